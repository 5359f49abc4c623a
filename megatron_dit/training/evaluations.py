"""Results of evaluations in a run's folder, ``evaluation/PROTOCOL/step_N.json``, and the curves of their metrics."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.io import read_text, replacing

logger = logging.getLogger(__name__)

EVALUATION = "evaluation"  # subfolder of a run

Curves = dict[str, list[tuple[int, float]]]  # "PROTOCOL metric" -> (step, value)


def result_file(run: Path, protocol: str, step: int, *, ema: bool = True) -> Path:
    """Return the file of a result. Images of the same evaluation are in the folder of this name without suffix."""
    return run / EVALUATION / protocol / f"step_{step:08d}{'' if ema else '_raw'}.json"


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result, whose values that are not finite become null, to its file and its metrics to TensorBoard."""
    metrics = {name: value if math.isfinite(value) else None for name, value in result["metrics"].items()}
    with replacing(path, makes_folder=True) as part:
        part.write_text(json.dumps({**result, "metrics": metrics}, indent=1) + "\n", encoding="utf-8")
    from torch.utils.tensorboard import SummaryWriter

    run, protocol = path.parents[2], path.parent.name
    # A separate subfolder: a trainer that resumes deletes later steps from its own events.
    with SummaryWriter(str(run / "tensorboard" / EVALUATION)) as board:
        for name, value in metrics.items():
            if value is not None:
                board.add_scalar(f"{EVALUATION}/{protocol}/{name}", value, result["step"])


def read_result(path: Path) -> dict[str, Any] | None:
    """Return a result that :func:`write_result` wrote, or None if there is none or it cannot be read."""
    if not path.is_file():
        return None
    try:
        result = json.loads(read_text(path, str(path)))
        valid = type(result["step"]) is int and isinstance(result["metrics"], dict)
    except (UserError, ValueError, KeyError, TypeError, RecursionError) as error:
        logger.warning("%s is not a result of an evaluation (%r); ignoring it", path, error)
        return None
    return result if valid else None


def read_curves(run: Path) -> Curves:
    """Return the metrics of the EMA weights by step, without those by timestep or task (with a ``/`` in their name).

    Only results whose fingerprint is that of the newest one of the protocol: others are not comparable to it.
    """
    curves: Curves = {}
    for folder in sorted((run / EVALUATION).glob("*")):
        results = [result for path in sorted(folder.glob("step_*[0-9].json")) if (result := read_result(path))]
        comparable = [each for each in results if each.get("fingerprint") == results[-1].get("fingerprint")]
        for result in comparable:
            for name, value in result["metrics"].items():
                if "/" not in name and value is not None:
                    curves.setdefault(f"{folder.name} {name}", []).append((result["step"], value))
    return curves
