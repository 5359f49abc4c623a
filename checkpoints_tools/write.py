"""Write folders atomically, and checkpoints in training's format from full tensors, one tensor at a time."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_tools.convert.tensors import Spec, TensorFile
from megatron_dit.checkpoint.listing import CHECKPOINTS
from megatron_dit.checkpoint.manifest import MANIFEST, write_manifest
from megatron_dit.config import ParallelConfig
from megatron_dit.data.tar import sha256_of
from megatron_dit.optimizer import has_state
from megatron_dit.parallel.sharding import cut
from megatron_dit.runtime.errors import UserError, writing
from megatron_dit.runtime.paths import user_path
from megatron_dit.training.run_folder import CONFIG, SNAPSHOTS


def new_folder(out: Path) -> Path:
    """Return the normalized path of a folder to write, with ``~`` expanded, after checking that it can be written.

    Raise UserError if the path exists, if it is inside a checkpoint or a run's folder of checkpoints, or if it cannot
    be created.
    """
    out = Path(os.path.normpath(user_path(str(out), "the folder to write")))
    with writing(out):
        if os.path.lexists(out):
            raise UserError(f"{out} already exists; give a folder that does not exist")
        parents = [parent for parent in out.absolute().parents if os.path.lexists(parent)]
        for folder in parents:
            of_a_run = folder.name in (CHECKPOINTS, SNAPSHOTS) and (folder.parent / CONFIG).exists()
            if of_a_run or (folder / MANIFEST).exists():
                raise UserError(
                    f"{out} is inside {folder}, which contains checkpoints; choose an output folder elsewhere"
                )
        with suppress(FileNotFoundError):
            _part_of(out).lstat()  # raises if a name is too long or a parent is not a folder
        with tempfile.TemporaryDirectory(dir=parents[0]):
            pass
    return out


@contextmanager
def writing_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder next to ``out``, which is renamed to ``out`` on success and removed on failure.

    Raise UserError if the folder cannot be written.
    """
    out = new_folder(out)
    part = _part_of(out)
    with writing(out):
        try:
            part.mkdir(parents=True)
            yield part
            part.rename(out)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _part_of(out: Path) -> Path:
    """Return a unique path next to ``out``, so that removing it cannot delete the files of another program."""
    return out.with_name(f"{out.name}.{secrets.token_hex(4)}.part")


def write_checkpoint(
    folder: Path, manifest: Mapping[str, Any], tensors: Iterable[tuple[str, str, Tensor]], tensor_size: int = 1
) -> None:
    """Write a checkpoint with one file per tensor-parallel rank to ``folder``.

    The manifest is ``manifest`` with a new layout and a new list of files. ``tensors`` yields (state, name, full fp32
    tensor) in any order; tensors that it does not yield are zero. Raise UserError if a parameter cannot be divided
    among ``tensor_size`` ranks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    params, states = manifest["params"], manifest["states"]
    for name, param in params.items():
        if param["dim"] is not None and param["shape"][param["dim"]] % (param["fused_parts"] * tensor_size):
            raise UserError(
                f"{name} of shape {param['shape']} cannot be divided among {tensor_size} tensor-parallel ranks; choose "
                "a number that divides model.heads"
            )
    paths = [folder / f"rank_{rank:05d}.safetensors" for rank in range(tensor_size)]
    with ExitStack() as stack:
        files = []
        for rank, path in enumerate(paths):
            held = {name: param for name, param in params.items() if rank == 0 or param["dim"] is not None}
            specs: dict[str, Spec] = {
                f"{state}/{name}": (torch.float32, (_numel(param) // (1 if param["dim"] is None else tensor_size),))
                for state in states
                for name, param in held.items()
                if has_state(state, muon=param.get("muon", False))
            }
            metadata = {"tensor_rank": str(rank), "starts": json.dumps(dict.fromkeys(held, 0))}
            files.append(stack.enter_context(TensorFile(path, specs, metadata)))
        for state, name, full in tensors:
            param = params[name]
            for rank, file in enumerate(files if param["dim"] is not None else files[:1]):
                shard = cut(full, param["dim"], param["fused_parts"], rank, tensor_size)
                file.put(f"{state}/{name}", shard.reshape(-1))
    complete = {
        **manifest,
        "layout": {"world": tensor_size, **asdict(ParallelConfig(tensor=tensor_size))},
        "files": {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in paths},
    }
    write_manifest(folder, complete)


def _numel(param: Mapping[str, Any]) -> int:
    return torch.Size(param["shape"]).numel()
