"""Evaluate each new checkpoint of a run that another process trains."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from megatron_dit.checkpoint.listing import CHECKPOINTS, list_checkpoints, step_of
from megatron_dit.checkpoint.load import open_checkpoint
from megatron_dit.checkpoint.reader import CheckpointReader
from megatron_dit.config import load_config
from megatron_dit.evaluation.checkpoint import is_evaluated
from megatron_dit.evaluation.protocol import LossProtocol, Protocol
from megatron_dit.parallel.collectives import on_all_ranks, on_rank0
from megatron_dit.parallel.topology import connect
from megatron_dit.runtime.errors import RemoteError, UserError
from megatron_dit.training.run_folder import CONFIG, RunFolder

logger = logging.getLogger(__name__)

POLL_SECONDS = 10.0


def follow(
    run: Path,
    protocol: Protocol | LossProtocol,
    evaluate: Callable[[CheckpointReader], None],
    poll: float = POLL_SECONDS,
) -> int:
    """Evaluate every checkpoint of a run that has no result yet, until the run is finished. Collective.

    Returns the number of evaluated checkpoints. A checkpoint gets its name when it is complete. One that the run
    deletes in the meantime is skipped; so is an incomplete one, with a warning.
    """
    connect()
    skipped: set[Path] = set()
    done, waiting = 0, False
    while True:
        path, finished = on_rank0(lambda: _next(run, protocol, skipped))
        if path is None:
            if finished:
                return done
            if not waiting:
                logger.info("waiting for the next checkpoint of %s", run)
            waiting = True
            time.sleep(poll)
            continue
        waiting = False
        reader = _opened(path)
        if reader is None:
            skipped.add(path)
            continue
        try:
            evaluate(reader)
        except (UserError, OSError, RemoteError) as error:
            # Every rank raises the same error.
            if on_rank0(path.exists):
                raise
            logger.info("%s was deleted by its run while it was read (%s)", path.name, error)
            skipped.add(path)
            continue
        done += 1
        on_rank0(lambda: RunFolder(load_config(run / CONFIG)).plot())


def _next(run: Path, protocol: Protocol | LossProtocol, skipped: set[Path]) -> tuple[Path | None, bool]:
    """Return the oldest checkpoint without a result, and whether the run has saved its last step."""
    last = load_config(run / CONFIG).train.steps
    found = list_checkpoints(run / CHECKPOINTS).checkpoints
    steps = [(step, path) for path in found if (step := step_of(path)) is not None]
    for step, path in steps:
        if path not in skipped:
            try:
                if not is_evaluated(path, step, protocol, run):
                    return path, False
            except FileNotFoundError:  # just deleted
                continue
    return None, bool(steps) and steps[-1][0] >= last


def _opened(path: Path) -> CheckpointReader | None:
    """Return a reader on all ranks, or None if the checkpoint is incomplete or was just deleted."""
    try:
        return on_all_ranks(lambda: open_checkpoint(path))
    except UserError as error:
        logger.warning("skipping %s: %s", path.name, error)
        return None
