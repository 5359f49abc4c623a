"""DiT (arXiv 2212.09748): class labels, adaLN-Zero. With rectified flow it is SiT (arXiv 2401.08740)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_dit.models.spec import ArchitectureSpec, TokenSequence
from megatron_dit.mup.init_rules import FAN_IN, XAVIER, XAVIER_MATRIX, ZERO, normal

if TYPE_CHECKING:
    from megatron_dit.config import ModelConfig


class DiTSpec(ArchitectureSpec):
    name = "dit"
    title = "DiT"
    objectives = ("ddpm", "rectified_flow")
    optional_keys = ("interpolation_scale",)
    init_presets = {
        # As published, under standard parametrization.
        "dit": {
            "time_embed.*.weight": normal(0.02),
            "label_embed.table": normal(0.02),
            "*modulation.weight": ZERO,
            "patch_embed.weight": XAVIER_MATRIX,
            "*.weight": XAVIER,
        },
        # DiT-μP (arXiv 2505.15270): Kaiming normal everywhere, adaLN not zero.
        "dit-mup": {"label_embed.table": normal(1.0), "*modulation.weight": FAN_IN},
    }

    def uses_labels(self, config: ModelConfig) -> bool:
        return True

    def sequences(self, config: ModelConfig, patches: int) -> dict[str, TokenSequence]:
        return {"image": TokenSequence(patches)}


SPEC = DiTSpec()
