"""The training loop: fetch, step, log, save."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_dit.checkpoint.listing import step_folder
from megatron_dit.checkpoint.load import newest_intact, restore
from megatron_dit.checkpoint.reader import CheckpointReader
from megatron_dit.config import Config
from megatron_dit.data.fingerprint import check_fingerprint, dataset_fingerprint
from megatron_dit.data.health import DataHealth, check_shards
from megatron_dit.data.index import Index
from megatron_dit.data.shared import rank_batches
from megatron_dit.data.stream import read_data
from megatron_dit.parallel.collectives import on_all_ranks
from megatron_dit.parallel.startup import start_up
from megatron_dit.parallel.topology import Topology
from megatron_dit.parallel.watchdog import Watchdog
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.progress import ProgressBar
from megatron_dit.runtime.signals import StopSignal
from megatron_dit.training.checkpointing import CheckpointSchedule
from megatron_dit.training.engine import Engine, StepMetrics
from megatron_dit.training.memory import explain_out_of_memory
from megatron_dit.training.metrics_log import MetricsLog
from megatron_dit.training.run_folder import RunFolder

logger = logging.getLogger(__name__)

Evaluate = Callable[[Path, Topology], None]  # evaluates a checkpoint


def train(config: Config, evaluate: Evaluate | None = None) -> dict[str, Any]:
    """Train to ``config.train.steps``, resuming from the newest checkpoint in the run's folder. Collective.

    ``evaluate`` is called on all ranks with the checkpoint of every ``evaluation.every``-th step.
    Returns the run's results: the step reached, the last logged metrics, and whether training is finished. SIGTERM and
    Ctrl-C save a checkpoint and stop; before the first step they end the process at once.
    Raises UserError if a device or host runs out of memory, or if another process trains in the folder.
    """
    with StopSignal() as stop_signal, explain_out_of_memory(config):
        topology = start_up(config)
        run, data = on_all_ranks(lambda: (RunFolder(config), read_data(config.data)))
        try:
            return _train(config, topology, run, data, stop_signal, evaluate)
        finally:
            run.unlock()


def _train(
    config: Config,
    topology: Topology,
    run: RunFolder,
    data: Sequence[Index],
    stop_signal: StopSignal,
    evaluate: Evaluate | None,
) -> dict[str, Any]:
    rank0 = topology.rank == 0
    check_shards(data, config.data, topology.rank, topology.world)
    on_all_ranks(lambda: run.lock() if rank0 else None)
    reader = newest_intact(run.checkpoints, topology.rank, topology.world)
    stream = rank_batches(data, config, reader.step if reader else 0, topology)
    engine = _engine(config, topology, data, reader)
    log = on_all_ranks(lambda: MetricsLog(run, config, engine, topology.world) if rank0 else None)
    schedule = CheckpointSchedule(engine, run)
    on_all_ranks(lambda: schedule.prepare() if rank0 else None)
    guards = _Guards(config, schedule)
    logger.info("optimizer: %s", engine.optimizer.title)
    stop_signal.listen()
    evaluation = _Evaluation(evaluate, engine, run, schedule, log)
    evaluation.run_if_due()  # if the previous process was stopped before it had evaluated this step
    watchdog = Watchdog(config.launch.hang_seconds, topology.rank, topology.world)
    with ProgressBar("train", config.train.steps, engine.step, show=rank0) as bar, watchdog:
        for batch in watchdog.reading(stream, engine.step + 1):
            watchdog.doing(engine.step + 1, "training")
            monitor = bool(config.train.monitor_every) and (engine.step + 1) % config.train.monitor_every == 0
            metrics = engine.train_step(batch, extra=[stop_signal.requested, schedule.writing], monitor=monitor)
            stop, writing = (count > 0 for count in metrics.extra)  # on any rank
            last = stop or engine.step == config.train.steps
            if log is not None:
                bar.advance(log.add(engine.step, metrics, last=last))
            guards.check(engine.step, metrics, batch.bad)
            watchdog.doing(engine.step, "saving")
            schedule.after_step(writing, last)
            if stop:
                logger.info(
                    "stopped by a signal and saved at step %d; run the same command again to resume", engine.step
                )
                break
            watchdog.doing(engine.step, "evaluating", limited=False)
            evaluation.run_if_due()
    lines = []
    if rank0:
        run.close()
        lines = run.metrics()
    return {
        "run": str(run.path),
        "optimizer": engine.optimizer.title,
        "finished": engine.step == config.train.steps,
        **(lines[-1] if lines else {}),
        "step": engine.step,
    }


def _engine(config: Config, topology: Topology, data: Sequence[Index], reader: CheckpointReader | None) -> Engine:
    """Return an engine with the initial state, or the checkpoint's if there is one.

    Raises UserError if the dataset is not the run's.
    """
    engine = Engine(config, topology)
    engine.data = dataset_fingerprint(data)
    if reader is None:
        engine.initialize()
    else:
        check_fingerprint(reader.manifest["data"], engine.data)
        restore(engine, reader)
        logger.info("resumed %s at step %d", config.run_dir, engine.step)
    return engine


class _Guards:
    """Stops a run, on every rank, after too many consecutive skipped steps or if too much data is unreadable."""

    def __init__(self, config: Config, schedule: CheckpointSchedule) -> None:
        self._limit, self._schedule = config.train.max_skipped_steps, schedule
        self._health = DataHealth(config)
        self._skipped = 0  # number of consecutive skipped steps

    def check(self, step: int, metrics: StepMetrics, bad: Sequence[tuple[str, str]]) -> None:
        """Raise UserError if the run has to stop. ``bad`` are this rank's unreadable samples. Collective."""
        self._skipped = self._skipped + 1 if metrics.skipped else 0
        try:
            if self._skipped >= self._limit:
                raise UserError(
                    f"loss or gradient was not finite in {self._skipped} consecutive steps up to step {step} (loss "
                    f"{metrics.loss}); lower optimizer.lr, raise optimizer.warmup_steps or set optimizer.grad_clip"
                )
            self._health.check(metrics.bad_samples, bad)
        except UserError:
            self._schedule.finish()  # a save in progress is still valid
            raise


class _Evaluation:
    """Calls ``evaluate`` with the checkpoint of every ``evaluation.every``-th step, for which training waits."""

    def __init__(
        self,
        evaluate: Evaluate | None,
        engine: Engine,
        run: RunFolder,
        schedule: CheckpointSchedule,
        log: MetricsLog | None,
    ) -> None:
        self._evaluate, self._engine, self._run, self._schedule, self._log = evaluate, engine, run, schedule, log

    def run_if_due(self) -> None:
        """Evaluate the checkpoint of the engine's step, if it is due. Collective."""
        step, every = self._engine.step, self._engine.config.evaluation.every
        if self._evaluate is None or every is None or step == 0 or step % every:
            return
        self._schedule.finish()
        started = time.monotonic()
        self._evaluate(step_folder(self._run.checkpoints, step), self._engine.topology)
        if self._log is not None:
            self._log.exclude(time.monotonic() - started)
