"""Checkpoints written in the background of training are exact; failed writes and corrupt checkpoints are reported."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
import torch

from megatron_dit.checkpoint import reader as format_module
from megatron_dit.checkpoint import writer as save_module
from megatron_dit.checkpoint.listing import step_folder
from megatron_dit.checkpoint.manifest import Incomplete
from megatron_dit.checkpoint.reader import CheckpointReader
from megatron_dit.cli import run
from tests.helpers.configs import small, write_config
from tests.helpers.engine import batch, start


def states(folder, step):
    reader = CheckpointReader(step_folder(Path(folder), step))
    return {(key, name): reader.full(key, name) for key in reader.states for name in reader.manifest["params"]}


def save_in_background(layout, folder):
    """Start a background checkpoint at step 2 whose writer waits until step 4; save steps 2 and 4 synchronously too."""
    config = small("mmdit", **layout)
    engine = start(config)
    for step in range(2):
        engine.train_step(batch(config, engine.topology, step))
    save_module.save(engine, Path(folder) / "sync")
    (Path(folder) / "async").mkdir(exist_ok=True)
    release, write = threading.Event(), save_module.write_safetensors

    def held(*arguments):
        assert release.wait(60)
        return write(*arguments)

    save_module.write_safetensors = held
    try:
        saver = save_module.CheckpointWriter(engine)
        saver.begin(Path(folder) / "async")
        writing = [
            engine.train_step(batch(config, engine.topology, step), extra=[saver.writing]).extra for step in (2, 3)
        ]
        assert not list((Path(folder) / "async").glob("step_*2"))
        release.set()
        saver.commit()
        saver.begin(Path(folder) / "async")
        saver.commit()
    finally:
        save_module.write_safetensors = write
    save_module.save(engine, Path(folder) / "sync")
    return writing, saver.under_way


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [(1, {}), (2, {"parallel.zero_stage": 3}), (2, {"parallel.zero_stage": 1}), (2, {"parallel.tensor": 2})],
)
def test_background_checkpoint_has_the_states_of_the_step_it_was_started_at(pool, tmp_path, ranks, layout):
    for writing, under_way in pool.run(ranks, save_in_background, layout, str(tmp_path)):
        assert writing == [[ranks], [ranks]]  # all ranks, in both steps
        assert not under_way
    for step in (2, 4):
        ours, theirs = states(tmp_path / "async", step), states(tmp_path / "sync", step)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    assert not list(tmp_path.rglob("*.part"))


@pytest.fixture
def config(dataset, tmp_path):
    options = {"data.path": str(dataset), "train.steps": 12, "checkpoint.every": 3, "checkpoint.keep": 4}
    return write_config(tmp_path, "mmdit", **options)


def steps(tmp_path):
    """Return the names of all entries except ``latest``, which must name the newest checkpoint."""
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    if "latest" in names:
        newest = max(name for name in names if name.startswith("step_") and "." not in name)
        assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == newest + "\n"
    return [name for name in names if name != "latest"]


def test_failed_write_is_reported_and_training_continues(config, tmp_path, capsys, monkeypatch):
    write = save_module.write_safetensors

    def fails_at_six(path, *arguments):
        if "00000006" in str(path):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return write(path, *arguments)

    monkeypatch.setattr(save_module, "write_safetensors", fails_at_six)
    assert run(["train", str(config)]) == 0
    out = capsys.readouterr().out
    assert "step_00000006 could not be written ([Errno 28] No space left on device)" in out
    assert "continuing to train" in out
    assert steps(tmp_path) == ["step_00000003", "step_00000009", "step_00000012"]


def test_failed_write_of_the_last_checkpoint_is_an_error(config, tmp_path, capsys, monkeypatch):
    def fails(path, *arguments):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(save_module, "write_safetensors", fails)
    assert run(["train", str(config)]) == 2
    assert "step_00000012 could not be written" in capsys.readouterr().err
    assert steps(tmp_path) == []


def test_exception_in_the_writer_leaves_no_checkpoint(config, tmp_path, capsys, monkeypatch):
    """A bug in the writer's thread must not count as success."""
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(save_module, "write_safetensors", lambda *_: 1 / 0)
    assert run(["train", str(config)]) == 2
    assert "its writer ended early" in capsys.readouterr().err
    assert steps(tmp_path) == []


@pytest.mark.parametrize("harm", ["flipped", "short", "missing", "manifest"])
def test_corrupt_checkpoint_is_reported_and_the_previous_one_used(config, tmp_path, capsys, harm):
    assert run(["train", str(config)]) == 0
    expected = states(tmp_path / "run" / "checkpoints", 12)
    file = tmp_path / "run" / "checkpoints" / "step_00000012" / "rank_00000.safetensors"
    data = bytearray(file.read_bytes())
    if harm == "flipped":
        data[-5] ^= 4
        file.write_bytes(data)
    elif harm == "short":
        os.truncate(file, len(data) // 2)
    elif harm == "missing":
        file.unlink()
    else:
        (file.parent / "manifest.json").write_text("{")
    capsys.readouterr()
    assert run(["train", str(config), "checkpoint.keep=1"]) == 0
    out = capsys.readouterr().out
    assert "skipping incomplete checkpoint step_00000012" in out
    assert "resumed" in out
    assert "at step 9" in out
    found = states(tmp_path / "run" / "checkpoints", 12)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert steps(tmp_path) == ["step_00000012", "step_00000012.incomplete"]


def test_run_without_an_intact_checkpoint_does_not_restart_from_step_0(config, tmp_path, capsys):
    assert run(["train", str(config), "checkpoint.keep=1"]) == 0
    (tmp_path / "run" / "checkpoints" / "step_00000012" / "manifest.json").unlink()
    before = sorted((tmp_path / "run").rglob("*"))
    assert run(["train", str(config)]) == 2
    err = capsys.readouterr().err
    assert "no checkpoint in" in err
    assert "skipping incomplete checkpoint step_00000012" in err
    assert sorted((tmp_path / "run").rglob("*")) == before


def test_io_error_is_not_treated_as_a_corrupt_checkpoint(config, tmp_path, capsys, monkeypatch):
    assert run(["train", str(config)]) == 0

    def fails(reader, *_, **__):
        raise format_module.unreadable(OSError(5, "Input/output error", str(reader.folder)))

    monkeypatch.setattr(CheckpointReader, "verify", fails)
    assert run(["train", str(config)]) == 2
    assert "cannot be read (Input/output error)" in capsys.readouterr().err
    assert len(steps(tmp_path)) == 4


def test_inspect_detects_a_flipped_byte(config, tmp_path, capsys):
    from checkpoints_tools.__main__ import main

    assert run(["train", str(config)]) == 0
    assert main(["inspect", str(tmp_path / "run"), "--json", str(tmp_path / "a.json")]) == 0
    assert json.loads((tmp_path / "a.json").read_text())["versions"]["torch"] == torch.__version__.partition("+")[0]
    file = tmp_path / "run" / "checkpoints" / "step_00000012" / "rank_00000.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert main(["inspect", str(tmp_path / "run"), "--json", str(tmp_path / "b.json")]) == 1
    assert "CORRUPT" in json.loads((tmp_path / "b.json").read_text())["integrity"]
    with pytest.raises(Incomplete, match="its SHA-256 differs"):
        CheckpointReader(file.parent).verify()


def test_inspect_reports_a_corrupt_checkpoint_and_uses_the_previous_one(config, tmp_path, capsys):
    from checkpoints_tools.__main__ import main

    assert run(["train", str(config)]) == 0
    manifest = tmp_path / "run" / "checkpoints" / "step_00000012" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"step": 12', '"step": 13'))
    assert main(["inspect", str(tmp_path / "run"), "--json", str(tmp_path / "a.json")]) == 0
    assert json.loads((tmp_path / "a.json").read_text())["step"] == 9
    assert "skipping incomplete checkpoint step_00000012" in capsys.readouterr().err
