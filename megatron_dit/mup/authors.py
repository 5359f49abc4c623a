"""Map parameter names of the original DiT and PixArt-α code, as used in their ``.bsh`` files, to ours."""

from __future__ import annotations

import re
from collections.abc import Mapping

Dims = tuple[int | None, ...]

_BLOCK = r"^blocks\.(\d+)\."
_DIT = {
    r"^x_embedder\.proj\.": "patch_embed.",
    r"^t_embedder\.mlp\.0\.": "time_embed.fc1.",
    r"^t_embedder\.mlp\.2\.": "time_embed.fc2.",
    _BLOCK + r"attn\.qkv\.": r"blocks.\1.qkv.",
    _BLOCK + r"attn\.proj\.": r"blocks.\1.out.",
    r"^final_layer\.linear\.": "head.linear.",
}
# Per architecture: pattern -> replacement; None drops tensors that are not parameters here (fixed positions).
NAMES: dict[str, dict[str, str | None]] = {
    "dit": {
        **_DIT,
        r"^y_embedder\.embedding_table\.weight$": "label_embed.table",
        _BLOCK + r"adaLN_modulation\.1\.": r"blocks.\1.modulation.",
        r"^final_layer\.adaLN_modulation\.1\.": "head.modulation.",
        r"^pos_embed$": None,
    },
    "pixart": {
        **_DIT,
        r"^t_block\.1\.": "time_modulation.",
        r"^y_embedder\.y_proj\.": "text_embed.",
        r"^y_embedder\.y_embedding$": "null_caption.table",
        _BLOCK + r"cross_attn\.q_linear\.": r"blocks.\1.cross_q.",
        _BLOCK + r"cross_attn\.kv_linear\.": r"blocks.\1.cross_kv.",
        _BLOCK + r"cross_attn\.proj\.": r"blocks.\1.cross_out.",
        _BLOCK + r"scale_shift_table$": r"blocks.\1.modulation.table",
        r"^final_layer\.scale_shift_table$": "head.modulation.table",
        r"^pos_embed$": None,
    },
}


def to_ours(base: Mapping[str, Dims], arch: str) -> dict[str, Dims]:
    """Convert base shapes to our names and dimensions; unknown names are kept.

    The patch embedding is a convolution (D, C, p, p) in the original code and a linear layer (D, C * p * p) here. The
    null caption is a buffer in the original code, so a file may not contain it; it has no infinite dimension.
    """
    converted: dict[str, Dims] = {}
    for name, dims in base.items():
        ours = rename(name, arch)
        if ours is not None:
            convolution = name.endswith("x_embedder.proj.weight") and len(dims) == 4 and dims[1:] == (None, None, None)
            converted[ours] = (dims[0], None) if convolution else dims
    if arch == "pixart" and "x_embedder.proj.weight" in base:
        converted.setdefault("null_caption.table", (None, None))
    return converted


def rename(name: str, arch: str) -> str | None:
    """Return our name for the original ``name``, None for fixed positions; unknown names are returned unchanged."""
    for pattern, replacement in NAMES.get(arch, {}).items():
        if re.search(pattern, name):
            return None if replacement is None else re.sub(pattern, replacement, name)
    return name
