"""U-ViT (arXiv 2209.12152): time, condition and patches as tokens of one sequence, with long skips."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_dit.models.spec import ArchitectureSpec, TokenSequence
from megatron_dit.mup.init_rules import FAN_IN, ZERO, normal
from megatron_dit.runtime.errors import UserError

if TYPE_CHECKING:
    from megatron_dit.config import ModelConfig


def sequence_length(config: ModelConfig, patches: int | None = None) -> int:
    """Return the number of tokens: time, condition and ``patches`` (default: those of ``sample_size``)."""
    if patches is None:
        patches = (config.sample_size // config.patch_size) ** 2
    return 1 + (1 if config.num_classes else config.text_tokens) + patches


class UViTSpec(ArchitectureSpec):
    name = "uvit"
    title = "U-ViT"
    objectives = ("ddpm",)
    fixed_size = True
    init_presets = {
        # As published, under standard parametrization.
        "uvit": {
            "patch_embed.weight": FAN_IN,
            "head.conv.weight": FAN_IN,
            "label_embed.table": normal(1.0),
            "*.weight": normal(0.02),
        },
        # Every residual branch starts at zero, as with the gates of adaLN-Zero.
        "uvit-zero": {"blocks.*.out.weight": ZERO, "blocks.*.fc2.weight": ZERO},
    }

    def uses_labels(self, config: ModelConfig) -> bool:
        return config.num_classes > 0

    def sequences(self, config: ModelConfig, patches: int) -> dict[str, TokenSequence]:
        return {"joint": TokenSequence(sequence_length(config, patches))}

    def check(self, config: ModelConfig) -> None:
        super().check(config)
        if config.depth % 2 == 0:
            raise UserError(
                f"model.depth={config.depth}: expected an odd number for uvit, whose middle block has no skip"
            )


SPEC = UViTSpec()
