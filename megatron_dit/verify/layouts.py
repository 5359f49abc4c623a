"""The layouts that ``verify`` compares, and a function that runs one of them in its own processes."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dit.config import Config, load_config, save_config
from megatron_dit.data.stream import read_data
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.launcher import run_ranks

logger = logging.getLogger(__name__)

TASK, RESULT = "task.json", "result.json"


@dataclass(frozen=True)
class Layout:
    """A parallel layout, number of accumulated micro-batches and recomputation mode."""

    ranks: int
    tensor: int = 1
    sequence: bool = False
    pipeline: int = 1
    virtual_stages: int = 1
    zero: int = 0
    accumulation: int = 1
    recompute: str = "none"

    def overrides(self, config: Config) -> list[str]:
        """Return the overrides that set this layout in ``config`` and keep its global batch."""
        replicas = self.ranks // (self.tensor * self.pipeline)
        micro_batch = max(1, config.train.global_batch // (replicas * self.accumulation))
        return [
            f"parallel.tensor={self.tensor}",
            f"parallel.sequence={str(self.sequence).lower()}",
            f"parallel.pipeline={self.pipeline}",
            f"parallel.virtual_stages={self.virtual_stages}",
            "parallel.blocks_per_stage=null",
            f"parallel.zero_stage={self.zero}",
            f"train.recompute={self.recompute}",
            "train.recompute_blocks=null",
            f"train.micro_batch={micro_batch}",
        ]


SINGLE, REFERENCE = "dp1", Layout(1)
LAYOUTS = {
    "accumulate4": Layout(1, accumulation=4),
    "dp2-zero0": Layout(2),
    "dp2-zero1": Layout(2, zero=1),
    "dp2-zero2": Layout(2, zero=2),
    "dp2-zero3": Layout(2, zero=3),
    "tp2": Layout(2, tensor=2),
    "tp2-sp": Layout(2, tensor=2, sequence=True),
    "dp2-tp2-zero3": Layout(4, tensor=2, zero=3),
    "pp2": Layout(2, pipeline=2, accumulation=4),
    "pp2-interleaved": Layout(2, pipeline=2, virtual_stages=2, accumulation=4),
    "dp2-pp2-zero1": Layout(4, pipeline=2, zero=1, accumulation=4),
    "tp2-pp2": Layout(4, tensor=2, pipeline=2, accumulation=4),
    "tp2-sp-pp2": Layout(4, tensor=2, sequence=True, pipeline=2, accumulation=4),
    "recompute-selective": Layout(1, recompute="selective"),
    "recompute-full": Layout(1, recompute="full"),
}


def layouts_of(
    path: str, overrides: Sequence[str], names: Sequence[str], steps: int, dtype: str, *, all_of_them: bool
) -> dict[str, tuple[Layout, Config]]:
    """Return the reference and each named layout with its config; log layouts that the model does not support.

    Raises UserError for an unknown name and, if ``all_of_them`` is true, for a layout that the model does not support.
    """
    known = {SINGLE: REFERENCE, **LAYOUTS}
    unknown = next((name for name in names if name not in known), None)
    if unknown is not None:
        raise UserError(f"unknown layout {unknown!r}; expected one or more of {', '.join(known)}")
    # ZeRO stage 0 cannot offload. Transformer Engine computes fp32 products in TF32, whose error exceeds the tolerance.
    forced = [*overrides, f"train.dtype={dtype}", "optimizer.offload=false", "train.fp8=none", "parallel.backend=local"]
    base = load_config(path, forced)
    read_data(base.data)
    found = {}
    for name in dict.fromkeys([SINGLE, *names]):
        layout = known[name]
        try:
            config = load_config(path, [*forced, f"train.steps={steps}", *layout.overrides(base)])
            config.data_parallel(layout.ranks)
            found[name] = layout, config
        except UserError as error:
            if all_of_them or name == SINGLE:
                raise
            logger.info("skipping layout %s: %s", name, error)
    return found


def run_layout(folder: Path, name: str, layout: Layout, config: Config, task: dict[str, Any]) -> Any:
    """Run ``verify.worker`` with a ``task`` in separate processes and return rank 0's result."""
    folder.mkdir()
    save_config(config, folder / "config.yaml")
    (folder / TASK).write_text(json.dumps(task))
    status = run_ranks([str(folder)], layout.ranks, module="megatron_dit.verify.worker", quiet=True)
    if status:
        raise UserError(f"layout {name} ended with exit status {status}; see its message above")
    return json.loads((folder / RESULT).read_text())
