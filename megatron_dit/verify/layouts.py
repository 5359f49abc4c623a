"""The layouts that ``verify`` compares, and the config of each."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_dit.config import Config, load_config
from megatron_dit.data.stream import read_data
from megatron_dit.runtime.errors import UserError
from megatron_dit.verify import conditions

logger = logging.getLogger(__name__)


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
    offload: bool = False

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
            f"optimizer.offload={str(self.offload).lower()}",
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
    "dp4-zero1": Layout(4, zero=1),
    "dp4-zero3": Layout(4, zero=3),
    "tp2": Layout(2, tensor=2),
    "tp2-sp": Layout(2, tensor=2, sequence=True),
    "dp2-tp2-zero3": Layout(4, tensor=2, zero=3),
    "dp2-tp2-sp-zero3": Layout(4, tensor=2, sequence=True, zero=3),
    "pp2": Layout(2, pipeline=2, accumulation=4),
    "pp2-interleaved": Layout(2, pipeline=2, virtual_stages=2, accumulation=4),
    "dp2-pp2-zero1": Layout(4, pipeline=2, zero=1, accumulation=4),
    "tp2-pp2": Layout(4, tensor=2, pipeline=2, accumulation=4),
    "tp2-sp-pp2": Layout(4, tensor=2, sequence=True, pipeline=2, accumulation=4),
    "tp2-pp2-interleaved": Layout(4, tensor=2, pipeline=2, virtual_stages=2, accumulation=4),
    "recompute-selective": Layout(1, recompute="selective"),
    "recompute-full": Layout(1, recompute="full"),
}
OWN, OWN_BF16 = "own", "own-bf16"  # the config's own layout, scaled down, in fp32 and in bf16


@dataclass(frozen=True)
class Row:
    """A layout with its config, and the name of the single process that it is compared with (itself: a reference)."""

    layout: Layout
    config: Config
    reference: str


@dataclass(frozen=True)
class Selection:
    """References and layouts to run, in this order, and what of the user's config they do not cover."""

    rows: dict[str, Row]
    uncovered: list[str]

    @property
    def references(self) -> list[str]:
        return [name for name, row in self.rows.items() if row.reference == name]


def ranks_at_hand() -> int:
    """Return the largest number of ranks of a layout: the number of GPUs, or four or more on a machine without."""
    return torch.cuda.device_count() or max(4, os.cpu_count() or 1)


def own_layout(config: Config, ranks: int) -> tuple[Layout, list[str]]:
    """Return the config's layout with at most two ranks for each dimension, and what of it is not covered."""
    parallel, train = config.parallel, config.train
    tensor, pipeline = min(2, parallel.tensor), min(2, parallel.pipeline)
    replicas = 2 if 2 * tensor * pipeline <= ranks else 1
    layout = Layout(
        ranks=replicas * tensor * pipeline,
        tensor=tensor,
        sequence=parallel.sequence,
        pipeline=pipeline,
        virtual_stages=min(2, parallel.virtual_stages),
        zero=parallel.zero_stage,
        accumulation=4 if pipeline > 1 else 2 if train.micro_batch < train.global_batch else 1,
        recompute=train.recompute,
        offload=config.optimizer.offload,
    )
    scaled = [
        f"parallel.{name}={value} (2 are)"
        for name, value in (
            ("tensor", parallel.tensor),
            ("pipeline", parallel.pipeline),
            ("virtual_stages", parallel.virtual_stages),
        )
        if value > 2
    ]
    if replicas == 1:
        scaled.append(f"data parallelism with this layout (it needs {2 * tensor * pipeline} ranks, at hand: {ranks})")
    return layout, scaled


def select(
    path: str,
    overrides: Sequence[str],
    names: Sequence[str] | None,
    steps: int,
    dtype: str,
    default: Sequence[str] = (*LAYOUTS, OWN, OWN_BF16),
) -> Selection:
    """Return the rows of the named layouts, or of those of ``default`` that the model and this machine support.

    Unsupported layouts of ``default`` are logged. OWN_BF16 is among them only for a config in bf16. Raises UserError
    for an unknown name, and for a named layout that is not supported.
    """
    user, ranks = load_config(path, overrides), ranks_at_hand()
    layout, uncovered = own_layout(user, ranks)
    known = {SINGLE: REFERENCE, **LAYOUTS, OWN: layout, OWN_BF16: layout}
    unknown = next((name for name in names or () if name not in known), None)
    if unknown is not None:
        raise UserError(f"unknown layout {unknown!r}; expected one or more of {', '.join(known)}")
    read_data(user.data)
    if user.train.dtype == "fp32" or dtype == "bf16":
        default = [name for name in default if name != OWN_BF16]
    rows: dict[str, Row] = {}
    for name in dict.fromkeys(default if names is None else names):
        try:
            if known[name].ranks > ranks:
                raise UserError(f"layout {name} needs {known[name].ranks} GPUs, but this machine has {ranks}")
            found = rows_of(path, overrides, name, known[name], steps, "bf16" if name == OWN_BF16 else dtype)
        except UserError as error:
            if names is not None:
                raise
            logger.info("skipping layout %s: %s", name, error)
            uncovered += [f"layout {name} ({error})"] if name in (OWN, OWN_BF16) else []
        else:
            rows.update(found)
    if user.train.fp8 != "none":
        uncovered.append(f"train.fp8={user.train.fp8} and Transformer Engine's layers")
    elif user.parallel.backend == "te":
        uncovered.append("parallel.backend=te: Megatron-core's layers are compared")
    return Selection(dict(sorted(rows.items(), key=lambda item: item[1].reference != item[0])), uncovered)


def rows_of(path: str, overrides: Sequence[str], name: str, layout: Layout, steps: int, dtype: str) -> dict[str, Row]:
    """Return the row of a layout and that of its reference.

    In fp32 this is the single process with the whole batch. In bf16 it has the layout's micro-batches: only then are
    the gradients of a layout without tensor parallelism equal up to fp32 rounding.
    """
    user = load_config(path, [*overrides, "optimizer.offload=false"])
    forced = [*overrides, *conditions.overrides(user, steps, dtype)]

    def config(layout: Layout) -> Config:
        found = load_config(path, [*forced, *layout.overrides(user)])
        found.data_parallel(layout.ranks)
        return found

    own = config(layout)
    if dtype == "fp32":
        reference, single = SINGLE, REFERENCE
    else:
        accumulation = user.train.global_batch // own.train.micro_batch
        single = Layout(1, accumulation=accumulation)
        reference = SINGLE if accumulation == 1 else f"{SINGLE}-accumulate{accumulation}"
        reference = f"{reference}-bf16"
    rows = {reference: Row(single, config(single), reference)}
    return rows if name == SINGLE else {**rows, name: Row(layout, own, reference)}
