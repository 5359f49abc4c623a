"""Entries of a folder of checkpoints that are not checkpoints are never opened, renamed or deleted."""

from __future__ import annotations

import shutil

import pytest

from checkpoints_tools.__main__ import main
from megatron_dit.checkpoint import listing
from megatron_dit.checkpoint.listing import checkpoints_to_delete, clear, list_checkpoints, step_folder
from megatron_dit.checkpoint.load import newest, open_checkpoint
from megatron_dit.checkpoint.writer import set_aside
from megatron_dit.cli import run as command_line
from megatron_dit.training.checkpointing import CheckpointSchedule
from tests.helpers.checkpoints import STRAYS, checkpoint, contents, flip
from tests.helpers.configs import write_config


def names(paths):
    return [path.name for path in paths]


@pytest.mark.parametrize("kind", STRAYS)
def test_entries_without_a_matching_manifest_are_not_checkpoints(run, capsys, kind):
    folder = run / "checkpoints"
    before = contents(STRAYS[kind](folder))
    assert names(list_checkpoints(folder).checkpoints) == ["step_00000003", "step_00000006"]
    assert names(checkpoints_to_delete(folder, keep=1)) == ["step_00000003"]
    assert open_checkpoint(run).step == 6
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith(f"warning: ignoring entries of {folder} that are not its checkpoints: ")
    assert note.isprintable()
    clear(folder)
    assert set_aside(folder, 6) == []
    assert main(["prune", str(run), "--keep", "1"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        note.removeprefix("warning: "),
        f"deleted {folder / 'step_00000003'}",
    ]
    assert contents(next(iter(list_checkpoints(folder).strays))) == before
    assert names(list_checkpoints(folder).checkpoints) == ["step_00000006"]


def test_note_describes_strays_and_counts_the_rest(run):
    folder = run / "checkpoints"
    for kind in ("short", "another step", "backup", "upper case", "link of another name", "nine digits"):
        STRAYS[kind](folder)
    note = list_checkpoints(folder).stray_note
    assert "step_00000009 (a checkpoint of step 3 under another name)" in note
    assert "1 more" in note


def test_checkpoints_are_sorted_by_step(tmp_path):
    """Sorted by name, 100,000,000 would come before 99,999,999."""
    for step in (99_999_999, 100_000_000):
        checkpoint(tmp_path, step)
    found = newest(tmp_path).reader
    assert found is not None
    assert found.step == 100_000_000
    assert names(checkpoints_to_delete(tmp_path, keep=1)) == ["step_99999999"]


def test_checkpoint_with_any_name_can_be_opened_by_its_path(run):
    assert open_checkpoint(STRAYS["best"](run / "checkpoints")).step == 3


def test_link_to_a_checkpoint_is_read_and_only_the_link_is_deleted(run, tmp_path, capsys):
    moved = tmp_path / "elsewhere"
    step_folder(run / "checkpoints", 3).rename(moved)
    step_folder(run / "checkpoints", 3).symlink_to(moved)
    before = contents(moved)
    assert not list_checkpoints(run / "checkpoints").strays
    assert open_checkpoint(step_folder(run / "checkpoints", 3)).step == 3
    assert main(["prune", str(run), "--keep", "1"]) == 0
    assert names(sorted((run / "checkpoints").iterdir())) == ["step_00000006"]
    assert contents(moved) == before


@pytest.mark.parametrize("text", ["../x\n", "/etc\n", "step_00000003\n\n", "\0\xff", ""])
def test_contents_of_latest_are_ignored(run, text):
    (run / "checkpoints" / "latest").write_text(text)
    assert open_checkpoint(run).step == 6
    assert list_checkpoints(run / "checkpoints").stray_note is None


def test_prune_verifies_the_checkpoints_it_keeps(run, capsys):
    flip(step_folder(run / "checkpoints", 6))
    assert main(["prune", str(run), "--keep", "1"]) == 2
    assert "step_00000006 is incomplete" in capsys.readouterr().err
    assert names(list_checkpoints(run / "checkpoints").checkpoints) == ["step_00000003", "step_00000006"]


def test_renamed_incomplete_checkpoints_are_never_overwritten(run):
    folder = run / "checkpoints"
    for content in ("one", "two"):
        (step_folder(folder, 6) / "manifest.json").write_text(content)
        assert len(set_aside(folder, 3)) == 1
        shutil.copytree(step_folder(folder, 3), step_folder(folder, 6))
    kept = [
        (folder / name / "manifest.json").read_text()
        for name in ("step_00000006.incomplete", "step_00000006.incomplete.1")
    ]
    assert kept == ["one", "two"]


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    """(config, run folder) of a run of 6 steps with checkpoints and snapshots at steps 3 and 6."""
    folder = tmp_path_factory.mktemp("trained")
    values = {"data.path": str(dataset), "train.steps": 6, "checkpoint.every": 3, "ema.snapshot_every": 3}
    config = write_config(folder, "mmdit", **values, **{"ema.sigma_rel": [0.1], "checkpoint.keep": 9})
    assert command_line(["train", str(config)]) == 0
    return config, folder / "run"


@pytest.fixture
def resume(trained, tmp_path, capsys):
    """Function that copies the run, adds strays and resumes it; returns (status, folder, stdout, stderr)."""
    config, run = trained
    shutil.copytree(run, tmp_path / "run")
    capsys.readouterr()

    def do(kinds, steps, below="checkpoints"):
        strays = [STRAYS[kind](tmp_path / "run" / below) for kind in kinds]
        before = [contents(path) for path in strays]
        status = command_line(["train", str(config), f"run_dir={tmp_path / 'run'}", f"train.steps={steps}"])
        assert [contents(path) for path in strays] == before
        return status, tmp_path / "run" / below, *capsys.readouterr()

    return do


KINDS = ("best", "short", "backup", "another step", "other digits", "folder called latest", "unfinished by name")


@pytest.mark.parametrize("below", ["checkpoints", "ema"])
def test_run_resumes_from_its_newest_checkpoint_in_spite_of_strays(resume, below):
    status, folder, out, _ = resume(KINDS, 8, below)
    assert status == 0
    assert "at step 6" in out
    assert out.count("ignoring entries of") == 1
    assert not list(folder.glob("*.incomplete"))
    found = names(list_checkpoints(folder).checkpoints)
    assert found == ["step_00000003", "step_00000006", "step_00000008"]


@pytest.mark.parametrize("below", ["checkpoints", "ema"])
@pytest.mark.parametrize("kind", ["another step", "file", "link to an older one"])
def test_stray_with_the_name_of_a_future_checkpoint_is_reported_before_the_first_step(resume, kind, below):
    status, folder, out, err = resume([kind], 9, below)
    assert status == 2
    assert f"{folder / 'step_00000009'} is " in err
    assert "this run will save step 9 under that name; move it away" in err
    assert err.count("\n") == 1
    assert "saved" not in out


def test_stray_that_appears_during_training_is_never_overwritten(resume, monkeypatch):
    monkeypatch.setattr(
        CheckpointSchedule, "_check_names_are_free", lambda *_: None
    )  # as if it had been created after the start
    status, folder, _, err = resume(["another step"], 9)
    assert status == 2
    assert f"{folder / 'step_00000009'} could not be written: the path exists and is a checkpoint of step 3" in err
    assert names(list_checkpoints(folder).checkpoints) == ["step_00000003", "step_00000006"]


def test_checkpoint_deleted_while_listing_is_skipped(run, monkeypatch):
    """A run that keeps only its newest checkpoint may delete one while another process samples from the run."""
    read = listing.read_manifest

    def deleted_before(path):
        if path.name == "step_00000003":
            shutil.rmtree(path)
        return read(path)

    monkeypatch.setattr(listing, "read_manifest", deleted_before)
    found = list_checkpoints(run / "checkpoints")
    assert names(found.checkpoints) == ["step_00000006"]
    assert not found.strays


def test_average_ignores_strays_and_refuses_corrupt_snapshots(trained, tmp_path, capsys):
    run = shutil.copytree(trained[1], tmp_path / "run")
    for kind in KINDS:
        STRAYS[kind](run / "ema")
    words = ["average", str(run), "--sigma-rel", "0.1"]
    assert main([*words, "--out", str(tmp_path / "a")]) == 0
    captured = capsys.readouterr()
    assert "at step 6 from 2 stored averages" in captured.out
    assert captured.err.count("ignoring entries of") == 1
    flip(step_folder(run / "ema", 3))
    assert main([*words, "--out", str(tmp_path / "b")]) == 2
    assert "step_00000003 is incomplete" in capsys.readouterr().err
    assert not list(tmp_path.glob("b*"))


@pytest.mark.parametrize(
    "words",
    [
        ["sample", "RUN", "--prompt", "a red circle", "--steps", "1", "--out", "OUT/grid.png"],
        ["evaluate", "RUN", "--prompts", "1", "--steps", "1", "--out", "OUT/grid.png"],
        ["convert", "RUN", "OUT/exported", "--to", "diffusers"],
        ["reshard", "RUN", "OUT/moved"],
    ],
    ids=lambda words: words[0],
)
def test_checkpoint_with_a_flipped_bit_is_never_used(trained, tmp_path, capsys, words):
    """If a run's folder is given, the previous checkpoint is used; a corrupt checkpoint given by path is refused."""
    run, out = shutil.copytree(trained[1], tmp_path / "run"), tmp_path / "out"
    out.mkdir()
    bad = step_folder(run / "checkpoints", 6)
    flip(bad)
    program = command_line if words[0] in ("sample", "evaluate") else main

    def call(source):
        capsys.readouterr()
        status = program([word.replace("RUN", str(source)).replace("OUT", str(out)) for word in words])
        return status, capsys.readouterr().err

    status, err = call(bad)
    assert status == 2
    assert err.count("\n") == 1
    assert f"checkpoint {bad} is incomplete" in err
    assert not list(out.iterdir())
    status, err = call(run)
    assert status == 0
    assert err.startswith("warning: skipping incomplete checkpoint step_00000006 (")
    assert list(out.iterdir())
