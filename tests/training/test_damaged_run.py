"""A run with corrupt metrics, config or TensorBoard files can be resumed."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from checkpoints_tools.write import write_checkpoint
from megatron_dit.checkpoint.listing import step_folder
from megatron_dit.checkpoint.manifest import manifest_of
from megatron_dit.config import load_config
from megatron_dit.models.param_specs import param_specs
from megatron_dit.runtime.errors import UserError
from megatron_dit.training.run_folder import RunFolder, read_metrics
from tests.helpers.configs import write_config

GOOD = [{"step": step, "loss": 1.0 / step, "grad_norm": 0.5} for step in (1, 2, 3)]


@pytest.fixture
def config(tmp_path):
    return load_config(write_config(tmp_path))


@pytest.fixture
def opened(config):
    """Function that opens the run's folder at a step, as training does, and closes it."""

    def open_at(step):
        run = RunFolder(config)
        try:
            run.lock()
            run.open(step)
            run.close()
        finally:
            run.unlock()
        return run

    return open_at


@pytest.mark.parametrize(
    "damage",
    [
        b'{"step": 2, "loss": {"step": 3, "loss": 0.2, "grad_norm": 1}',  # two lines merged into one
        b'{"step": 7, "loss": 1.0, "x": "\xff"}',
        b"\0" * 40,
        b"\0" * 40 + b'{"step": 4, "loss": 1.0}',
        b'{"epoch": 1}',
        b'{"step": "4", "loss": 1.0}',
        b'{"step": true, "loss": 1.0}',
        b'{"step": 4}',
        b'{"step": 4, "loss": "low"}',
        b'{"step": 4, "loss": 1e999}',
        b'{"step": 4, "loss": 1%s}' % (b"0" * 400),
        b"[1, 2]",
        b"3",
        b"",
        b"[" * 100_000,
    ],
)
def test_corrupt_line_of_metrics_is_deleted_with_one_warning(opened, tmp_path, capsys, damage):
    opened(0)
    path = tmp_path / "run" / "metrics.jsonl"
    lines = [json.dumps(line).encode() for line in GOOD]
    path.write_bytes(b"\n".join([lines[0], damage, *lines[1:]]) + b"\n")
    assert read_metrics(path.parent) == GOOD
    capsys.readouterr()
    opened(2)
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"{path}: line 2 " in err
    assert [json.loads(line) for line in path.read_text().splitlines()] == GOOD[:2]
    opened(2).plot()
    assert capsys.readouterr().err == ""


def test_truncated_last_line_is_removed_without_a_warning(opened, tmp_path, capsys):
    opened(0)
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in GOOD) + '{"step": 4, "lo')
    opened(3)
    assert capsys.readouterr().err == ""
    assert read_metrics(path.parent) == GOOD


def test_non_finite_metrics_are_written_as_null(config, tmp_path):
    run = RunFolder(config)
    run.open(0)
    run.log(1, {"loss": math.nan, "grad_norm": math.inf, "lr": 0.1})
    run.close()
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert text == '{"step": 1, "loss": null, "grad_norm": null, "lr": 0.1}\n'
    (tmp_path / "run" / "metrics.jsonl").write_text(
        '{"step": 1, "loss": NaN, "grad_norm": 1.0}\n'
    )  # as older versions wrote it
    assert read_metrics(tmp_path / "run") == [{"step": 1, "loss": None, "grad_norm": 1.0}]


def test_run_continues_if_tensorboard_cannot_be_written(config, tmp_path, capsys):
    run = RunFolder(config)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("a file in place of the folder")
    (tmp_path / "run" / "config.yaml").write_text((tmp_path / "config.yaml").read_text())
    run.lock()
    run.open(0)
    assert "TensorBoard" in capsys.readouterr().err
    run.log(1, {"loss": 1.0, "grad_norm": 1.0})
    run.close()
    run.unlock()
    assert read_metrics(tmp_path / "run")[0]["loss"] == 1.0


CONFIGS = [b"\x7fELF\x00\x01", b"", b"- 1\n", b"\xff\xfe", b"run_dir: x\nmodel:\n  ar", b"\0" * 500, None]


def checkpoint_of(config, step=3):
    """Write the run's checkpoint of a step, which contains the config."""
    folder = step_folder(Path(config.run_dir) / "checkpoints", step)
    params = param_specs(config)
    write_checkpoint(folder, manifest_of(config, params, ["master"], step=step), [])


@pytest.mark.parametrize("content", CONFIGS)
def test_corrupt_or_missing_config_is_restored_from_the_newest_checkpoint(opened, config, tmp_path, capsys, content):
    opened(0)
    checkpoint_of(config)
    path = tmp_path / "run" / "config.yaml"
    before = path.read_text()
    path.unlink() if content is None else path.write_bytes(content)
    capsys.readouterr()
    opened(3)
    assert path.read_text() == before
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"{path}" in err
    assert "rewriting it" in err
    opened(3)
    assert capsys.readouterr().err == ""
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=r"contains another run \(seed is 1 there and 2 here\)"):
        RunFolder(replace(config, seed=2))


@pytest.mark.parametrize("content", CONFIGS)
def test_corrupt_config_without_a_checkpoint_is_refused_on_one_line(opened, config, tmp_path, content):
    opened(0)
    path = tmp_path / "run" / "config.yaml"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        RunFolder(config)
    assert ("exists and is not a run" if content is None else "run/config.yaml") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folder_in_place_of_the_metrics_file_is_refused(opened, tmp_path):
    opened(0)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    (tmp_path / "run" / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match="move the existing file or folder away, or choose another folder"):
        opened(0)


def test_run_in_a_folder_named_like_a_formula_is_plotted(tmp_path):
    run = RunFolder(load_config(write_config(tmp_path, run_dir=str(tmp_path / r"a$\frac$"))))
    run.open(0)
    run.log(1, {"loss": 1.0, "grad_norm": 1.0})
    run.plot()
    run.close()
    assert (run.path / "loss.png").stat().st_size > 5000
