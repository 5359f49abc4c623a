"""Find a checkpoint and restore an engine from it."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_dit.checkpoint.listing import CHECKPOINTS, Listing, list_checkpoints
from megatron_dit.checkpoint.manifest import MANIFEST, STATE, Incomplete, unreadable
from megatron_dit.checkpoint.reader import CheckpointReader
from megatron_dit.models.build import build_unsharded
from megatron_dit.optimizer import state_keys
from megatron_dit.parallel.collectives import gather, on_all_ranks, on_rank0
from megatron_dit.runtime.errors import UserError

if TYPE_CHECKING:
    from megatron_dit.parallel.masters import MasterShard
    from megatron_dit.training.engine import Engine

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Newest:
    """The newest intact checkpoint of a folder, and the entries that were skipped to find it."""

    reader: CheckpointReader | None
    listing: Listing
    incomplete: dict[Path, str]  # newer checkpoints than the intact one, each with the reason why it is incomplete

    @property
    def incomplete_notes(self) -> list[str]:
        """One line per incomplete checkpoint."""
        return [f"skipping incomplete checkpoint {path.name} ({why})" for path, why in self.incomplete.items()]

    @property
    def notes(self) -> list[str]:
        """One line about all strays, and one per incomplete checkpoint."""
        strays = [] if self.listing.stray_note is None else [self.listing.stray_note]
        return strays + self.incomplete_notes


def newest(folder: Path, *, verify: bool = True) -> Newest:
    """Find the newest intact checkpoint of ``folder``.

    ``verify`` compares the SHA-256 of the files; if it is false, only their sizes are checked.
    """
    listing = list_checkpoints(folder)
    incomplete = {}
    for path in reversed(listing.checkpoints):
        reader, reason = _opened(path, slice(None) if verify else slice(0), show=True)
        if reason is None:
            return Newest(reader, listing, incomplete)
        incomplete[path] = reason
    return Newest(None, listing, incomplete)


def newest_intact(folder: Path, rank: int, world: int) -> CheckpointReader | None:
    """Return the newest intact checkpoint, or None; log skipped entries. Collective: each rank verifies some files.

    Raises UserError if there are checkpoints but none is intact: starting from step 0 would discard the run.
    """
    listing = on_rank0(lambda: list_checkpoints(folder))
    found = Newest(None, listing, {})
    for path in reversed(listing.checkpoints):
        reader, reason = on_all_ranks(lambda path=path: _opened(path, slice(rank, None, world)))
        reason = next((text for text in gather(reason) if text is not None), None)
        if reason is None:
            found = replace(found, reader=reader)
            break
        found.incomplete[path] = reason
    if found.reader is None and found.incomplete:
        reasons = "; ".join(found.incomplete_notes)
        raise UserError(f"no checkpoint in {folder} is intact ({reasons}); repair one or set a new run_dir")
    for line in found.notes:
        logger.info(line)
    return found.reader


def _opened(path: Path, files: slice, *, show: bool = False) -> tuple[CheckpointReader | None, str | None]:
    """Return the checkpoint with a slice of its files verified, or the reason why it is incomplete."""
    try:
        reader = CheckpointReader(path)
        reader.verify(files, show=show)
        return reader, None
    except Incomplete as error:
        return None, str(error)


def open_checkpoint(path: str | Path, *, verify: bool = True) -> CheckpointReader:
    """Return the checkpoint in folder ``path``, or the newest intact checkpoint if ``path`` is a run's folder.

    For a run, newer incomplete checkpoints are skipped with a warning. The folder of a single checkpoint may have any
    name. ``verify`` has the same meaning as in :func:`newest`. Raises UserError if there is no checkpoint, or if the
    given one is incomplete.
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
    found = newest(path / CHECKPOINTS, verify=verify)
    if found.reader is None:
        detail = f" ({'; '.join(found.notes)})" if found.notes else ""
        raise UserError(
            f"{path} contains no complete checkpoint{detail}; give a run's folder or one of its checkpoints/step_*"
        )
    for line in found.notes:
        logger.warning(line)
    return found.reader


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

    with reader.keep_files_open():
        engine.write_state((STATE, *state_keys(engine.config.ema)), range_of)
        if engine.config.train.fp8 == "delayed":
            engine.load_fp8_scales(reader.fp8_scales())
    engine.resume_at(reader.step, reader.manifest["num_updates"])
    engine.bad_samples.update(reader.manifest["bad_samples"])
