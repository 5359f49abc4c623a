"""Tests of inspect, reshard and prune, and of the output folders of all commands."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from checkpoints_tools.__main__ import main
from megatron_dit.checkpoint import load
from megatron_dit.checkpoint.listing import checkpoints
from megatron_dit.checkpoint.load import open_checkpoint
from megatron_dit.cli import run as command_line
from megatron_dit.models.param_specs import param_specs
from tests.helpers.checkpoints import run_of
from tests.helpers.configs import small, small_dict, write_config
from tests.helpers.trained_checkpoints import LAYOUTS, save_after


def everything(reader):
    return {(key, name): reader.full(key, name) for key in reader.states for name in reader.manifest["params"]}


@pytest.fixture(scope="module")
def from_four(pool, tmp_path_factory):
    """The folder of a run with a checkpoint of step 2 from tensor-parallel ZeRO-3 ranks."""
    run = tmp_path_factory.mktemp("run")
    pool.run(4, save_after, "mmdit", LAYOUTS["dp2-tp2-zero3"][1], str(run / "checkpoints"))
    return run


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_reshard_changes_the_files_but_not_the_tensors(from_four, tmp_path, tensor):
    out = tmp_path / "out"
    assert main(["reshard", str(from_four), str(out), "--tensor", str(tensor)]) == 0
    old, new = open_checkpoint(from_four), open_checkpoint(out)
    new.verify()
    assert len(new.manifest["files"]) == tensor
    assert new.manifest["layout"]["tensor"] == tensor
    expected, found = everything(old), everything(new)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_resharded_run_resumes_bit_exactly(dataset, tmp_path):
    config = write_config(tmp_path, "mmdit", **{"data.path": str(dataset), "train.steps": 4})
    assert command_line(["train", str(config), "train.steps=2"]) == 0
    assert main(["reshard", str(tmp_path / "run"), str(tmp_path / "moved"), "--tensor", "2"]) == 0
    assert command_line(["train", str(config), f"run_dir={tmp_path / 'moved'}"]) == 0
    assert command_line(["train", str(config)]) == 0
    one, other = (everything(open_checkpoint(tmp_path / name)) for name in ("run", "moved"))
    assert all(torch.equal(one[key], value) for key, value in other.items())


@pytest.mark.parametrize(
    ("tensor", "message"), [("3", "parallel.tensor=3"), ("0", "--tensor 0: expected at least 1")], ids=["three", "none"]
)
def test_reshard_to_an_invalid_tensor_size_fails_with_one_line(from_four, tmp_path, capsys, tensor, message):
    assert main(["reshard", str(from_four), str(tmp_path / "out"), "--tensor", tensor]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_inspect_reports_the_mup_ratios_by_role(from_four, tmp_path, capsys):
    assert main(["inspect", str(from_four), "--json", str(tmp_path / "found.json")]) == 0
    roles = json.loads((tmp_path / "found.json").read_text())["roles"]
    assert (roles["hidden"]["lr"], roles["hidden"]["weight_decay"]) == ([0.5], [2.0])  # twice the base width
    assert (roles["output"]["lr"], roles["output"]["multiplier"]) == ([1.0], [0.5])
    params = param_specs(small("mmdit"))
    assert roles["hidden"]["tensors"] == sum(param.role == "hidden" for param in params.values())
    assert "forward multiplier" in capsys.readouterr().out


@pytest.fixture
def run(dataset, tmp_path):
    values = {"data.path": str(dataset), "train.steps": 6, "checkpoint.every": 1, "checkpoint.keep": 9}
    assert command_line(["train", str(write_config(tmp_path, "mmdit", **values))]) == 0
    return tmp_path / "run"


def left(run):
    return [int(path.name[5:]) for path in checkpoints(run / "checkpoints")]


def test_prune_deletes_all_but_the_newest_and_every_nth_checkpoint(run, capsys):
    assert main(["prune", str(run), "--keep", "1", "--keep-every", "3", "--dry-run"]) == 0
    assert left(run) == [1, 2, 3, 4, 5, 6]
    assert capsys.readouterr().out.count("would delete") == 4
    assert main(["prune", str(run), "--keep", "1", "--keep-every", "3"]) == 0
    assert left(run) == [3, 6]
    assert main(["prune", str(run), "--keep", "0"]) == 2
    assert left(run) == [3, 6]


def test_prune_deletes_nothing_if_a_checkpoint_to_keep_is_incomplete(run, capsys):
    (run / "checkpoints" / "step_00000006" / "rank_00000.safetensors").write_bytes(b"short")
    assert main(["prune", str(run), "--keep", "1"]) == 2
    assert "step_00000006 is incomplete" in capsys.readouterr().err
    assert left(run) == [1, 2, 3, 4, 5, 6]


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """The folder of a run with two checkpoints that was not trained."""
    run = run_of(tmp_path_factory.mktemp("small") / "run")
    (run / "config.yaml").write_text(yaml.safe_dump(small_dict("mmdit")))
    return run


PROGRAMS = {
    "convert": lambda run, out: ["convert", str(run), out, "--to", "diffusers"],
    "reshard": lambda run, out: ["reshard", str(run), out],
    "average": lambda run, out: ["average", str(run), "--sigma-rel", "0.1", "--out", out],
    "import": lambda run, out: ["convert", str(run), out, "--from", "diffusers"],
}


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("/proc/x", "cannot be written"),
        ("/proc/1/x/y", "cannot be written"),
        ("FOLDER/file/x", "cannot be written"),
        ("FOLDER/" + "x" * 250, "cannot be written"),  # the name is too long for a temporary suffix
        ("FOLDER/" + "x" * 300 + "/y", "at most 255 bytes in each name"),
        ("FOLDER/full", "exists"),
        ("FOLDER/link", "exists"),
        ("FOLDER/../FOLDER_NAME/full/", "exists"),
        ("", "is empty: expected a path"),
        ("/", "exists"),
        ("RUN", "choose another name"),
        ("RUN/checkpoints/x", "which contains checkpoints"),
        ("RUN/ema/new/x", "which contains checkpoints"),
        ("RUN/checkpoints/step_00000006/x", "which contains checkpoints"),
    ],
)
@pytest.mark.parametrize("program", PROGRAMS)
def test_an_invalid_output_folder_fails_before_any_work(
    small_run, tmp_path, capsys, monkeypatch, program, out, message
):
    """No checkpoint is opened, and no files are left behind."""
    monkeypatch.setattr(load, "open_checkpoint", None)
    (tmp_path / "file").write_text("")
    (tmp_path / "full" / "x").mkdir(parents=True)
    (tmp_path / "link").symlink_to("nowhere")
    (small_run / "ema").mkdir(exist_ok=True)
    before = sorted(tmp_path.rglob("*")), sorted(small_run.rglob("*"))
    out = out.replace("RUN", str(small_run)).replace("FOLDER_NAME", tmp_path.name).replace("FOLDER", str(tmp_path))
    assert main(PROGRAMS[program](small_run, out)) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert (sorted(tmp_path.rglob("*")), sorted(small_run.rglob("*"))) == before


def test_the_normalized_output_path_is_reported(small_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["reshard", str(small_run), "~/a/../b", "--json", "found.json"]) == 0
    assert f"wrote {tmp_path / 'b'}: step 6" in capsys.readouterr().out
    assert json.loads((tmp_path / "found.json").read_text())["out"] == str(tmp_path / "b")
    assert open_checkpoint(tmp_path / "b").step == 6


def test_an_existing_folder_with_a_temporary_name_is_not_deleted(small_run, tmp_path):
    """The user may have a folder whose name resembles that of a partial output."""
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "notes").write_text("")
    assert main(["reshard", str(small_run), str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.part"]
    assert (tmp_path / "out.part" / "notes").exists()


def test_an_import_rejects_an_override_of_run_dir(tmp_path, capsys):
    words = ["convert", str(tmp_path), str(tmp_path / "out"), "--from", "diffusers", "run_dir=other"]
    assert main(words) == 2
    assert f"the run is written to {tmp_path / 'out'}; leave run_dir out" in capsys.readouterr().err
