"""FLOPs of each architecture by formula, from the config alone: what torch's counts are compared with."""

from __future__ import annotations

from megatron_dit.models.flops import Flops

TIMESTEP_FEATURES = 256


def model_parts(config, height, width):
    """Return (embed, blocks, head, projector)."""
    patches = height // config.patch_size * (width // config.patch_size)
    embed, blocks, head = PARTS[config.arch](config, patches)
    tokens = sequence(config, patches) if config.arch == "uvit" else patches
    return embed, blocks, head, _projector(config, tokens, patches) if config.repa_block else Flops()


def sequence(config, patches):
    """Tokens of U-ViT's sequence: time, condition and patches."""
    return patches + 1 + (config.text_tokens or 1)


def _linear(tokens, inputs, outputs, *, of_data=False):
    """FLOPs of a product (tokens, inputs) -> (tokens, outputs). ``of_data``: the input needs no gradient."""
    forward = 2 * tokens * inputs * outputs
    return Flops(forward, forward if of_data else 2 * forward)


def _attention(queries, keys, width):
    """FLOPs of the scores and the weighted sum of the values, over all heads."""
    forward = 2 * (2 * queries * keys * width)
    return Flops(forward, 2 * forward)


def _layer(config, tokens):
    """FLOPs of the products of a Transformer layer: qkv, output and MLP."""
    d, hidden = config.width, config.mlp_ratio * config.width
    return _linear(tokens, d, 3 * d) + _linear(tokens, d, d) + _linear(tokens, d, hidden) + _linear(tokens, hidden, d)


def _patch_embed(config, patches):
    return _linear(patches, config.in_channels * config.patch_size**2, config.width, of_data=True)


def _time_embed(config):
    return _linear(1, TIMESTEP_FEATURES, config.width, of_data=True) + _linear(1, config.width, config.width)


def _readout(config, patches):
    return _linear(patches, config.width, config.patch_size**2 * config.out_channels)


def _projector(config, tokens, patches):
    """FLOPs of REPA's MLP; the hidden layers process all tokens, the last layer only the patches."""
    d = config.width
    return _linear(tokens, d, 2 * d) + _linear(tokens, 2 * d, 2 * d) + _linear(patches, 2 * d, config.repa_dim)


def _dit(config, patches):
    d = config.width
    embed = _patch_embed(config, patches) + _time_embed(config)
    block = _linear(1, d, 6 * d) + _layer(config, patches) + _attention(patches, patches, d)
    head = _linear(1, d, 2 * d) + _readout(config, patches)
    return embed, [block] * config.depth, head


def _mmdit(config, patches):
    d, text = config.width, config.text_tokens
    embed = _patch_embed(config, patches) + _time_embed(config) + _linear(text, config.text_dim, d, of_data=True)
    image = _linear(1, d, 6 * d) + _layer(config, patches) + _attention(patches + text, patches + text, d)
    block = image + _linear(1, d, 6 * d) + _layer(config, text)
    last = image + _linear(1, d, 2 * d) + _linear(text, d, 3 * d)  # text is only an input of its attention
    head = _linear(1, d, 2 * d) + _readout(config, patches)
    return embed, [block] * (config.depth - 1) + [last], head


def _pixart(config, patches):
    d, text = config.width, config.text_tokens
    captions = _linear(text, config.text_dim, d, of_data=not config.train_null_caption) + _linear(text, d, d)
    embed = _patch_embed(config, patches) + _time_embed(config) + _linear(1, d, 6 * d) + captions
    cross = _linear(patches, d, d) + _linear(text, d, 2 * d) + _attention(patches, text, d) + _linear(patches, d, d)
    block = _layer(config, patches) + _attention(patches, patches, d) + cross
    return embed, [block] * config.depth, _readout(config, patches)


def _uvit(config, patches):
    d, tokens, half, channels = config.width, sequence(config, patches), config.depth // 2, config.out_channels
    embed = _patch_embed(config, patches) + _linear(config.text_tokens, config.text_dim, d, of_data=True)
    block = _layer(config, tokens) + _attention(tokens, tokens, d)
    skipped = _linear(tokens, 2 * d, d) + block
    conv = _linear(patches * config.patch_size**2, 3 * 3 * channels, channels)
    return embed, [block] * (half + 1) + [skipped] * half, _readout(config, patches) + conv


PARTS = {"dit": _dit, "mmdit": _mmdit, "pixart": _pixart, "uvit": _uvit}
