"""Reshard a checkpoint into one file per tensor-parallel rank, which turns thousands of files into a few."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from checkpoints_tools.write import write_checkpoint, writing_folder
from megatron_dit.checkpoint.listing import CHECKPOINTS, step_folder
from megatron_dit.checkpoint.reader import CheckpointReader
from megatron_dit.config import save_config
from megatron_dit.runtime.progress import ProgressBar
from megatron_dit.training.run_folder import CONFIG


def reshard(reader: CheckpointReader, out: Path, tensor_size: int) -> None:
    """Write the run folder ``out`` with this one checkpoint, sharded for ``parallel.tensor=tensor_size``.

    Only one full tensor is held in memory at a time. Raise UserError if the model cannot be divided among
    ``tensor_size`` ranks or if ``out`` cannot be written.
    """
    parallel = replace(reader.config.parallel, tensor=tensor_size)
    config = replace(reader.config, run_dir=str(out), parallel=parallel)
    with writing_folder(out) as part:
        write_checkpoint(step_folder(part / CHECKPOINTS, reader.step), reader.manifest, _tensors(reader), tensor_size)
        save_config(config, part / CONFIG)


def _tensors(reader: CheckpointReader) -> Iterator[tuple[str, str, Tensor]]:
    params = reader.manifest["params"]
    with ProgressBar("reshard", len(reader.states) * len(params)) as bar:
        for state in reader.states:
            for name in params:
                if state in reader.states_of(name):
                    yield state, name, reader.full(state, name)
                bar.advance(f"{state}/{name}")
