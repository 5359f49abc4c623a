"""Small sweeps, and finished sweeps with given results."""

from __future__ import annotations

import json

import yaml

from megatron_dit.config import load
from megatron_dit.tuning.space import SweepConfig, open_folder
from megatron_dit.tuning.trial import Result, TrialFiles
from tests.helpers.configs import small_dict


def write_sweep(folder, data, space, arch="mmdit", base=None, **options):
    """Write base and sweep configs to ``folder``; return the sweep config's path."""
    tiny = {"model.depth": 1, "train.steps": 6, "train.global_batch": 4, "optimizer.warmup_steps": 0}
    tiny |= {"checkpoint.every": 2, "data.path": str(data)}
    (folder / "base.yaml").write_text(yaml.safe_dump(small_dict(arch, **{**tiny, **(base or {})})))
    values = {"run_dir": str(folder / "sweep"), "base_config": str(folder / "base.yaml"), "space": space, **options}
    path = folder / "search.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def plant(path, outcomes):
    """Create a finished sweep. ``outcomes`` has (params, state, loss) of trials 0, 1, ..., all with all their steps."""
    config = load(SweepConfig, path)
    open_folder(config)
    for number, (params, state, loss) in enumerate(outcomes):
        trial = config.trial_config(params, number)
        samples = trial.train.steps * trial.train.global_batch
        files = TrialFiles(config.folder / "trials" / f"{number:04d}", params)
        files.write(Result(number, params, state, loss, "" if loss else "because", trial.train.steps, samples, 1.0))
    return config


def plant_metrics(config, number, losses):
    """Write the metrics of a planted trial: its loss at steps 1, 2, ..."""
    folder = config.trial_folder(number)
    folder.mkdir()
    lines = [{"step": step, "loss": float(loss), "grad_norm": 1.0} for step, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
