"""Time training steps with random weights and random data in the shapes of a config."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from megatron_dit.bench.profile import Profile, profile_steps
from megatron_dit.config import Config
from megatron_dit.data.batch import Batch
from megatron_dit.models.common.condition import Condition
from megatron_dit.models.flops import model_flops
from megatron_dit.parallel.collectives import gather
from megatron_dit.parallel.startup import start_up
from megatron_dit.runtime.device import device_peak, peak_memory
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.progress import ProgressBar
from megatron_dit.runtime.table import Table
from megatron_dit.training.engine import Engine
from megatron_dit.training.memory import GIB

if TYPE_CHECKING:
    from megatron_dit.bench.diffusers_baseline import DiffusersBaseline


@dataclass(frozen=True)
class Times:
    """Wall-clock seconds of each step."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile, in seconds."""
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    def __str__(self) -> str:
        low, high = self.quartiles
        return f"{1e3 * self.median:.1f} ms (quartiles {1e3 * low:.1f} to {1e3 * high:.1f}, {len(self.seconds)} steps)"


@dataclass(frozen=True)
class Measurement:
    """Time and memory that the training steps used."""

    device: str  # CUDA's name of the device, or cpu
    devices: int
    precision: str  # fp32 | bf16 | fp8; MFU is relative to the device's peak in this precision
    parameters: int
    global_batch: int
    sample_flops: int  # model FLOPs of one sample, forward and backward
    peak_flops: float | None  # FLOP/s of one device; None if unknown
    peak_memory: int  # bytes, maximum over ranks: allocated memory on a GPU, resident memory on a CPU
    skipped_steps: int  # steps without an optimizer update because the loss or gradient was not finite
    times: Times
    diffusers: Times | None  # steps of the diffusers baseline, interleaved with ours
    profile: Profile | None = None  # of three more steps of rank 0

    @property
    def samples_per_second(self) -> float:
        return self.global_batch / self.times.median

    @property
    def flops_per_second(self) -> float:
        """Model FLOP/s per device. Recomputation takes time but adds no model FLOPs, so it lowers this value."""
        return self.sample_flops * self.samples_per_second / self.devices

    @property
    def mfu(self) -> float | None:
        return None if self.peak_flops is None else self.flops_per_second / self.peak_flops

    @property
    def speedup(self) -> float | None:
        """Median step time of the diffusers baseline divided by ours."""
        return None if self.diffusers is None else self.diffusers.median / self.times.median

    def results(self) -> dict[str, Any]:
        """Return the results that ``--json`` prints."""
        derived = {
            "step_seconds": self.times.median,
            "samples_per_second": self.samples_per_second,
            "tflops_per_device": self.flops_per_second / 1e12,
            "mfu": self.mfu,
            "peak_memory_gib": self.peak_memory / GIB,
            "diffusers_step_seconds": None if self.diffusers is None else self.diffusers.median,
            "speedup": self.speedup,
        }
        return {**derived, **asdict(self)}

    def print(self, title: str) -> None:
        rows = {
            "device": f"{self.devices} x {self.device}, {self.precision}",
            "parameters": f"{self.parameters:,}",
            "global batch": str(self.global_batch),
            "step": str(self.times),
            "samples/s": f"{self.samples_per_second:.1f}",
            "TFLOP/s per device": f"{self.flops_per_second / 1e12:.3g}",
            "MFU": "unknown (no peak FLOP/s known for this device)" if self.mfu is None else f"{100 * self.mfu:.1f}%",
            "peak memory": f"{self.peak_memory / GIB:.2f} GiB",
        }
        if self.skipped_steps:
            rows["skipped steps"] = f"{self.skipped_steps} (not finite; their times exclude the optimizer update)"
        if self.diffusers is not None:
            rows["diffusers step"] = str(self.diffusers)
            rows["speed-up over diffusers"] = f"{self.speedup:.2f}"
        table = Table(title=title, show_header=False)
        for row in rows.items():
            table.add_row(*row)
        Console(width=110).print(table)
        if self.profile is not None:
            self.profile.print(self.device)


def measure(config: Config, steps: int, warmup: int, *, diffusers: bool, profile: bool) -> Measurement:
    """Time ``steps`` training steps after ``warmup`` untimed ones. Collective.

    If ``diffusers`` is true, also time the same number of steps of the diffusers baseline, interleaved with ours. If
    ``profile`` is true, profile three more steps.
    """
    topology = start_up(config)
    world = topology.world
    if diffusers and world > 1:
        raise UserError(
            f"--diffusers was given with {world} ranks, but the diffusers baseline runs on one rank; omit --procs"
        )
    make_baseline = _baseline_type(config) if diffusers else None
    torch.manual_seed(config.seed)
    engine = Engine(config, topology)
    fill(engine)
    batch = random_batch(config, config.train.global_batch // topology.data_size)
    skipped = 0

    def ours(monitor: bool = False) -> None:
        nonlocal skipped
        skipped += engine.train_step(batch, monitor=monitor).skipped

    times: dict[str, list[float]] = {"ours": [], "diffusers": []}
    with ProgressBar("bench", warmup + steps, show=topology.rank == 0) as bar:
        _reset_peak_memory()
        for i in range(warmup):
            # The first step is monitored, as a run's are at times: it needs the most memory.
            ours(monitor=i == 0 and config.train.monitor_every is not None)
            bar.advance("warm-up")
        memory = max(gather(peak_memory()))  # of all ranks
        turns: dict[str, Callable[..., None]] = {"ours": ours}
        if make_baseline is not None:
            baseline = make_baseline(config)
            turns["diffusers"] = lambda: baseline.step(batch)
            for _ in range(warmup):
                _timed(turns["diffusers"])
        for _ in range(steps):
            for name, step in turns.items():
                times[name].append(_timed(step))
            bar.advance(f"{times['ours'][-1]:.3f} s")
    profiled = profile_steps(lambda: _timed(ours)) if profile else None
    model, train = config.model, config.train
    precision = train.dtype if train.fp8 == "none" else "fp8"
    return Measurement(
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        devices=world,
        precision=precision,
        parameters=sum(math.prod(param.shape) for param in engine.params.values()),
        global_batch=train.global_batch,
        sample_flops=model_flops(model, model.sample_size, model.sample_size).total.model,
        peak_flops=device_peak(precision),
        peak_memory=memory,
        skipped_steps=skipped,
        times=Times(tuple(times["ours"])),
        diffusers=Times(tuple(times["diffusers"])) if diffusers else None,
        profile=profiled,
    )


def _baseline_type(config: Config) -> type[DiffusersBaseline]:
    """Import the diffusers baseline, which no other run needs. Raise UserError if it cannot run ``config``."""
    try:
        from megatron_dit.bench.diffusers_baseline import DiffusersBaseline, check_baseline
    except ImportError as error:
        raise UserError(
            f"--diffusers needs the package diffusers, which cannot be imported ({' '.join(str(error).split())}); "
            "install diffusers, or omit --diffusers"
        ) from None
    check_baseline(config.model)
    return DiffusersBaseline


@torch.no_grad()
def fill(engine: Engine) -> None:
    """Fill the weights with small random values, generated on the device that holds them.

    ``Engine.initialize`` generates every full tensor on the CPU, which takes minutes for billions of weights, and sets
    gates to zero. Multiplying zeros consumes less power and therefore runs faster than the products of a model in
    training.
    """
    for shard in engine.masters.shards.values():
        engine.state_slice(shard, "master").normal_(std=0.02)
    engine.masters.sync_model_weights()


def random_batch(config: Config, size: int) -> Batch:
    """Return ``size`` random samples in the config's shapes, in the form that the data stream yields."""
    model = config.model
    latents = torch.randn(size, model.in_channels, model.sample_size, model.sample_size)
    dropped = torch.rand(size) < config.data.caption_dropout
    if model.num_classes:
        condition = Condition(dropped, label=torch.randint(model.num_classes, (size,)))
    else:
        text = torch.randn(size, model.text_tokens, model.text_dim)
        condition = Condition(dropped, text, torch.ones(size, model.text_tokens, dtype=torch.bool))
    patches = (model.sample_size // model.patch_size) ** 2
    batch = Batch(
        latents=latents,
        condition=condition,
        u=torch.rand(size, dtype=torch.float64).clamp(1e-9, 1 - 1e-9),
        noise=torch.randn_like(latents),
        weight=torch.ones(size),
        features=torch.randn(size, patches, model.repa_dim) if model.repa_dim else None,
    )
    return batch.pin_memory() if torch.cuda.is_available() else batch


def _timed(step: Callable[[], None]) -> float:
    _wait()
    start = time.perf_counter()
    step()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _reset_peak_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
