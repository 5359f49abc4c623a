"""Post-hoc EMA: reconstruct an average of any width from a run's snapshots (EDM2, arXiv 2312.02696, section 3.2)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_tools.write import write_checkpoint, writing_folder
from megatron_dit.checkpoint.listing import list_checkpoints
from megatron_dit.checkpoint.manifest import Incomplete
from megatron_dit.checkpoint.reader import CheckpointReader
from megatron_dit.config.keys import SigmaRel, check_value
from megatron_dit.optimizer import power_averages
from megatron_dit.optimizer.ema import Profile, combination, gamma_of
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.progress import ProgressBar
from megatron_dit.training.run_folder import SNAPSHOTS


@dataclass(frozen=True)
class Stored:
    """One of the power-function averages stored in a snapshot."""

    reader: CheckpointReader
    key: str
    profile: Profile


def average(run: Path, sigma_rel: float, step: int | None, out: Path) -> dict[str, Any]:
    """Write to ``out`` a checkpoint whose EMA is the power-function average at ``step`` (None: the last snapshot's).

    Return the width, the step, the number of stored averages that were combined, and the relative error of the
    resulting profile. Raise UserError if the run has no snapshots or none of ``step``, if a snapshot is incomplete, or
    if ``out`` cannot be written.
    """
    check_value("--sigma-rel", sigma_rel, SigmaRel)
    readers = _snapshots(run)
    steps = [reader.step for reader in readers]
    step = steps[-1] if step is None else step
    if step not in steps:
        raise UserError(f"--step {step}: no snapshot of this step; choose one of {', '.join(map(str, steps))}")
    readers = readers[: steps.index(step) + 1]
    _check_alike(readers)
    stored = [
        Stored(reader, key, Profile(gamma_of(width), reader.manifest["num_updates"]))
        for reader in readers
        for key, width in _widths(reader).items()
    ]
    target = Profile(gamma_of(sigma_rel), readers[-1].manifest["num_updates"])
    coefficients, relative_error = combination([item.profile for item in stored], target)
    summary = {"sigma_rel": sigma_rel, "step": step, "averages": len(stored), "relative_error": relative_error}
    with writing_folder(out) as part:
        manifest = {**readers[-1].manifest, "states": ["ema"], "post_hoc": summary}
        write_checkpoint(part, manifest, _combined(stored, coefficients.tolist()))
    return summary


def _snapshots(run: Path) -> list[CheckpointReader]:
    """Return the run's snapshots by ascending number of optimizer updates, one for each number.

    Steps that were skipped do not update an average, so two snapshots of different steps may be equal.
    """
    found: dict[int, CheckpointReader] = {}
    listing = list_checkpoints(run / SNAPSHOTS)
    listing.log_strays(logging.WARNING)
    for path in listing.checkpoints:
        with _complete(path):
            reader = CheckpointReader(path)
        found[reader.manifest["num_updates"]] = reader
    found.pop(0, None)
    if not found:
        raise UserError(f"{run / SNAPSHOTS} contains no snapshots; train with ema.sigma_rel and ema.snapshot_every")
    return list(found.values())


def _check_alike(readers: list[CheckpointReader]) -> None:
    """Raise UserError if a snapshot is of a different model or if its files do not match their digests."""
    shapes = {name: tuple(param["shape"]) for name, param in readers[0].manifest["params"].items()}
    for reader in readers:
        reader.check(shapes)
        with _complete(reader.folder):
            reader.verify(show=True)


@contextmanager
def _complete(path: Path) -> Iterator[None]:
    """Raise UserError in place of ``Incomplete`` for the snapshot ``path``."""
    try:
        yield
    except Incomplete as error:
        raise UserError(
            f"snapshot {path} is incomplete ({error}): delete it to average without this snapshot"
        ) from None


def _widths(reader: CheckpointReader) -> dict[str, float]:
    ema = reader.config.ema
    return dict(zip(power_averages(ema), ema.sigma_rel, strict=True))


def _combined(stored: list[Stored], coefficients: list[float]) -> Iterator[tuple[str, str, Tensor]]:
    """Yield each parameter's weighted sum, accumulated in fp64 because the coefficients may cancel."""
    params = stored[0].reader.manifest["params"]
    with ProgressBar("average", len(params)) as bar:
        for name, param in params.items():
            total = torch.zeros(param["shape"], dtype=torch.float64)
            for item, coefficient in zip(stored, coefficients, strict=True):
                total.add_(item.reader.full(item.key, name), alpha=coefficient)
            yield "ema", name, total.float()
            bar.advance(name)
