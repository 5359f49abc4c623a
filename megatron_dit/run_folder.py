"""A run's folder: its resolved config, metrics, TensorBoard events and the loss picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dit.config import Config, first_difference, load_config, save_config
from megatron_dit.errors import UserError, writing
from megatron_dit.runtime.locks import RunLock

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
LOCK = "run.lock"  # held by rank 0 of the process that trains
SNAPSHOTS = "ema"  # the averages of train.ema_sigma_rel every checkpoint.ema_every steps


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines logged to a run's folder; a last line cut short by a kill is left out."""
    path = folder / METRICS
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


class RunFolder:
    """Made by every rank (it only reads); rank 0 alone calls the writing methods."""

    def __init__(self, config: Config) -> None:
        """Raises UserError where the folder holds another run, or something that is no run."""
        self.path = Path(config.run_dir)
        self.checkpoints = self.path / "checkpoints"
        self.snapshots = self.path / SNAPSHOTS
        self._config = config
        self._lock: RunLock | None = None
        self._check()

    def _check(self) -> None:
        config = self._config
        saved = self.path / CONFIG
        if saved.is_file():
            difference = first_difference(load_config(saved), config)
            if difference is not None:
                raise UserError(f"{self.path} holds another run ({difference}): set run_dir to a new folder")
        elif self.path.exists() and (not self.path.is_dir() or any(path.name != LOCK for path in self.path.iterdir())):
            raise UserError(f"run_dir={self.path} exists and is no run of ours: set run_dir to a new folder")

    def lock(self) -> None:
        """Lock the folder if it exists, before any of it is read: a running process may still delete what we find.

        A new run's folder is created and locked by :meth:`open`, after everything that may be refused.
        Raises UserError naming the process that holds the lock.
        """
        if self._lock is None and self.path.is_dir():
            with writing(self.path):
                self._lock = RunLock(self.path / LOCK)
            self._check()

    def open(self, step: int) -> None:
        """Create the folder, lock it, write the config, and drop metrics that a run resumed at ``step`` will write
        anew. Raises UserError if another process holds the lock, or has begun a run in it since we looked.
        """
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if self._lock is None:
                self.lock()
                if (self.path / CONFIG).exists():
                    raise UserError(
                        f"run_dir={self.path} was created by another process just now: run the command again to resume"
                    )
            save_config(self._config, self.path / CONFIG)
            kept = [line for line in self.metrics() if line["step"] <= step]
            path = self.path / METRICS
            part = path.with_suffix(".part")
            part.write_text("".join(json.dumps(line) + "\n" for line in kept))
            part.replace(path)
            self._file, self._waiting = path.open("ab", buffering=0), b""
            self._board: SummaryWriter | None = self._open_board(step)

    def _open_board(self, step: int) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter

        folder = self.path / "tensorboard"
        folder.mkdir(exist_ok=True)  # it would make the parents too, on the disk below a mount that was lost
        return SummaryWriter(str(folder), purge_step=step + 1)

    def log(self, step: int, figures: dict[str, Any]) -> str:
        """Add a line to metrics.jsonl and TensorBoard; None stands for a figure that is not finite.

        Returns "", or why that could not be done: the line then waits for the next one, TensorBoard goes without it.
        """
        self._waiting += json.dumps({"step": step, **figures}).encode() + b"\n"
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
            self._board = self._board or self._open_board(step - 1)
            for name, value in figures.items():
                if value is not None:
                    self._board.add_scalar(f"train/{name}", value, step)
        except OSError as error:
            self._board = None  # its writer has ended
            return f"metrics cannot be written ({error})"
        return ""

    def metrics(self) -> list[dict[str, Any]]:
        """The lines logged so far."""
        return read_metrics(self.path)

    def plot(self) -> None:
        """Draw loss.png: loss and gradient norm over steps."""
        from matplotlib.figure import Figure

        lines = [line for line in self.metrics() if line["loss"] is not None and line["grad_norm"] is not None]
        steps = [line["step"] for line in lines]
        figure = Figure(figsize=(8, 5), layout="constrained")
        upper, lower = figure.subplots(2, sharex=True, height_ratios=(2, 1))
        upper.plot(steps, [line["loss"] for line in lines], linewidth=1)
        upper.set_ylabel("loss")
        upper.set_title(str(self.path))
        lower.plot(steps, [line["grad_norm"] for line in lines], linewidth=1, color="tab:orange")
        lower.set_yscale("log")
        lower.set(xlabel="step", ylabel="gradient norm")
        for axes in (upper, lower):
            axes.grid(alpha=0.3)
        figure.savefig(self.path / "loss.png", dpi=120)

    def close(self) -> None:
        """Raises UserError where metrics are still waiting to be written."""
        with writing(self.path):
            self._file.write(self._waiting)
            self._file.close()
            if self._board is not None:
                self._board.close()

    def unlock(self) -> None:
        """Release the lock, if this process holds it."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None
