"""One trial: a training run in its own process, and its result."""

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
from typing import Annotated, Any, Literal

from megatron_dit.config import Config, load_config
from megatron_dit.config.convert import build
from megatron_dit.config.keys import CountOrZero, Interval, NonNegative, Section, check
from megatron_dit.runtime.compat import silence_import_warnings
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.io import read_text, replacing
from megatron_dit.runtime.launcher import die_with_parent, leave, run_ranks
from megatron_dit.runtime.locks import try_lock
from megatron_dit.runtime.logging import set_up
from megatron_dit.runtime.output import guard_output, survive_console_loss
from megatron_dit.training.run_folder import read_metrics
from megatron_dit.tuning.space import SweepConfig

# Exit statuses of a trial's process that ends without a result.
TAKEN = 75  # another process is running the trial
INTERRUPTED = 130  # stopped by a signal after saving a checkpoint; the trial can be resumed


@dataclass(frozen=True)
class Result(Section):
    """Result of a trial."""

    number: CountOrZero
    params: dict[str, Any]
    state: Literal["complete", "diverged", "stopped", "crashed"]  # stopped: by median pruning
    loss: float | None  # mean training loss over the last steps; None unless complete or stopped
    reason: str  # why the trial is not complete
    steps: CountOrZero  # completed steps
    samples: Annotated[int, Interval("[0, 2^63)")]  # training samples seen
    seconds: NonNegative  # wall time of the process that ended the trial

    def check(self) -> None:
        check(self.loss is not None or self.state != "complete", "state=complete: expected a loss")


@dataclass(frozen=True)
class TrialFiles:
    """Files of a trial: its run folder, with its result, config, log and lock next to it."""

    folder: Path  # the run folder
    params: dict[str, Any]

    @property
    def number(self) -> int:
        """Number of the trial."""
        return int(self.folder.name)

    def file(self, suffix: str) -> Path:
        """Return the trial's file with ``suffix``, such as ``.json``."""
        return self.folder.with_name(self.folder.name + suffix)

    def result(self) -> Result | None:
        """Return the trial's result, if it exists. Raises UserError if it is corrupt or belongs to another trial."""
        path = self.file(".json")
        if not path.exists():
            return None
        try:
            result = build(Result, json.loads(read_text(path, "it")))
            check(result.number == self.number, f"it is the result of trial {result.number}")
            return result
        except (UserError, ValueError, RecursionError) as error:
            raise UserError(f"{path} is not a valid trial result ({error})") from None

    def write(self, result: Result) -> None:
        """Write the trial's result."""
        with replacing(self.file(".json")) as part:
            part.write_text(json.dumps(asdict(result)) + "\n")

    @contextlib.contextmanager
    def lock(self) -> Iterator[bool]:
        """Try to lock the trial and yield whether it succeeded; the kernel releases the lock when the process ends."""
        lock = try_lock(self.file(".lock"))
        with lock or contextlib.nullcontext():
            yield lock is not None


def stored_result(config: SweepConfig, number: int) -> Result | None:
    """Return the result of a trial, if it exists. Raises UserError if it is corrupt or belongs to another sweep."""
    files = TrialFiles(config.trial_folder(number), {})
    result = files.result()
    keys = set(config.space)
    if result is not None and set(result.params) != keys:
        raise UserError(f"{files.file('.json')} has values for {sorted(result.params)}, expected {sorted(keys)}")
    return result


def run_trial(files: TrialFiles, procs: int, last: float, keep: bool, devices: str | None) -> None:
    """Run a trial in its process: train, or resume an interrupted run, and write the result.

    ``last`` is the fraction of the steps that the result's loss is averaged over. The process exits with status TAKEN
    if another process is running the trial, and INTERRUPTED if a signal stopped it.
    """
    die_with_parent()
    with files.file(".log").open("a", buffering=1) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    guard_output()
    set_up()
    silence_import_warnings()
    survive_console_loss()
    if devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices
    with files.lock() as locked:
        if not locked:
            leave(TAKEN)
        if files.result() is None:
            started = time.monotonic()
            reason = _train(files, procs)
            if reason is None:
                leave(INTERRUPTED)
            files.write(classify(files, last, str(reason), time.monotonic() - started))
        if not keep:
            shutil.rmtree(files.folder / "checkpoints", ignore_errors=True)
    leave(0)


def classify(files: TrialFiles, last: float, reason: str, seconds: float) -> Result:
    """Return the result that follows from a run's metrics; ``reason`` is why it ended before its last step, if it did.

    A run is diverged if it ended because of losses that are not finite, or if its final loss is above that of the
    untrained model.
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
            reason = reason if state == "complete" else f"final loss {mean:.4g} is above the untrained {first:.4g}"
    samples = steps * config.train.global_batch
    return Result(files.number, files.params, state, loss, reason, steps, samples, seconds)


def final_loss(lines: list[dict[str, Any]], config: Config, last: float) -> float:
    """Return the mean loss over the ``last`` fraction of the steps; inf if no loss was finite."""
    since = config.train.steps * (1 - last)
    losses = [line["loss"] for line in lines if line["step"] > since and line["loss"] is not None]
    return sum(losses) / len(losses) if losses else math.inf


def _train(files: TrialFiles, procs: int) -> str | None:
    """Run the training. Return why it ended early, an empty string if it is finished, or None after a signal."""
    path = files.file(".yaml")
    config = load_config(path)
    stop = config.launch.stop_seconds
    try:
        if procs > 1 and (status := run_ranks(["train", str(path)], procs, stop_seconds=stop)):
            stopped = status in (128 + signal.SIGTERM, 128 + signal.SIGINT)  # before the first step
            return None if stopped else _last_error(files)
        if procs == 1:
            from megatron_dit.training.trainer import train  # not before the libraries' warnings are silenced

            train(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return str(error)
    except Exception as error:  # a crash is a result of the sweep and is stored with its reason
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"
    lines = read_metrics(files.folder)
    return "" if lines and lines[-1]["step"] == config.train.steps else None


def _last_error(files: TrialFiles) -> str:
    """Return the last error in the trial's log, or its last line if it has none."""
    lines = files.file(".log").read_text(errors="replace").strip().splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or ["no error message"])[-1]
