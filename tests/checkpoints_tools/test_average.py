"""Post-hoc EMA: the snapshots of a run, their combination, and sampling from the result."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from checkpoints_tools.__main__ import main
from checkpoints_tools.average import average
from megatron_dit.checkpoint.listing import checkpoints
from megatron_dit.checkpoint.load import open_checkpoint
from megatron_dit.cli import run as command_line
from megatron_dit.optimizer.ema import gamma_of
from megatron_dit.runtime.errors import UserError
from tests.helpers.averages import step_weights
from tests.helpers.configs import small_dict
from tests.helpers.runs import finish_run, train_in_pool

STEPS = 24


@pytest.fixture(scope="module")
def trained(pool, dataset, tmp_path_factory):
    """A run on two ZeRO-2 ranks with a checkpoint of every step, and snapshots every 4 steps and at the last step."""
    folder = tmp_path_factory.mktemp("ema")
    values = {
        "data.path": str(dataset),
        "run_dir": str(folder / "run"),
        "train.steps": STEPS - 2,
        "ema.sigma_rel": [0.05, 0.1],
        "ema.snapshot_every": 4,
        "checkpoint.every": 1,
        "checkpoint.keep": STEPS,
        "parallel.zero_stage": 2,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(small_dict("mmdit", **values)))
    train_in_pool(pool, 2, path)
    train_in_pool(pool, 2, path, f"train.steps={STEPS}", "checkpoint.keep=24")
    return path, folder / "run"


def test_snapshots_contain_only_the_averages_and_are_all_kept(trained):
    _, run = trained
    snapshots = checkpoints(run / "ema")
    assert [int(path.name[5:]) for path in snapshots] == [4, 8, 12, 16, 20, 22, 24]
    for path in snapshots:
        snapshot, checkpoint = open_checkpoint(path), open_checkpoint(run / "checkpoints" / path.name)
        assert snapshot.states == ["ema_0", "ema_1"]
        for name in snapshot.manifest["params"]:
            assert torch.equal(snapshot.full("ema_1", name), checkpoint.full("ema_1", name))


@pytest.mark.parametrize(("key", "width", "step"), [("ema_0", 0.05, None), ("ema_1", 0.1, 16)])
def test_average_with_a_stored_width_equals_the_stored_average(trained, tmp_path, key, width, step):
    _, run = trained
    results = average(run, width, step, tmp_path / "out")
    assert results["step"] == (step or STEPS)
    out, stored = open_checkpoint(tmp_path / "out"), open_checkpoint(run / "ema" / f"step_{step or STEPS:08d}")
    for name in stored.manifest["params"]:
        expected = stored.full(key, name)
        assert (out.full("ema", name) - expected).norm() <= 1e-6 * expected.norm()


def test_average_with_a_new_width_is_close_to_the_exact_average_of_all_steps(trained, tmp_path, capsys):
    """The error is below 2% of the distance between the two stored averages, with 7 snapshots of a short run."""
    _, run = trained
    arguments = ["average", str(run), "--sigma-rel", "0.08", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--json", str(tmp_path / "results.json")]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["step"], results["averages"]) == (STEPS, 14)
    assert "0.08 at step 24 from 14 stored averages" in capsys.readouterr().out
    steps = [open_checkpoint(run / "checkpoints" / f"step_{step:08d}") for step in range(1, STEPS + 1)]
    out = open_checkpoint(tmp_path / "out")
    error = distance = 0.0
    for name in out.manifest["params"]:
        weighed = zip(step_weights(gamma_of(0.08), STEPS, STEPS), steps, strict=True)
        expected = sum(float(share) * reader.full("master", name).double() for share, reader in weighed)
        error += float((out.full("ema", name) - expected).square().sum())
        distance += float((steps[-1].full("ema_0", name) - steps[-1].full("ema_1", name)).square().sum())
    assert error**0.5 <= 0.02 * distance**0.5


def test_averaged_checkpoint_can_be_sampled_and_inspected(trained, tmp_path, capsys):
    _, run = trained
    out = tmp_path / "out"
    average(run, 0.07, None, out)
    sampling = ["sample", str(out), "--prompt", "a red circle", "--steps", "2", "--out", str(tmp_path / "grid.png")]
    assert command_line(sampling) == 0
    assert (tmp_path / "grid.png").is_file()
    assert command_line([*sampling, "--no-ema"]) == 2
    assert "contains no master; expected one of ema" in capsys.readouterr().err
    assert main(["inspect", str(out)]) == 0


def test_resuming_with_other_ema_widths_is_rejected(trained):
    path, _ = trained
    with pytest.raises(AssertionError, match=r"ema.sigma_rel is \[0.05, 0.1\] there and \[0.05\] here"):
        finish_run(path, 1, "ema.sigma_rel=[0.05]")


def test_invalid_arguments_and_missing_snapshots_are_rejected(trained, tmp_path):
    _, run = trained
    for width, step, out, message in [
        (0.3, None, "out", r"--sigma-rel=0.3: expected at least 0.0001"),
        (0.08, 5, "out", "--step 5: no snapshot of this step; choose one of 4, 8, 12"),
        (0.08, None, "", "already exists; give a folder that does not exist"),
    ]:
        with pytest.raises(UserError, match=message):
            average(run, width, step, tmp_path / out)
    with pytest.raises(UserError, match="contains no snapshots; train"):
        average(tmp_path, 0.08, None, tmp_path / "out")
    assert main(["average", str(run), "--sigma-rel", "0.08"]) == 2
