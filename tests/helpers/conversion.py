"""Helpers: write random checkpoints with training's engine, and compare our models with diffusers'."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel

from checkpoints_tools.__main__ import main
from megatron_dit.checkpoint.load import open_checkpoint
from megatron_dit.config import config_from_dict
from megatron_dit.models.common.condition import Condition
from megatron_dit.models.uvit.uvit_transformer_2d import UViTTransformer2DModel
from megatron_dit.parallel.topology import connect
from megatron_dit.sampling.model import load_model
from tests.helpers.configs import small
from tests.helpers.gloo import leave

CLASSES = {
    "dit": DiTTransformer2DModel,
    "mmdit": SD3Transformer2DModel,
    "pixart": PixArtTransformer2DModel,
    "uvit": UViTTransformer2DModel,
}
TOLERANCE = 1e-5


def random_value(name, shape, key):
    """Return values that are equal in every layout, and of a size as after training, so that no output is zero."""
    digest = hashlib.sha256(f"{key}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    value = torch.randn(shape, generator=generator) * (
        0.1 if len(shape) == 1 else torch.Size(shape[1:]).numel() ** -0.5
    )
    return value + 1 if name.endswith("gain") else value


def write_checkpoint(folder, arch, options, layout=None):
    """Write a checkpoint of step 7 with random averages and master weights to ``folder/checkpoints``. Collective."""
    from megatron_dit.checkpoint.writer import save
    from megatron_dit.parallel.topology import build_topology
    from megatron_dit.training.engine import Engine

    config = small(arch, **options, **(layout or {}))
    engine = Engine(config, build_topology(config))
    for key in ("master", "ema"):
        engine.write_full_state({key: lambda name, key=key: random_value(name, engine.params[name].shape, key)})
    engine.resume_at(7, 6)
    save(engine, Path(folder) / "checkpoints")


def write_alone(folder, arch, options):
    """Call :func:`write_checkpoint` in this process as the only rank."""
    connect()
    write_checkpoint(folder, arch, options)
    leave()


def convert(*words):
    assert main(["convert", *map(str, words)]) == 0


def tensors(run, key="ema"):
    """Return every parameter's full tensor by name."""
    reader = open_checkpoint(run)
    return {name: reader.full(key, name) for name in reader.manifest["params"]}


def weights_of(folder):
    """Return every tensor in a folder's weights files by name."""
    from safetensors.torch import load_file

    found = {}
    for path in sorted(Path(folder).glob("diffusion_pytorch_model*.safetensors")):
        found.update(load_file(path))
    return found


def equal(one, other):
    """Return whether names, dtypes and values are equal."""
    return one.keys() == other.keys() and all(
        value.dtype == other[name].dtype and torch.equal(value, other[name]) for name, value in one.items()
    )


def our_model(run, ema=True):
    reader = open_checkpoint(run)
    return load_model(reader, config_from_dict(reader.manifest["config"]), ema=ema)


def their_model(folder, arch):
    """Load a diffusers model as the model card shows. Fails on missing or unexpected tensors."""
    model, info = CLASSES[arch].from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    if arch == "dit":
        for block in model.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
    return model.eval()


def inputs(model):
    """Return (x, t, condition) for three samples: the second condition is dropped, the last two texts are shorter."""
    generator = torch.Generator().manual_seed(5)
    side = model.sample_size
    x = torch.randn(3, model.in_channels, side, side, generator=generator)
    t = torch.rand(3, generator=generator) * 1000
    dropped = torch.tensor([False, True, False])
    if model.num_classes:
        return x, t, Condition(dropped, label=torch.randint(model.num_classes, (3,), generator=generator))
    mask = torch.ones(3, model.text_tokens, dtype=torch.bool)
    mask[1:, model.text_tokens // 2 :] = False
    return x, t, Condition(dropped, torch.randn(3, model.text_tokens, model.text_dim, generator=generator), mask)


@torch.no_grad()
def their_output(theirs, config, x, t, condition, null_caption=None):
    """Return the output of diffusers' model, with the condition in the form that its class expects."""
    dropped = condition.dropped
    if config.num_classes:
        labels = torch.where(dropped, config.num_classes, condition.label)
        return theirs(x, timestep=t, class_labels=labels).sample
    if config.arch == "pixart":
        text = torch.where(dropped[:, None, None], null_caption, condition.text)
        return theirs(x, encoder_hidden_states=text, timestep=t, encoder_attention_mask=condition.mask).sample
    text = condition.text * (condition.mask & ~dropped[:, None])[..., None]
    if config.arch == "uvit":
        return theirs(x, encoder_hidden_states=text, timestep=t).sample
    pooled = torch.zeros(len(x), theirs.config.pooled_projection_dim)
    return theirs(x, encoder_hidden_states=text, pooled_projections=pooled, timestep=t).sample


@torch.no_grad()
def difference(run, folder, ema=True):
    """Return the relative difference between the outputs of a run's model and of a diffusers folder's."""
    from safetensors.torch import load_file

    ours, null = our_model(run, ema), Path(folder) / "null_caption.safetensors"
    x, t, condition = inputs(ours.config)
    null_caption = load_file(null)["null_caption"] if null.is_file() else torch.zeros(())
    theirs = their_output(their_model(folder, ours.config.arch), ours.config, x, t, condition, null_caption)
    out = ours(x, t, condition)
    assert out.abs().mean() > 0.01
    return float((out - theirs).norm() / theirs.norm())
