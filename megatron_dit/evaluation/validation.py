"""Validation loss at fixed timesteps, as MLPerf Training measures FLUX.1.

Sample n of the dataset has the timestep t = (n mod T) / T, and its noise is a function of the protocol's seed and n.
Each sample's loss is computed by itself, and the mean is taken over all of them in fp64: the result does not depend on
the batch size, the layout or the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby, islice

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from megatron_dit.checkpoint.reader import CheckpointReader
from megatron_dit.config import Config
from megatron_dit.data.batch import Batch
from megatron_dit.data.index import Index, read_index
from megatron_dit.data.samples import Place, Samples
from megatron_dit.data.stream import online_text
from megatron_dit.data.text import DTYPES
from megatron_dit.data.validate import check_data
from megatron_dit.evaluation.protocol import LossProtocol
from megatron_dit.objectives import OBJECTIVES, NoiseDraw
from megatron_dit.parallel.collectives import gather_to_rank0, on_all_ranks, on_rank0, raise_on_all_ranks
from megatron_dit.parallel.topology import SOLO, Topology, connect
from megatron_dit.runtime.device import device
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.progress import ProgressBar
from megatron_dit.sampling.model import load_model

SHOWN = 5  # unreadable samples that a message lists


def validation_loss(
    reader: CheckpointReader, protocol: LossProtocol, batch: int, *, topology: Topology = SOLO
) -> dict[str, float]:
    """Return the mean losses of the EMA and of the trained weights: over all samples and by timestep. Collective.

    The losses are the objective's, without REPA's. Captions are not dropped. Raises UserError if the dataset does not
    match the model, has too few samples, or has an unreadable one.
    """
    connect()
    config = _config(reader.config, protocol)
    index = on_all_ranks(lambda: _open_data(config, protocol))
    found: dict[str, float] = {}
    for name, ema in (("validation_loss", True), ("validation_loss_raw", False)):
        model = on_all_ranks(
            lambda ema=ema: load_model(
                reader, reader.config, ema=ema, dtype=DTYPES[config.train.dtype], topology=topology
            )
        )
        losses = _losses(model, index, config, protocol, batch, topology)
        found |= on_rank0(lambda losses=losses, name=name: _means(name, losses, protocol.timesteps))
    return found


def _config(config: Config, protocol: LossProtocol) -> Config:
    """Return the run's config with the protocol's data and seed. Vision features are not read."""
    data = replace(
        config.data, path=protocol.data or config.data.path, mixture={}, caption_dropout=0.0, shard_text_encoder=False
    )
    model = replace(config.model, repa_block=None, repa_dim=None)
    return replace(config, data=replace(data, repa_encoder=None), model=model, seed=protocol.seed)


def _open_data(config: Config, protocol: LossProtocol) -> Index:
    index = read_index(config.data.path)
    check_data((index,), config)
    total = sum(shard.samples for shard in index.shards)
    if total < protocol.samples:
        raise UserError(
            f"{index.folder} has {total} samples, but the protocol {protocol.name} needs {protocol.samples}"
        )
    return index


def _losses(
    model: nn.Module, index: Index, config: Config, protocol: LossProtocol, batch: int, topology: Topology
) -> np.ndarray:
    """Return the loss of each sample, (samples,) fp64, on rank 0 and an empty array on the others. Collective."""
    parts = list(_parts(index, protocol.samples, batch))
    own = parts[topology.replica :: topology.replicas]
    dataset = Samples((index,), config)
    loader = DataLoader(
        dataset,
        batch_sampler=own,  # pyright: ignore[reportArgumentType]
        num_workers=config.data.workers,
        collate_fn=dataset.collate,
        generator=torch.Generator().manual_seed(0),  # otherwise it would advance torch's global one
    )
    batches: Iterator[Batch] = iter(loader)
    if config.data.text_encoder and not config.model.num_classes:
        batches = map(online_text(index, config), batches)
    found: list[tuple[int, float]] = []
    wrong: list[str] = []
    with ProgressBar("validate", len(own), show=topology.rank == 0) as bar:
        for places, samples in zip(own, batches, strict=True):
            wrong += [message for _, message in samples.bad]
            numbers = [position for _, position, *_ in places]
            found += zip(numbers, _batch_losses(model, samples, numbers, config, protocol.timesteps), strict=True)
            bar.advance()
    raise_on_all_ranks(_unreadable(index, wrong))
    by_rank = gather_to_rank0(found if topology.tensor_rank == 0 else [])
    return np.array([loss for _, loss in sorted(pair for pairs in by_rank for pair in pairs)])


def _parts(index: Index, samples: int, size: int) -> Iterator[list[Place]]:
    """Yield the places of the first samples of a dataset, at most ``size`` of one bucket at a time."""
    numbered = ((shard, sample) for shard, each in enumerate(index.shards) for sample in range(each.samples))
    places = ((0, position, 0, shard, sample) for position, (shard, sample) in enumerate(islice(numbered, samples)))
    for _, group in groupby(places, key=lambda place: index.shards[place[3]].bucket):
        while part := list(islice(group, size)):
            yield part


@torch.no_grad()
def _batch_losses(
    model: nn.Module, batch: Batch, numbers: Sequence[int], config: Config, timesteps: int
) -> list[float]:
    objective, dtype = OBJECTIVES[config.objective_name], DTYPES[config.train.dtype]
    batch = batch.to(device())
    fraction = torch.tensor(numbers, device=device()) % timesteps / timesteps
    draw = NoiseDraw(t=objective.t_at(fraction), noise=batch.noise)
    x_t, t = objective.perturb(batch.latents, draw, config.objective)
    condition = batch.condition.map(lambda x: x.to(dtype) if x.is_floating_point() else x)
    output = model(x_t.to(dtype), t, condition)
    return objective.loss(output, batch.latents, draw, config.objective).double().tolist()


def _means(name: str, losses: np.ndarray, timesteps: int) -> dict[str, float]:
    found = {name: float(losses.mean())}
    return found | {f"{name}/t={i / timesteps:g}": float(losses[i::timesteps].mean()) for i in range(timesteps)}


def _unreadable(index: Index, wrong: Sequence[str]) -> UserError | None:
    if not wrong:
        return None
    more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
    return UserError(
        f"{index.folder} has {len(wrong)} unreadable samples: {'; '.join(wrong[:SHOWN])}{more}; validation needs every "
        "sample"
    )
