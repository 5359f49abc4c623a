"""Metrics of a run: means over ``train.log_every`` steps, speed, memory and counts, logged to the run's folder."""

from __future__ import annotations

import time

from megatron_dit.config import Config
from megatron_dit.models.flops import model_flops
from megatron_dit.runtime.device import device_peak, peak_memory
from megatron_dit.training.engine import Engine, StepMetrics
from megatron_dit.training.memory import GIB
from megatron_dit.training.monitor import SpikeDetector
from megatron_dit.training.run_folder import RunFolder


class MetricsLog:
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
        self._rate = 0.0  # samples per second
        self._since = time.monotonic()

    def add(self, step: int, metrics: StepMetrics, *, last: bool) -> str:
        """Add one step's metrics, write a line if it is due, and return the text for the progress bar."""
        self._skipped += metrics.skipped
        if not metrics.skipped:
            self._losses.append(metrics.loss)
            self._spikes += self._detector.spikes(metrics.loss)
        # Log the first step, because it is the loss of the untrained model.
        due = last or step == 1 or step % self._config.train.log_every == 0
        if due or metrics.skipped or metrics.monitors:
            self._write(step, metrics)
        skipped = f" skipped {self._skipped}" if self._skipped else ""
        return f"loss {metrics.loss:.4f} {self._rate:.0f} samples/s{skipped}"

    def exclude(self, seconds: float) -> None:
        """Exclude time that was not spent on training from the rate of the next line."""
        self._since += seconds

    def _write(self, step: int, metrics: StepMetrics) -> None:
        now = time.monotonic()
        steps = len(self._losses) + metrics.skipped
        self._rate = steps * self._config.train.global_batch / max(1e-9, now - self._since)
        values = {
            "loss": sum(self._losses) / len(self._losses) if self._losses else None,
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
        self._run.log(step, values)
        self._losses, self._since = [], now

    def _speed(self) -> dict[str, float]:
        """Return model FLOP/s per device, MFU if the device's peak is known, and rank 0's peak memory."""
        flops = self._sample_flops * self._rate / self._devices
        mfu = {} if self._peak is None else {"mfu": flops / self._peak}
        return {"tflops_per_device": flops / 1e12, **mfu, "memory_gib": peak_memory() / GIB}
