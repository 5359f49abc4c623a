"""Find a checkpoint and restore an engine from it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_dit.checkpoint.listing import CHECKPOINTS, list_checkpoints
from megatron_dit.checkpoint.manifest import MANIFEST, STATE, Incomplete, unreadable
from megatron_dit.checkpoint.reader import CheckpointReader
from megatron_dit.models.build import build_unsharded
from megatron_dit.optimizer import state_keys
from megatron_dit.parallel.topology import gather, on_all_ranks
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.text import printable

if TYPE_CHECKING:
    from megatron_dit.parallel.masters import MasterShard
    from megatron_dit.training.engine import Engine


def newest(folder: Path, *, verify: bool = True) -> tuple[CheckpointReader | None, list[str]]:
    """Return the newest intact checkpoint of ``folder``, or None, and messages about entries that were skipped.

    ``verify`` compares the SHA-256 of the files; if it is false, only their sizes are checked.
    """
    listing = list_checkpoints(folder)
    notes = listing.notes
    for path in reversed(listing.checkpoints):
        reader, wrong = _opened(path, slice(None) if verify else slice(0), show=True)
        if wrong is None:
            return reader, notes
        notes.append(_skipped(path, wrong))
    return None, notes


def newest_intact(folder: Path, rank: int, world: int) -> tuple[CheckpointReader | None, list[str]]:
    """Return the result of :func:`newest`, with the verification of the files split over the ranks. Collective.

    Raises UserError if there are checkpoints but none is intact: starting from step 0 would discard the run.
    """
    listing = gather(on_all_ranks(lambda: list_checkpoints(folder) if rank == 0 else None))[0]
    assert listing is not None
    skipped = []
    for path in reversed(listing.checkpoints):
        reader, wrong = on_all_ranks(lambda path=path: _opened(path, slice(rank, None, world)))
        wrong = next((text for text in gather(wrong) if text is not None), None)
        if wrong is None:
            return reader, [*listing.notes, *skipped]
        skipped.append(_skipped(path, wrong))
    if skipped:
        raise UserError(f"no checkpoint in {folder} is intact ({'; '.join(skipped)}); repair one or set a new run_dir")
    return None, listing.notes


def _opened(path: Path, share: slice, *, show: bool = False) -> tuple[CheckpointReader | None, str | None]:
    """Return the checkpoint, or the reason why it is incomplete."""
    try:
        reader = CheckpointReader(path)
        reader.verify(share, show=show)
        return reader, None
    except Incomplete as error:
        return None, str(error)


def _skipped(path: Path, why: str) -> str:
    return f"skipping incomplete checkpoint {path.name} ({why})"


def open_checkpoint(path: str | Path, *, verify: bool = True) -> CheckpointReader:
    """Return the checkpoint in folder ``path``, or the newest intact checkpoint if ``path`` is a run's folder.

    For a run, newer incomplete checkpoints are skipped and reported on standard error. The folder of a single
    checkpoint may have any name. ``verify`` as in :func:`newest`. Raises UserError if there is no checkpoint, or if
    the given one is incomplete.
    """
    path = Path(path)
    try:
        if not path.is_dir():
            wrong = "is not a folder" if path.exists() else "does not exist"
            raise UserError(f"checkpoint {path} {wrong}; give a run's folder or one of its checkpoints/step_*")
    except OSError as error:
        raise unreadable(error) from None
    if os.path.lexists(path / MANIFEST):
        reader, wrong = _opened(path, slice(None) if verify else slice(0), show=True)
        if reader is None:
            raise UserError(f"checkpoint {path} is incomplete ({wrong}); use another one")
        return reader
    reader, notes = newest(path / CHECKPOINTS, verify=verify)
    if reader is None:
        detail = f" ({'; '.join(notes)})" if notes else ""
        raise UserError(f"{path} contains no complete checkpoint{detail}; give a run's folder or a checkpoints/step_*")
    for line in notes:
        print(printable(line), file=sys.stderr)
    return reader


def check_model(reader: CheckpointReader) -> None:
    """Raise UserError if a checkpoint's config describes another model than its tensors. Allocates no memory."""
    model, held = reader.config.model, len(reader.manifest["params"])
    if model.depth > held:
        raise UserError(f"{reader.folder} contains {held} parameters, but its config has model.depth={model.depth}")
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in build_unsharded(model).named_parameters()}
    reader.check(shapes)


def restore(engine: Engine, reader: CheckpointReader) -> None:
    """Load masters, moments, averages and step into an engine of any layout. Collective.

    The μP multipliers of lr and weight decay are computed from the config and compared with the checkpoint's.
    Raises UserError if they or the parameters differ.
    """
    reader.check({name: param.shape for name, param in engine.params.items()})
    reader.check_mup(engine.params)
    topology = engine.topology

    def range_of(key: str, name: str, shard: MasterShard) -> Tensor:
        return reader.part(key, name, topology.tensor_rank, topology.tensor_size, shard.start, shard.numel)

    engine.write_state((STATE, *state_keys(engine.config.ema)), range_of)
    engine.resume_at(reader.step, reader.manifest["num_updates"])
    engine.bad_samples.update(reader.manifest["bad_samples"])
