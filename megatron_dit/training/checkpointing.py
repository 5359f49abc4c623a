"""Schedule of a run's checkpoints and EMA snapshots, which are written in the background of training."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from megatron_dit.checkpoint.listing import checkpoints_to_delete, clear, delete, list_checkpoints, step_of
from megatron_dit.checkpoint.staging import Staging
from megatron_dit.checkpoint.writer import CheckpointWriter, set_aside
from megatron_dit.optimizer import power_averages
from megatron_dit.runtime.errors import UserError, writing
from megatron_dit.training.engine import Engine
from megatron_dit.training.run_folder import RunFolder

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_PLOTS = 60.0  # minimum between updates of loss.png; plotting takes longer than a small checkpoint


class CheckpointSchedule:
    """Saves an engine's state after the steps that ``checkpoint.*`` defines."""

    def __init__(self, engine: Engine, run: RunFolder) -> None:
        self._engine, self._run, self._config = engine, run, engine.config
        staging = Staging()  # after_step commits both writers before it begins either
        self._snapshot, self._checkpoint = CheckpointWriter(engine, staging), CheckpointWriter(engine, staging)
        self._plotted = time.monotonic()

    def prepare(self) -> None:
        """Create the folders and delete the remains of interrupted saves.

        Only rank 0 calls this, before the first step. Raises UserError if an entry that is not a checkpoint has the
        name of one that this run will write.
        """
        run, config = self._run, self._config.checkpoint
        folders = {run.checkpoints: config.every}
        snapshot_every = self._config.ema.snapshot_every
        if snapshot_every:
            folders[run.snapshots] = snapshot_every
        with writing(run.path):
            for folder, every in folders.items():
                folder.mkdir(exist_ok=True)
                self._check_names_are_free(folder, every)
                clear(folder)
            if snapshot_every:  # stray entries among the checkpoints were logged when the run was resumed
                list_checkpoints(run.snapshots).log_strays(logging.INFO)
            set_aside(run.checkpoints, self._engine.step)

    def _check_names_are_free(self, folder: Path, every: int) -> None:
        last = self._config.train.steps
        for path, why in list_checkpoints(folder).strays.items():
            step = step_of(path)
            if step is not None and self._engine.step < step <= last and (step % every == 0 or step == last):
                raise UserError(f"{path} is {why}, but this run will save step {step} under that name; move it away")

    @property
    def writing(self) -> bool:
        """Whether this rank is still writing a checkpoint or snapshot."""
        return self._snapshot.writing or self._checkpoint.writing

    def after_step(self, writing: bool, last: bool) -> None:
        """Commit saves that all ranks have written and start those due after this step. Collective.

        ``writing``: some rank is still writing. A failed write does not stop the run: it is logged, and the next save
        tries again. After the ``last`` step a failed write raises UserError.
        """
        step, config = self._engine.step, self._config.checkpoint
        snapshot_every = self._config.ema.snapshot_every
        snapshot_due = bool(snapshot_every) and (step % snapshot_every == 0 or step == self._config.train.steps)
        checkpoint_due = last or step % config.every == 0
        if checkpoint_due or snapshot_due or not writing:
            self.finish()
        if snapshot_due:
            self._snapshot.begin(self._run.snapshots, list(power_averages(self._config.ema)))
        if checkpoint_due:
            self._checkpoint.begin(self._run.checkpoints)
        if last:
            self.finish(must=True)

    def finish(self, must: bool = False) -> None:
        """Wait for the saves in progress. Collective. If ``must`` is true, raise UserError if a write failed."""
        # Commit the snapshot first: a run killed between the two resumes from the checkpoint and would never write it.
        for writer in (self._snapshot, self._checkpoint):
            if not writer.under_way:
                continue
            try:
                path = writer.commit()
                logger.info("saved %s/%s", path.parent.name, path.name)
            except UserError as error:
                if must:
                    raise
                logger.info("%s; continuing to train, older checkpoints are unchanged", error)
                continue
            if writer is self._checkpoint and writer.is_rank0:
                self._delete_old_and_plot(must)

    def _delete_old_and_plot(self, must: bool) -> None:
        """Delete old checkpoints and, if it is due or ``must`` is true, update loss.png."""
        config = self._config.checkpoint
        try:
            for old in checkpoints_to_delete(self._run.checkpoints, config.keep, config.keep_every):
                delete(old)
            if must or time.monotonic() - self._plotted > SECONDS_BETWEEN_PLOTS:
                self._run.plot()
                self._plotted = time.monotonic()
        except (OSError, UserError) as error:
            logger.info("old checkpoints or loss.png cannot be replaced (%s); continuing to train", error)
