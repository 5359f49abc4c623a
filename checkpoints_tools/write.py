"""Folders written aside, and checkpoints made of full tensors, one at a time, as training writes them."""

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
from megatron_dit.errors import UserError, writing
from megatron_dit.mup.init import cut
from megatron_dit.run_folder import CONFIG, SNAPSHOTS
from megatron_dit.runtime.paths import user_path


def new_folder(out: Path) -> Path:
    """Return the path of a folder to write, normalised and with ``~`` expanded, after a check that it can be written.

    Raises UserError if something has that name already, if it is inside of a checkpoint or among a run's checkpoints,
    or if it cannot be created.
    """
    out = Path(os.path.normpath(user_path(str(out), "the folder to write")))
    with writing(out):
        if os.path.lexists(out):
            raise UserError(f"{out} exists: give a new folder")
        parents = [parent for parent in out.absolute().parents if os.path.lexists(parent)]
        for folder in parents:
            of_a_run = folder.name in (CHECKPOINTS, SNAPSHOTS) and (folder.parent / CONFIG).exists()
            if of_a_run or (folder / MANIFEST).exists():
                raise UserError(f"{out} is inside of {folder}, which holds checkpoints: choose another folder")
        with suppress(FileNotFoundError):
            _part_of(out).lstat()  # raises if a name is too long or a parent is not a folder
        with tempfile.TemporaryDirectory(dir=parents[0]):
            pass
    return out


@contextmanager
def aside(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that becomes it if all goes well, and is removed if not.

    Raises UserError if it cannot be written.
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
    """Return a name that nobody else uses: what is there already is not ours to delete."""
    return out.with_name(f"{out.name}.{secrets.token_hex(4)}.part")


def write_checkpoint(
    folder: Path, manifest: Mapping[str, Any], tensors: Iterable[tuple[str, str, Tensor]], tensor_size: int = 1
) -> None:
    """Fill ``folder`` with one file a tensor-parallel rank and the manifest, its layout and files made anew.

    ``tensors`` gives (state, name, full fp32 tensor) in any order; what it does not give is zero.
    """
    folder.mkdir(parents=True, exist_ok=True)
    params, states = manifest["params"], manifest["states"]
    for name, param in params.items():
        if param["dim"] is not None and param["shape"][param["dim"]] % (param["pieces"] * tensor_size):
            raise UserError(f"{name} of shape {param['shape']} cannot be cut for {tensor_size} tensor-parallel ranks")
    paths = [folder / f"rank_{rank:05d}.safetensors" for rank in range(tensor_size)]
    with ExitStack() as stack:
        files = []
        for rank, path in enumerate(paths):
            held = {name: param for name, param in params.items() if rank == 0 or param["dim"] is not None}
            specs: dict[str, Spec] = {
                f"{state}/{name}": (torch.float32, (_numel(param) // (1 if param["dim"] is None else tensor_size),))
                for state in states
                for name, param in held.items()
            }
            about = {"tensor_rank": str(rank), "starts": json.dumps(dict.fromkeys(held, 0))}
            files.append(stack.enter_context(TensorFile(path, specs, about)))
        for state, name, full in tensors:
            param = params[name]
            for rank, file in enumerate(files if param["dim"] is not None else files[:1]):
                shard = cut(full, param["dim"], param["pieces"], rank, tensor_size)
                file.put(f"{state}/{name}", shard.reshape(-1))
    whole = {
        **manifest,
        "layout": {"world": tensor_size, **asdict(ParallelConfig(tensor=tensor_size))},
        "files": {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in paths},
    }
    write_manifest(folder, whole)


def _numel(param: Mapping[str, Any]) -> int:
    return torch.Size(param["shape"]).numel()
