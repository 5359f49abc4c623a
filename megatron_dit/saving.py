"""What a run saves and when: checkpoints to resume from, snapshots of its averages, both written beside training."""

from __future__ import annotations

import time
from pathlib import Path

from megatron_dit.checkpoint.listing import clear, delete, list_checkpoints, old_ones, step_of
from megatron_dit.checkpoint.save import Saver, set_aside
from megatron_dit.engine import Engine
from megatron_dit.errors import UserError, writing
from megatron_dit.optimizer import power_averages
from megatron_dit.run_folder import RunFolder

SECONDS_BETWEEN_PICTURES = 60.0  # to draw one takes longer than to save a small model


class RunSaver:
    """Saves an engine's state after the steps that ``checkpoint.*`` names."""

    def __init__(self, engine: Engine, run: RunFolder) -> None:
        self._engine, self._run, self._config = engine, run, engine.config
        self._snapshot, self._checkpoint = Saver(engine), Saver(engine)
        self._drawn = time.monotonic()

    def prepare(self) -> list[str]:
        """Make the folders, delete what unfinished saves left in them; messages. Rank 0 alone, before any step.

        Raises UserError if something that is not a checkpoint has the name of one that this run will write.
        """
        run, config = self._run, self._config.checkpoint
        folders = {run.checkpoints: config.every}
        if config.ema_every:
            folders[run.snapshots] = config.ema_every
        notes = []
        with writing(run.path):
            for folder, every in folders.items():
                folder.mkdir(exist_ok=True)
                self._check_names_are_free(folder, every)
                clear(folder)
            if config.ema_every:  # those of the checkpoints were reported when one was looked for
                notes += list_checkpoints(run.snapshots).notes
            return notes + set_aside(run.checkpoints, self._engine.step)

    def _check_names_are_free(self, folder: Path, every: int) -> None:
        last = self._config.train.steps
        for path, why in list_checkpoints(folder).strays.items():
            step = step_of(path)
            if step is not None and self._engine.step < step <= last and (step % every == 0 or step == last):
                raise UserError(f"{path} is {why}, but this run will save step {step} under that name: move it away")

    @property
    def writing(self) -> bool:
        """Whether this rank is still writing its share of something."""
        return self._snapshot.writing or self._checkpoint.writing

    def after_step(self, busy: bool, last: bool) -> list[str]:
        """Finish what all ranks have written (``busy``: some have not), begin what is due; lines to say. Collective.

        A failed write does not stop a run, which says so and tries again at the next; after the ``last`` step it
        raises UserError.
        """
        step, config = self._engine.step, self._config.checkpoint
        of_averages = config.ema_every > 0 and (step % config.ema_every == 0 or step == self._config.train.steps)
        due = last or step % config.every == 0
        lines = self.finish() if due or of_averages or not busy else []
        if of_averages:
            self._snapshot.begin(self._run.snapshots, list(power_averages(self._config.train)))
        if due:
            self._checkpoint.begin(self._run.checkpoints)
        return lines + (self.finish(must=True) if last else [])

    def finish(self, must: bool = False) -> list[str]:
        """Wait for what is being written; lines to say. ``must`` raises UserError where it failed. Collective."""
        lines, config = [], self._config.checkpoint
        # The snapshot first: a run that was killed between them and resumes from the checkpoint never writes it again.
        for saver in (self._snapshot, self._checkpoint):
            if not saver.under_way:
                continue
            try:
                path = saver.commit()
                lines.append(f"saved {path.parent.name}/{path.name}")
            except UserError as error:
                if must:
                    raise
                lines.append(f"{error}; training goes on, older ones are as they were")
                continue
            if saver is self._checkpoint and saver.first:
                try:
                    for old in old_ones(self._run.checkpoints, config.keep, config.keep_every):
                        delete(old)
                    if must or time.monotonic() - self._drawn > SECONDS_BETWEEN_PICTURES:
                        self._run.plot()
                        self._drawn = time.monotonic()
                except OSError as error:
                    lines.append(f"old checkpoints or loss.png cannot be replaced ({error}); training goes on")
        return lines
