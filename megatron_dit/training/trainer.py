"""The training loop: fetch, step, log, save."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType
from typing import Any

from megatron_dit.checkpoint.load import newest_intact, restore
from megatron_dit.checkpoint.reader import CheckpointReader
from megatron_dit.config import Config
from megatron_dit.data.health import DataHealth, check_shards
from megatron_dit.data.index import Index
from megatron_dit.data.stream import batches, read_data
from megatron_dit.data.validate import check_same, dataset_fingerprint
from megatron_dit.models.flops import model_flops
from megatron_dit.parallel.startup import start_up
from megatron_dit.parallel.topology import Topology, on_all_ranks
from megatron_dit.runtime.device import device_peak, peak_memory
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.progress import ProgressBar
from megatron_dit.runtime.signals import STOPPING, signals_end_at_once
from megatron_dit.training.checkpointing import CheckpointSchedule
from megatron_dit.training.engine import Engine, StepMetrics
from megatron_dit.training.memory import explain_out_of_memory
from megatron_dit.training.monitor import SpikeDetector
from megatron_dit.training.run_folder import RunFolder


def train(config: Config) -> dict[str, Any]:
    """Train to ``config.train.steps``, resuming from the newest checkpoint in the run's folder. Collective.

    Returns the run's results: the step reached, the last logged metrics, and whether training is finished. SIGTERM and
    Ctrl-C save a checkpoint and stop; before the first step they end the process at once.
    Raises UserError if a device or host runs out of memory, or if another process trains in the folder.
    """
    with StopSignal() as stop_signal, explain_out_of_memory(config):
        topology = start_up(config)
        run, data = on_all_ranks(lambda: (RunFolder(config), read_data(config.data)))
        try:
            return _train(config, topology, run, data, stop_signal)
        finally:
            run.unlock()


def _train(
    config: Config, topology: Topology, run: RunFolder, data: tuple[Index, ...], stop_signal: StopSignal
) -> dict[str, Any]:
    notes = check_shards(data, config.data, topology.rank, topology.world)
    first = topology.rank == 0
    on_all_ranks(lambda: run.lock() if first else None)
    reader, skipped = newest_intact(run.checkpoints, topology.rank, topology.world)
    notes += skipped
    start = reader.step if reader else 0
    stream = batches(data, config, start, topology.data_rank, topology.data_size)
    engine = Engine(config, topology)
    engine.data = dataset_fingerprint(data)
    if reader is None:
        engine.initialise()
    else:
        notes += [*_resume(engine, reader), f"resumed {run.path} at step {start}"]
    logger = on_all_ranks(lambda: Logger(run, config, engine, topology.world) if first else None)
    schedule = CheckpointSchedule(engine, run)
    notes += on_all_ranks(lambda: schedule.prepare() if first else [])
    health = DataHealth(config)
    with ProgressBar("train", config.train.steps, start, show=first) as bar:
        for line in [*notes, f"optimizer: {engine.optimizer.title}"]:
            bar.say(line)
        skipped_in_a_row = 0
        stop_signal.listen()
        for batch in stream:
            every = config.train.monitor_every
            monitor = bool(every) and (engine.step + 1) % every == 0
            metrics = engine.train_step(batch, stop=stop_signal.asked, busy=schedule.writing, monitor=monitor)
            skipped_in_a_row = skipped_in_a_row + 1 if metrics.skipped else 0
            if logger:
                bar.advance(logger.log(engine.step, metrics))
            try:
                _check_skipped(engine.step, metrics, skipped_in_a_row, config.train.max_skipped_steps)
                for line in health.check(metrics.bad_samples, batch.bad):
                    bar.say(line)
            except UserError:
                schedule.finish()  # a save in progress is still valid
                raise
            last = metrics.stop or engine.step == config.train.steps
            for line in schedule.after_step(metrics.busy, last):
                bar.say(line)
            if metrics.stop:
                bar.say(f"stopped by a signal and saved at step {engine.step}; run the same command again to resume")
                break
    logged = run.metrics()[-1:] if logger else []
    if logger:
        run.close()
    last_metrics = logged[0] if logged else {}
    finished = engine.step == config.train.steps
    return {
        "run": str(run.path),
        "optimizer": engine.optimizer.title,
        "finished": finished,
        **last_metrics,
        "step": engine.step,
    }


def _resume(engine: Engine, reader: CheckpointReader) -> list[str]:
    """Restore the checkpoint; return messages to print. Raises UserError if the dataset is not the run's."""
    changed = check_same(reader.manifest["data"], engine.data)
    restore(engine, reader)
    return [changed] if changed else []


def _check_skipped(step: int, metrics: StepMetrics, skipped: int, limit: int) -> None:
    """Raise UserError, on every rank, after too many consecutive skipped steps."""
    if skipped >= limit:
        raise UserError(
            f"loss or gradient was not finite in {skipped} consecutive steps up to step {step} (loss {metrics.loss}); "
            "lower optimizer.lr, raise optimizer.warmup_steps or set optimizer.grad_clip"
        )


class Logger:
    """Logs means over ``log_every`` steps to the run's folder. Used on rank 0 only."""

    def __init__(self, run: RunFolder, config: Config, engine: Engine, devices: int) -> None:
        self._run, self._config, self._bad_samples = run, config, engine.bad_samples
        run.open(engine.step)
        self._losses: list[float] = []
        self._skipped, self._spikes = 0, 0
        self._detector = SpikeDetector()
        side = config.model.sample_size
        self._sample_flops = model_flops(config.model, side, side).total.model
        self._peak = device_peak("fp8" if config.train.fp8 != "none" else config.train.dtype)
        self._devices = devices
        self._rate, self._trouble = 0.0, ""
        self._since = time.monotonic()

    def log(self, step: int, metrics: StepMetrics) -> str:
        """Add one step's metrics; return the text for the progress bar."""
        self._skipped += metrics.skipped
        if not metrics.skipped:
            self._losses.append(metrics.loss)
            self._spikes += self._detector.spikes(metrics.loss)
        # Log the first step, because it is the loss of the untrained model.
        due = step in (1, self._config.train.steps) or step % self._config.train.log_every == 0
        if not (due or metrics.skipped or metrics.stop or metrics.monitors):
            return self._text(metrics)
        now = time.monotonic()
        steps = len(self._losses) + metrics.skipped
        self._rate = steps * self._config.train.global_batch / max(1e-9, now - self._since)
        mean = sum(self._losses) / len(self._losses) if self._losses else None
        values = {
            "loss": mean,
            "grad_norm": None if metrics.skipped else metrics.grad_norm,
            "lr": metrics.lr,
            "samples_per_second": self._rate,
            "skipped_steps": self._skipped,
            "loss_spikes": self._spikes,
            **{f"bad_samples/{cause}": count for cause, count in self._bad_samples.items()},
            **self._speed(),
            **({} if metrics.alignment is None else {"alignment": metrics.alignment}),
            **metrics.monitors,
        }
        self._trouble = self._run.log(step, values)
        self._losses, self._since = [], now
        return self._text(metrics)

    def _speed(self) -> dict[str, float]:
        """Return model FLOP/s per device, MFU if the device's peak is known, and rank 0's peak memory."""
        flops = self._sample_flops * self._rate / self._devices
        mfu = {} if self._peak is None else {"mfu": flops / self._peak}
        return {"tflops_per_device": flops / 1e12, **mfu, "memory_gib": peak_memory() / 2**30}

    def _text(self, metrics: StepMetrics) -> str:
        skipped = f" skipped {self._skipped}" if self._skipped else ""
        return f"loss {metrics.loss:.4f} {self._rate:.0f} samples/s{skipped} {self._trouble}".rstrip()


class StopSignal:
    """Context in which SIGTERM and Ctrl-C end the process at once. After ``listen``, the first only sets ``asked``."""

    def __init__(self) -> None:
        self.asked = False
        self._at_once = signals_end_at_once()

    def listen(self) -> None:
        """From now on, request a stop at the first signal instead of ending at once, so that the run can be saved."""
        for number in STOPPING:
            signal.signal(number, self._ask)

    def _ask(self, number: int, _: FrameType | None) -> None:
        self.asked = True
        for each in STOPPING:
            signal.signal(each, signal.SIG_DFL)

    def __enter__(self) -> StopSignal:
        self._at_once.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._at_once.__exit__(kind, error, _)
