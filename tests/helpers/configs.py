"""Small configs for tests."""

from __future__ import annotations

import tempfile
from pathlib import Path

import yaml

from megatron_dit.config import Config, load_config

ARCHITECTURES = ["dit", "mmdit", "pixart", "uvit"]


def small_dict(arch: str = "mmdit", heads: int = 4, base_heads: int = 2, **overrides) -> dict:
    """Return the config of a tiny model on 16 x 16 pixels. ``overrides`` are dotted keys.

    ``uvit-class`` is U-ViT with class labels, ``dit-flow`` DiT with rectified flow (SiT). Each rank uses
    one thread: with such small tensors more threads are slower, and their number may affect rounding.
    """
    arch, _, kind = arch.partition("-")
    condition = {"text_dim": 64, "text_tokens": 23 if arch == "uvit" else 24}
    if arch == "dit" or kind == "class":
        condition = {"num_classes": 24}
    values = {
        "run_dir": "unused",
        "seed": 1,
        "model": {
            "arch": arch, "depth": 3 if arch == "uvit" else 2, "heads": heads, "head_dim": 8, "patch_size": 4,
            "in_channels": 3, "sample_size": 16, **condition,
            "learn_sigma": arch in ("dit", "pixart") and kind != "flow",
        },
        "mup": {"base_heads": base_heads},
        "objective": {"name": "rectified_flow"} if kind == "flow" else {},
        "optimizer": {"lr": 2**-8, "weight_decay": 0.01, "grad_clip": 0.5, "warmup_steps": 3},
        "data": {"path": "unused"},
        "train": {"steps": 10, "global_batch": 8, "micro_batch": 4, "log_every": 1, "threads": 1},
        "ema": {"decay": 0.9},
    }  # fmt: skip
    for key, value in overrides.items():
        *sections, name = key.split(".")
        node = values
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    return values


def write_config(folder: Path, arch: str = "mmdit", **overrides) -> Path:
    """Write ``folder/config.yaml`` with run folder ``folder/run``, and return its path."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(small_dict(arch, **{"run_dir": str(folder / "run"), **overrides})))
    return path


def small(arch: str = "mmdit", heads: int = 4, base_heads: int = 2, **overrides) -> Config:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump(small_dict(arch, heads, base_heads, **overrides)))
        return load_config(path)
