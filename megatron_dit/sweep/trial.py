"""One trial: a training run in a process of its own, and what became of it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from megatron_dit.config import Config, load_config
from megatron_dit.config.checks import CountOrZero, Interval, NonNegative, check, check_ranges, choice
from megatron_dit.config.convert import build
from megatron_dit.errors import UserError
from megatron_dit.launch import die_with_parent, leave, run_ranks
from megatron_dit.run_folder import read_metrics
from megatron_dit.runtime.io import read_text, replacing
from megatron_dit.runtime.locks import try_lock
from megatron_dit.runtime.output import guard_output, keep_going
from megatron_dit.sweep.space import SweepConfig
from megatron_dit.trainer import train

# Exit statuses of a trial's process that has no result.
TAKEN = 75  # another process has the trial
INTERRUPTED = 130  # stopped by a signal and saved: it will go on


@dataclass(frozen=True)
class Result:
    """What a trial came to; ``state`` is complete, diverged, stopped (hopeless, by the median) or crashed."""

    number: CountOrZero
    params: dict[str, Any]
    state: str
    loss: float | None  # mean training loss over the last steps; None unless complete or stopped
    reason: str  # why it is not complete
    steps: CountOrZero  # steps done
    samples: Annotated[int, Interval("[0, 2^63)")]  # training samples seen
    seconds: NonNegative  # of the process that ended it

    def __post_init__(self) -> None:
        choice("state", self.state, ("complete", "diverged", "stopped", "crashed"))
        check(self.loss is not None or self.state != "complete", "state=complete: expected a loss")
        check_ranges(self)


@dataclass(frozen=True)
class TrialFiles:
    """Where a trial keeps what it is: its run's folder beside its result, log and lock."""

    folder: Path  # the run's
    params: dict[str, Any]

    @property
    def number(self) -> int:
        return int(self.folder.name)

    def file(self, suffix: str) -> Path:
        return self.folder.with_name(self.folder.name + suffix)

    def result(self) -> Result | None:
        """The trial's result, if it has one. Raises UserError if the file is damaged or another trial's."""
        path = self.file(".json")
        if not path.exists():
            return None
        try:
            result = build(Result, json.loads(read_text(path, "it")))
            check(result.number == self.number, f"it is the result of trial {result.number}")
            return result
        except (UserError, ValueError, RecursionError) as error:
            raise UserError(f"{path} is no result of a trial ({error})") from None

    def write(self, result: Result) -> None:
        with replacing(self.file(".json")) as part:
            part.write_text(json.dumps(asdict(result)) + "\n")

    @contextlib.contextmanager
    def lock(self) -> Iterator[bool]:
        """Whether this process alone has the trial; the kernel frees it however the process ends."""
        lock = try_lock(self.file(".lock"))
        with lock or contextlib.nullcontext():
            yield lock is not None


def stored_result(config: SweepConfig, number: int) -> Result | None:
    """The result of a sweep's trial, if it has one. Raises UserError if it is damaged or belongs to another search."""
    files = TrialFiles(config.trial_folder(number), {})
    result = files.result()
    keys = set(config.space)
    if result is not None and set(result.params) != keys:
        raise UserError(f"{files.file('.json')} has values of {sorted(result.params)}, expected {sorted(keys)}")
    return result


def run_trial(files: TrialFiles, procs: int, last: float, keep: bool, devices: str | None) -> None:
    """Body of a trial's process: train, go on where a killed one stopped, and write the result."""
    die_with_parent()
    with files.file(".log").open("a", buffering=1) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    guard_output()
    keep_going()
    if devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices
    with files.lock() as mine:
        if not mine:
            leave(TAKEN)
        if files.result() is None:
            started = time.monotonic()
            reason = _train(files, procs)
            if reason is None:
                leave(INTERRUPTED)
            files.write(judge(files, last, str(reason), time.monotonic() - started))
        if not keep:
            shutil.rmtree(files.folder / "checkpoints", ignore_errors=True)
    leave(0)


def judge(files: TrialFiles, last: float, reason: str, seconds: float) -> Result:
    """The result that a run's metrics show; ``reason`` says why it ended before its last step, if it did.

    Diverged is a run that ended for losses that were not finite, and one that is worse at its end than
    the untrained model was.
    """
    config, lines = load_config(files.file(".yaml")), read_metrics(files.folder)
    steps = lines[-1]["step"] if lines else 0
    state, loss = "crashed", None
    if lines:
        mean = final_loss(lines, config, last)
        if lines[-1]["loss"] is None:
            state = "diverged"
        elif steps == config.train.steps:
            first = lines[0]["loss"]
            state = "complete" if first is None or mean <= first else "diverged"
            loss = mean if state == "complete" else None
            reason = reason if state == "complete" else f"loss {mean:.4g} at its end, {first:.4g} untrained"
    samples = steps * config.train.global_batch
    return Result(files.number, files.params, state, loss, reason, steps, samples, seconds)


def final_loss(lines: list[dict[str, Any]], config: Config, last: float) -> float:
    """Mean loss over the last share of the steps; inf where none of it was finite."""
    since = config.train.steps * (1 - last)
    losses = [line["loss"] for line in lines if line["step"] > since and line["loss"] is not None]
    return sum(losses) / len(losses) if losses else math.inf


def _train(files: TrialFiles, procs: int) -> str | None:
    """Run the training; returns what ended it early, an empty string at its last step, None for a signal."""
    path = files.file(".yaml")
    config = load_config(path)
    stop = config.launch.stop_seconds
    try:
        if procs > 1 and (status := run_ranks(["train", str(path)], procs, stop_seconds=stop)):
            stopped = status in (128 + signal.SIGTERM, 128 + signal.SIGINT)  # before the first step
            return None if stopped else _last_error(files)
        if procs == 1:
            train(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return str(error)
    except Exception as error:  # a trial's crash is a result of the sweep, kept with its reason
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"
    lines = read_metrics(files.folder)
    return "" if lines and lines[-1]["step"] == config.train.steps else None


def _last_error(files: TrialFiles) -> str:
    lines = files.file(".log").read_text(errors="replace").strip().splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or ["no message"])[-1]
