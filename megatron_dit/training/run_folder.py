"""A run's folder: its resolved config, metrics, TensorBoard events and the plot of the loss."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dit.config import Config, first_difference, load_config, save_config
from megatron_dit.runtime.errors import UserError, writing
from megatron_dit.runtime.io import replacing
from megatron_dit.runtime.locks import RunLock
from megatron_dit.runtime.text import printable
from megatron_dit.training.evaluations import read_curves
from megatron_dit.training.prediction import PREDICTION, read_prediction

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
LOCK = "run.lock"  # held by rank 0 during training
SNAPSHOTS = "ema"  # snapshots of the averages of ema.sigma_rel, every ema.snapshot_every steps


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines logged to a run's folder, without corrupt or foreign lines."""
    return _read_metrics(folder)[0]


def _read_metrics(folder: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Return the valid lines and the numbers of corrupt ones. A truncated last line is in neither."""
    path = folder / METRICS
    found, damaged = [], []
    lines = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    if not lines[-1].endswith(b"}"):
        lines.pop()
    for number, text in enumerate(lines, 1):
        line = _metrics_of(text)
        if line is None:
            damaged.append(number)
        else:
            found.append(line)
    return found, damaged


def _metrics_of(text: bytes) -> dict[str, Any] | None:
    """Parse a line written by :meth:`RunFolder.log`, with non-finite values as None; return None for any other line."""
    try:
        line = json.loads(text.decode(), parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or type(line.get("step")) is not int or "loss" not in line:
        return None
    values = (line["loss"], line.get("grad_norm"))
    valid = all(value is None or (type(value) in (int, float) and abs(value) < 1e300) for value in values)
    return line if valid else None


def _list_lines(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:5])) + (", …" if len(numbers) > 5 else "")
    return f"line {shown}" if len(numbers) == 1 else f"lines {shown}"


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


class RunFolder:
    """Folder of a run. Every rank creates this object, which only reads; only rank 0 calls the writing methods."""

    def __init__(self, config: Config) -> None:
        """Raise UserError if the folder contains another run, or files that are not a run."""
        self.path = Path(config.run_dir)
        self.checkpoints = self.path / "checkpoints"
        self.snapshots = self.path / SNAPSHOTS
        self._config = config
        self._lock: RunLock | None = None
        self._check()

    def _check(self) -> None:
        saved, self._damage = self._saved_config()
        if saved is not None:
            difference = first_difference(saved, self._config)
            if difference is not None:
                raise UserError(f"{self.path} contains another run ({difference}); set run_dir to a new folder")
        elif self.path.exists():
            new = self.path.is_dir() and all(path.name in (LOCK, PREDICTION) for path in self.path.iterdir())
            if not new:
                raise UserError(f"run_dir={self.path} exists and is not a run; set run_dir to a new folder")

    def _saved_config(self) -> tuple[Config | None, str]:
        """Return the config of the run in the folder and the error of config.yaml ("" if it can be used).

        If config.yaml cannot be used, the config in the newest checkpoint is returned. Raises UserError if that
        cannot be used either. The config is None if the folder contains no run.
        """
        path = self.path / CONFIG
        try:
            if path.is_file():
                return load_config(path), ""
            wrong = UserError(f"{path} is {'not a regular file' if os.path.lexists(path) else 'missing'}")
        except UserError as error:
            wrong = error
        from megatron_dit.checkpoint.load import newest  # imports torch, which readers of metrics do not need

        reader = newest(self.checkpoints, verify=False).reader
        if reader is not None:
            with contextlib.suppress(UserError):  # this version cannot use it: report the error of config.yaml
                return reader.config, str(wrong)
        if path.is_file():
            raise UserError(f"{wrong}; no checkpoint contains a usable config either; set run_dir to a new folder")
        return None, ""

    def lock(self) -> None:
        """Lock the folder if it exists. Call this before reading checkpoints, which a running process may delete.

        The folder of a new run is created and locked by :meth:`open`, after all checks of the config and the data.
        Raises UserError with the name of the process that holds the lock.
        """
        if self._lock is None and self.path.is_dir():
            with writing(self.path):
                self._lock = RunLock(self.path / LOCK)
            self._check()

    def open(self, step: int) -> None:
        """Create and lock the folder, write the config, and delete metrics after ``step``, which will be rewritten.

        Raises UserError if another process holds the lock, or has started a run in the folder in the meantime.
        """
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if self._lock is None:
                self.lock()
                if (self.path / CONFIG).exists():
                    raise UserError(
                        f"run_dir={self.path} was just created by another process; run the command again to resume"
                    )
            if self._damage:
                logger.warning(
                    "%s; rewriting it, because the newest checkpoint's config agrees with this run's", self._damage
                )
            save_config(self._config, self.path / CONFIG)
            path = self.path / METRICS
            lines, damaged = _read_metrics(self.path)
            if damaged:
                logger.warning("%s: %s cannot be read as metrics; deleting them", path, _list_lines(damaged))
            kept = [line for line in lines if line["step"] <= step]
            part = path.with_suffix(".part")
            part.write_text("".join(json.dumps(line) + "\n" for line in kept))
            part.replace(path)
            self._file, self._waiting = path.open("ab", buffering=0), b""
        self._error = ""  # the last error of writing metrics
        self._board: SummaryWriter | None = None
        try:
            self._board = self._open_board(step)
        except OSError as error:  # the run does not need TensorBoard; `log` tries again
            logger.warning("TensorBoard events cannot be written (%s)", error)

    def _open_board(self, step: int) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter

        folder = self.path / "tensorboard"
        folder.mkdir(exist_ok=True)  # SummaryWriter would create the parents too, e.g. below a mount that was lost
        return SummaryWriter(str(folder), purge_step=step + 1)

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Write a line of metrics to metrics.jsonl (non-finite values as null) and TensorBoard.

        A write error is logged, and the line is written to metrics.jsonl together with the next one; TensorBoard omits
        it.
        """
        metrics = {name: None if _is_not_finite(value) else value for name, value in metrics.items()}
        self._waiting += json.dumps({"step": step, **metrics}).encode() + b"\n"
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
            self._board = self._board or self._open_board(step - 1)
            for name, value in metrics.items():
                if value is not None:
                    self._board.add_scalar(f"train/{name}", value, step)
            self._error = ""
        except OSError as error:
            self._board = None  # its writer thread has ended
            if str(error) != self._error:  # log an error that persists only once
                logger.warning("metrics cannot be written (%s); trying again with the next ones", error)
            self._error = str(error)

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines logged so far."""
        return read_metrics(self.path)

    def plot(self) -> None:
        """Write loss.png, a plot of the loss and gradient norm over steps.

        With the predicted loss, if there is one, and a curve of each metric of the run's evaluations.
        """
        from matplotlib.figure import Figure

        lines = [line for line in self.metrics() if line["loss"] is not None and line.get("grad_norm") is not None]
        steps = [line["step"] for line in lines]
        curves = read_curves(self.path)
        figure = Figure(figsize=(8, 5 + 1.5 * len(curves)), layout="constrained")
        upper, lower, *others = figure.subplots(
            2 + len(curves), sharex=True, height_ratios=(2, *[1] * (1 + len(curves)))
        )
        upper.plot(steps, [line["loss"] for line in lines], linewidth=1, label="measured")
        try:
            prediction = read_prediction(self.path)
        except UserError as error:
            logger.warning("%s", error)
        else:
            if prediction is not None:
                prediction.draw(upper)
                upper.legend()
        upper.set_ylabel("loss")
        upper.set_title(printable(self.path), parse_math=False)  # a $ in the path must not start a formula
        lower.plot(steps, [line["grad_norm"] for line in lines], linewidth=1, color="tab:orange")
        lower.set_yscale("log")
        lower.set(ylabel="gradient norm")
        for axes, (name, points) in zip(others, curves.items(), strict=True):
            axes.plot(*zip(*points, strict=True), linewidth=1, marker=".", color="tab:green")
            axes.set_ylabel(name.replace(" ", "\n"))
        for axes in (upper, lower, *others):
            axes.grid(alpha=0.3)
        (*_, lowest) = (upper, lower, *others)
        lowest.set_xlabel("step")
        with replacing(self.path / "loss.png") as part:  # 'evaluate --follow' writes it too
            figure.savefig(part, dpi=120)

    def close(self) -> None:
        """Write the remaining metrics and close the files. Raises UserError if they cannot be written."""
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
