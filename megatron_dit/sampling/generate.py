"""Generate images from a checkpoint of any layout in one process."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from megatron_dit.checkpoint.load import check_model, open_checkpoint
from megatron_dit.checkpoint.reader import CheckpointReader
from megatron_dit.config import Config
from megatron_dit.data.codec import open_codec
from megatron_dit.data.index import Index, read_index
from megatron_dit.data.text import DTYPES, TextEncoder, pad
from megatron_dit.models.build import build_unsharded
from megatron_dit.models.common.condition import Condition
from megatron_dit.mup.multipliers import set_multipliers
from megatron_dit.parallel.topology import connect
from megatron_dit.runtime.device import device
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.progress import ProgressBar
from megatron_dit.sampling.solvers import guide, scheduler_for, solve


def load_model(
    reader: CheckpointReader, config: Config, *, ema: bool = True, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Return the unsharded model in evaluation mode, with a checkpoint's EMA (or raw) weights and multipliers.

    The weights are rounded to ``dtype``. They are on the device in this type only, 2 bytes per parameter in bf16.
    """
    connect()
    check_model(reader)
    with torch.device("meta"):
        model = build_unsharded(config.model).to(dtype)
    assert not list(model.buffers()), "to_empty leaves buffers without values"
    model.to_empty(device=device())
    multipliers = reader.manifest["multipliers"]
    supported = {f"{name}.weight" for name, layer in model.named_modules() if hasattr(layer, "multiplier")}
    unknown = next((name for name in multipliers if name not in supported), None)
    if unknown is not None:
        raise UserError(
            f"{reader.folder} has a forward multiplier for {unknown}, whose layer supports none; use another checkpoint"
        )
    set_multipliers(model, multipliers)
    with torch.no_grad(), reader.keep_files_open():
        for name, p in model.named_parameters():
            p.copy_(reader.weights("ema" if ema else "master", name))
    return model.eval()


def noise_of(prompt: str, copy: int, seed: int, shape: tuple[int, ...]) -> Tensor:
    """Return the initial noise of a prompt's ``copy``-th image, which does not depend on the batch."""
    digest = hashlib.sha256(f"{seed}/{copy}/{prompt}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator)


class Sampler:
    """Generator of images from one checkpoint, in the type that the run trained in (``train.dtype``).

    The dataset's index names the codec and text encoder; ``data`` overrides the dataset in the run's config.
    """

    def __init__(self, checkpoint: str | Path, *, data: str | None = None, ema: bool = True) -> None:
        reader = open_checkpoint(checkpoint)
        self.config = reader.config
        self.step = reader.step
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
        self.model = load_model(reader, self.config, ema=ema, dtype=self._dtype)

    def draw(
        self,
        prompts: Sequence[str],
        *,
        seed: int = 0,
        size: tuple[int, int] | None = None,
        solver: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        batch: int = 64,
        show: bool = True,
    ) -> np.ndarray:
        """Return images (N, H, W, 3) uint8, one per prompt.

        ``size`` is (height, width) in pixels. The other parameters default to the config's values. A prompt is a
        caption, or the number of a class if the model has classes. The k-th occurrence of a prompt uses the k-th noise
        of (seed, prompt).
        """
        model, defaults = self.config.model, self.config.sampling
        chosen = replace(
            defaults,
            solver=defaults.solver if solver is None else solver,
            steps=defaults.steps if steps is None else steps,
            guidance=defaults.guidance if guidance is None else guidance,
        )
        config = replace(self.config, sampling=chosen)  # validates the new values
        shape = (model.in_channels, *self._latent_size(size))
        copies = [list(prompts[:i]).count(prompt) for i, prompt in enumerate(prompts)]
        noise = torch.stack([noise_of(p, c, seed, shape) for p, c in zip(prompts, copies, strict=True)])
        condition = self._condition(prompts)
        images = []
        groups = range(0, len(prompts), batch)
        with ProgressBar("sample", len(groups) * chosen.steps, show=show) as bar:
            for i in groups:
                part = condition.map(lambda x, i=i: x[i : i + batch].to(device()))
                guided = guide(self._predict, part, chosen.guidance, model.in_channels)
                scheduler = scheduler_for(config, chosen.solver)
                latents = solve(guided, noise[i : i + batch].to(device()), scheduler, chosen.steps, bar.advance)
                images.append(self.codec.decode(latents).cpu().permute(0, 2, 3, 1))
        return torch.cat(images).numpy()

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
            return Condition(dropped, *pad(self._text.encode(prompts), self.config.model.text_tokens))
        classes = self.config.model.num_classes
        wrong = next((p for p in prompts if not (p.isdecimal() and int(p) < classes)), None)
        if wrong is not None:
            raise UserError(f"prompt {wrong!r} is invalid; expected the number of a class, 0 to {classes - 1}")
        return Condition(dropped, label=torch.tensor([int(prompt) for prompt in prompts]))

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
