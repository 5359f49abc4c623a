"""Config of a sweep: the base config, the keys to search and the search method."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from megatron_dit.config import RESUMABLE, Config, check_overrides, first_difference, flatten, load, load_config
from megatron_dit.config.keys import Count, FilePath, Interval, Section, check, key
from megatron_dit.runtime.errors import UserError, writing
from megatron_dit.runtime.io import replacing

logger = logging.getLogger(__name__)

Params = dict[str, Any]  # dotted key -> value in one trial


@dataclass(frozen=True, kw_only=True)
class Dimension(Section):
    """Values to search for one key, given by exactly one of the fields."""

    log2: list[Annotated[int, Interval("[-1000, 1000]")]] = key("[a, b]: 2^a, 2^(a+1), ..., 2^b", factory=list)
    choice: list[Any] = key("a list of values", factory=list)
    uniform: list[float] = key("[low, high], uniformly distributed", factory=list)
    log_uniform: list[float] = key("[low, high], both positive, log-uniformly distributed", factory=list)

    def check(self) -> None:
        given = {
            name: values for name in ("log2", "choice", "uniform", "log_uniform") if (values := getattr(self, name))
        }
        check(
            len(given) == 1,
            f"a key in space has {list(given)}: expected exactly one of log2, choice, uniform, log_uniform",
        )
        name, values = next(iter(given.items()))
        if name != "choice":
            check(len(values) == 2 and values[0] < values[1], f"{name}={values}: expected [low, high] with low < high")
        check(name != "log_uniform" or values[0] > 0, f"log_uniform={values}: expected positive numbers")

    @property
    def finite(self) -> list[Any]:
        """All values in order; empty for a continuous dimension."""
        return [2.0**power for power in range(self.log2[0], self.log2[1] + 1)] if self.log2 else list(self.choice)

    @property
    def interval(self) -> list[float]:
        """[low, high] of a continuous dimension, as integers if both are integral, as integer keys require."""
        values = self.uniform or self.log_uniform
        return [int(value) for value in values] if all(value.is_integer() for value in values) else values

    def distribution(self, integer: bool) -> BaseDistribution:
        """Return the Optuna distribution; ``integer`` states whether the config's key is an integer."""
        if self.finite:
            return CategoricalDistribution([to_optuna(value) for value in self.finite])
        low, high = self.interval
        log = bool(self.log_uniform)
        return IntDistribution(int(low), int(high), log) if integer else FloatDistribution(low, high, log)

    def from_optuna(self, value: Any) -> Any:
        """Return the config value for a value stored by Optuna."""
        return next((item for item in self.finite if to_optuna(item) == value), value)


@dataclass(frozen=True, kw_only=True)
class SweepConfig(Section):
    """A sweep. Every trial runs ``base_config`` with ``overrides`` and the trial's values of the keys in ``space``."""

    run_dir: FilePath = key("folder of the sweep")
    base_config: FilePath = key("YAML file of the base run (the proxy)")
    overrides: list[str] = key("overrides of the base config, such as train.steps=500", factory=list)
    space: dict[str, Dimension] = key("keys to search, each with its values")
    sampler: Literal["grid", "random", "tpe"] = key("how values are chosen", "grid")
    trials: Count | None = key("number of trials; null: every point of the grid", None)
    seed: Annotated[int, Interval("[0, 4095]")] = key(
        "seed of the sampler; the seeds of the trials come from the base config or the space", 0
    )
    concurrent_trials: Count = key("trials that run at the same time on this host", 1)
    ranks_per_trial: Count = key("ranks of each trial", 1)
    final_fraction: Annotated[float, Interval("(0, 1]")] = key(
        "a trial's result is its mean training loss over this last fraction of its steps", 0.1
    )
    median_pruning: bool = key("stop a trial whose loss is above the other trials' median at the same step", False)
    keep_checkpoints: bool = key("keep the checkpoints of finished trials", False)

    def check(self) -> None:
        check(bool(self.run_dir), "run_dir is empty: expected a folder")
        check_overrides(self.overrides)
        check(bool(self.space), "space is empty: name at least one key, such as optimizer.lr: {log2: [-13, -5]}")
        known = flatten(self.base)
        for name, dimension in self.space.items():
            check(
                name in known and name != "run_dir",
                f"space has {name!r}, which is not a searchable key of {self.base_config}",
            )
            if self.sampler == "grid":
                check(
                    bool(dimension.finite),
                    f"space.{name} is continuous, but sampler=grid needs a list of values; "
                    "set sampler to random or tpe, or use log2 or choice",
                )
            # Validate each value in the config, and convert choices to the type of the key.
            values = [self._value(name, value) for value in dimension.finite or dimension.interval]
            duplicate = next((value for i, value in enumerate(values) if value in values[:i]), None)
            check(duplicate is None, f"space.{name} has the value {duplicate} twice; remove one")
            if dimension.choice:
                self.space[name] = replace(dimension, choice=values)
        if self.sampler == "grid":
            points = self.grid_size
            check(
                self.trials is None or self.trials <= points,
                f"trials={self.trials}: the grid has {points} points; remove trials to run all of them",
            )
        else:
            check(self.trials is not None, f"trials is not set: sampler={self.sampler} needs a number of trials")

    @cached_property
    def base(self) -> Config:
        """The base config with the sweep's overrides."""
        return load_config(self.base_config, self.overrides)

    def _value(self, name: str, value: Any) -> Any:
        return flatten(self.trial_config({name: value}, 0))[name]

    @property
    def grid_size(self) -> int:
        """Number of points of the grid."""
        return math.prod(len(dimension.finite) for dimension in self.space.values())

    @property
    def count(self) -> int:
        """Number of trials."""
        return self.trials or self.grid_size

    @property
    def folder(self) -> Path:
        """The sweep's folder, ``run_dir``."""
        return Path(self.run_dir)

    def distributions(self) -> dict[str, BaseDistribution]:
        """Return the Optuna distribution of every searched key."""
        known = flatten(self.base)
        return {name: dimension.distribution(type(known[name]) is int) for name, dimension in self.space.items()}

    def trial_config(self, params: Mapping[str, Any], number: int) -> Config:
        """Return the config of a trial. Raises UserError if the combination of its values is invalid."""
        return load_config(self.base_config, self.overrides, {**params, "run_dir": str(self.trial_folder(number))})

    def trial_folder(self, number: int) -> Path:
        """Return the run folder of a trial; the trial's other files are next to it."""
        return self.folder / "trials" / f"{number:04d}"


def to_optuna(value: Any) -> Any:
    """Return a value as Optuna stores it: JSON text for lists and mappings, because its choices must be scalars."""
    return json.dumps(value, sort_keys=True) if isinstance(value, (list, dict)) else value


def open_folder(config: SweepConfig) -> None:
    """Create the sweep's folder and write its config. Raises UserError if the folder contains anything else.

    A corrupt saved config is rewritten if the results have the keys of this sweep.
    """
    folder, path, base = config.folder, config.folder / "sweep.yaml", config.folder / "base.yaml"
    if path.is_file():
        try:
            difference = _difference(folder, config)
        except UserError as error:
            difference = _other_results(folder, config)
            if difference is None:
                logger.warning("%s; rewriting the sweep's saved config", error)
        if difference is not None:
            raise UserError(f"{folder} holds another sweep ({difference}); set run_dir to a new folder")
    elif folder.exists() and (not folder.is_dir() or any(not _ours(item) for item in folder.iterdir())):
        raise UserError(f"run_dir={folder} exists and is not a sweep folder; set run_dir to a new folder")
    # Tasks of a job array run this concurrently: every file is replaced atomically, and sweep.yaml is written last.
    with writing(folder):
        (folder / "trials").mkdir(parents=True, exist_ok=True)
    for file, values in ((base, config.base), (path, config)):
        with replacing(file) as part:
            part.write_text(yaml.safe_dump(asdict(values), sort_keys=False))


def _ours(item: Path) -> bool:
    """Return whether an item is one that a sweep creates before or together with its sweep.yaml."""
    return item.name in ("trials", "base.yaml", "sweep.yaml") or ".part" in item.name


def load_saved(folder: Path) -> SweepConfig:
    """Return the config of the sweep in ``folder``, with the base config that was resolved when the sweep started."""
    base = {"base_config": str(folder / "base.yaml"), "overrides": [], "run_dir": str(folder)}
    return load(SweepConfig, folder / "sweep.yaml", values=base)


def _difference(folder: Path, config: SweepConfig) -> str | None:
    """Return the first difference in the search between the saved sweep and ``config``, or None.

    Keys that only affect how the sweep is run may differ.
    """
    saved = load_saved(folder)
    for name in ("space", "sampler", "seed", "final_fraction"):
        old, new = getattr(saved, name), getattr(config, name)
        if old != new:
            return f"{name} was {old!r} and is now {new!r}"
    may_differ = RESUMABLE - {"train.steps"}
    return first_difference(saved.base, config.base, may_differ)


def _other_results(folder: Path, config: SweepConfig) -> str | None:
    """Return the evidence that the results in a folder belong to another sweep, or None."""
    for path in sorted((folder / "trials").glob("*.json")):
        try:
            keys = sorted(json.loads(path.read_bytes())["params"])
        except (ValueError, TypeError, KeyError, OSError, RecursionError):
            continue  # corrupt as well
        if keys != sorted(config.space):
            expected = ", ".join(sorted(config.space))
            return f"{path.name} has values for {', '.join(keys)}, but this sweep searches {expected}"
    return None
