"""Checkpoints that ``torch.save`` wrote, read without running what a pickle may hold."""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dit.errors import UserError

# Beside tensors and Python's own containers: what DiT's training script saves its arguments as.
SAFE: list[Any] = [argparse.Namespace]
RAW, AVERAGES = ("model", "state_dict"), ("ema", "state_dict_ema")
OPTIMIZER = ("opt", "optimizer")
WRAPPER = "module."  # before each name of a model that DistributedDataParallel or DeepSpeed wraps

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
        with _only_safe_types():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # of a file that is torn anything may be raised
        named = re.search(r"GLOBAL (\S+)|unrecognized function (.+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and named is not None:
            raise UserError(
                f"{path} needs {named[1] or named[2]}, which would run code of the file's choice: nothing of it was "
                "run, only files of tensors and argparse.Namespace are read"
            ) from None
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} cannot be read ({reason}): expected what torch.save wrote, get it again") from None


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
    for name, value in weights.items():
        dense = isinstance(value, Tensor) and value.layout == torch.strided and value.is_floating_point()
        if not isinstance(name, str) or not dense:
            raise UserError(f"{path} has {name!r}, which is no dense tensor of floats: expected weights alone")
    wrapped = bool(weights) and all(name.startswith(WRAPPER) for name in weights)
    return {name.removeprefix(WRAPPER) if wrapped else name: value.detach() for name, value in weights.items()}


def _shapes(weights: Weights) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in weights.items()}
