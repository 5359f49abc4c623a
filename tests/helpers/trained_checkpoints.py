"""Checkpoints written after two training steps in several layouts."""

from __future__ import annotations

from tests.helpers.configs import small
from tests.helpers.engine import batch, start

LAYOUTS = {
    "one": (1, {}),
    "dp2-zero0": (2, {}),
    "dp2-zero1-bf16": (2, {"parallel.zero_stage": 1, "train.dtype": "bf16"}),
    "dp2-zero2": (2, {"parallel.zero_stage": 2}),
    "dp2-zero3": (2, {"parallel.zero_stage": 3}),
    "tp2-sp": (2, {"parallel.tensor": 2, "parallel.sequence": True}),
    "tp2-pp2": (4, {"parallel.tensor": 2, "parallel.pipeline": 2, "train.micro_batch": 2}),
    "dp2-pp2-zero1": (4, {"parallel.pipeline": 2, "parallel.zero_stage": 1, "train.micro_batch": 2}),
    "dp2-tp2-zero3": (4, {"parallel.tensor": 2, "parallel.zero_stage": 3}),
}


def save_after(arch, layout, folder):
    from pathlib import Path

    from megatron_dit.checkpoint.writer import save

    config = small(arch, **layout)
    engine = start(config)
    for step in range(2):
        engine.train_step(batch(config, engine.topology, step))
    save(engine, Path(folder))
