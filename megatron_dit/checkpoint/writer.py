"""Write checkpoints in the background of training.

Each rank writes its own part to a temporary folder. The files are fsynced, and then the folder is renamed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import shutil
import struct
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_dit.checkpoint.listing import (
    INCOMPLETE,
    LATEST,
    PART,
    checkpoints,
    is_created_by_runs,
    remove,
    rename_for_deletion,
    step_folder,
    step_of,
    why_stray,
)
from megatron_dit.checkpoint.manifest import FP8_SCALES, STATE, manifest_of, write_manifest
from megatron_dit.checkpoint.staging import Staging
from megatron_dit.optimizer import has_state, state_keys
from megatron_dit.parallel.collectives import gather, on_all_ranks, raise_on_all_ranks
from megatron_dit.runtime.errors import UserError, writing

if TYPE_CHECKING:
    from megatron_dit.training.engine import Engine

logger = logging.getLogger(__name__)

REMEDY = "free space or change run_dir"


class CheckpointWriter:
    """Writer of an engine's checkpoints, optionally in the background of training.

    ``begin`` copies this rank's part to host buffers and starts a thread that writes them. ``commit`` waits for all
    ranks and renames the folder from ``step_N.part`` to ``step_N``. Writers may share a ``staging`` if all that are
    under way were begun at the same step.
    """

    def __init__(self, engine: Engine, staging: Staging | None = None) -> None:
        self._engine, self.is_rank0 = engine, engine.topology.rank == 0
        self._staging = Staging() if staging is None else staging
        self._thread: threading.Thread | None = None

    @property
    def under_way(self) -> bool:
        """Whether a checkpoint was started and is not committed yet."""
        return self._thread is not None

    @property
    def writing(self) -> bool:
        """Whether this rank is still writing its part."""
        return self._thread is not None and self._thread.is_alive()

    def begin(self, folder: Path, keys: Sequence[str] = ()) -> None:
        """Start writing ``folder/step_N``: masters and all states, or only ``keys``. ``folder`` must exist."""
        keys = keys or (STATE, *state_keys(self._engine.config.ema))
        ranges, about = _local_ranges(self._engine, keys)
        self._start(folder, keys, self._staging.copy(ranges), about)

    def save(self, folder: Path, keys: Sequence[str] = ()) -> Path:
        """Write a checkpoint and return its path, without a background copy. Collective."""
        keys = keys or (STATE, *state_keys(self._engine.config.ema))
        self._start(folder, keys, *_local_ranges(self._engine, keys))
        return self.commit()

    def _start(self, folder: Path, keys: Sequence[str], tensors: dict[str, Tensor], about: dict[str, str]) -> None:
        assert not self.under_way
        self._target = step_folder(folder, self._engine.step)
        self._part = self._target.with_suffix(PART)
        self._manifest = _manifest(self._engine, keys) if self.is_rank0 else {}
        self._written: dict[str, dict[str, Any]] = {}
        self._error: str | None = "its writer ended early"  # the writer replaces this value
        self._thread = threading.Thread(target=self._write, args=(tensors, about), name="checkpoint")
        self._thread.start()

    def _write(self, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
        try:
            self._part.mkdir(exist_ok=True)  # without parents: if a mount was lost, the disk below must not be written
            if tensors:
                path = self._part / f"rank_{self._engine.topology.rank:05d}.safetensors"
                self._written[path.name] = write_safetensors(path, tensors, about)
            self._error = None
        except OSError as error:
            self._error = str(error)

    def commit(self) -> Path:
        """Complete the checkpoint started by ``begin`` and return its path. Collective.

        If any rank failed to write, the partial checkpoint is removed and UserError is raised on every rank.
        """
        assert self._thread is not None
        self._thread.join()
        self._thread = None
        results = gather((self._error, self._written))
        error = next((f" ({error}): {REMEDY}" for error, _ in results if error), None)
        if self.is_rank0 and error is None:
            try:
                files = {name: record for _, written in results for name, record in sorted(written.items())}
                _finish(self._part, self._target, {**self._manifest, "files": files})
            except OSError as caught:
                error = f" ({caught}): {REMEDY}"
            except UserError as caught:
                error = f": {caught}"
        if self.is_rank0 and error is not None:
            shutil.rmtree(self._part, ignore_errors=True)
        raise_on_all_ranks(UserError(f"checkpoint {self._target} could not be written{error}") if error else None)
        return self._target


def save(engine: Engine, folder: Path, keys: Sequence[str] = ()) -> Path:
    """Write ``folder/step_N``, wait for it and return its path. Collective; every rank raises if one cannot write."""
    on_all_ranks(lambda: _make(folder))
    return CheckpointWriter(engine).save(folder, keys)


def _make(folder: Path) -> None:
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


def _manifest(engine: Engine, keys: Sequence[str]) -> dict[str, Any]:
    return manifest_of(
        engine.config,
        engine.params,
        keys,
        engine.topology.world,
        engine.config.parallel,
        step=engine.step,
        num_updates=engine.num_updates,
        data=engine.data,
        bad_samples=dict(engine.bad_samples),
    )


def _finish(part: Path, target: Path, manifest: Mapping[str, Any]) -> None:
    _sync(write_manifest(part, manifest))
    _sync(part)
    old = None
    if os.path.lexists(target):  # e.g. an EMA snapshot that a run resumed at an earlier step writes again
        why = why_stray(target)
        if why is not None:
            raise UserError(f"the path exists and is {why}; move it away")
        old = rename_for_deletion(target)
    part.replace(target)
    _sync(target.parent)
    if old is not None:
        remove(old)
    _write_latest(target)


def set_aside(folder: Path, step: int) -> list[Path]:
    """Rename incomplete checkpoints after ``step`` to ``step_N.incomplete``: the resumed run will write these steps.

    Returns their new paths.
    """
    renamed = []
    for path in checkpoints(folder):
        found = step_of(path)
        if found is not None and found > step:
            names = (path.with_name(path.name + INCOMPLETE + (f".{i}" if i else "")) for i in itertools.count())
            target = next(name for name in names if not os.path.lexists(name))  # never overwrite an earlier one
            renamed.append(path.rename(target))
            logger.info("renamed incomplete checkpoint %s to %s", path, target.name)
    if renamed:
        _write_latest(step_folder(folder, step))
    return renamed


def _write_latest(target: Path) -> None:
    """Write the name of the newest checkpoint to ``latest`` in the same folder."""
    latest, part = target.with_name(LATEST), target.with_name(LATEST + PART)
    if not is_created_by_runs(latest) and os.path.lexists(latest):  # a user's own folder has this name: leave it alone
        return
    part.write_text(target.name + "\n")
    _sync(part)
    part.replace(latest)


def _local_ranges(engine: Engine, keys: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the flat fp32 ranges that this rank writes, by KEY/NAME, and the file's metadata."""
    topology = engine.topology
    ranges, starts = {}, {}
    for number, (name, shard) in enumerate(engine.masters.shards.items()):
        sharded = engine.params[name].dim is not None
        # At stage 0 every data-parallel rank holds all shards: distribute the writing over the ranks.
        replicated = engine.config.parallel.zero_stage == 0
        written_elsewhere = replicated and number % topology.data_size != topology.data_rank
        if (topology.tensor_rank and not sharded) or written_elsewhere:
            continue
        starts[name] = shard.start
        for key in keys:
            if has_state(key, muon=engine.params[name].muon):
                ranges[f"{key}/{name}"] = engine.state_slice(shard, key)
    if STATE in keys and topology.tensor_rank == topology.data_rank == 0:
        ranges.update({f"{FP8_SCALES}/{layer}": scales for layer, scales in engine.fp8_scales().items()})
    return ranges, {"tensor_rank": str(topology.tensor_rank), "starts": json.dumps(starts)}


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> dict[str, Any]:
    """Write flat fp32 tensors to a safetensors file, fsync it, and return its bytes and SHA-256 for the manifest.

    Tensors are written one at a time, because the package's own writer first copies all of them. ``about`` becomes the
    header's metadata. The format is the header's length (8 bytes), the header (JSON) and the tensors' bytes.
    """
    header: dict[str, Any] = {"__metadata__": dict(about)}
    end = 0
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        pieces = (tensor.detach().contiguous().cpu().numpy().data for tensor in tensors.values())
        for piece in itertools.chain((struct.pack("<Q", len(encoded)) + encoded,), pieces):
            file.write(piece)
            digest.update(piece)
        file.flush()
        os.fsync(file.fileno())
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
