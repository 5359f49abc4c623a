"""Finding a checkpoint and restoring an engine from it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from megatron_dit.checkpoint.format import MANIFEST, STATE, CheckpointReader, Torn, unreadable
from megatron_dit.checkpoint.save import checkpoints
from megatron_dit.errors import UserError
from megatron_dit.optimizer import state_keys
from megatron_dit.parallel.topology import agreed, gather

if TYPE_CHECKING:
    from megatron_dit.engine import Engine
    from megatron_dit.parallel.masters import MasterShard


def newest(folder: Path) -> tuple[CheckpointReader | None, list[str]]:
    """The newest whole checkpoint under ``folder`` (None if there is none), and what was wrong with newer ones."""
    torn = []
    for path in reversed(checkpoints(folder)):
        try:
            return CheckpointReader(path), torn
        except Torn as error:
            torn.append(_passed_over(path, str(error)))
    return None, torn


def newest_intact(folder: Path, rank: int, world: int) -> tuple[CheckpointReader | None, list[str]]:
    """As :func:`newest`, by the files' SHA-256 too, each rank reading its share of them. Collective.

    Raises UserError where all are torn: to begin anew would be to throw the run away.
    """
    torn = []
    for path in reversed(gather(agreed(lambda: _listed(folder)))[0]):
        reader, wrong = agreed(lambda path=path: _verified(path, slice(rank, None, world)))
        wrong = next((text for text in gather(wrong) if text is not None), None)
        if wrong is None:
            return reader, torn
        torn.append(_passed_over(path, wrong))
    if torn:
        raise UserError(f"no checkpoint of {folder} is whole: {'; '.join(torn)}: mend one, or set a new run_dir")
    return None, torn


def _listed(folder: Path) -> list[Path]:
    try:
        return checkpoints(folder)
    except OSError as error:
        raise unreadable(error) from None


def _verified(path: Path, share: slice) -> tuple[CheckpointReader | None, str | None]:
    try:
        reader = CheckpointReader(path)
        reader.verify(share)
        return reader, None
    except Torn as error:
        return None, str(error)


def _passed_over(path: Path, why: str) -> str:
    return f"checkpoint {path.name} is torn and passed over ({why})"


def open_checkpoint(path: str | Path) -> CheckpointReader:
    """A checkpoint by its own folder, or the newest of a run's folder, naming torn ones on standard error.

    Raises UserError if there is none.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"checkpoint {path} does not exist: give a run's folder or one of its checkpoints/step_*")
    if (path / MANIFEST).is_file():
        try:
            return CheckpointReader(path)
        except Torn as error:
            raise UserError(f"checkpoint {path} is torn ({error}): use an older one beside it") from None
    reader, torn = newest(path / "checkpoints")
    if reader is None:
        detail = f" ({'; '.join(torn)})" if torn else ""
        raise UserError(f"{path} holds no whole checkpoint{detail}: give a run's folder or a checkpoints/step_*")
    for line in torn:
        print(line, file=sys.stderr)
    return reader


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
