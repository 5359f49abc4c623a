"""Proxies of finished sweeps: the best setting of each size and duration, with its losses over the samples seen."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron_dit.config import Config, flatten
from megatron_dit.models.flops import model_flops
from megatron_dit.runtime.errors import UserError
from megatron_dit.training.run_folder import read_metrics
from megatron_dit.tuning import report
from megatron_dit.tuning.cost import parameters
from megatron_dit.tuning.transfer import read_sweep

logger = logging.getLogger(__name__)

WINDOWS_PER_OCTAVE = 4  # of a training curve
MAX_DIFFERENCE = 0.02  # of the fractions of the steps in which wsd's learning rate falls
OCTAVES = 2  # of a training curve that are used: the law does not describe the first part of a training
SIZE_KEYS = ("model.heads", "model.head_dim", "model.base_head_dim", "model.depth", "model.repa_block")
# Keys that change the loss for another reason; the paths of the data may differ between machines.
COMPARED = ("model.", "objective.", "mup.base_depth", "mup.depth_exponent", "data.caption_dropout")
Curve = tuple[tuple[float, float], ...]  # (steps, loss)


@dataclass(frozen=True)
class Run:
    """A training run's size, duration and costs."""

    config: Config

    @cached_property
    def parameters(self) -> int:
        """Number of all parameters of the model."""
        return parameters(self.config.model)

    @property
    def samples(self) -> int:
        """Samples seen in the entire run."""
        return self.config.train.steps * self.config.train.global_batch

    @cached_property
    def sample_flops(self) -> int:
        """FLOPs of training on one sample, without recomputation."""
        side = self.config.model.sample_size
        return model_flops(self.config.model, side, side).total.model

    @property
    def flops(self) -> float:
        """FLOPs of the entire run."""
        return float(self.sample_flops) * self.samples


@dataclass(frozen=True)
class Proxy(Run):
    """The best setting of one size and duration in a sweep."""

    folder: Path  # of the sweep
    trials: tuple[int, ...]  # numbers of its trials, which differ only in their seed
    losses: tuple[float, ...]  # final loss of each trial
    curve: Curve  # the points to fit, sorted by step


def uses_curves(target: Config, proxies: Sequence[Config]) -> bool:
    """Return whether a loss during a proxy's training is the final loss of a shorter run.

    This is the case at a constant learning rate, up to the decay of schedule wsd, and with inverse_sqrt. Raises
    UserError if the target's loss cannot be predicted from the proxies' because their schedules differ.
    """
    schedule = target.optimizer.schedule
    comparable = ("constant", "wsd") if schedule == "constant" else (schedule,)
    for proxy in proxies:
        if proxy.optimizer.schedule not in comparable:
            raise UserError(
                f"optimizer.schedule is {proxy.optimizer.schedule} in a sweep and {schedule} in the target; make them "
                "equal, because the final loss depends on the schedule"
            )
        for key in ("final_lr_ratio", "decay_start") if schedule != "constant" else ():
            values = [getattr(config.optimizer, key) for config in (proxy, target)]
            if values[0] != values[1]:
                raise UserError(
                    f"optimizer.{key} is {values[0]} in a sweep and {values[1]} in the target; make them equal, "
                    "because the final loss depends on the schedule"
                )
        fractions = [(config.optimizer.decay_steps or 0) / config.train.steps for config in (proxy, target)]
        if schedule == "wsd" and abs(fractions[0] - fractions[1]) > MAX_DIFFERENCE:
            raise UserError(
                f"optimizer.decay_steps is {fractions[0]:.2g} of train.steps in a sweep and {fractions[1]:.2g} in the "
                "target; make these fractions equal, because the final loss depends on the schedule"
            )
    return schedule in ("constant", "inverse_sqrt")


def read_proxies(folders: Sequence[Path], target: Config) -> tuple[list[Proxy], bool]:
    """Return the proxies of the sweeps, sorted by compute, and whether their training curves are used.

    A proxy is the best setting, by the mean loss over its seeds, of all trials of one width, depth, batch size and
    number of steps, with the target's ``mup.enabled``. Settings with a trial that is not complete are ignored. If
    curves are not used, a proxy's only point is its final loss. Raises UserError if a folder is not a sweep, has no
    completed trial, or the loss of its models is not comparable to that of the target.
    """
    best: dict[tuple[int, ...], tuple[Path, Config, report.Setting]] = {}
    for folder in folders:
        config, results = read_sweep(folder)
        settings = [setting for setting in report.settings(results) if math.isfinite(setting.loss)]
        candidates = [(config.trial_config(each.trials[0].params, each.trials[0].number), each) for each in settings]
        candidates = [pair for pair in candidates if pair[0].mup.enabled == target.mup.enabled]
        if not candidates:
            raise UserError(
                f"{folder} has no completed trial with mup.enabled={str(target.mup.enabled).lower()}, as the target "
                "has; set mup.enabled in the target, or add it to the sweep's space"
            )
        for proxy, setting in candidates:
            _check_comparable(proxy, target)
            size = (proxy.model.width, proxy.model.depth, proxy.train.global_batch, proxy.train.steps)
            if size not in best or setting.loss < best[size][2].loss:
                best[size] = (folder, proxy, setting)
    with_curves = uses_curves(target, [proxy for _, proxy, _ in best.values()])
    proxies = []
    for folder, config, setting in best.values():
        losses = tuple(float(trial.loss) for trial in setting.trials if trial.loss is not None)
        numbers = tuple(trial.number for trial in setting.trials)
        curve: Curve = ((config.train.steps, float(np.mean(losses))),)
        if with_curves:
            curve = smoothed([folder / "trials" / f"{number:04d}" for number in numbers], config)
            if not curve:
                logger.warning(
                    "%s: no metrics after warm-up in trials %s; ignoring them", folder, ", ".join(map(str, numbers))
                )
                continue
        lowest = min(*losses, *(loss for _, loss in curve))
        if lowest <= 0:
            raise UserError(
                f"{folder}: trials {', '.join(map(str, numbers))} have a loss of {lowest:.4g}, but the law is one of "
                "positive losses; fit sweeps without an objective whose loss can be negative, such as REPA's"
            )
        proxies.append(Proxy(config, folder, numbers, losses, curve))
    return sorted(proxies, key=lambda proxy: proxy.flops), with_curves


def smoothed(runs: Sequence[Path], config: Config) -> Curve:
    """Return the training loss of ``runs``, which differ in their seed, in windows of a quarter octave of steps.

    A window's step is the geometric mean of its steps. The curve is that of the last two octaves, without steps of the
    warm-up and of wsd's decay.
    """
    optimizer, steps = config.optimizer, config.train.steps
    last = steps - (optimizer.decay_steps or 0)
    first = max(optimizer.warmup_steps, last / 2**OCTAVES)
    windows: dict[int, list[tuple[float, float, float]]] = {}  # (number of steps, log of their middle, mean loss)
    for run in runs:
        before = 0
        for line in read_metrics(run):  # each line is a mean over the steps since the previous one
            step, loss = line["step"], line["loss"]
            if loss is not None and first <= before < step <= last:
                window = math.floor(WINDOWS_PER_OCTAVE * math.log2(last / step))
                windows.setdefault(window, []).append((step - before, math.log((before + 1 + step) / 2), loss))
            before = step
    curve = []
    for window in sorted(windows, reverse=True):
        weights, middles, losses = zip(*windows[window], strict=True)
        middle = float(np.average(middles, weights=weights))
        curve.append((math.exp(middle), float(np.average(losses, weights=weights))))
    return tuple(curve)


def _check_comparable(proxy: Config, target: Config) -> None:
    """Raise UserError if the losses differ for another reason than size, duration and hyperparameters."""
    values = [
        {key: value for key, value in flatten(config).items() if key.startswith(COMPARED)} for config in (proxy, target)
    ]
    for each, config in zip(values, (proxy, target), strict=True):
        each["optimizer.muon_lr"] = "null" if config.optimizer.muon_lr is None else "a number"
    for key in values[0]:
        if key not in SIZE_KEYS and values[0][key] != values[1][key]:
            raise UserError(
                f"{key} is {values[0][key]!r} in a sweep and {values[1][key]!r} in the target, so their losses are not "
                "comparable; make them equal"
            )
