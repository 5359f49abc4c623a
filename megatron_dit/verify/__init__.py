"""``megatron-dit verify``: compare layouts with a single process, in the first steps and across checkpoints."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from megatron_dit.config import load_config
from megatron_dit.verify.layout_parity import Comparison, Trace, compare, disturbed, first_steps, verify
from megatron_dit.verify.layouts import FOUND, LAYOUTS, REFERENCE, TASK, Layout
from megatron_dit.verify.resume_parity import Pair, resumed, verify_resume

__all__ = [
    "LAYOUTS",
    "REFERENCE",
    "Comparison",
    "Layout",
    "Pair",
    "Trace",
    "compare",
    "disturbed",
    "first_steps",
    "verify",
    "verify_layout",
    "verify_resume",
]


def verify_layout(folder: Path) -> None:
    """Run one rank of one layout. Started by :func:`verify` and :func:`verify_resume`."""
    config, task = load_config(folder / "config.yaml"), json.loads((folder / TASK).read_text())
    result = resumed(config, folder, **task) if task else first_steps(config, folder / "checkpoints")
    if result is not None:
        (folder / FOUND).write_text(json.dumps(asdict(result)))
