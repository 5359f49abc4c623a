"""A YAML file and dotted overrides to a validated dataclass, and back."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast, get_type_hints

import yaml
from omegaconf import OmegaConf, flag_override
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from megatron_dit.config.checks import check
from megatron_dit.config.schema import Config
from megatron_dit.errors import UserError

T = TypeVar("T")

# What a run may change when it is started again in its folder: how it is run, not what it computes.
RESUMABLE = ("run_dir", "parallel", "launch", "train.micro_batch", "train.steps")
RESUMABLE += ("data.path", "data.workers", "data.max_bad_share", "data.cache", "data.cache_gib")
RESUMABLE += (
    "train.recompute",
    "train.recompute_blocks",
    "train.compile",
    "train.log_every",
    "train.monitor_every",
    "train.threads",
)
RESUMABLE += ("data.text_encoder", "data.text_sharded")
RESUMABLE += ("train.max_skipped_steps", "checkpoint", "sampling", "optimizer.fused", "optimizer.offload")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """A run's config; see :func:`load`."""
    return load(Config, path, overrides)


def load(schema: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Read a YAML file, apply ``a.b=value`` overrides and validate the whole as the dataclass ``schema``.

    Raises UserError for a missing file, an unknown key (naming the nearest known one), an ill-typed or
    missing value, and anything the dataclasses refuse.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"config {path} does not exist: give the path of a YAML file, such as configs/quickstart.yaml")
    for item in overrides:
        check("=" in item, f"override {item!r}: expected key=value, such as train.steps=100")
    try:
        return _merged(schema, OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
    except ConfigKeyError as error:
        known = _dotted_keys(schema)
        key = str(error.full_key)
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
        raise UserError(f"unknown key {key!r} in {path}: did you mean {near[0]!r}?") from None
    except MissingMandatoryValue as error:
        raise UserError(f"{path} does not set {error.full_key}: add it, it has no default") from None
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: {error.full_key}: {reason}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None


def config_from_dict(values: dict[str, Any]) -> Config:
    """The config that ``dataclasses.asdict`` gave, validated anew."""
    return _merged(Config, OmegaConf.create(values))


def _merged(schema: type[T], *parts: Any) -> T:
    structured = OmegaConf.structured(schema)
    with flag_override(structured, "readonly", False):
        return cast(T, OmegaConf.to_object(OmegaConf.merge(structured, *parts)))


def save_config(config: Config, path: Path) -> None:
    """Write the resolved config as YAML, aside and then renamed."""
    part = path.with_suffix(".part")
    part.write_text(yaml.safe_dump(asdict(config), sort_keys=False))
    part.replace(path)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """``{"model.depth": 4, ...}`` of a dataclass."""
    flat: dict[str, Any] = {}
    for item in fields(config):
        value = getattr(config, item.name)
        key = prefix + item.name
        flat.update(flatten(value, key + ".") if is_dataclass(value) else {key: value})
    return flat


def first_difference(old: Config, new: Config, free: Sequence[str] = RESUMABLE) -> str | None:
    """The first key but ``free`` ones in which ``new`` may not continue ``old``'s run, with both values, or None."""
    before, after = flatten(old), flatten(new)
    for key, value in before.items():
        may_change = any(key == name or key.startswith(name + ".") for name in free)
        if not may_change and after[key] != value:
            return f"{key} is {value!r} there and {after[key]!r} here"
    return None


def _dotted_keys(cls: type, prefix: str = "") -> list[str]:
    """Every section and key, dotted."""
    keys = []
    for name, kind in get_type_hints(cls).items():
        keys.append(prefix + name)
        if isinstance(kind, type) and is_dataclass(kind):
            keys += _dotted_keys(kind, f"{prefix}{name}.")
    return keys
