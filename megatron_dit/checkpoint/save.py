"""Writing checkpoints: each rank its share, aside, fsynced, then renamed into place."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from megatron_dit.checkpoint.format import FORMAT, MANIFEST, STATE
from megatron_dit.errors import UserError
from megatron_dit.mup.init import forward_multipliers
from megatron_dit.optimizer import STATE_KEYS
from megatron_dit.parallel.topology import agree

if TYPE_CHECKING:
    from megatron_dit.engine import Engine

PREFIX = "step_"


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"{PREFIX}{step:08d}"


def save(engine: Engine, folder: Path) -> Path:
    """Write ``folder/step_N`` of the engine's state. Collective; every rank raises if one cannot write."""
    target = step_folder(folder, engine.step)
    part = target.with_suffix(".part")
    first = engine.topology.rank == 0
    _together(part, _make_folder if first else None, part)
    _together(part, _write_share, engine, part)
    _together(part, _commit if first else None, engine, part, target)
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
    except (OSError, SafetensorError) as caught:
        error = UserError(f"checkpoint {part} cannot be written ({caught}): free space or change run_dir")
    agree(error)


def _make_folder(part: Path) -> None:
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)


def _commit(engine: Engine, part: Path, target: Path) -> None:
    _write_manifest(engine, part)
    shutil.rmtree(target, ignore_errors=True)
    part.replace(target)
    _sync(target.parent)


def _write_share(engine: Engine, part: Path) -> None:
    topology = engine.topology
    named = dict(engine.model.named_parameters())
    tensors, starts = {}, {}
    for number, (name, shard) in enumerate(engine.masters.shards.items()):
        sharded = getattr(named[name], "tensor_model_parallel", False)
        whole = engine.config.parallel.zero_stage == 0  # every data-parallel rank holds all of it: take turns
        if (topology.tensor_rank and not sharded) or (whole and number % topology.data_size != topology.data_rank):
            continue
        starts[name] = shard.start
        for key in (STATE, *STATE_KEYS):
            tensors[f"{key}/{name}"] = engine.view(shard, key).cpu().clone()
    if not tensors:
        return
    path = part / f"rank_{topology.rank:05d}.safetensors"
    save_file(tensors, path, metadata={"tensor_rank": str(topology.tensor_rank), "starts": json.dumps(starts)})
    _sync(path)


def _write_manifest(engine: Engine, part: Path) -> None:
    named = dict(engine.model.named_parameters())
    params = {}
    for name, param in engine.params.items():
        p = named[name]
        sharded = getattr(p, "tensor_model_parallel", False)
        params[name] = {
            "shape": param.shape,
            "dim": p.partition_dim if sharded else None,  # pyright: ignore[reportAttributeAccessIssue]
            "pieces": p.partition_stride if sharded else 1,  # pyright: ignore[reportAttributeAccessIssue]
            "role": param.role,
        }
    manifest = {
        "format": FORMAT,
        "step": engine.step,
        "adam_steps": engine.adam_steps,
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
