"""Config section ``objective``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_dit.config.keys import Interval, NonNegative, Positive, Section, key


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(Section):
    """Training objective."""

    prefix = "objective."

    name: Literal["rectified_flow", "ddpm"] | None = key(
        "rectified_flow (velocity) or ddpm (1000 steps, ε); null: the architecture's own", None
    )
    logit_mean: Annotated[float, Interval("[-100, 100]")] = key(
        "rectified_flow: mean of logit(t) (SD3, arXiv 2403.03206, eq. 19)", 0.0
    )
    logit_std: Positive = key("rectified_flow: standard deviation of logit(t)", 1.0)
    shift: Positive = key("rectified_flow: resolution shift of t (SD3, eq. 23)", 1.0)
    repa_weight: NonNegative = key(
        "weight of the alignment loss, with model.repa_block (REPA, arXiv 2410.06940, table 2)", 0.5
    )
    beta_schedule: Literal["linear", "scaled_linear"] = key(
        "ddpm: linear (1e-4 to 0.02) or scaled_linear (Stable Diffusion)", "linear"
    )
    normal_cdf: Literal["exact", "tanh"] = key(
        "ddpm with model.learn_sigma: normal cdf of the likelihood at t = 0, exact or the tanh approximation of the "
        "original code of DiT and PixArt-α",
        "exact",
    )
