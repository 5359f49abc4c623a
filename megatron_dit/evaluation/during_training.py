"""Evaluate the checkpoints of a run from within its training process."""

from __future__ import annotations

import logging
from pathlib import Path

from megatron_dit.checkpoint.load import open_checkpoint
from megatron_dit.config import Config
from megatron_dit.evaluation.checkpoint import check_protocols, evaluate_checkpoint, is_evaluated
from megatron_dit.evaluation.protocol import load_protocol
from megatron_dit.parallel.collectives import on_all_ranks, on_rank0
from megatron_dit.parallel.topology import Topology
from megatron_dit.runtime.errors import UserError
from megatron_dit.sampling.sampler import Sampler
from megatron_dit.training.run_folder import RunFolder

logger = logging.getLogger(__name__)


class TrainingEvaluation:
    """Evaluates a run's checkpoint by the protocols of its config, on all ranks, while training waits.

    The EMA weights are read from the checkpoint beside the training state: 2 bytes per parameter and tensor-parallel
    rank in bf16. Nothing of the training state is used or changed.
    """

    def __init__(self, config: Config) -> None:
        """Raise UserError if a protocol is invalid, or if a file that it names does not exist."""
        self._config, self._batch, self._run = config, config.evaluation.batch, Path(config.run_dir)
        self._protocols = [load_protocol(path) for path in config.evaluation.protocols]
        check_protocols(self._protocols)

    def __call__(self, checkpoint: Path, topology: Topology) -> None:
        """Evaluate a checkpoint, unless its results exist. Collective. An error is logged, and training continues."""
        try:
            reader = on_all_ranks(lambda: open_checkpoint(checkpoint))
            missing = on_rank0(
                lambda: [each for each in self._protocols if not is_evaluated(checkpoint, reader.step, each, self._run)]
            )
            results = evaluate_checkpoint(
                reader,
                missing,
                lambda: Sampler(checkpoint, topology=topology),
                self._run,
                topology,
                self._batch,
                keep_images=False,
            )
        except UserError as error:
            logger.error("evaluation of %s failed (%s); continuing to train", checkpoint.name, error)
            return
        for result in results:
            values = ", ".join(f"{name} {value:.6g}" for name, value in result.metrics.items() if "/" not in name)
            logger.info("step %d, %s: %s", reader.step, result.protocol.name, values)
        on_rank0(self._plot)

    def _plot(self) -> None:
        try:
            RunFolder(self._config).plot()
        except (OSError, UserError) as error:
            logger.warning("loss.png cannot be replaced (%s); continuing to train", error)
