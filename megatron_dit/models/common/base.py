"""Base class of all models, which lets a pipeline split them: ``embed``, numbered blocks, and ``readout``.

Each block receives and returns a :data:`State`, which contains all tensors (n, B, D) that later blocks need. Pipeline
stages send it as one tensor, concatenated along n, so no stage needs copies of another stage's parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megatron_dit.config import ModelConfig
from megatron_dit.models.common.condition import Condition
from megatron_dit.models.common.modules import Intermediates, Projector
from megatron_dit.parallel.backend import Backend

State = tuple[Tensor, ...]


class DiffusionTransformer(nn.Module, ABC):
    """A model, or the part of it with the given ``blocks``. Blocks are named by their global numbers, from 0.

    The part with block 0 has the embedders, the part with the last block has the head, and the part with block
    ``repa_block - 1`` has REPA's projector.
    """

    def __init__(self, config: ModelConfig, backend: Backend, blocks: Sequence[int] | None = None) -> None:
        super().__init__()
        self.config, self.backend = config, backend
        numbers = range(config.depth) if blocks is None else blocks
        if 0 in numbers:
            self.build_embedders()
        self.blocks = nn.ModuleDict({str(i): self.build_block(i) for i in numbers})
        if config.depth - 1 in numbers:
            self.build_head()
        self.projector = Projector(backend, config) if (config.repa_block or 0) - 1 in numbers else None

    @abstractmethod
    def build_embedders(self) -> None: ...

    @abstractmethod
    def build_block(self, i: int) -> nn.Module: ...

    @abstractmethod
    def build_head(self) -> None: ...

    @abstractmethod
    def embed(self, x: Tensor, t: Tensor, condition: Condition, intermediates: Intermediates | None) -> State:
        """Return the state before block 0. For the arguments see :meth:`forward`."""

    @abstractmethod
    def run_block(self, i: int, state: State, condition: Condition) -> State:
        """Run block ``i`` and return the state after it."""

    @abstractmethod
    def readout(self, state: State, height: int, width: int) -> Tensor:
        """Return the prediction (B, out_channels, H, W) from the state after the last block."""

    @abstractmethod
    def state_lengths(self, i: int, patches: int) -> list[int]:
        """Return the lengths n of the state's tensors after block ``i``, for an image of ``patches`` tokens."""

    def record(self, intermediates: Intermediates, i: int, state: State) -> None:
        """Add the state after block ``i`` to ``intermediates``."""
        intermediates[f"blocks.{i}"] = state[0]

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        condition: Condition,
        intermediates: Intermediates | None = None,
        blocks: range | None = None,
        received: Tensor | None = None,
    ) -> Tensor:
        """Return the prediction (B, out_channels, H, W): velocity, ε, or ε and the variance's interpolation.

        ``x`` (B, C, H, W) are latents with H and W multiples of the patch size; ``t`` (B,) is in [0, 1000]. The dict
        ``intermediates`` receives the intermediates by name. A virtual stage of a pipeline runs ``blocks`` on the
        packed state ``received`` and, unless it has the last block, returns the packed state (N, B, D).
        """
        blocks = range(self.config.depth) if blocks is None else blocks
        height, width = x.shape[-2:]
        patches = height * width // self.config.patch_size**2
        if received is None:
            state = self.embed(x, t, condition, intermediates)
        else:
            state = received[: sum(lengths := self.state_lengths(blocks.start - 1, patches))].split(lengths)
        for i in blocks:
            state = self.backend.recompute.block(i, self.run_block, state, condition)
            if intermediates is not None:
                self.record(intermediates, i, state)
                if self.projector is not None:
                    self.projector.record(intermediates, i, state[0], patches)
        if blocks.stop < self.config.depth:
            return torch.cat(state)
        out = self.readout(state, height, width)
        if intermediates is not None:
            # Only ε, without the learned variance, for the reason given in tuning/coord_check.py.
            intermediates["output"] = out[:, : self.config.in_channels]
        return out
