"""Read checkpoints written by ``torch.save`` without running code that a pickle may contain."""

from __future__ import annotations

import argparse
import io
import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_tools.convert.tensors import unwrapped
from megatron_dit.models.common.original import OriginalCheckpoint, Weights
from megatron_dit.runtime.content import mismatch
from megatron_dit.runtime.errors import UserError

# Types allowed in addition to tensors and Python's containers. DiT's training script saves its arguments as Namespace.
SAFE: list[Any] = [argparse.Namespace]
RAW, AVERAGES = ("model", "state_dict"), ("ema", "state_dict_ema")
OPTIMIZER = ("opt", "optimizer")
# Maximum bytes of pickled data, excluding the tensors' contents. A billion parameters in 2,400 tensors need 0.5 MB.
# The limit bounds memory: each byte of a pickle can become an object of 200 bytes.
PICKLE_LIMIT = 4 << 20


def read_original(path: Path) -> OriginalCheckpoint:
    """Read a file. Raise UserError if it is not a dictionary of tensors or if its pickle refers to unsafe types."""
    found = _load(path)
    if not isinstance(found, dict):
        raise UserError(
            f"{path} contains a {type(found).__name__}: expected a dictionary of tensors, or of dictionaries of tensors"
        )
    raw, averages = (
        next((found[key] for key in keys if isinstance(found.get(key), Mapping)), None) for keys in (RAW, AVERAGES)
    )
    if raw is None and averages is None:
        raw = found
    raw_tensors, averaged_tensors = (
        None if weights is None else _tensors(path, weights) for weights in (raw, averages)
    )
    if raw_tensors is not None and averaged_tensors is not None and _shapes(raw_tensors) != _shapes(averaged_tensors):
        raise UserError(
            f"the raw and averaged weights in {path} differ in names or shapes, so they are not of the same model"
        )
    args = found.get("args")
    return OriginalCheckpoint(
        path,
        raw_tensors if raw_tensors is not None else averaged_tensors or {},
        averaged_tensors if averaged_tensors is not None else raw_tensors or {},
        args if isinstance(args, argparse.Namespace) else argparse.Namespace(),
        _groups(next((found[key] for key in OPTIMIZER if key in found), None)),
    )


def _groups(optimizer: Any) -> Sequence[Mapping[str, Any]] | None:
    """Return the parameter groups of a ``torch.optim.Optimizer.state_dict``; [] for any other kind of optimizer."""
    if optimizer is None:
        return None
    groups = optimizer.get("param_groups") if isinstance(optimizer, Mapping) else None
    return [group for group in groups if isinstance(group, Mapping)] if isinstance(groups, list) else []


def _load(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"{path} is not a file; give a checkpoint written by torch.save (.pt or .pth)")
    try:
        zipped = zipfile.is_zipfile(path)
        _check_sizes(path, zipped)
        with _only_safe_types():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except UserError:
        raise
    except Exception as error:  # a damaged file may raise any exception
        text = " ".join(str(error).split())
        named = re.search(r"GLOBAL (\S+)|unrecognized function (.+)", text)
        if isinstance(error, pickle.UnpicklingError) and named is not None:
            raise UserError(
                f"{path} needs {(named[1] or named[2])[:200]}, which could run arbitrary code, so it was not loaded: "
                "save the tensors alone (argparse.Namespace is also allowed)"
            ) from None
        # torch's message advises loading the file without this protection; that advice must not reach the user.
        reason = text.partition("WeightsUnpickler error: ")[2].partition(" Check the documentation")[0] or text
        reason = type(error).__name__ if "weights_only" in reason or not reason else reason[:200]
        raise UserError(_unreadable(path, reason)) from None


def _check_sizes(path: Path, zipped: bool) -> None:
    """Raise UserError, before anything is unpickled, for a file that would need much more memory than its size."""
    size = path.stat().st_size
    if not zipped:
        _check_legacy(path, size)
        return
    with zipfile.ZipFile(path) as file:
        entries = file.infolist()
    names: set[str] = set()
    for entry in entries:
        if entry.filename in names:
            raise UserError(
                f"{path} has two entries named {entry.filename:.200}: expected a file written by torch.save"
            )
        names.add(entry.filename)
        if entry.compress_type != zipfile.ZIP_STORED:
            raise UserError(
                f"{path} has the compressed entry {entry.filename:.200}: expected a file written by torch.save"
            )
        if entry.filename.endswith("data.pkl") and entry.file_size > PICKLE_LIMIT:
            raise UserError(
                f"{path} has {entry.file_size:,} bytes in {entry.filename:.200}, expected at most {PICKLE_LIMIT:,} "
                "in addition to the tensors: save the weights without other data"
            )
    declared = sum(entry.file_size for entry in entries)
    if declared > size:
        raise UserError(f"{path} declares {declared:,} bytes of entries, but has {size:,} bytes; download it again")


def _check_legacy(path: Path, size: int) -> None:
    """Check a file in the format used before PyTorch 1.6: five pickles, followed by the tensors' bytes.

    Raise UserError if the pickles are not complete within ``PICKLE_LIMIT`` bytes.
    """
    with path.open("rb") as file:
        head = io.BytesIO(file.read(PICKLE_LIMIT))
    try:
        for _ in range(5):
            for _ in pickletools.genops(head):
                pass
    except Exception:  # damaged or not a pickle: for a file within the limit, loading reports the reason
        if size > PICKLE_LIMIT:
            reason = f"no complete pickles in its first {PICKLE_LIMIT:,} bytes"
            raise UserError(_unreadable(path, reason)) from None


def _unreadable(path: Path, reason: str) -> str:
    """Return the message for a file that torch.load cannot read: its detected type, or ``reason``."""
    return mismatch(path, "torch", "pickle") or (
        f"{path} cannot be read ({reason}): expected a file written by torch.save; download it again"
    )


@contextmanager
def _only_safe_types() -> Iterator[None]:
    """Let torch.load accept the types in ``SAFE`` only, not those that other libraries in this process allowed."""
    others = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(SAFE)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(others)


def _tensors(path: Path, weights: Mapping[Any, Any]) -> Weights:
    size, records = path.stat().st_size, _record_sizes(path)
    for name, value in weights.items():
        dense = isinstance(value, Tensor) and value.layout == torch.strided and value.is_floating_point()
        if not isinstance(name, str) or not dense or value.device.type != "cpu":
            raise UserError(f"{path} has {name!r:.200}, which is not a dense float tensor: expected only weights")
        needed, held = value.numel() * value.element_size(), value.untyped_storage().nbytes()
        if needed > held or held > size:
            raise UserError(
                f"{path} declares {needed:,} bytes for {name:.200}, but has {min(held, size):,}; download it again"
            )
        if records is not None and held not in records:  # a memory-mapped storage may extend into the next entry
            raise UserError(
                f"{path} declares {held:,} bytes for {name:.200}, but has no entry of that size; download it again"
            )
    return {name: weights[given].detach() for name, given in unwrapped(weights).items()}


def _record_sizes(path: Path) -> set[int] | None:
    """Return the sizes in bytes of a zip's entries; None for the legacy format, where torch.load compares them."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as file:
        return {entry.file_size for entry in file.infolist()}


def _shapes(weights: Weights) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in weights.items()}
