"""Parameter names of the architectures' own codebases, as their ``.bsh`` files have them, and ours."""

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
# Per architecture: pattern -> replacement; None drops what is no parameter of ours (fixed positions).
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
    """Base shapes under our names and with our dimensions; names that are not the authors' stay as they are.

    A patch embedding is a convolution there, (D, C, p, p), and a linear layer here, (D, C * p * p). The null caption
    is a buffer there, so a file may lack it: it has no infinite dimension.
    """
    found: dict[str, Dims] = {}
    for name, dims in base.items():
        ours = rename(name, arch)
        if ours is not None:
            convolution = name.endswith("x_embedder.proj.weight") and len(dims) == 4 and dims[1:] == (None, None, None)
            found[ours] = (dims[0], None) if convolution else dims
    if arch == "pixart" and "x_embedder.proj.weight" in base:
        found.setdefault("null_caption.table", (None, None))
    return found


def rename(name: str, arch: str) -> str | None:
    """Our name of the authors' ``name``, None for fixed positions; another name stays as it is."""
    for pattern, replacement in NAMES.get(arch, {}).items():
        if re.search(pattern, name):
            return None if replacement is None else re.sub(pattern, replacement, name)
    return name
