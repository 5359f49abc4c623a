"""Random models saved by diffusers itself."""

from __future__ import annotations

import torch

from checkpoints_tools.__main__ import main
from tests.helpers.conversion import CLASSES
from tests.helpers.output import one_line

COMMON = {
    "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 3, "num_layers": 3, "sample_size": 8,
    "patch_size": 2,
}  # fmt: skip


SETTINGS = {
    "dit": {"out_channels": 6, "num_embeds_ada_norm": 10, "norm_eps": 1e-6},
    "pixart": {
        "out_channels": 6, "cross_attention_dim": 16, "caption_channels": 64, "interpolation_scale": 2,
        "use_additional_conditions": False,
    },
    "mmdit": {
        "out_channels": 3, "joint_attention_dim": 64, "caption_projection_dim": 16, "pooled_projection_dim": 20,
        "pos_embed_max_size": 6, "qk_norm": "rms_norm",
    },
    "uvit": {"text_dim": 64, "text_tokens": 24},
}  # fmt: skip


def foreign(folder, arch, keep_clip=False, **changes):
    """Save a random model with diffusers and return its folder."""
    model = CLASSES[arch](**{**COMMON, **SETTINGS[arch], **changes})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.1 if p.ndim == 1 else p[0].numel() ** -0.5))
            if name.endswith(("norm_q.weight", "norm_k.weight")):
                p.add_(1)
            if "text_embedder" in name and not keep_clip:
                p.zero_()
        if arch == "dit":
            for block in model.transformer_blocks[1:]:
                block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    model.save_pretrained(folder)
    return folder


def refused(capsys, *words):
    """Run ``convert``, check that it fails with a one-line error, and return the line."""
    assert main(["convert", *map(str, words)]) == 2
    return one_line(capsys)
