"""FLOPs of one sample by part of the model, counted by torch on the meta device.

A multiply-add is 2 FLOPs. Matrix products, attention and convolutions are counted; norms, activations, softmax,
modulation and other pointwise operations are not. Attention counts every query with every key, masked or not. Fused
attention kernels recompute the scores in the backward pass; this is not counted (as in PaLM, arXiv 2204.02311,
appendix B).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_dit.config import ModelConfig
from megatron_dit.models.build import build_unsharded
from megatron_dit.models.common.base import State
from megatron_dit.models.common.condition import Condition
from megatron_dit.models.common.modules import Intermediates, Projector


@dataclass(frozen=True)
class Flops:
    """FLOPs of a part of a model for one sample. Parts can be added."""

    forward: int = 0
    backward: int = 0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward)

    @property
    def model(self) -> int:
        """FLOPs that a training step needs without recomputation; the numerator of MFU."""
        return self.forward + self.backward


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


@functools.cache
def model_flops(config: ModelConfig, height: int, width: int) -> ModelFlops:
    """Return the FLOPs per sample for latents (height, width) and text padded to ``text_tokens``, without recompute."""
    with torch.device("meta"):
        model = build_unsharded(config)
        x, t = torch.empty(1, config.in_channels, height, width), torch.empty(1)
        condition = _condition(config)
    state, embed = _count(lambda _: model.embed(x, t, condition, None), ())
    blocks, counted = [], {}
    projector, patches = Flops(), height * width // config.patch_size**2
    for i in range(config.depth):
        block = model.get_submodule(f"blocks.{i}")
        # Blocks with the same weights and inputs have the same FLOPs.
        kind = tuple(p.shape for p in block.parameters()), tuple(value.shape for value in state)
        if kind not in counted:
            counted[kind] = _count(lambda state, i=i: model.run_block(i, state, condition), state)[1]
        blocks.append(counted[kind])
        with torch.no_grad():
            state = model.run_block(i, state, condition)
        if i + 1 == config.repa_block and model.projector is not None:
            projector = _count(functools.partial(_project, model.projector, i, patches), state[:1])[1]
    head = _count(lambda state: (model.readout(state, height, width),), state)[1]
    return ModelFlops(embed, tuple(blocks), head, projector, (config.repa_block or 0) - 1)


def _project(projector: Projector, block: int, patches: int, state: State) -> State:
    found: Intermediates = {}
    projector.record(found, block, state[0], patches)
    return (found["projection"],)


def _condition(config: ModelConfig) -> Condition:
    dropped = torch.zeros(1, dtype=torch.bool)
    if config.num_classes:
        return Condition(dropped, label=torch.zeros(1, dtype=torch.long))
    return Condition(
        dropped,
        torch.empty(1, config.text_tokens, config.text_dim),
        torch.ones(1, config.text_tokens, dtype=torch.bool),
    )


def _count(function: Callable[[State], State], state: State) -> tuple[State, Flops]:
    """Return a part's output and its FLOPs, including the gradients of its weights and of the state it receives."""
    inputs = tuple(value.detach().requires_grad_() for value in state)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            out = function(inputs)
        # A state that is passed on unchanged has no backward pass here.
        outputs = [value for value in out if value.requires_grad and not any(value is each for each in inputs)]
        with FlopCounterMode(display=False) as backward:
            torch.autograd.backward(outputs, [torch.empty_like(value) for value in outputs])
    return out, Flops(forward.get_total_flops(), backward.get_total_flops())
