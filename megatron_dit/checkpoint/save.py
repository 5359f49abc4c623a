"""Writing checkpoints: each rank its share, aside, fsynced, then renamed into place."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_dit.checkpoint.format import FORMAT, MANIFEST, STATE
from megatron_dit.errors import UserError
from megatron_dit.mup.init import forward_multipliers
from megatron_dit.optimizer import state_keys
from megatron_dit.parallel.topology import agree

if TYPE_CHECKING:
    from megatron_dit.engine import Engine

PREFIX = "step_"


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"{PREFIX}{step:08d}"


def save(engine: Engine, folder: Path, keys: Sequence[str] = ()) -> Path:
    """Write ``folder/step_N``: masters and every state, or ``keys`` of them alone.

    Collective; every rank raises if one cannot write.
    """
    keys = keys or (STATE, *state_keys(engine.config.train))
    target = step_folder(folder, engine.step)
    part = target.with_suffix(".part")
    first = engine.topology.rank == 0
    _together(part, _make_folder if first else None, part)
    _together(part, _write_share, engine, part, keys)
    _together(part, _commit if first else None, engine, part, target, keys)
    return target


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints, and what unfinished saves left."""
    whole = sorted(path for path in folder.glob(PREFIX + "*") if path.suffix != ".part")
    for path in [*whole[:-keep], *folder.glob(PREFIX + "*.part")]:
        shutil.rmtree(path, ignore_errors=True)


def _together(part: Path, write: Callable[..., None] | None, *arguments: Any) -> None:
    """Run ``write`` where given; every rank waits for the others and raises if one of them could not."""
    error = None
    try:
        if write is not None:
            write(*arguments)
    except OSError as caught:
        error = UserError(f"checkpoint {part} cannot be written ({caught}): free space or change run_dir")
    agree(error)


def _make_folder(part: Path) -> None:
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)


def _commit(engine: Engine, part: Path, target: Path, keys: Sequence[str]) -> None:
    _write_manifest(engine, part, keys)
    shutil.rmtree(target, ignore_errors=True)
    part.replace(target)
    _sync(target.parent)


def _write_share(engine: Engine, part: Path, keys: Sequence[str]) -> None:
    topology = engine.topology
    views, starts = {}, {}
    for number, (name, shard) in enumerate(engine.masters.shards.items()):
        sharded = engine.params[name].dim is not None
        whole = engine.config.parallel.zero_stage == 0  # every data-parallel rank holds all of it: take turns
        if (topology.tensor_rank and not sharded) or (whole and number % topology.data_size != topology.data_rank):
            continue
        starts[name] = shard.start
        for key in keys:
            views[f"{key}/{name}"] = engine.view(shard, key)
    if not views:
        return
    path = part / f"rank_{topology.rank:05d}.safetensors"
    write_safetensors(path, views, {"tensor_rank": str(topology.tensor_rank), "starts": json.dumps(starts)})
    _sync(path)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Flat fp32 tensors to a safetensors file, one at a time: the package's own writer first copies them all.

    The format: the header's length (8 bytes), the header (JSON), the tensors' bytes.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in tensors.values():
            file.write(tensor.detach().contiguous().cpu().numpy().data)


def _write_manifest(engine: Engine, part: Path, keys: Sequence[str]) -> None:
    params = {
        name: {"shape": param.shape, "dim": param.dim, "pieces": param.pieces, "role": param.role}
        for name, param in engine.params.items()
    }
    manifest = {
        "format": FORMAT,
        "step": engine.step,
        "adam_steps": engine.adam_steps,
        "states": list(keys),
        "data": engine.data,
        "bad_samples": engine.bad_samples,
        "config": asdict(engine.config),
        "layout": {"world": engine.topology.world, **asdict(engine.config.parallel)},
        "params": params,
        "multipliers": forward_multipliers(engine.params),
        "files": {path.name: path.stat().st_size for path in sorted(part.glob("rank_*.safetensors"))},
    }
    path = part / MANIFEST
    path.write_text(json.dumps(manifest))
    _sync(path)
    _sync(part)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
