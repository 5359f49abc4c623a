"""Finding a checkpoint and restoring an engine from it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_dit.checkpoint.format import CheckpointReader
from megatron_dit.checkpoint.listing import CHECKPOINTS, list_checkpoints
from megatron_dit.checkpoint.manifest import MANIFEST, STATE, Torn, unreadable
from megatron_dit.errors import UserError
from megatron_dit.models import build_unsharded
from megatron_dit.optimizer import state_keys
from megatron_dit.parallel.topology import agreed, gather
from megatron_dit.runtime.text import printable

if TYPE_CHECKING:
    from megatron_dit.engine import Engine
    from megatron_dit.parallel.masters import MasterShard


def newest(folder: Path, *, verify: bool = True) -> tuple[CheckpointReader | None, list[str]]:
    """Return the newest intact checkpoint of ``folder`` (None if there is none), and messages about what is not one.

    ``verify`` reads its files to compare their SHA-256; otherwise one whose files have the right sizes is taken.
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
    """As :func:`newest`, each rank reading its share of the files. Collective.

    Raises UserError if there are checkpoints and none is intact: to start from step 0 would throw the run away.
    """
    listing = gather(agreed(lambda: list_checkpoints(folder) if rank == 0 else None))[0]
    assert listing is not None
    skipped = []
    for path in reversed(listing.checkpoints):
        reader, wrong = agreed(lambda path=path: _opened(path, slice(rank, None, world)))
        wrong = next((text for text in gather(wrong) if text is not None), None)
        if wrong is None:
            return reader, [*listing.notes, *skipped]
        skipped.append(_skipped(path, wrong))
    if skipped:
        raise UserError(f"no checkpoint of {folder} is intact: {'; '.join(skipped)}: repair one, or set a new run_dir")
    return None, listing.notes


def _opened(path: Path, share: slice, *, show: bool = False) -> tuple[CheckpointReader | None, str | None]:
    """Return the checkpoint, or why it is incomplete."""
    try:
        reader = CheckpointReader(path)
        reader.verify(share, show=show)
        return reader, None
    except Torn as error:
        return None, str(error)


def _skipped(path: Path, why: str) -> str:
    return f"skipping incomplete checkpoint {path.name} ({why})"


def open_checkpoint(path: str | Path, *, verify: bool = True) -> CheckpointReader:
    """Return a checkpoint by its own folder, or the newest intact one of a run's folder.

    Prints to standard error which newer ones of a run are incomplete and skipped. A checkpoint given by its own folder
    is taken whatever that is called, and refused if it is incomplete. ``verify`` as in :func:`newest`. Raises UserError
    if there is none.
    """
    path = Path(path)
    try:
        if not path.is_dir():
            wrong = "is not a folder" if path.exists() else "does not exist"
            raise UserError(f"checkpoint {path} {wrong}: give a run's folder or one of its checkpoints/step_*")
    except OSError as error:
        raise unreadable(error) from None
    if os.path.lexists(path / MANIFEST):
        reader, wrong = _opened(path, slice(None) if verify else slice(0), show=True)
        if reader is None:
            raise UserError(f"checkpoint {path} is incomplete ({wrong}): use another one")
        return reader
    reader, notes = newest(path / CHECKPOINTS, verify=verify)
    if reader is None:
        detail = f" ({'; '.join(notes)})" if notes else ""
        raise UserError(f"{path} holds no complete checkpoint{detail}: give a run's folder or a checkpoints/step_*")
    for line in notes:
        print(printable(line), file=sys.stderr)
    return reader


def check_model(reader: CheckpointReader) -> None:
    """Raise UserError if the config describes another model than the one whose tensors are held. Allocates nothing."""
    model, held = reader.config.model, len(reader.manifest["params"])
    if model.depth > held:
        raise UserError(f"{reader.folder} holds {held} parameters, but its config has model.depth={model.depth}")
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in build_unsharded(model).named_parameters()}
    reader.check(shapes)


def restore(engine: Engine, reader: CheckpointReader) -> None:
    """Masters, moments, averages and step, into whatever layout the engine has. Collective.

    μP's ratios of lr and weight decay are made anew from the config, and compared with those it was trained with.
    """
    reader.check({name: param.shape for name, param in engine.params.items()})
    reader.check_mup(engine.params)
    topology = engine.topology

    def range_of(key: str, name: str, shard: MasterShard) -> Tensor:
        return reader.part(key, name, topology.tensor_rank, topology.tensor_size, shard.start, shard.numel)

    engine.fill((STATE, *state_keys(engine.config.train)), range_of)
    engine.resume_at(reader.step, reader.manifest["adam_steps"])
    engine.bad_samples.update(reader.manifest["bad_samples"])
