"""FLOPs of one sample, computed by formula from the config, for each part of a model.

A multiply-add is 2 FLOPs. Matrix products, attention and convolutions are counted; norms, activations, softmax,
modulation and other pointwise operations are not. Attention counts every query with every key, masked or not.

In the backward pass a matrix product costs its forward FLOPs once for each factor that needs a gradient: twice, or once
if its input is data (patches, timestep features, text that is not learned). The recomputation of attention scores by a
fused kernel in its backward pass is not counted (as in PaLM, arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from megatron_dit.config import ModelConfig

TIMESTEP_FEATURES = 256


@dataclass(frozen=True)
class Flops:
    """FLOPs of a part of a model for one sample. Parts can be added."""

    forward: int = 0
    backward: int = 0
    recomputed: int = 0  # forward FLOPs run again during the backward pass

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward, self.recomputed + other.recomputed)

    @property
    def model(self) -> int:
        """FLOPs that a training step needs without recomputation; the numerator of MFU."""
        return self.forward + self.backward

    @property
    def hardware(self) -> int:
        """FLOPs that a training step executes, including recomputation."""
        return self.model + self.recomputed


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of the parts into which a pipeline splits a model."""

    embed: Flops
    blocks: tuple[Flops, ...]
    head: Flops
    projector: Flops  # REPA's projector; zero without REPA
    projector_block: int  # index of the block before the projector; -1 without REPA

    def stage(self, blocks: Iterable[int]) -> Flops:
        """Return the FLOPs of a stage with ``blocks``; block 0 includes the embedders, the last block the head."""
        total = Flops()
        for i in blocks:
            total += self.blocks[i]
            if i == 0:
                total += self.embed
            if i == len(self.blocks) - 1:
                total += self.head
            if i == self.projector_block:
                total += self.projector
        return total

    @property
    def total(self) -> Flops:
        return self.stage(range(len(self.blocks)))


def model_flops(config: ModelConfig, height: int, width: int, recomputed_blocks: int = 0) -> ModelFlops:
    """Return the FLOPs per sample for latents (height, width) and text padded to ``text_tokens``.

    The first ``recomputed_blocks`` blocks store only their inputs and run again during the backward pass.
    """
    patches = height // config.patch_size * (width // config.patch_size)
    embed, blocks, head = PARTS[config.arch](config, patches)
    tokens = config.tokens if config.arch == "uvit" else patches
    return ModelFlops(
        embed=embed,
        blocks=tuple(
            replace(block, recomputed=block.forward if i < recomputed_blocks else 0) for i, block in enumerate(blocks)
        ),
        head=head,
        projector=_projector(config, tokens, patches) if config.repa_block else Flops(),
        projector_block=config.repa_block - 1,
    )


def _linear(tokens: int, inputs: int, outputs: int, *, of_data: bool = False) -> Flops:
    """FLOPs of a product (tokens, inputs) -> (tokens, outputs). ``of_data``: the input needs no gradient."""
    forward = 2 * tokens * inputs * outputs
    return Flops(forward, forward if of_data else 2 * forward)


def _attention(queries: int, keys: int, width: int) -> Flops:
    """FLOPs of the scores and the weighted sum of the values, over all heads."""
    forward = 2 * (2 * queries * keys * width)
    return Flops(forward, 2 * forward)


def _layer(config: ModelConfig, tokens: int) -> Flops:
    """FLOPs of the products of a Transformer layer: qkv, output and MLP."""
    d, hidden = config.width, config.mlp_ratio * config.width
    return _linear(tokens, d, 3 * d) + _linear(tokens, d, d) + _linear(tokens, d, hidden) + _linear(tokens, hidden, d)


def _patch_embed(config: ModelConfig, patches: int) -> Flops:
    return _linear(patches, config.in_channels * config.patch_size**2, config.width, of_data=True)


def _time_embed(config: ModelConfig) -> Flops:
    return _linear(1, TIMESTEP_FEATURES, config.width, of_data=True) + _linear(1, config.width, config.width)


def _readout(config: ModelConfig, patches: int) -> Flops:
    return _linear(patches, config.width, config.patch_size**2 * config.out_channels)


def _projector(config: ModelConfig, tokens: int, patches: int) -> Flops:
    """FLOPs of REPA's MLP; the hidden layers process all tokens, the last layer only the patches."""
    d = config.width
    return _linear(tokens, d, 2 * d) + _linear(tokens, 2 * d, 2 * d) + _linear(patches, 2 * d, config.repa_dim)


Parts = tuple[Flops, list[Flops], Flops]  # embed, blocks, head


def _dit(config: ModelConfig, patches: int) -> Parts:
    d = config.width
    embed = _patch_embed(config, patches) + _time_embed(config)
    block = _linear(1, d, 6 * d) + _layer(config, patches) + _attention(patches, patches, d)
    head = _linear(1, d, 2 * d) + _readout(config, patches)
    return embed, [block] * config.depth, head


def _mmdit(config: ModelConfig, patches: int) -> Parts:
    d, text = config.width, config.text_tokens
    embed = _patch_embed(config, patches) + _time_embed(config) + _linear(text, config.text_dim, d, of_data=True)
    image = _linear(1, d, 6 * d) + _layer(config, patches) + _attention(patches + text, patches + text, d)
    block = image + _linear(1, d, 6 * d) + _layer(config, text)
    last = image + _linear(1, d, 2 * d) + _linear(text, d, 3 * d)  # text is only an input of its attention
    head = _linear(1, d, 2 * d) + _readout(config, patches)
    return embed, [block] * (config.depth - 1) + [last], head


def _pixart(config: ModelConfig, patches: int) -> Parts:
    d, text = config.width, config.text_tokens
    captions = _linear(text, config.text_dim, d, of_data=not config.train_null_caption) + _linear(text, d, d)
    embed = _patch_embed(config, patches) + _time_embed(config) + _linear(1, d, 6 * d) + captions
    cross = _linear(patches, d, d) + _linear(text, d, 2 * d) + _attention(patches, text, d) + _linear(patches, d, d)
    block = _layer(config, patches) + _attention(patches, patches, d) + cross
    return embed, [block] * config.depth, _readout(config, patches)


def _uvit(config: ModelConfig, patches: int) -> Parts:
    d, tokens, half, channels = config.width, config.tokens, config.depth // 2, config.out_channels
    embed = _patch_embed(config, patches) + _linear(config.text_tokens, config.text_dim, d, of_data=True)
    block = _layer(config, tokens) + _attention(tokens, tokens, d)
    skipped = _linear(tokens, 2 * d, d) + block
    conv = _linear(patches * config.patch_size**2, 3 * 3 * channels, channels)
    return embed, [block] * (half + 1) + [skipped] * half, _readout(config, patches) + conv


PARTS: dict[str, Callable[[ModelConfig, int], Parts]] = {"dit": _dit, "mmdit": _mmdit, "pixart": _pixart, "uvit": _uvit}
