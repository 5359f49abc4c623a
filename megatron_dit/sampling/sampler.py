"""Generate images from a checkpoint of any layout, on one rank or on tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_dit.checkpoint.load import open_checkpoint
from megatron_dit.checkpoint.manifest import MANIFEST
from megatron_dit.config import Config, SamplingConfig
from megatron_dit.data.codec import open_codec
from megatron_dit.data.index import Index, read_index
from megatron_dit.data.tar import sha256_of
from megatron_dit.data.text import DTYPES, TextEncoder, pad
from megatron_dit.models.common.condition import Condition
from megatron_dit.parallel.topology import SOLO, Topology
from megatron_dit.runtime.device import device
from megatron_dit.runtime.errors import UserError
from megatron_dit.sampling.guidance import guide
from megatron_dit.sampling.image_sampler import Drawing, ImageSampler, generator_of
from megatron_dit.sampling.model import load_model
from megatron_dit.sampling.prompts import Request
from megatron_dit.sampling.solvers import evaluations, scheduler_for, solve, uses_variance


class Sampler(ImageSampler):
    """Generator of images from one checkpoint, in the type that the run trained in (``train.dtype``).

    The dataset's index names the codec and text encoder; ``data`` overrides the dataset in the run's config. With a
    ``topology``, its tensor-parallel ranks share the model and have to make the same calls.
    """

    def __init__(
        self, checkpoint: str | Path, *, data: str | None = None, ema: bool = True, topology: Topology = SOLO
    ) -> None:
        reader = open_checkpoint(checkpoint)
        self.folder = reader.folder
        self.config = reader.config
        self.step = reader.step
        self.ema = ema
        self.topology = topology
        self.classes = self.config.model.num_classes
        self.index = index = read_index(data or self.config.data.path)
        model = self.config.model
        if index.channels != model.in_channels:
            raise UserError(
                f"{index.folder} has {index.channels} channels, but the checkpoint's model has {model.in_channels}; "
                "set --data to a dataset encoded like the run's"
            )
        if not model.num_classes and not index.text:
            raise UserError(
                f"{index.folder} has no captions, but the checkpoint's model expects text; "
                "set --data to a dataset with captions"
            )
        self._text = None if model.num_classes else self._text_encoder(index)
        self.codec = open_codec(index.codec, device(), channels=index.channels)
        self._dtype = DTYPES[self.config.train.dtype]
        self.model = load_model(reader, self.config, ema=ema, dtype=self._dtype, topology=topology)

    def settings(self, **values: object) -> SamplingConfig:
        return chosen(self.config, **values)

    def identity(self) -> dict[str, Any]:
        sha256 = sha256_of(self.folder / MANIFEST)
        checkpoint = {"folder": str(self.folder), "step": self.step, "sha256": sha256}
        return {"checkpoint": checkpoint, "ema": self.ema, "dtype": self.config.train.dtype}

    def check_size(self, size: tuple[int, int] | None) -> None:
        self._latent_size(size)

    def evaluations(self, drawing: Drawing) -> int:
        return evaluations(scheduler_for(self.config, drawing.sampling.solver), drawing.sampling.steps)

    def images(self, batch: Sequence[Request], drawing: Drawing, each_step: Callable[[], None]) -> np.ndarray:
        images = self.codec.decode(self.latents(batch, drawing, each_step))
        return images.cpu().permute(0, 2, 3, 1).numpy()

    def latents(self, batch: Sequence[Request], drawing: Drawing, each_step: Callable[[], None]) -> Tensor:
        """Return the latents (N, C, h, w) of a batch."""
        model = self.config.model
        shape = (model.in_channels, *self._latent_size(drawing.size))
        generators = [generator_of(request, drawing.seed) for request in batch]
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device())
        condition = self._condition([request.prompt for request in batch])
        if drawing.negative is None:
            null = replace(condition, dropped=torch.ones_like(condition.dropped))
        else:
            null = self._condition([drawing.negative] * len(batch))
        scheduler = scheduler_for(self.config, drawing.sampling.solver)
        variance = uses_variance(scheduler)
        guided = guide(self._predict, condition, null, drawing.sampling, model.in_channels, variance=variance)
        return solve(guided, noise, scheduler, drawing.sampling.steps, each_step, generators)

    def _predict(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Run the model in the type of its weights, as in training; guidance and the solver are fp32."""
        condition = condition.map(lambda each: each.to(self._dtype) if each.is_floating_point() else each)
        return self.model(x.to(self._dtype), t, condition).float()

    def _text_encoder(self, index: Index) -> TextEncoder:
        """Return the encoder whose features the model was trained on. Raises UserError if its weights differ."""
        name, model = self.config.data.text_encoder or index.text_encoder, self.config.model
        encoder = TextEncoder(name, index.text["tokens"], device(), DTYPES[index.text["dtype"]])
        if encoder.dim != model.text_dim:
            raise UserError(f"text encoder {name} has {encoder.dim} features, but model.text_dim={model.text_dim}")
        if encoder.sha256 != index.text["sha256"]:
            raise UserError(
                f"text encoder {name} has weights with SHA-256 {encoder.sha256[:12]}, but {index.folder} was encoded "
                f"with {index.text['sha256'][:12]}; restore that encoder"
            )
        return encoder

    def _condition(self, prompts: Sequence[str]) -> Condition:
        dropped = torch.zeros(len(prompts), dtype=torch.bool)
        if self._text is not None:
            found = Condition(dropped, *pad(self._text.encode(prompts), self.config.model.text_tokens))
        else:
            found = Condition(dropped, label=torch.tensor([int(prompt) for prompt in prompts]))
        return found.map(lambda each: each.to(device()))

    def _latent_size(self, size: tuple[int, int] | None) -> tuple[int, int]:
        model = self.config.model
        if size is None:
            return model.sample_size, model.sample_size
        if model.spec.fixed_size:
            raise UserError(
                f"--size {size[0]}x{size[1]} is not supported by {model.arch}, which learns the positions of its "
                "training size; omit --size"
            )
        multiple = self.codec.scale * model.patch_size
        if any(side % multiple or side <= 0 for side in size):
            raise UserError(f"--size {size[0]}x{size[1]} is invalid: expected positive multiples of {multiple} pixels")
        return size[0] // self.codec.scale, size[1] // self.codec.scale


def chosen(config: Config, **values: object) -> SamplingConfig:
    """Return the config's sampling section with the values that are not None, validated with the entire config."""
    sampling = replace(config.sampling, **{name: value for name, value in values.items() if value is not None})
    return replace(config, sampling=sampling).sampling
