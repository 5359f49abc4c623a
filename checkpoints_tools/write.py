"""Checkpoints made of full tensors, one at a time, as training writes them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_tools.convert.tensors import Spec, TensorFile
from megatron_dit.checkpoint.format import MANIFEST
from megatron_dit.config import ParallelConfig
from megatron_dit.data.tar import sha256_of
from megatron_dit.mup.init import cut


def write_checkpoint(
    folder: Path, manifest: Mapping[str, Any], tensors: Iterable[tuple[str, str, Tensor]], tensor_size: int = 1
) -> None:
    """Fill ``folder`` with one file a tensor-parallel rank and the manifest, its layout and files made anew.

    ``tensors`` gives (state, name, full fp32 tensor) for each of the manifest's states and parameters once, in any
    order.
    """
    folder.mkdir(parents=True)
    params, states = manifest["params"], manifest["states"]
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
    (folder / MANIFEST).write_text(json.dumps(whole))


def _numel(param: Mapping[str, Any]) -> int:
    return torch.Size(param["shape"]).numel()
