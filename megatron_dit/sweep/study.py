"""The sweep itself: optuna says what to try, processes try it, files say what came out."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.distributions import BaseDistribution
from optuna.samplers import RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import BaseJournalFileLock
from optuna.trial import TrialState

from megatron_dit.config import flatten, load_config, save_config
from megatron_dit.errors import UserError, writing
from megatron_dit.progress import ProgressBar
from megatron_dit.run_folder import read_metrics
from megatron_dit.runtime.locks import FileLock, wait_for_lock
from megatron_dit.runtime.text import warn
from megatron_dit.sweep.space import Params, SweepConfig, open_folder, to_optuna
from megatron_dit.sweep.trial import INTERRUPTED, TAKEN, Result, TrialFiles, judge, run_trial, stored_result

POLL_SECONDS = 0.2
TAKEN_SECONDS = 5.0  # before a trial that another process holds is tried again


class Lock(BaseJournalFileLock):
    """A file's lock that the kernel frees with its process: optuna's own outlive a kill by half a minute."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock: FileLock | None = None

    def acquire(self) -> bool:
        self._lock = wait_for_lock(self._path)
        return True

    def release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


def open_journal(folder: Path) -> JournalStorage:
    """Optuna's journal in a sweep's folder. A damaged one is set aside: all that counts is in ``trials/`` too."""
    path, lock = folder / "journal.log", Lock(folder / "journal.lock")
    with lock:
        damage = _damage_of(path)
        if damage:
            warn(f"{path} is damaged ({damage}); it is now {set_aside(path)}, and is made anew from the trials")
    return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))


def _damage_of(path: Path) -> str:
    """What is wrong with a journal, or an empty string."""
    text = path.read_bytes() if path.exists() else b""
    if not text.endswith(b"\n") and text:
        return "its last line is cut short"
    try:
        for line in text.splitlines():
            json.loads(line)
        if text:
            JournalStorage(JournalFileBackend(str(path)))  # replays every line
    except Exception as error:  # whatever optuna raises for lines that it did not write
        return f"{type(error).__name__}: {error}"
    return ""


def set_aside(path: Path) -> Path:
    """Rename a damaged file to a name that is free, and return it."""
    names = (path.with_name(f"{path.name}.damaged{number or ''}") for number in itertools.count())
    free = next(name for name in names if not name.exists())
    return path.rename(free)


@dataclass
class Running:
    files: TrialFiles
    process: BaseProcess
    slot: int
    started: float
    reported: int = 0  # last step told to optuna


class Sweep:
    """A sweep's folder: ``sweep.yaml``, optuna's journal, and a trial's run, result, log and lock in ``trials/``.

    Several processes may work on one folder (tasks of a Slurm array): a trial is run under its lock, and what
    is to be tried is asked under the sweep's. Started again it goes on: finished trials have a result and are
    left alone, interrupted ones resume as any run does.
    """

    def __init__(self, config: SweepConfig) -> None:
        gpus, needed = torch.cuda.device_count(), config.parallel * config.procs
        if 0 < gpus < needed:
            raise UserError(f"parallel={config.parallel} * procs={config.procs} needs as many GPUs, here are {gpus}")
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

    # --- what to try ----------------------------------------------------------------------------------

    def files(self, number: int) -> TrialFiles:
        """The trial's files, its values asked for if nobody has."""
        with Lock(self.config.folder / "ask.lock"):
            while len(trials := self._study.get_trials(deepcopy=False)) <= number:
                self._ask(len(trials))
        space = self.config.space
        params = {key: space[key].from_optuna(value) for key, value in trials[number].params.items()}
        return TrialFiles(self.config.trial_folder(number), params)

    def _ask(self, number: int) -> None:
        """Add trial ``number`` to the study: with the values it has in ``trials/``, if the journal has lost them."""
        distributions = self.config.distributions()
        params = self._known_params(number)
        if params is not None:
            self._add(params, distributions)
            return
        if self.config.sampler != "grid":
            # Seeded anew for each trial: a sampler's generator would start over with the process.
            seed = (self.config.seed << 20) + number
            tpe = self.config.sampler == "tpe"
            self._study.sampler = TPESampler(seed=seed, constant_liar=True) if tpe else RandomSampler(seed=seed)
            self._study.ask(distributions)
            return
        # Optuna's GridSampler stops its study by itself, which only ``study.optimize`` allows.
        points = itertools.product(*(dimension.finite for dimension in self.config.space.values()))
        point = next(itertools.islice(points, number, None))
        self._add(dict(zip(self.config.space, point, strict=True)), distributions)

    def _add(self, params: Params, distributions: dict[str, BaseDistribution]) -> None:
        values = {key: to_optuna(value) for key, value in params.items()}
        try:
            trial = optuna.trial.create_trial(state=TrialState.RUNNING, params=values, distributions=distributions)
        except ValueError as error:
            folder = self.config.folder / "trials"
            raise UserError(f"{folder} holds trials of another search ({error}): set run_dir to a new folder") from None
        self._study.add_trial(trial)

    def _known_params(self, number: int) -> Params | None:
        """The values that a trial was started with before, by its result or its config."""
        result = self._stored(number)
        if result is not None:
            return result.params
        path = TrialFiles(self.config.trial_folder(number), {}).file(".yaml")
        if not path.is_file():
            return None
        try:
            values = flatten(load_config(path))
        except UserError as error:
            warn(f"{error}; the values of trial {number} are chosen anew")
            return None
        return {key: values[key] for key in self.config.space}

    # --- trying it ------------------------------------------------------------------------------------

    def run(self, only: int | None = None) -> list[Result]:
        """Run what has no result yet, all trials or one, and return the results by number."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["megatron_dit.sweep.trial", "megatron_dit.engine"])  # imports take seconds
        numbers = range(self.config.count) if only is None else [only]
        results = {n: result for n in numbers if (result := self._stored(n)) is not None}
        for result in results.values():
            self._tell(result)
        running: list[Running] = []
        handler = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
        try:
            with ProgressBar("sweep", len(numbers), len(results)) as bar:
                for result in self._until_done(context, [n for n in numbers if n not in results], running):
                    results[result.number] = result
                    bar.advance(line_of(result))
        except KeyboardInterrupt:
            for trial in running:  # they save and leave, and go on when the sweep does
                trial.process.terminate()
            for trial in running:
                trial.process.join()
            raise
        finally:
            signal.signal(signal.SIGTERM, handler)
        return [results[number] for number in sorted(results)]

    def _until_done(self, context: Any, numbers: list[int], running: list[Running]) -> Iterator[Result]:
        """Run the trials, ``parallel`` at a time; yields results as they come. ``running`` holds those under way."""
        waiting = deque(numbers)
        held_until: dict[int, float] = {}
        while waiting or running:
            free = set(range(self.config.parallel)) - {trial.slot for trial in running}
            ready = [n for n in waiting if time.monotonic() >= held_until.get(n, 0.0)]
            for slot, number in zip(sorted(free), ready, strict=False):
                waiting.remove(number)
                try:
                    running.append(self._start(context, number, slot))
                except UserError as error:  # values that do not go together
                    yield self._refused(number, str(error))
            time.sleep(POLL_SECONDS)
            for trial in list(running):
                if trial.process.is_alive():
                    self._watch(trial)
                    continue
                running.remove(trial)
                # A signal that came before the run could handle it is no crash of the trial's.
                if trial.process.exitcode in (INTERRUPTED, -signal.SIGTERM, -signal.SIGINT):
                    raise KeyboardInterrupt
                if trial.process.exitcode == TAKEN:
                    held_until[trial.files.number] = time.monotonic() + TAKEN_SECONDS
                    waiting.append(trial.files.number)
                    continue
                yield self._ended(trial)

    def _stored(self, number: int) -> Result | None:
        """The result of a trial, if it has one; one that is damaged is set aside, and the trial runs again."""
        try:
            return stored_result(self.config, number)
        except UserError as error:
            path = TrialFiles(self.config.trial_folder(number), {}).file(".json")
            warn(f"{error}; it is now {set_aside(path)}, and the trial runs again")
            return None

    def _start(self, context: Any, number: int, slot: int) -> Running:
        """Start a trial's process. Raises UserError where its values do not go together."""
        files, devices = self.files(number), self._devices(slot)
        config = self.config.trial_config(files.params, number)
        threads = config.train.threads or max(1, (os.cpu_count() or 1) // (self.config.parallel * self.config.procs))
        save_config(replace(config, train=replace(config.train, threads=threads)), files.file(".yaml"))
        arguments = (files, self.config.procs, self.config.last, self.config.keep_checkpoints, devices)
        process = context.Process(target=run_trial, args=arguments)
        process.start()
        return Running(files, process, slot, time.monotonic())

    def _refused(self, number: int, reason: str) -> Result:
        files = self.files(number)
        result = Result(number, files.params, "crashed", None, reason, steps=0, samples=0, seconds=0.0)
        files.write(result)
        self._tell(result)
        return result

    def _devices(self, slot: int) -> str | None:
        """CUDA_VISIBLE_DEVICES of a slot: its own share of this machine's GPUs."""
        if torch.cuda.device_count() == 0:
            return None
        return ",".join(str(gpu) for gpu in range(slot * self.config.procs, (slot + 1) * self.config.procs))

    def _ended(self, trial: Running) -> Result:
        """The result the trial wrote; one that died before it could has crashed."""
        result = trial.files.result()
        if result is None:
            reason = f"its process died (exit status {trial.process.exitcode}), see {trial.files.file('.log')}"
            result = judge(trial.files, self.config.last, reason, time.monotonic() - trial.started)
            trial.files.write(result)
        self._tell(result)
        return result

    # --- optuna's side --------------------------------------------------------------------------------

    def _tell(self, result: Result) -> None:
        self.files(result.number)  # the journal may have lost it
        trial = self._study.get_trials(deepcopy=False)[result.number]
        if trial.state.is_finished():
            return
        if result.state == "complete":
            self._study.tell(result.number, result.loss)
        else:  # TPE ranks a pruned trial below every complete one; a crashed one says nothing of its values
            pruned = result.state in ("diverged", "stopped")
            self._study.tell(result.number, state=TrialState.PRUNED if pruned else TrialState.FAIL)

    def _watch(self, trial: Running) -> None:
        """With ``stop_early``, report the losses so far, and end the trial if they are hopeless."""
        if not self.config.stop_early:
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
                    reason = f"loss {line['loss']:.4g} at step {line['step']} is above the median of the others"
                    result = judge(trial.files, self.config.last, reason, seconds)
                    if trial.files.result() is None:
                        trial.files.write(replace(result, state="stopped", loss=line["loss"]))
                    return


def line_of(result: Result) -> str:
    values = " ".join(
        f"{key}={value:.6g}" if isinstance(value, float) else f"{key}={value}" for key, value in result.params.items()
    )
    return f"trial {result.number} {values}: {result.state} " + (
        result.reason if result.loss is None else f"loss {result.loss:.5g}"
    )
