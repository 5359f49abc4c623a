"""Config of a sweep: the base config, the keys to search and the search method."""

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
from megatron_dit.runtime.errors import UserError, writing
from megatron_dit.runtime.io import replacing
from megatron_dit.runtime.text import warn

Params = dict[str, Any]  # dotted key -> value in one trial


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """Values to search for one key, given by exactly one of the fields."""

    # [a, b] means 2^a, 2^(a+1), ..., 2^b
    log2: list[Annotated[int, Interval("[-1000, 1000]")]] = field(default_factory=list)
    choice: list[Any] = field(default_factory=list)
    uniform: list[float] = field(default_factory=list)  # [low, high]
    log_uniform: list[float] = field(default_factory=list)  # [low, high], both positive

    def __post_init__(self) -> None:
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
        check_ranges(self)

    @property
    def finite(self) -> list[Any]:
        """All values in order; empty for a continuous dimension."""
        return [2.0**power for power in range(self.log2[0], self.log2[1] + 1)] if self.log2 else list(self.choice)

    @property
    def interval(self) -> list[float]:
        """[low, high] of a continuous dimension, as integers if both are integral, as integer keys require."""
        values = self.uniform or self.log_uniform
        return [int(value) for value in values] if all(value.is_integer() for value in values) else values

    def distribution(self, whole: bool) -> BaseDistribution:
        """Return the Optuna distribution; ``whole`` says that the config's key is an integer."""
        if self.finite:
            return CategoricalDistribution([to_optuna(value) for value in self.finite])
        low, high = self.interval
        log = bool(self.log_uniform)
        return IntDistribution(int(low), int(high), log) if whole else FloatDistribution(low, high, log)

    def from_optuna(self, value: Any) -> Any:
        """Return the config value for a value stored by Optuna."""
        return next((item for item in self.finite if to_optuna(item) == value), value)


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A sweep. Every trial runs ``config`` with ``overrides`` and the trial's values of the keys in ``space``."""

    run_dir: FilePath
    config: FilePath  # YAML of the base run (the proxy)
    overrides: list[str] = field(default_factory=list)
    space: dict[str, Dimension]
    sampler: str = "grid"  # grid | random | tpe
    trials: CountOrZero = 0  # 0 means every point of the grid
    # Seed of the sampler; the seeds of the trials come from the base config or the space.
    seed: Annotated[int, Interval("[0, 4095]")] = 0
    parallel: Count = 1  # number of concurrent trials on this host
    procs: Count = 1  # ranks per trial
    # A trial's result is its mean training loss over this last fraction of its steps.
    last: Annotated[float, Interval("(0, 1]")] = 0.1
    stop_early: bool = False  # stop a trial whose loss is above the other trials' median at the same step
    keep_checkpoints: bool = False  # keep the checkpoints of finished trials

    def __post_init__(self) -> None:
        choice("sampler", self.sampler, ("grid", "random", "tpe"))
        check_ranges(self)
        check(bool(self.run_dir), "run_dir is empty: expected a folder")
        check_overrides(self.overrides)
        check(bool(self.space), "space is empty: name at least one key, such as optimizer.lr: {log2: [-13, -5]}")
        known = flatten(self.base)
        for key, dimension in self.space.items():
            check(
                key in known and key != "run_dir", f"space has {key!r}, which is not a searchable key of {self.config}"
            )
            if self.sampler == "grid":
                check(
                    bool(dimension.finite),
                    f"space.{key} is continuous, but sampler=grid needs a list of values; "
                    "set sampler to random or tpe, or use log2 or choice",
                )
            # Validate each value in the config, and convert choices to the type of the key.
            values = [self._value(key, value) for value in dimension.finite or dimension.interval]
            duplicate = next((value for i, value in enumerate(values) if value in values[:i]), None)
            check(duplicate is None, f"space.{key} has the value {duplicate} twice; remove one")
            if dimension.choice:
                self.space[key] = replace(dimension, choice=values)
        if self.sampler == "grid":
            points = self.grid_size
            check(
                self.trials <= points,
                f"trials={self.trials}: the grid has {points} points; set trials to 0 for all of them",
            )
        else:
            at_least("trials", self.trials, 1)

    @cached_property
    def base(self) -> Config:
        """The base config with the sweep's overrides."""
        return load_config(self.config, self.overrides)

    def _value(self, key: str, value: Any) -> Any:
        return flatten(self.trial_config({key: value}, 0))[key]

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
        return {key: dimension.distribution(type(known[key]) is int) for key, dimension in self.space.items()}

    def trial_config(self, params: Mapping[str, Any], number: int) -> Config:
        """Return the config of a trial. Raises UserError if the combination of its values is invalid."""
        return load_config(self.config, self.overrides, {**params, "run_dir": str(self.trial_folder(number))})

    def trial_folder(self, number: int) -> Path:
        """Return the run folder of a trial; the trial's other files are next to it."""
        return self.folder / "trials" / f"{number:04d}"


def to_optuna(value: Any) -> Any:
    """Return a value as Optuna stores it: JSON text for lists and mappings, because its choices must be scalars."""
    return json.dumps(value, sort_keys=True) if isinstance(value, (list, dict)) else value


def open_folder(config: SweepConfig) -> None:
    """Create the sweep's folder and write its config. Raises UserError if the folder holds anything else.

    A corrupt saved config is rewritten if the results have the keys of this sweep.
    """
    folder, path, base = config.folder, config.folder / "sweep.yaml", config.folder / "base.yaml"
    if path.is_file():
        try:
            difference = _difference(folder, config)
        except UserError as error:
            difference = _other_results(folder, config)
            if difference is None:
                warn(f"{error}; rewriting the sweep's saved config")
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
    base = {"config": str(folder / "base.yaml"), "overrides": [], "run_dir": str(folder)}
    return load(SweepConfig, folder / "sweep.yaml", values=base)


def _difference(folder: Path, config: SweepConfig) -> str | None:
    """Return the first difference in the search between the saved sweep and ``config``, or None.

    Keys that only affect how the sweep is run may differ.
    """
    saved = load_saved(folder)
    for key in ("space", "sampler", "seed", "last"):
        old, new = getattr(saved, key), getattr(config, key)
        if old != new:
            return f"{key} was {old!r} and is now {new!r}"
    how_it_is_run = tuple(key for key in RESUMABLE if key != "train.steps")
    return first_difference(saved.base, config.base, how_it_is_run)


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
