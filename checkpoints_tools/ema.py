"""Post-hoc EMA: an average of any width from a run's snapshots (EDM2, arXiv 2312.02696, section 3.2)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dit.checkpoint.format import MANIFEST, CheckpointReader, Torn
from megatron_dit.checkpoint.save import checkpoints, write_safetensors
from megatron_dit.config import ParallelConfig, config_from_dict
from megatron_dit.config.checks import check_sigma_rel
from megatron_dit.errors import UserError
from megatron_dit.optimizer import power_averages
from megatron_dit.optimizer.averages import Profile, combination, gamma_of
from megatron_dit.progress import ProgressBar
from megatron_dit.run_folder import SNAPSHOTS

FILE_BYTES = 2**30  # tensors are gathered up to this before they are written


@dataclass(frozen=True)
class Stored:
    """One average of a snapshot."""

    reader: CheckpointReader
    key: str
    profile: Profile


def reconstruct(run: Path, sigma_rel: float, step: int | None, out: Path) -> dict[str, Any]:
    """Write to ``out`` a checkpoint whose EMA is the power-function average at ``step`` (the last snapshot's).

    Returns what was combined, and how much of the wanted profile that misses. Raises UserError where the run has
    no snapshots, or none of ``step``, and where ``out`` is taken.
    """
    check_sigma_rel("--sigma-rel", sigma_rel)
    if out.exists():
        raise UserError(f"--out {out} exists: give a new folder")
    readers = _snapshots(run)
    steps = [reader.step for reader in readers]
    step = steps[-1] if step is None else step
    if step not in steps:
        raise UserError(f"--step {step}: expected a step with a snapshot, one of {', '.join(map(str, steps))}")
    readers = readers[: steps.index(step) + 1]
    stored = [
        Stored(reader, key, Profile(gamma_of(width), reader.manifest["adam_steps"]))
        for reader in readers
        for key, width in _widths(reader).items()
    ]
    target = Profile(gamma_of(sigma_rel), readers[-1].manifest["adam_steps"])
    coefficients, missed = combination([item.profile for item in stored], target)
    figures = {"sigma_rel": sigma_rel, "step": step, "averages": len(stored), "missed": missed}
    _write(out, readers[-1], _combined(stored, coefficients.tolist()), figures)
    return figures


def _snapshots(run: Path) -> list[CheckpointReader]:
    """Those of different ages, in order: skipped steps do not age an average."""
    found: dict[int, CheckpointReader] = {}
    for path in checkpoints(run / SNAPSHOTS):
        try:
            reader = CheckpointReader(path)
        except Torn as error:
            raise UserError(f"snapshot {path} is torn ({error}): delete it to go without it") from None
        found[reader.manifest["adam_steps"]] = reader
    found.pop(0, None)
    if not found:
        raise UserError(f"{run / SNAPSHOTS} has no snapshots: set train.ema_sigma_rel and checkpoint.ema_every")
    return list(found.values())


def _widths(reader: CheckpointReader) -> dict[str, float]:
    train = config_from_dict(reader.manifest["config"]).train
    return dict(zip(power_averages(train), train.ema_sigma_rel, strict=True))


def _combined(stored: list[Stored], coefficients: list[float]) -> Iterator[tuple[str, Tensor]]:
    """Each parameter's combination, added up in fp64: coefficients may cancel."""
    params = stored[0].reader.manifest["params"]
    with ProgressBar("ema", len(params)) as bar:
        for name, param in params.items():
            total = torch.zeros(param["shape"], dtype=torch.float64)
            for item, coefficient in zip(stored, coefficients, strict=True):
                try:
                    total.add_(item.reader.full(item.key, name), alpha=coefficient)
                except Torn as error:
                    raise UserError(f"snapshot {error} is torn: delete it to go without it") from None
            yield name, total.float()
            bar.advance(name)


def _write(out: Path, newest: CheckpointReader, tensors: Iterable[tuple[str, Tensor]], figures: dict[str, Any]) -> None:
    """A checkpoint of one rank that holds nothing but its EMA, aside and then renamed into place."""
    part = out.with_name(out.name + ".part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        batch: dict[str, Tensor] = {}
        files: dict[str, dict[str, Any]] = {}
        for name, tensor in tensors:
            batch[name] = tensor
            if sum(held.nbytes for held in batch.values()) >= FILE_BYTES:
                _write_file(part, batch, files)
                batch = {}
        _write_file(part, batch, files)
        manifest = {
            **newest.manifest,
            "states": ["ema"],
            "post_hoc": figures,
            "layout": {"world": 1, **asdict(ParallelConfig())},
            "files": files,
        }
        (part / MANIFEST).write_text(json.dumps(manifest))
        part.replace(out)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error}): free space or choose another folder") from None


def _write_file(part: Path, tensors: dict[str, Tensor], files: dict[str, dict[str, Any]]) -> None:
    name = f"rank_{len(files):05d}.safetensors"
    about = {"tensor_rank": "0", "starts": json.dumps(dict.fromkeys(tensors, 0))}
    flat = {f"ema/{param}": tensor.reshape(-1) for param, tensor in tensors.items()}
    files[name] = write_safetensors(part / name, flat, about)
