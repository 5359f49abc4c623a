"""Write safetensors files one tensor at a time, and models as several such files."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from megatron_dit.data.hub import STEM
from megatron_dit.models.common.rows import Shape
from megatron_dit.runtime.errors import UserError

Spec = tuple[torch.dtype, Shape]

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int8: "I8"}


# Prefixes that wrapping modules add to the names of all parameters: DistributedDataParallel, DeepSpeed, torch.compile,
# FSDP, and modules that have the model as an attribute of one of these names.
WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "model.", "transformer.", "diffusion_model.")
# Wrappers of single blocks (torch.compile, FSDP, activation checkpointing) appear inside names.
INNER = re.compile(r"(?<=\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def unwrapped(names: Iterable[str]) -> dict[str, str]:
    """Map the names of a model's own parameters to the given names, to which wrappers may have added prefixes.

    A prefix is removed only if all names have it. Raise UserError if two names become equal.
    """
    given = list(names)
    found = [INNER.sub("", name) for name in given]
    while wrapper := next((each for each in WRAPPERS if found and all(name.startswith(each) for name in found)), None):
        found = [name.removeprefix(wrapper) for name in found]
    own: dict[str, str] = {}
    for name, original in zip(found, given, strict=True):
        if name in own:
            raise UserError(f"{own[name]} and {original} both name the parameter {name}: keep one of them")
        own[name] = original
    return own


class TensorFile:
    """A safetensors file (8 bytes with the header's length, JSON header, data) whose tensors are written in any order.

    Tensors that are not written are zero, and occupy no space on file systems with sparse files.
    """

    def __init__(self, path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> None:
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        end = 0
        self._starts: dict[str, int] = {}
        for name, (dtype, shape) in specs.items():
            self._starts[name] = end
            end += bytes_of((dtype, shape))
            offsets = [self._starts[name], end]
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": offsets}
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._specs, self._data = specs, 8 + len(encoded)
        self._file = path.open("wb")
        self._file.write(struct.pack("<Q", len(encoded)) + encoded)
        self._file.truncate(self._data + end)

    def put(self, name: str, tensor: Tensor) -> None:
        assert (tensor.dtype, tuple(tensor.shape)) == self._specs[name], f"{name}: {tensor.dtype} {tensor.shape}"
        self._file.seek(self._data + self._starts[name])
        self._file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()


def bytes_of(spec: Spec) -> int:
    dtype, shape = spec
    return dtype.itemsize * torch.Size(shape).numel()


def write_shards(
    folder: Path,
    specs: Mapping[str, Spec],
    tensors: Iterable[tuple[str, Tensor]],
    largest: int,
    metadata: Mapping[str, str],
) -> int:
    """Write a model's weights in files of at most ``largest`` bytes, named as in diffusers.

    ``tensors`` must be in the order of ``specs``. A tensor of more than ``largest`` bytes gets a file of its own.
    Return the number of files.
    """
    shards = _split(specs, largest)
    single = len(shards) == 1
    names = [f"{STEM}.safetensors" if single else _shard_name(i, len(shards)) for i in range(len(shards))]
    stream = iter(tensors)
    for file_name, shard in zip(names, shards, strict=True):
        with TensorFile(folder / file_name, {name: specs[name] for name in shard}, metadata) as file:
            for expected in shard:
                name, tensor = next(stream)
                assert name == expected, f"got {name}, expected {expected}"
                file.put(name, tensor)
                del tensor  # free the memory before the next tensor is computed
    assert next(stream, None) is None
    if not single:
        index = {
            "metadata": {"total_size": sum(map(bytes_of, specs.values()))},
            "weight_map": {name: file for file, shard in zip(names, shards, strict=True) for name in shard},
        }
        (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    return len(shards)


def _split(specs: Mapping[str, Spec], largest: int) -> list[list[str]]:
    shards: list[list[str]] = []
    size = 0
    for name, spec in specs.items():
        count = bytes_of(spec)
        if not shards or size + count > largest:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += count
    return shards


def _shard_name(i: int, count: int) -> str:
    return f"{STEM}-{i + 1:05d}-of-{count:05d}.safetensors"
