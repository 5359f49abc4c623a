"""The sweep: Optuna chooses the values, each trial runs in its own process, and the results are stored in files."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from typing import Any

import optuna
import torch
from optuna.distributions import BaseDistribution
from optuna.samplers import RandomSampler, TPESampler
from optuna.trial import TrialState

from megatron_dit.config import flatten, load_config, save_config
from megatron_dit.runtime.errors import UserError, writing
from megatron_dit.runtime.progress import ProgressBar
from megatron_dit.training.run_folder import read_metrics
from megatron_dit.tuning.journal import Lock, open_journal, set_aside
from megatron_dit.tuning.space import Params, SweepConfig, open_folder, to_optuna
from megatron_dit.tuning.trial import INTERRUPTED, TAKEN, Result, TrialFiles, classify, run_trial, stored_result

logger = logging.getLogger(__name__)

PRELOADED = ["megatron_dit.tuning.trial", "megatron_dit.training.engine", "torch._dynamo", "matplotlib.figure"]
POLL_SECONDS = 0.2
TAKEN_SECONDS = 5.0  # wait before retrying a trial that another process is running


@dataclass
class Running:
    """A trial whose process is running."""

    files: TrialFiles
    process: BaseProcess
    slot: int
    started: float
    reported: int = 0  # last step reported to Optuna


class Sweep:
    """A sweep. Its folder has ``sweep.yaml``, Optuna's journal, and the runs, results, logs and locks in ``trials/``.

    Several processes (such as tasks of a Slurm array) may work on one folder: a process holds the trial's lock while
    it runs the trial, and the sweep's lock while it asks Optuna for values. A restarted sweep resumes: trials that have
    a result are not run again, interrupted trials resume from their newest checkpoint.
    """

    def __init__(self, config: SweepConfig) -> None:
        gpus, needed = torch.cuda.device_count(), config.concurrent_trials * config.ranks_per_trial
        if 0 < gpus < needed:
            raise UserError(
                f"concurrent_trials={config.concurrent_trials} * ranks_per_trial={config.ranks_per_trial} requires "
                f"{needed} GPUs, but this host has {gpus}; reduce one of them"
            )
        open_folder(config)
        self.config = config
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with writing(config.folder):
            self._study = optuna.create_study(
                study_name="sweep",
                storage=open_journal(config.folder),
                load_if_exists=True,
                pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=config.base.train.steps // 10),
            )

    # --- values to try ----------------------------------------------------------------------------------

    def files(self, number: int) -> TrialFiles:
        """Return the trial's files with its values, which are chosen now if no process has done so."""
        with Lock(self.config.folder / "ask.lock"):
            while len(trials := self._study.get_trials(deepcopy=False)) <= number:
                self._ask(len(trials))
        space = self.config.space
        params = {key: space[key].from_optuna(value) for key, value in trials[number].params.items()}
        return TrialFiles(self.config.trial_folder(number), params)

    def _ask(self, number: int) -> None:
        """Add trial ``number`` to the study, with its values from ``trials/`` if the journal was lost."""
        distributions = self.config.distributions()
        params = self._known_params(number)
        if params is not None:
            self._add(params, distributions)
            return
        if self.config.sampler != "grid":
            # Seed the sampler per trial, because its generator would restart with each process.
            seed = (self.config.seed << 20) + number
            tpe = self.config.sampler == "tpe"
            self._study.sampler = TPESampler(seed=seed, constant_liar=True) if tpe else RandomSampler(seed=seed)
            self._study.ask(distributions)
            return
        # Optuna's GridSampler calls study.stop(), which is only allowed inside ``study.optimize``.
        points = itertools.product(*(dimension.finite for dimension in self.config.space.values()))
        point = next(itertools.islice(points, number, None))
        self._add(dict(zip(self.config.space, point, strict=True)), distributions)

    def _add(self, params: Params, distributions: dict[str, BaseDistribution]) -> None:
        values = {key: to_optuna(value) for key, value in params.items()}
        try:
            trial = optuna.trial.create_trial(state=TrialState.RUNNING, params=values, distributions=distributions)
        except ValueError as error:
            folder = self.config.folder / "trials"
            raise UserError(f"{folder} holds trials of another sweep ({error}); set run_dir to a new folder") from None
        self._study.add_trial(trial)

    def _known_params(self, number: int) -> Params | None:
        """Return the values with which a trial was started before, from its result or its config, or None."""
        result = self._stored(number)
        if result is not None:
            return result.params
        path = TrialFiles(self.config.trial_folder(number), {}).file(".yaml")
        if not path.is_file():
            return None
        try:
            values = flatten(load_config(path))
        except UserError as error:
            logger.warning("%s; choosing new values for trial %d", error, number)
            return None
        return {key: values[key] for key in self.config.space}

    # --- running trials ------------------------------------------------------------------------------------

    def run(self, only: int | None = None) -> list[Result]:
        """Run all trials, or trial ``only``, that have no result yet, and return the results sorted by number."""
        context = multiprocessing.get_context("forkserver")
        # Importing these modules takes seconds, so import them once for all trials.
        context.set_forkserver_preload(PRELOADED)
        numbers = range(self.config.count) if only is None else [only]
        results = {n: result for n in numbers if (result := self._stored(n)) is not None}
        for result in results.values():
            self._report(result)
        running: list[Running] = []
        handler = signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
        try:
            with ProgressBar("sweep", len(numbers), len(results)) as bar:
                for result in self._until_done(context, [n for n in numbers if n not in results], running):
                    results[result.number] = result
                    bar.advance(line_of(result))
        except KeyboardInterrupt:
            for trial in running:  # they save a checkpoint, exit, and resume with the sweep
                trial.process.terminate()
            for trial in running:
                trial.process.join()
            raise
        finally:
            signal.signal(signal.SIGTERM, handler)
        return [results[number] for number in sorted(results)]

    def _until_done(self, context: Any, numbers: list[int], running: list[Running]) -> Iterator[Result]:
        """Run ``concurrent_trials`` trials at a time and yield each result. ``running`` lists the running ones."""
        waiting = deque(numbers)
        held_until: dict[int, float] = {}
        while waiting or running:
            free = set(range(self.config.concurrent_trials)) - {trial.slot for trial in running}
            ready = [n for n in waiting if time.monotonic() >= held_until.get(n, 0.0)]
            for slot, number in zip(sorted(free), ready, strict=False):
                waiting.remove(number)
                try:
                    running.append(self._start(context, number, slot))
                except UserError as error:  # the combination of values is invalid
                    yield self._refused(number, str(error))
            time.sleep(POLL_SECONDS)
            for trial in list(running):
                if trial.process.is_alive():
                    self._watch(trial)
                    continue
                running.remove(trial)
                # A signal that arrives before the run handles signals is not a crash of the trial.
                if trial.process.exitcode in (INTERRUPTED, -signal.SIGTERM, -signal.SIGINT):
                    raise KeyboardInterrupt
                if trial.process.exitcode == TAKEN:
                    held_until[trial.files.number] = time.monotonic() + TAKEN_SECONDS
                    waiting.append(trial.files.number)
                    continue
                yield self._ended(trial)

    def _stored(self, number: int) -> Result | None:
        """Return the result of a trial, if it exists; a corrupt one is renamed, so that the trial runs again."""
        try:
            return stored_result(self.config, number)
        except UserError as error:
            path = TrialFiles(self.config.trial_folder(number), {}).file(".json")
            logger.warning("%s; renamed it to %s, running the trial again", error, set_aside(path))
            return None

    def _start(self, context: Any, number: int, slot: int) -> Running:
        """Start a trial's process. Raises UserError if the combination of its values is invalid."""
        files, devices = self.files(number), self._devices(slot)
        config = self.config.trial_config(files.params, number)
        threads = config.train.threads or max(
            1, (os.cpu_count() or 1) // (self.config.concurrent_trials * self.config.ranks_per_trial)
        )
        save_config(replace(config, train=replace(config.train, threads=threads)), files.file(".yaml"))
        arguments = (
            files,
            self.config.ranks_per_trial,
            self.config.final_fraction,
            self.config.keep_checkpoints,
            devices,
        )
        process = context.Process(target=run_trial, args=arguments)
        process.start()
        return Running(files, process, slot, time.monotonic())

    def _refused(self, number: int, reason: str) -> Result:
        """Store and return the result of a trial whose config is invalid."""
        files = self.files(number)
        result = Result(number, files.params, "crashed", None, reason, steps=0, samples=0, seconds=0.0)
        files.write(result)
        self._report(result)
        return result

    def _devices(self, slot: int) -> str | None:
        """Return CUDA_VISIBLE_DEVICES of a slot: ``ranks_per_trial`` GPUs of its own; None without GPUs."""
        if torch.cuda.device_count() == 0:
            return None
        return ",".join(
            str(gpu) for gpu in range(slot * self.config.ranks_per_trial, (slot + 1) * self.config.ranks_per_trial)
        )

    def _ended(self, trial: Running) -> Result:
        """Return the result the trial wrote, or store a result if its process died before writing one."""
        result = trial.files.result()
        if result is None:
            status, log = trial.process.exitcode, trial.files.file(".log")
            reason = f"its process ended without a result (exit status {status}); see {log}"
            result = classify(trial.files, self.config.final_fraction, reason, time.monotonic() - trial.started)
            trial.files.write(result)
        self._report(result)
        return result

    # --- reporting to Optuna --------------------------------------------------------------------------------

    def _report(self, result: Result) -> None:
        """Report a result to Optuna."""
        self.files(result.number)  # adds the trial if the journal was lost
        trial = self._study.get_trials(deepcopy=False)[result.number]
        if trial.state.is_finished():
            return
        if result.state == "complete":
            self._study.tell(result.number, result.loss)
        else:  # TPE ranks pruned trials below all complete ones; a crash is no evidence about the values
            pruned = result.state in ("diverged", "stopped")
            self._study.tell(result.number, state=TrialState.PRUNED if pruned else TrialState.FAIL)

    def _watch(self, trial: Running) -> None:
        """With ``median_pruning``, report the losses so far to Optuna and stop the trial if the pruner decides so."""
        if not self.config.median_pruning:
            return
        lines = [line for line in read_metrics(trial.files.folder) if line["step"] > trial.reported]
        if not lines:
            return
        frozen = self._study.get_trials(deepcopy=False)[trial.files.number]
        handle = optuna.trial.Trial(self._study, frozen._trial_id)
        for line in lines:
            if line["loss"] is not None:
                trial.reported = line["step"]
                handle.report(line["loss"], line["step"])
                if handle.should_prune():
                    trial.process.kill()
                    trial.process.join()
                    seconds = time.monotonic() - trial.started
                    reason = f"loss {line['loss']:.4g} at step {line['step']} is above the median of the other trials"
                    result = classify(trial.files, self.config.final_fraction, reason, seconds)
                    if trial.files.result() is None:
                        trial.files.write(replace(result, state="stopped", loss=line["loss"]))
                    return


def line_of(result: Result) -> str:
    """Return a line with a trial's values, state and loss or reason."""
    values = " ".join(
        f"{key}={value:.6g}" if isinstance(value, float) else f"{key}={value}" for key, value in result.params.items()
    )
    return f"trial {result.number} {values}: {result.state} " + (
        result.reason if result.loss is None else f"loss {result.loss:.5g}"
    )
