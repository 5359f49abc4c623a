"""MMDiT (Stable Diffusion 3, arXiv 2403.03206): text and image streams with joint attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_dit.models.spec import ArchitectureSpec, TokenSequence

if TYPE_CHECKING:
    from megatron_dit.config import ModelConfig


class MMDiTSpec(ArchitectureSpec):
    name = "mmdit"
    title = "MMDiT"
    objectives = ("rectified_flow",)
    optional_keys = ("position_size",)

    def uses_labels(self, config: ModelConfig) -> bool:
        return False

    def sequences(self, config: ModelConfig, patches: int) -> dict[str, TokenSequence]:
        return {"image": TokenSequence(patches), "text": TokenSequence(config.text_tokens)}

    def bucket_error(self, config: ModelConfig, height: int, width: int) -> str | None:
        side = config.position_size or config.sample_size // config.patch_size
        longest = max(height, width)
        if longest > side * config.patch_size:
            return (
                f"is larger than the position table, which has {side} positions per side; set model.position_size to "
                f"{longest // config.patch_size} or more"
            )
        return None


SPEC = MMDiTSpec()
