"""Checkpoints that ``torch.save`` wrote, read without running what a pickle may hold."""

from __future__ import annotations

import argparse
import io
import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_tools.convert.tensors import unwrapped
from megatron_dit.errors import UserError
from megatron_dit.runtime.content import mismatch

# Beside tensors and Python's own containers: what DiT's training script saves its arguments as.
SAFE: list[Any] = [argparse.Namespace]
RAW, AVERAGES = ("model", "state_dict"), ("ema", "state_dict_ema")
OPTIMIZER = ("opt", "optimizer")
# Bytes of what is pickled beside the tensors. A billion parameters in 2,400 tensors take 0.5 MB; each byte of a pickle
# can become an object of 200.
PICKLE_LIMIT = 4 << 20

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Published:
    """What a file holds. One that has the raw weights or their averages alone has them as both."""

    path: Path
    raw: Weights
    averages: Weights
    args: argparse.Namespace  # of the training script; empty where there are none
    groups: Sequence[Mapping[str, Any]] | None  # the optimizer's parameter groups; None where it has no optimizer


def read_published(path: Path) -> Published:
    """Raises UserError for what is no file of tensors, and for a pickle that names anything else."""
    found = _load(path)
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a {type(found).__name__}: expected a dictionary of tensors, or of such")
    raw, averages = (
        next((found[key] for key in keys if isinstance(found.get(key), Mapping)), None) for keys in (RAW, AVERAGES)
    )
    if raw is None and averages is None:
        raw = found
    one, other = (None if weights is None else _tensors(path, weights) for weights in (raw, averages))
    if one is not None and other is not None and _shapes(one) != _shapes(other):
        raise UserError(f"{path} has raw weights and averages of different names or shapes: they are of two models")
    args = found.get("args")
    return Published(
        path,
        one if one is not None else other or {},
        other if other is not None else one or {},
        args if isinstance(args, argparse.Namespace) else argparse.Namespace(),
        _groups(next((found[key] for key in OPTIMIZER if key in found), None)),
    )


def _groups(optimizer: Any) -> Sequence[Mapping[str, Any]] | None:
    """The groups of what ``torch.optim.Optimizer.state_dict`` returned; [] for an optimizer of another kind."""
    if optimizer is None:
        return None
    groups = optimizer.get("param_groups") if isinstance(optimizer, Mapping) else None
    return [group for group in groups if isinstance(group, Mapping)] if isinstance(groups, list) else []


def _load(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"{path} is no file: give a checkpoint that torch.save wrote (.pt or .pth)")
    try:
        zipped = zipfile.is_zipfile(path)
        _check_sizes(path, zipped)
        with _only_safe_types():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except UserError:
        raise
    except Exception as error:  # of a file that is damaged anything may be raised
        text = " ".join(str(error).split())
        named = re.search(r"GLOBAL (\S+)|unrecognized function (.+)", text)
        if isinstance(error, pickle.UnpicklingError) and named is not None:
            raise UserError(
                f"{path} needs {(named[1] or named[2])[:200]}, which would run code of the file's choice: nothing of "
                "it was run, only files of tensors and argparse.Namespace are read"
            ) from None
        # What is left of the library's advice to load the file without this protection is not passed on.
        reason = text.partition("WeightsUnpickler error: ")[2].partition(" Check the documentation")[0] or text
        reason = type(error).__name__ if "weights_only" in reason or not reason else reason[:200]
        raise UserError(_unreadable(path, reason)) from None


def _check_sizes(path: Path, zipped: bool) -> None:
    """Raise UserError for a file that would take much more memory than it has bytes, before anything in it is read."""
    size = path.stat().st_size
    if not zipped:
        _check_legacy(path, size)
        return
    with zipfile.ZipFile(path) as file:
        entries = file.infolist()
    names: set[str] = set()
    for entry in entries:
        if entry.filename in names:
            raise UserError(f"{path} has two entries {entry.filename:.200}: expected what torch.save wrote")
        names.add(entry.filename)
        if entry.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{path} has the compressed entry {entry.filename:.200}: expected what torch.save wrote")
        if entry.filename.endswith("data.pkl") and entry.file_size > PICKLE_LIMIT:
            raise UserError(
                f"{path} has {entry.file_size:,} bytes in {entry.filename:.200}, expected at most {PICKLE_LIMIT:,} "
                "beside the tensors: it holds more than weights"
            )
    declared = sum(entry.file_size for entry in entries)
    if declared > size:
        raise UserError(f"{path} declares {declared:,} bytes of entries, but has {size:,}: download it again")


def _check_legacy(path: Path, size: int) -> None:
    """The format before PyTorch 1.6: five pickles, then the tensors' bytes."""
    with path.open("rb") as file:
        head = io.BytesIO(file.read(PICKLE_LIMIT))
    try:
        for _ in range(5):
            for _ in pickletools.genops(head):
                pass
    except Exception:  # damaged, or not pickles at all: loading says why, and reads no more than that
        if size > PICKLE_LIMIT:
            reason = f"no pickles of at most {PICKLE_LIMIT:,} bytes at its start"
            raise UserError(_unreadable(path, reason)) from None


def _unreadable(path: Path, reason: str) -> str:
    """Message about a file that torch.load does not read: what it is instead, or ``reason``."""
    return mismatch(path, "torch", "pickle") or (
        f"{path} cannot be read ({reason}): expected what torch.save wrote, download it again"
    )


@contextmanager
def _only_safe_types() -> Iterator[None]:
    """torch.load takes the types of ``SAFE``, and none that another library in this process has allowed."""
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
            raise UserError(f"{path} has {name!r:.200}, which is no dense tensor of floats: expected weights alone")
        needed, held = value.numel() * value.element_size(), value.untyped_storage().nbytes()
        if needed > held or held > size:
            raise UserError(
                f"{path} declares {needed:,} bytes for {name:.200}, but holds {min(held, size):,}: download it again"
            )
        if records is not None and held not in records:  # a mapped storage may reach into the next one's bytes
            raise UserError(
                f"{path} declares {held:,} bytes for {name:.200}, but holds other numbers: download it again"
            )
    return {name: weights[given].detach() for name, given in unwrapped(weights).items()}


def _record_sizes(path: Path) -> set[int] | None:
    """Bytes of the entries of a zip; None for the legacy format, where torch.load compares them itself."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as file:
        return {entry.file_size for entry in file.infolist()}


def _shapes(weights: Weights) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in weights.items()}
