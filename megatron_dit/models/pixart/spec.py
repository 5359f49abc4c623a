"""PixArt-α (arXiv 2310.00426): adaLN-single and masked cross-attention to T5 features."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_dit.models.spec import ArchitectureSpec, TokenSequence
from megatron_dit.mup.init_rules import FAN_IN, XAVIER, XAVIER_MATRIX, ZERO, normal

if TYPE_CHECKING:
    from megatron_dit.config import ModelConfig


class PixArtSpec(ArchitectureSpec):
    name = "pixart"
    title = "PixArt-α"
    objectives = ("ddpm",)
    optional_keys = ("interpolation_scale", "train_null_caption")
    init_presets = {
        # As published, under standard parametrization.
        "pixart": {
            "time_embed.*.weight": normal(0.02),
            "time_modulation.weight": normal(0.02),
            "text_embed.*.weight": normal(0.02),
            "*modulation.table": FAN_IN,
            "*cross_out.weight": ZERO,
            "patch_embed.weight": XAVIER_MATRIX,
            "*.weight": XAVIER,
        },
        # PixArt-α-μP (arXiv 2505.15270).
        "pixart-mup": {
            "time_*.weight": normal(0.02),
            "text_embed.*.weight": normal(0.02),
            "*cross_out.weight": ZERO,
            "*.weight": XAVIER,
        },
    }

    def uses_labels(self, config: ModelConfig) -> bool:
        return False

    def sequences(self, config: ModelConfig, patches: int) -> dict[str, TokenSequence]:
        return {"image": TokenSequence(patches), "text": TokenSequence(config.text_tokens, sharded=False)}


SPEC = PixArtSpec()
