"""Predicted loss of a run: ``prediction.json``, which ``megatron-dit fit`` writes to the run's folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_dit.config.convert import build
from megatron_dit.config.keys import Count, Positive, Section, check
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.io import read_text, replacing

PREDICTION = "prediction.json"


@dataclass(frozen=True)
class Prediction(Section):
    """Predicted training loss after each of ``steps``, which increase, with the bounds of a 90% interval."""

    steps: list[Count]
    loss: list[Positive]
    low: list[Positive]
    high: list[Positive]

    def check(self) -> None:
        lengths = {len(values) for values in (self.steps, self.loss, self.low, self.high)}
        check(len(lengths) == 1 and 0 not in lengths, "steps, loss, low and high: expected lists of equal length")
        check(self.steps == sorted(set(self.steps)), "steps: expected increasing numbers")
        ordered = all(low <= loss <= high for low, loss, high in zip(self.low, self.loss, self.high, strict=True))
        check(ordered, "expected low <= loss <= high")

    def write(self, folder: Path) -> Path:
        """Write the prediction to a folder, which is created if it is missing; return the file."""
        with replacing(folder / PREDICTION, makes_folder=True) as part:
            part.write_text(json.dumps(asdict(self)) + "\n")
        return folder / PREDICTION

    def draw(self, axes: Any) -> None:
        """Plot the prediction over steps: a line with its interval, or an error bar if it has a single step."""
        style: dict[str, Any] = {"color": "black", "linewidth": 1, "label": "predicted, with 90% interval"}
        if len(self.steps) == 1:
            below, above = self.loss[0] - self.low[0], self.high[0] - self.loss[0]
            axes.errorbar(self.steps, self.loss, yerr=[[below], [above]], fmt="*", capsize=4, **style)
        else:
            axes.plot(self.steps, self.loss, linestyle="--", **style)
            axes.fill_between(self.steps, self.low, self.high, color="black", alpha=0.12, linewidth=0)


def read_prediction(folder: Path) -> Prediction | None:
    """Return the prediction in a run's folder, if there is one. Raises UserError if it is invalid."""
    path = folder / PREDICTION
    if not path.exists():
        return None
    try:
        return build(Prediction, json.loads(read_text(path, "it")))
    except (UserError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not a valid prediction ({error}); write it again with 'megatron-dit fit', or delete it"
        ) from None
