"""The sweep's YAML: a base config, the keys to search and how."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from megatron_dit.config import RESUMABLE, Config, first_difference, flatten, load_config, save_config
from megatron_dit.config.checks import at_least, check, choice
from megatron_dit.errors import UserError

Params = dict[str, Any]  # dotted key -> value, of one trial


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """Values of one key, by exactly one of these."""

    log2: list[int] = field(default_factory=list)  # [a, b]: 2^a, 2^(a+1), ..., 2^b
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

    @property
    def finite(self) -> list[Any]:
        """All values; empty for a continuous dimension."""
        return [2.0**power for power in range(self.log2[0], self.log2[1] + 1)] if self.log2 else list(self.choice)

    def distribution(self, whole: bool) -> BaseDistribution:
        """Optuna's counterpart; ``whole`` where the config's key is an integer."""
        if self.finite:
            return CategoricalDistribution(self.finite)
        low, high = self.uniform or self.log_uniform
        log = bool(self.log_uniform)
        return IntDistribution(int(low), int(high), log) if whole else FloatDistribution(low, high, log)


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A search: every trial is ``config`` with ``overrides`` and its own values of the keys in ``space``."""

    run_dir: str
    config: str  # YAML of the base run (the proxy)
    overrides: list[str] = field(default_factory=list)
    space: dict[str, Dimension]
    sampler: str = "grid"  # grid | random | tpe
    trials: int = 0  # grid: 0 stands for every point
    seed: int = 0  # of the sampler; trials take theirs from the base config or the space
    parallel: int = 1  # trials at a time on this machine
    procs: int = 1  # ranks of one trial
    last: float = 0.1  # a trial's figure is its mean training loss over this last share of its steps
    stop_early: bool = False  # end a trial whose loss is above the median of the others' at the same step
    keep_checkpoints: bool = False  # of finished trials

    def __post_init__(self) -> None:
        choice("sampler", self.sampler, ("grid", "random", "tpe"))
        for name, least in (("trials", 0), ("seed", 0), ("parallel", 1), ("procs", 1)):
            at_least(name, getattr(self, name), least)
        check(0 < self.last <= 1, f"last={self.last}: expected a number in (0, 1]")
        check(bool(self.space), "space is empty: name at least one key, such as optimizer.lr: {log2: [-13, -5]}")
        known = flatten(self.base)
        for key, dimension in self.space.items():
            check(key in known and key != "run_dir", f"space has {key!r}, which is no key of {self.config}")
            if self.sampler == "grid":
                check(bool(dimension.finite), f"space.{key} is continuous: use sampler random or tpe, or choice")
            for value in dimension.finite:
                self.trial_config({key: value}, 0)  # validated as any config is
        if self.sampler == "grid":
            points = self.grid_size
            check(self.trials <= points, f"trials={self.trials}: the grid has {points} points")
        else:
            at_least("trials", self.trials, 1)

    @cached_property
    def base(self) -> Config:
        return load_config(self.config, self.overrides)

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
        run_dir = self.folder / "trials" / f"{number:04d}"
        return load_config(self.config, self.overrides, {**params, "run_dir": str(run_dir)})


def open_folder(config: SweepConfig) -> None:
    """Make the sweep's folder and write its config. Raises UserError where the folder holds something else."""
    folder, path, base = config.folder, config.folder / "sweep.yaml", config.folder / "base.yaml"
    if path.is_file():
        how_it_is_run = tuple(key for key in RESUMABLE if key != "train.steps")
        difference = _difference(path, config) or first_difference(load_config(base), config.base, how_it_is_run)
        if difference is not None:
            raise UserError(f"{folder} holds another sweep ({difference}): set run_dir to a new folder")
    elif folder.exists() and (not folder.is_dir() or any(not _ours(item) for item in folder.iterdir())):
        raise UserError(f"run_dir={folder} exists and is no sweep of ours: set run_dir to a new folder")
    # Tasks of an array do this at once: every file appears whole, and sweep.yaml last.
    (folder / "trials").mkdir(parents=True, exist_ok=True)
    part = folder / f"{os.getpid()}.part"
    save_config(config.base, part)
    part.replace(base)
    part.write_text(yaml.safe_dump(asdict(config), sort_keys=False))
    part.replace(path)


def _ours(item: Path) -> bool:
    """Whether it is what a sweep writes before its sweep.yaml."""
    return item.name in ("trials", "base.yaml", "sweep.yaml") or item.suffix == ".part"


def _difference(path: Path, config: SweepConfig) -> str | None:
    """What makes the saved sweep another search than ``config``'s; how it is run may change."""
    old, new = yaml.safe_load(path.read_text()), asdict(config)
    free = ("run_dir", "parallel", "procs", "stop_early", "keep_checkpoints", "trials")
    for key, value in old.items():
        if key not in free and new[key] != value:
            return f"{key} is {value!r} there and {new[key]!r} here"
    return None
