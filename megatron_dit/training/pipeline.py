"""Run the model under Megatron-core's pipeline schedules, 1F1B and interleaved 1F1B."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_dit.config import Config
from megatron_dit.data.batch import Batch
from megatron_dit.models.common.base import DiffusionTransformer
from megatron_dit.parallel.megatron import ModelType, TransformerConfig, get_forward_backward_func
from megatron_dit.parallel.topology import Topology
from megatron_dit.runtime.compat import create_cuda_tensors_on_cpu
from megatron_dit.training.losses import LossTerms

Forward = Callable[["ModelChunk", Batch], LossTerms]  # (virtual stage, micro-batch) -> its losses


class ModelChunk(nn.Module):
    """A virtual stage: consecutive blocks, with the attributes that Megatron's schedules require of a model."""

    def __init__(self, model: DiffusionTransformer, blocks: range, config: TransformerConfig, number: int) -> None:
        super().__init__()
        self.model, self.blocks, self.config, self.vp_stage = model, blocks, config, number
        self.model_type = ModelType.encoder_or_decoder
        self.length = 0  # number of tokens sent to the next stage; shorter states are padded
        self._received: Tensor | None = None

    @property
    def is_last_chunk(self) -> bool:
        return self.blocks.stop == self.model.config.depth

    def set_input_tensor(self, tensors: list[Tensor | None]) -> None:
        self._received = tensors[0]

    def forward(self, *inputs: Any) -> Tensor:
        """Run the blocks on (x, t, condition, intermediates).

        Returns the prediction on the last virtual stage, and the packed state on the others.
        """
        out = self.model(*inputs, self.blocks, self._received)
        return out if self.is_last_chunk else F.pad(out, (0, 0, 0, 0, 0, self.length - len(out)))


class Pipeline:
    """The virtual stages of this rank, and the schedule that runs micro-batches through all stages."""

    def __init__(self, model: DiffusionTransformer, config: Config, topology: Topology, dtype: torch.dtype) -> None:
        parallel, interleaved = config.parallel, config.parallel.virtual_stages > 1
        schedule = TransformerConfig(
            num_layers=config.model.depth,
            hidden_size=config.model.width,
            num_attention_heads=config.model.heads,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.virtual_stages if interleaved else None,
            pipeline_dtype=dtype,
            # With two stages, each is the other's previous and next stage, so the interleaved schedule would silently
            # mix up batched messages. It overlaps unbatched messages with the computation instead.
            overlap_p2p_comm=interleaved,
            batch_p2p_comm=not interleaved,
            batch_p2p_sync=False,
            deallocate_pipeline_outputs=False,
        )
        self._runs = config.virtual_stage_blocks()
        own = self._runs[topology.pipeline_rank :: parallel.pipeline]
        self.chunks = [ModelChunk(model, blocks, schedule, number) for number, blocks in enumerate(own)]
        self._model, self._interleaved = model, interleaved

    def run(self, micro_batches: Sequence[Batch], forward: Forward, *, forward_only: bool = False) -> None:
        """Run the forward and, unless ``forward_only``, the backward pass of all micro-batches.

        Gradients are those of the micro-batches' mean loss. Collective over the pipeline.
        """
        height, width = micro_batches[0].latents.shape[-2:]
        patches = height * width // self._model.config.patch_size**2
        sizes = [sum(self._model.state_lengths(run.stop - 1, patches)) for run in self._runs[:-1]]
        own = [self._runs.index(chunk.blocks) for chunk in self.chunks]
        for chunk, place in zip(self.chunks, own, strict=True):
            chunk.length = max(sizes) if self._interleaved else [*sizes, 0][place]
        shapes = None if self._interleaved else self._shapes(([0, *sizes])[own[0]], self.chunks[0].length)

        def step(batches: Iterator[Batch], chunk: ModelChunk) -> tuple[Tensor, Callable[[Tensor], Any] | None]:
            terms = forward(chunk, next(batches))
            total = terms.total
            return terms.output, None if total is None else lambda _: (total, None)

        with create_cuda_tensors_on_cpu():
            get_forward_backward_func()(
                forward_step_func=step,
                data_iterator=[iter(micro_batches) for _ in self.chunks],
                model=[*self.chunks],
                num_microbatches=len(micro_batches),
                seq_length=max(sizes),
                micro_batch_size=len(micro_batches[0].u),
                forward_only=forward_only,
                adjust_tensor_shapes_fn=shapes,
            )

    def _shapes(self, received: int, sent: int) -> Callable[[Any, Any], tuple[Any, Any]]:
        """Return a function that sets the shapes of received and sent states for 1F1B.

        Shapes differ between stage boundaries, because U-ViT's skips change the state. The interleaved schedule
        supports only one shape.
        """

        def adjust(shapes: list[tuple[int, ...]], _: Any) -> tuple[Any, Any]:
            (_, *rest) = shapes[0]
            return [(received, *rest)], [(sent, *rest)]

        return adjust
