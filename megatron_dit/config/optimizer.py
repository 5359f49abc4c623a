"""Config sections ``optimizer`` and ``ema``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_dit.config.keys import (
    Count,
    CountOrZero,
    Fraction,
    Interval,
    NonNegative,
    Positive,
    Section,
    SigmaRel,
    check,
    key,
)

Implementation = Literal["auto", "apex", "te", "deepspeed", "torch"]
MUON_MOMENTUM = 0.95
Schedule = Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt"]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    """AdamW, or Muon and AdamW. ``lr`` and ``weight_decay`` are base values, which μP scales per parameter group."""

    prefix = "optimizer."

    lr: Positive = key("base learning rate")
    beta1: Annotated[float, Interval("[0, 1)")] = key("decay of the first moment", 0.9)
    beta2: Annotated[float, Interval("[0, 1)")] = key("decay of the second moment", 0.999)
    eps: Annotated[float, Interval("[1e-30, 1]")] = key("added to the root of the second moment", 1e-8)
    muon_lr: Positive | None = key(
        "hidden matrices, except adaLN's modulation, are updated by Muon with this base learning rate, all other "
        "parameters by AdamW; null: AdamW updates all",
        None,
    )
    muon_momentum: Annotated[float, Interval("[0, 1)")] = key("Muon's Nesterov momentum", MUON_MOMENTUM)
    weight_decay: NonNegative = key("base decoupled weight decay", 0.0)
    grad_clip: Positive | None = key("maximum global gradient norm; null: no clipping", None)
    warmup_steps: CountOrZero = key("linear warm-up: step k (from 0) uses lr * (k + 1) / warmup_steps", 0, unit="steps")
    schedule: Schedule = key(
        "learning rate after warm-up; linear, cosine: decays to the end; wsd (warm-up, stable, decay): constant, then "
        "decays linearly over decay_steps; inverse_sqrt: falls as 1/sqrt(step) from decay_start (EDM2)",
        "constant",
    )
    final_lr_ratio: Fraction = key("linear, cosine, wsd: learning rate at the end / peak learning rate", 0.0)
    decay_steps: Count | None = key("wsd: length of the decay at the end of the training", None, unit="steps")
    decay_start: Count | None = key("inverse_sqrt: lr * sqrt(decay_start / step) from this step", None, unit="steps")
    implementation: Implementation = key(
        "AdamW implementation; auto: the first available of apex, te, deepspeed and torch on a GPU, torch on a CPU",
        "auto",
        resumable=True,
    )
    offload: bool = key(
        "ZeRO 1, 2, 3: keep masters, moments and EMA on the CPU and update them with DeepSpeed's CPU AdamW",
        False,
        resumable=True,
    )

    def check(self) -> None:
        for name, schedule in (("decay_steps", "wsd"), ("decay_start", "inverse_sqrt")):
            value = getattr(self, name)
            check(
                value is not None or self.schedule != schedule,
                f"optimizer.schedule={schedule} needs optimizer.{name}: set it to a number of steps",
            )
            check(
                value is None or self.schedule == schedule,
                f"optimizer.{name}={value} has no effect with optimizer.schedule={self.schedule}: set "
                f"optimizer.{name}=null, or optimizer.schedule={schedule}",
            )
        check(
            self.decay_start is None or self.decay_start >= self.warmup_steps,
            f"optimizer.decay_start={self.decay_start} is before the end of the warm-up; set it to "
            f"optimizer.warmup_steps={self.warmup_steps} or more",
        )
        check(
            self.muon_lr is not None or self.muon_momentum == MUON_MOMENTUM,
            f"optimizer.muon_momentum={self.muon_momentum} has no effect without optimizer.muon_lr; set both or "
            "neither",
        )
        check(
            not self.offload or self.muon_lr is None,
            f"optimizer.muon_lr={self.muon_lr} with optimizer.offload=true: Muon cannot be offloaded; remove one of "
            "the two keys",
        )
        check(
            not self.offload or self.implementation == "auto",
            f"optimizer.implementation={self.implementation!r}: optimizer.offload=true uses its own AdamW, remove "
            "optimizer.implementation",
        )


@dataclass(frozen=True, kw_only=True)
class EmaConfig(Section):
    """Moving averages of the weights, in fp32."""

    prefix = "ema."

    decay: Annotated[float, Interval("[0, 1)")] = key("decay per step of the average that is sampled from", 0.9999)
    sigma_rel: list[SigmaRel] = key(
        "relative widths of additional power-function averages for post-hoc EMA (EDM2, arXiv 2312.02696), such as "
        "[0.05, 0.1]",
        factory=list,
    )
    snapshot_every: Count | None = key(
        "steps between snapshots of the power-function averages, which are all kept; null: none",
        None,
        unit="steps",
        resumable=True,
    )

    def check(self) -> None:
        check(
            len(set(self.sigma_rel)) == len(self.sigma_rel),
            f"ema.sigma_rel={self.sigma_rel}: expected different numbers",
        )
        check(
            self.snapshot_every is None or bool(self.sigma_rel),
            f"ema.snapshot_every={self.snapshot_every} saves the averages of ema.sigma_rel; set it, for example to "
            "[0.05, 0.1]",
        )
