"""diffusers' counterparts of our models, which compute the same function. U-ViT has none."""

from __future__ import annotations

from typing import Any

from megatron_dit.config import ModelConfig

CLASSES = {"dit": "DiTTransformer2DModel", "mmdit": "SD3Transformer2DModel", "pixart": "PixArtTransformer2DModel"}
MLP_RATIO = 4  # fixed in diffusers' models
POOLED_TEXT = 2048  # width of SD3's pooled text input, which our MMDiT does not have


def diffusers_settings(config: ModelConfig) -> dict[str, Any]:
    """Return the constructor arguments of diffusers' class for ``config.arch``."""
    common = {
        "num_attention_heads": config.heads,
        "attention_head_dim": config.head_dim,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "sample_size": config.sample_size,
        "patch_size": config.patch_size,
    }
    own = {
        "dit": {"num_embeds_ada_norm": config.num_classes, "norm_eps": 1e-6},
        "pixart": {
            "cross_attention_dim": config.width,
            "caption_channels": config.text_dim,
            "interpolation_scale": config.interpolation_scale,
            "use_additional_conditions": False,
        },
        "mmdit": {
            "joint_attention_dim": config.text_dim,
            "caption_projection_dim": config.width,
            "pooled_projection_dim": POOLED_TEXT,
            "pos_embed_max_size": config.position_size or config.sample_size // config.patch_size,
            "qk_norm": "rms_norm",
        },
    }
    return {**common, **own[config.arch]}
