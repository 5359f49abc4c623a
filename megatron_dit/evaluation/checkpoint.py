"""Evaluate a checkpoint by protocols, and keep the results in the run's folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from megatron_dit.checkpoint.manifest import MANIFEST
from megatron_dit.checkpoint.reader import CheckpointReader
from megatron_dit.data.fingerprint import dataset_fingerprint
from megatron_dit.data.index import read_index
from megatron_dit.data.tar import sha256_of
from megatron_dit.evaluation.evaluate import Result, check_files, evaluate
from megatron_dit.evaluation.generate import generate, images_folder
from megatron_dit.evaluation.images import open_images
from megatron_dit.evaluation.protocol import LossProtocol, Protocol, fingerprint
from megatron_dit.evaluation.validation import validation_loss
from megatron_dit.parallel.collectives import on_all_ranks, on_rank0
from megatron_dit.parallel.topology import Topology, connect
from megatron_dit.sampling.folder import SETTINGS
from megatron_dit.sampling.grid import save_grid
from megatron_dit.sampling.sampler import Sampler
from megatron_dit.training.evaluations import read_result, result_file, write_result

GRID = 16  # images in the picture of an evaluation


def check_protocols(protocols: Sequence[Protocol | LossProtocol]) -> None:
    """Raise UserError for the first file that a protocol names and that does not exist."""
    for protocol in protocols:
        if isinstance(protocol, Protocol):
            check_files(protocol)
        elif protocol.data is not None:
            read_index(protocol.data)


def evaluate_checkpoint(
    reader: CheckpointReader,
    protocols: Sequence[Protocol | LossProtocol],
    open_sampler: Callable[[], Sampler],
    run: Path,
    topology: Topology,
    batch: int,
    *,
    keep_images: bool,
) -> list[Result]:
    """Return the results of a checkpoint, written to ``run``/evaluation/PROTOCOL/step_N.json. Collective.

    A picture of the first images is beside the result; the images themselves are deleted unless they are to be kept.
    The sampler is opened only if a protocol judges images. torch's random state is restored.
    """
    connect()
    results = []
    # A checkpoint is read at the beginning only: its run may delete it during a long evaluation.
    sha256 = on_rank0(lambda: sha256_of(reader.folder / MANIFEST))
    with torch.random.fork_rng():
        sampler = on_all_ranks(open_sampler) if any(isinstance(each, Protocol) for each in protocols) else None
        for protocol in protocols:
            if isinstance(protocol, LossProtocol):
                ema, result = True, _loss(reader, protocol, topology, batch)
            else:
                assert sampler is not None
                ema, result = sampler.ema, _images(sampler, protocol, run, batch, keep_images=keep_images)
            result = replace(result, step=reader.step, checkpoint=sha256)
            path = result_file(run, protocol.name, reader.step, ema=ema)
            on_rank0(lambda path=path, result=result: write_result(path, result.as_dict()))
            results.append(result)
    return results


def is_evaluated(checkpoint: Path, step: int, protocol: Protocol | LossProtocol, run: Path) -> bool:
    """Return whether the run's folder has the result of this checkpoint by this protocol."""
    result = read_result(result_file(run, protocol.name, step))
    if result is None or result.get("protocol") != json.loads(json.dumps(asdict(protocol))):
        return False
    return result.get("checkpoint") == sha256_of(checkpoint / MANIFEST)


def _images(sampler: Sampler, protocol: Protocol, run: Path, batch: int, *, keep_images: bool) -> Result:
    if not keep_images:
        on_rank0(lambda: _delete_others(images_folder(run, protocol, sampler), sampler))
    folder = generate(sampler, protocol, run, batch)
    images = open_images(folder)
    result = evaluate(images, protocol, str(folder), batch)

    def finish() -> None:
        _, shown = next(images.parts(min(GRID, len(images)), 0, 1))
        save_grid(shown, images.prompts[: len(shown)], folder.with_suffix(".png"))
        if not keep_images:
            shutil.rmtree(folder)

    on_rank0(finish)
    return result


def _delete_others(folder: Path, sampler: Sampler) -> None:
    """Delete what an interrupted evaluation left of the images of another checkpoint of this step."""
    try:
        left = json.loads((folder / SETTINGS).read_text())["checkpoint"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        left = None
    if left != sampler.identity()["checkpoint"]["sha256"] and folder.exists():
        shutil.rmtree(folder)


def _loss(reader: CheckpointReader, protocol: LossProtocol, topology: Topology, batch: int) -> Result:
    metrics = validation_loss(reader, protocol, batch, topology=topology)
    index = on_all_ranks(lambda: read_index(protocol.data or reader.config.data.path))
    hashes = {"data": dataset_fingerprint([index])["samples"]}
    return Result(protocol, fingerprint(protocol, hashes), hashes, str(reader.folder), metrics)
