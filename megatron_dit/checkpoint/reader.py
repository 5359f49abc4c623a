"""The checkpoint format, and the reader that assembles full tensors from it.

A checkpoint is a folder, e.g. ``step_00001000``, with ``manifest.json`` and one ``rank_00000.safetensors`` per writing
rank. A rank's file stores flat fp32 ranges of tensor-parallel shards under ``KEY/NAME``. KEY is master, exp_avg,
exp_avg_sq (not of parameters that Muon updates), ema, or ema_0, ... for ``ema.sigma_rel``; the manifest's ``states``
lists the keys. With delayed FP8 scaling
the files also store the scales of each layer, under ``fp8_scales/LAYER``. The file's metadata contain the tensor-
parallel rank and the start of each NAME's range in the shard. A checkpoint written in any layout can therefore be
loaded in any other. The learning rate, noise, dropped conditions and data order are functions of the config, the seed
and the step, so no other state needs to be stored.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_dit.checkpoint.manifest import FP8_SCALES, Incomplete, read_manifest, size_of, unreadable
from megatron_dit.config import Config, config_from_dict
from megatron_dit.data.tar import sha256_of
from megatron_dit.mup.rules import Param
from megatron_dit.optimizer import has_state
from megatron_dit.parallel.sharding import cut, pieces, unshard
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.progress import ProgressBar

SHOWN = 1 << 30  # bytes above which the progress of hashing is shown; hashing 1 GiB takes about a second


@dataclass(frozen=True)
class Fragment:
    file: Path
    tensor_rank: int
    start: int  # in the flattened tensor-parallel shard
    stop: int


class CheckpointReader:
    """Reader of full tensors by global name from a checkpoint's folder.

    Raises Incomplete if the manifest is not valid or a file is missing or has the wrong size. Only :meth:`verify`
    compares the contents of the files with their hashes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._kept_open: Callable[[Path], Any] | None = None
        self.manifest = read_manifest(folder)
        for name, record in self.manifest["files"].items():
            found = size_of(folder, name)
            if found != record["bytes"]:
                raise Incomplete(f"{folder / name} has {found} bytes, expected {record['bytes']}")

    @contextmanager
    def keep_files_open(self) -> Iterator[None]:
        """Return a context in which each file is opened only once, instead of for each range that is read.

        Opening a file of a large model takes milliseconds, because its header lists all tensors. Open files are
        memory-mapped, so the pages that were read count as this process's memory until the end of the context.
        """
        with ExitStack() as stack:
            self._kept_open = functools.cache(lambda path: stack.enter_context(safe_open(path, framework="pt")))
            try:
                yield
            finally:
                self._kept_open = None

    def _open(self, path: Path) -> AbstractContextManager[Any]:
        return safe_open(path, framework="pt") if self._kept_open is None else nullcontext(self._kept_open(path))

    @cached_property
    def config(self) -> Config:
        """Config of the run that wrote the checkpoint. Raises UserError if this version cannot use it."""
        try:
            return config_from_dict(self.manifest["config"])
        except UserError as error:
            raise UserError(f"the config in {self.folder} cannot be used by this version: {error}") from None

    @property
    def step(self) -> int:
        return self.manifest["step"]

    def verify(self, files: slice = slice(None), *, show: bool = False) -> None:
        """Read a slice of the files and compare their SHA-256. Raises Incomplete for the first difference.

        ``show`` displays the progress if there is more than 1 GiB to read.
        """
        names = sorted(self.manifest["files"])[files]
        total = sum(self.manifest["files"][name]["bytes"] for name in names)
        with ProgressBar("verify", len(names), show=show and total > SHOWN) as bar:
            for name in names:
                try:
                    digest = sha256_of(self.folder / name)
                except OSError as error:
                    raise unreadable(error) from None
                if digest != self.manifest["files"][name]["sha256"]:
                    raise Incomplete(f"{self.folder / name} is corrupt: its SHA-256 differs from the manifest's")
                bar.advance(name)

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise UserError for the first parameter whose name or shape differs between checkpoint and model."""
        held = {name: tuple(param["shape"]) for name, param in self.manifest["params"].items()}
        for name, shape in shapes.items():
            if held.get(name) != shape:
                found = f"has shape {held[name]}" if name in held else "is missing"
                raise UserError(
                    f"{self.folder} is a checkpoint of another architecture: {name} {found}, the model expects {shape}"
                )
        extra = next((name for name in held if name not in shapes), None)
        if extra is not None:
            raise UserError(
                f"{self.folder} is a checkpoint of another architecture: the model has no parameter {extra}"
            )

    def check_mup(self, params: Mapping[str, Param]) -> None:
        """Raise UserError for the first parameter trained with another μP multiplier of lr or weight decay."""
        for name, param in params.items():
            held = self.manifest["params"][name]
            for key, ratio in (("lr", param.lr_multiplier), ("weight_decay", param.weight_decay_multiplier)):
                if held[key] != ratio:
                    raise UserError(
                        f"{self.folder} was trained with {key} x {held[key]:g} for {name}, but the config's μP rules "
                        f"give x {ratio:g}; restore the run's mup.* settings"
                    )

    @property
    def states(self) -> list[str]:
        """Keys stored for the parameters, e.g. ``master`` and ``exp_avg``."""
        return self.manifest["states"]

    def states_of(self, name: str) -> list[str]:
        """Return the keys stored for a parameter: there is no second moment if Muon updates it."""
        muon = self.manifest["params"][name].get("muon", False)
        return [key for key in self.states if has_state(key, muon=muon)]

    def full(self, key: str, name: str) -> Tensor:
        """Return the full fp32 tensor of a parameter's master, moment or average."""
        param = self.manifest["params"][name]
        shape, dim, shards = list(param["shape"]), param["dim"], self._shards(name)
        if dim is not None:
            shape[dim] //= shards
        tensors = [self._range(key, name, rank, 0, math.prod(shape)).view(shape) for rank in range(shards)]
        return tensors[0] if dim is None else unshard(tensors, dim, param["fused_parts"])

    def weights(self, key: str, name: str) -> Tensor:
        """Return :meth:`full` for use in a model. Raises UserError if a value is not finite: training has diverged."""
        values = self.full(key, name)
        self._check_finite(key, name, values)
        return values

    def copy_shard(self, target: Tensor, key: str, name: str, tensor_rank: int, tensor_size: int) -> None:
        """Copy a rank's tensor-parallel shard of :meth:`weights` to ``target``, of any type and on any device.

        In addition to ``target``, the shard is in memory in fp32 if the checkpoint was written with this
        tensor-parallel size, else the full tensor (twice while it is assembled from the shards of another size).
        """
        param = self.manifest["params"][name]
        dim, parts = param["dim"], param["fused_parts"]
        if dim is None or tensor_size == self._shards(name):
            values = self._range(key, name, tensor_rank if dim is not None else 0, 0, target.numel())
            target.copy_(values.view(target.shape))
        else:
            values = self.full(key, name)
            sources = pieces(values, dim, parts, tensor_rank, tensor_size)
            for piece, source in zip(target.chunk(parts, dim), sources, strict=True):
                piece.copy_(source)
        self._check_finite(key, name, values)

    def _check_finite(self, key: str, name: str, values: Tensor) -> None:
        if not all(bound.isfinite() for bound in values.aminmax()):  # isfinite of all values would take as much memory
            raise UserError(f"{self.folder} has NaN or infinite values in {key}/{name}; use an older checkpoint")

    def part(self, key: str, name: str, tensor_rank: int, tensor_size: int, start: int, numel: int) -> Tensor:
        """Return elements [start, start + numel) of a flattened tensor-parallel shard.

        Only these elements are read if the checkpoint was written with the same tensor-parallel size.
        """
        param = self.manifest["params"][name]
        if param["dim"] is None:
            return self._range(key, name, 0, start, numel)
        if tensor_size == self._shards(name):
            return self._range(key, name, tensor_rank, start, numel)
        shard = cut(self.full(key, name), param["dim"], param["fused_parts"], tensor_rank, tensor_size)
        return shard.reshape(-1)[start : start + numel]

    def fp8_scales(self) -> dict[str, Tensor]:
        """Return the flat scales of delayed FP8 scaling by layer; empty unless the run trained with it."""
        found = {}
        for path, layers in self._contents[1].items():
            with _incomplete_on_error(path), self._open(path) as file:
                found.update({layer: file.get_tensor(f"{FP8_SCALES}/{layer}") for layer in layers})
        return found

    def _shards(self, name: str) -> int:
        return 1 if self.manifest["params"][name]["dim"] is None else self.manifest["layout"]["tensor"]

    def _range(self, key: str, name: str, tensor_rank: int, start: int, numel: int) -> Tensor:
        """Assemble a range from all files that store a part of it."""
        if key not in self.states:
            raise UserError(f"{self.folder} contains no {key}; expected one of {', '.join(self.states)}")
        flat, covered, stop = torch.empty(numel), 0, start + numel
        for fragment in self._contents[0].get(name, []):
            low, high = max(start, fragment.start), min(stop, fragment.stop)
            if fragment.tensor_rank != tensor_rank or low >= high:
                continue
            with _incomplete_on_error(fragment.file), self._open(fragment.file) as file:
                piece = file.get_slice(f"{key}/{name}")[low - fragment.start : high - fragment.start]
                if piece.shape != (high - low,):
                    raise Incomplete(f"{fragment.file}: {key}/{name} is shorter than {fragment.stop - fragment.start}")
            flat[low - start : high - start] = piece
            covered += high - low
        if covered != numel:
            raise Incomplete(f"{self.folder}: {key}/{name} has {covered} of {numel} elements")
        return flat

    @cached_property
    def _contents(self) -> tuple[dict[str, list[Fragment]], dict[Path, list[str]]]:
        """Fragments of each parameter, sorted by position, and layers with FP8 scales of each file that has any.

        Raises Incomplete if two files store the same element.
        """
        found: dict[str, list[Fragment]] = {}
        layers: dict[Path, list[str]] = {}
        for name in self.manifest["files"]:
            path = self.folder / name
            with _incomplete_on_error(path), self._open(path) as file:
                about = file.metadata()
                rank = int(about["tensor_rank"])
                scales = [key.partition("/")[2] for key in file.keys() if key.startswith(f"{FP8_SCALES}/")]  # noqa: SIM118
                if scales:
                    layers[path] = scales
                for param, start in json.loads(about["starts"]).items():
                    (size,) = file.get_slice(f"{self.states[0]}/{param}").get_shape()
                    found.setdefault(param, []).append(Fragment(path, rank, int(start), int(start) + size))
        for name, fragments in found.items():
            fragments.sort(key=lambda fragment: (fragment.tensor_rank, fragment.start))
            for one, other in pairwise(fragments):
                if one.tensor_rank == other.tensor_rank and other.start < one.stop:
                    raise Incomplete(f"{other.file} and {one.file} store the same elements of {name}")
        return found, layers


@contextmanager
def _incomplete_on_error(path: Path) -> Iterator[None]:
    """Raise Incomplete for any error of reading a file of tensors, whose header may contain arbitrary values."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise Incomplete(f"{path} is corrupt ({type(error).__name__}: {str(error)[:200]})") from None
