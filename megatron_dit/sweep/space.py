"""The sweep's YAML: a base config, the keys to search and how."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import yaml
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from megatron_dit.config import RESUMABLE, Config, check_overrides, first_difference, flatten, load, load_config
from megatron_dit.config.checks import Count, CountOrZero, FilePath, Interval, at_least, check, check_ranges, choice
from megatron_dit.errors import UserError, writing
from megatron_dit.runtime.io import replacing
from megatron_dit.runtime.text import warn

Params = dict[str, Any]  # dotted key -> value, of one trial


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """Values of one key, by exactly one of these."""

    # [a, b]: 2^a, 2^(a+1), ..., 2^b
    log2: list[Annotated[int, Interval("[-1000, 1000]")]] = field(default_factory=list)
    choice: list[Any] = field(default_factory=list)
    uniform: list[float] = field(default_factory=list)  # [low, high]
    log_uniform: list[float] = field(default_factory=list)  # [low, high], both positive

    def __post_init__(self) -> None:
        given = {
            name: values for name in ("log2", "choice", "uniform", "log_uniform") if (values := getattr(self, name))
        }
        check(len(given) == 1, f"a searched key has {list(given)}: expected one of log2, choice, uniform, log_uniform")
        name, values = next(iter(given.items()))
        if name != "choice":
            check(len(values) == 2 and values[0] < values[1], f"{name}={values}: expected [low, high] with low < high")
        check(name != "log_uniform" or values[0] > 0, f"log_uniform={values}: expected positive numbers")
        check_ranges(self)

    @property
    def finite(self) -> list[Any]:
        """All values; empty for a continuous dimension."""
        return [2.0**power for power in range(self.log2[0], self.log2[1] + 1)] if self.log2 else list(self.choice)

    @property
    def interval(self) -> list[float]:
        """[low, high] of a continuous dimension; integers if both are whole, as an integer's key needs them."""
        values = self.uniform or self.log_uniform
        return [int(value) for value in values] if all(value.is_integer() for value in values) else values

    def distribution(self, whole: bool) -> BaseDistribution:
        """Optuna's counterpart; ``whole`` where the config's key is an integer."""
        if self.finite:
            return CategoricalDistribution([to_optuna(value) for value in self.finite])
        low, high = self.interval
        log = bool(self.log_uniform)
        return IntDistribution(int(low), int(high), log) if whole else FloatDistribution(low, high, log)

    def from_optuna(self, value: Any) -> Any:
        return next((own for own in self.finite if to_optuna(own) == value), value)


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A search: every trial is ``config`` with ``overrides`` and its own values of the keys in ``space``."""

    run_dir: FilePath
    config: FilePath  # YAML of the base run (the proxy)
    overrides: list[str] = field(default_factory=list)
    space: dict[str, Dimension]
    sampler: str = "grid"  # grid | random | tpe
    trials: CountOrZero = 0  # grid: 0 stands for every point
    seed: Annotated[int, Interval("[0, 4095]")] = (
        0  # of the sampler; trials take theirs from the base config or the space
    )
    parallel: Count = 1  # trials at a time on this machine
    procs: Count = 1  # ranks of one trial
    # A trial's figure is its mean training loss over this last share of its steps.
    last: Annotated[float, Interval("(0, 1]")] = 0.1
    stop_early: bool = False  # end a trial whose loss is above the median of the others' at the same step
    keep_checkpoints: bool = False  # of finished trials

    def __post_init__(self) -> None:
        choice("sampler", self.sampler, ("grid", "random", "tpe"))
        check_ranges(self)
        check(bool(self.run_dir), "run_dir is empty: expected a folder")
        check_overrides(self.overrides)
        check(bool(self.space), "space is empty: name at least one key, such as optimizer.lr: {log2: [-13, -5]}")
        known = flatten(self.base)
        for key, dimension in self.space.items():
            check(key in known and key != "run_dir", f"space has {key!r}, which is no key of {self.config}")
            if self.sampler == "grid":
                check(bool(dimension.finite), f"space.{key} is continuous: use sampler random or tpe, or choice")
            # Validated as any config is; choices become what the key makes of them.
            values = [self._value(key, value) for value in dimension.finite or dimension.interval]
            twice = next((value for i, value in enumerate(values) if value in values[:i]), None)
            check(twice is None, f"space.{key} has the value {twice} twice: leave one out")
            if dimension.choice:
                self.space[key] = replace(dimension, choice=values)
        if self.sampler == "grid":
            points = self.grid_size
            check(self.trials <= points, f"trials={self.trials}: the grid has {points} points")
        else:
            at_least("trials", self.trials, 1)

    @cached_property
    def base(self) -> Config:
        return load_config(self.config, self.overrides)

    def _value(self, key: str, value: Any) -> Any:
        return flatten(self.trial_config({key: value}, 0))[key]

    @property
    def grid_size(self) -> int:
        return math.prod(len(dimension.finite) for dimension in self.space.values())

    @property
    def count(self) -> int:
        """Number of trials."""
        return self.trials or self.grid_size

    @property
    def folder(self) -> Path:
        return Path(self.run_dir)

    def distributions(self) -> dict[str, BaseDistribution]:
        known = flatten(self.base)
        return {key: dimension.distribution(type(known[key]) is int) for key, dimension in self.space.items()}

    def trial_config(self, params: Mapping[str, Any], number: int) -> Config:
        """The config of a trial. Raises UserError where its values do not go together."""
        return load_config(self.config, self.overrides, {**params, "run_dir": str(self.trial_folder(number))})

    def trial_folder(self, number: int) -> Path:
        """The run folder of a trial, with its other files beside it."""
        return self.folder / "trials" / f"{number:04d}"


def to_optuna(value: Any) -> Any:
    """A value as optuna stores it: lists and mappings as JSON text, as its choices can only be scalars."""
    return json.dumps(value, sort_keys=True) if isinstance(value, (list, dict)) else value


def open_folder(config: SweepConfig) -> None:
    """Make the sweep's folder and write its config. Raises UserError where the folder holds something else.

    A saved config that is damaged is written anew, if the results have the keys of this search.
    """
    folder, path, base = config.folder, config.folder / "sweep.yaml", config.folder / "base.yaml"
    if path.is_file():
        try:
            difference = _difference(folder, config)
        except UserError as error:
            difference = _other_results(folder, config)
            if difference is None:
                warn(f"{error}; the sweep's saved config is written anew")
        if difference is not None:
            raise UserError(f"{folder} holds another sweep ({difference}): set run_dir to a new folder")
    elif folder.exists() and (not folder.is_dir() or any(not _ours(item) for item in folder.iterdir())):
        raise UserError(f"run_dir={folder} exists and is no sweep of ours: set run_dir to a new folder")
    # Tasks of an array do this at once: every file appears whole, and sweep.yaml last.
    with writing(folder):
        (folder / "trials").mkdir(parents=True, exist_ok=True)
    for file, values in ((base, config.base), (path, config)):
        with replacing(file) as part:
            part.write_text(yaml.safe_dump(asdict(values), sort_keys=False))


def _ours(item: Path) -> bool:
    """Whether it is what a sweep writes before its sweep.yaml."""
    return item.name in ("trials", "base.yaml", "sweep.yaml") or ".part" in item.name


def load_saved(folder: Path) -> SweepConfig:
    """The config of the sweep in ``folder``, with its base as it was resolved then, wherever it is read from."""
    base = {"config": str(folder / "base.yaml"), "overrides": [], "run_dir": str(folder)}
    return load(SweepConfig, folder / "sweep.yaml", values=base)


def _difference(folder: Path, config: SweepConfig) -> str | None:
    """What makes the saved sweep another search than ``config``'s; how it is run may change."""
    saved = load_saved(folder)
    for key in ("space", "sampler", "seed", "last"):
        old, new = getattr(saved, key), getattr(config, key)
        if old != new:
            return f"{key} is {old!r} there and {new!r} here"
    how_it_is_run = tuple(key for key in RESUMABLE if key != "train.steps")
    return first_difference(saved.base, config.base, how_it_is_run)


def _other_results(folder: Path, config: SweepConfig) -> str | None:
    """What shows that the results in a folder are another search's."""
    for path in sorted((folder / "trials").glob("*.json")):
        try:
            keys = sorted(json.loads(path.read_bytes())["params"])
        except (ValueError, TypeError, KeyError, OSError, RecursionError):
            continue  # damaged too
        if keys != sorted(config.space):
            return f"{path.name} has values of {', '.join(keys)}, here {', '.join(sorted(config.space))} are searched"
    return None
