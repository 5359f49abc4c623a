"""Corrupt files of a sweep are rebuilt from its trials' results, and values of every type can be searched."""

from __future__ import annotations

import json

import pytest

from megatron_dit.cli import run
from megatron_dit.config import load, load_config, save_config
from megatron_dit.runtime.errors import UserError
from megatron_dit.tuning import report
from megatron_dit.tuning.space import SweepConfig
from megatron_dit.tuning.study import Sweep
from megatron_dit.tuning.transfer import read_sweep
from tests.helpers.sweeps import plant, write_sweep

LRS = {"optimizer.lr": {"log2": [-9, -8]}}


@pytest.fixture
def finished(tmp_path, dataset):
    """(config path, folder) of a finished sweep, with a journal that Optuna wrote."""
    path = write_sweep(tmp_path, dataset, LRS)
    config = plant(path, [({"optimizer.lr": 2**-9}, "complete", 0.5), ({"optimizer.lr": 2**-8}, "complete", 0.25)])
    sweep = Sweep(config)
    for number in range(2):
        sweep._report(sweep._stored(number))  # pyright: ignore[reportArgumentType]
    return path, config.folder


def states(path):
    """Return (learning rate, loss) of the trials in Optuna's study."""
    return [(trial.params["optimizer.lr"], trial.value) for trial in Sweep(load(SweepConfig, path))._study.get_trials()]


@pytest.mark.parametrize(
    ("harm", "warns"),
    [
        (lambda text: text[:-30], True),
        (lambda text: text + bytes(200), True),
        (lambda text: text.replace(b'"op_code"', b'"op_kode"', 3), True),
        (lambda text: text.replace(b"{", b"[", 1), True),
        (lambda text: text[: len(text) // 2] + b"\xff\n" + text[len(text) // 2 :], True),
        (lambda text: text[: text.index(b"\n", len(text) // 2) + 1], False),  # only the last lines are missing
        (lambda text: b"", False),
        (lambda text: None, False),
    ],
    ids=["truncated line", "zeros", "other keys", "invalid JSON", "not UTF-8", "missing lines", "empty", "missing"],
)
def test_corrupt_journal_is_rebuilt_from_the_trials(finished, capsys, harm, warns):
    path, folder = finished
    before = {item.name: item.read_bytes() for item in (folder / "trials").glob("*.json")}
    journal = folder / "journal.log"
    text = harm(journal.read_bytes())
    journal.unlink()
    if text is not None:
        journal.write_bytes(text)
    assert run(["sweep", str(path)]) == 0
    out, err = capsys.readouterr()
    assert "best of 2 trials: trial 1, loss 0.25" in out
    assert (f"{journal} is corrupt" in err) == warns
    assert err.count("\n") == warns
    aside = folder / "journal.log.damaged"
    assert (aside.read_bytes() if warns else None) == (text if warns else None)
    assert {item.name: item.read_bytes() for item in (folder / "trials").glob("*.json")} == before
    assert states(path) == [(2**-9, 0.5), (2**-8, 0.25)]
    assert run(["sweep", str(path)]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["sweep.yaml", "base.yaml"])
@pytest.mark.parametrize("content", [b"", b"\x00\xff"])
def test_corrupt_saved_config_is_rewritten(finished, capsys, name, content):
    path, folder = finished
    good = (folder / name).read_bytes()
    (folder / name).write_bytes(content)
    assert run(["sweep", str(path)]) == 0
    assert name in capsys.readouterr().err
    assert (folder / name).read_bytes() == good


def test_corrupt_saved_config_is_kept_if_the_results_are_of_another_sweep(finished, tmp_path, dataset, capsys):
    _, folder = finished
    (folder / "sweep.yaml").write_text("")
    other = write_sweep(tmp_path, dataset, {"optimizer.grad_clip": {"choice": [0.1, 1.0]}})
    assert run(["sweep", str(other)]) == 2
    assert "holds another sweep (0000.json has values for optimizer.lr" in capsys.readouterr().err
    assert (folder / "sweep.yaml").read_text() == ""


@pytest.mark.parametrize(
    "content",
    [
        b"\x00\xff",
        b"[]",
        b'{"number": 0',
        b"RESULT1",
        b'RESULT0"loss": NaN',
        b'RESULT0"loss": null',
        b'RESULT0"state": "fine"',
        b'RESULT0"steps": -1',
        b'RESULT0"params": {"optimizer.eps": 1}',
    ],
)
def test_corrupt_result_is_renamed_and_its_trial_runs_again(finished, capsys, content):
    _, folder = finished
    trial = folder / "trials" / "0000.json"
    if content.startswith(b"RESULT"):  # the complete result of trial n, with one value replaced
        values = json.loads(trial.with_name(f"000{chr(content[6])}.json").read_text())
        content = json.dumps(values | (json.loads(b"{%s}" % content[7:]) if content[7:] else {})).encode()
    trial.write_bytes(content)
    config, results = read_sweep(folder)
    assert [result.number for result in results] == [1]
    assert "0000.json" in capsys.readouterr().err
    assert trial.read_bytes() == content  # read_sweep does not modify the folder
    sweep = Sweep(config)
    assert sweep._stored(0) is None
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"renamed it to {trial}.damaged, running the trial again" in err
    assert not trial.exists()
    assert trial.with_name("0000.json.damaged").read_bytes() == content
    assert sweep._stored(0) is None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("ema.sigma_rel", [[0.05], [0.1], [0.05, 0.1]]),
        ("data.mixture", [{"/a/b.c": 0.1}, {"/a/b.c": 0.2, "/d": 0.1}]),
        ("init.zero_adaln", [None, True, False]),
        ("init.std.hidden", [None, 0.02]),
        ("optimizer.schedule", ["constant", "cosine"]),
        ("data.text_encoder", ["/models" + "/x" * 150, "a/b [red] $1$ %s {}"]),
        ("optimizer.lr", [1, 0.5]),  # an integer is accepted for a float key
    ],
)
def test_values_of_every_type_are_searched_and_reported(tmp_path, dataset, capsys, key, values):
    path = write_sweep(tmp_path, dataset, {key: {"choice": values}, "seed": {"choice": [0, 1]}})
    config = load(SweepConfig, path)
    sweep = Sweep(config)
    asked = [sweep.files(number).params for number in range(config.count)]
    asked.sort(key=lambda params: (values.index(params[key]), params["seed"]))
    assert asked == [{key: value, "seed": seed} for value in values for seed in (0, 1)]
    plant(path, [(params, "complete", 1.0 + values.index(params[key])) for params in asked])
    assert run(["sweep", str(path)]) == 0
    out, err = capsys.readouterr()
    assert "best of" in out
    assert err == ""
    found = report.settings(read_sweep(config.folder)[1])
    assert [dict(setting.hyperparameters)[key] for setting in found] == values
    assert [len(setting.trials) for setting in found] == [2] * len(values)
    best = load_config(config.folder / "best.yaml")
    section, *rest = key.split(".")
    value = getattr(best, section)
    for name in rest:
        value = getattr(value, name)
    assert value == values[0]
    assert (config.folder / "influence.png").stat().st_size > 5000


def test_unfinished_trials_keep_their_values_if_the_journal_is_lost(tmp_path, dataset):
    space = {"optimizer.lr": {"log_uniform": [1e-4, 1e-2]}, "optimizer.warmup_steps": {"uniform": [1, 100]}}
    config = load(SweepConfig, write_sweep(tmp_path, dataset, space, sampler="tpe", trials=3))
    sweep = Sweep(config)
    before = [sweep.files(number).params for number in range(3)]

    for number in (0, 2):  # a trial writes its config when it starts
        save_config(config.trial_config(before[number], number), sweep.files(number).file(".yaml"))
    (config.folder / "journal.log").unlink()
    sweep = Sweep(config)
    after = [sweep.files(number).params for number in range(3)]
    assert (after[0], after[2]) == (before[0], before[2])


def test_unwritable_folder_raises_user_error(tmp_path, dataset):
    path = write_sweep(tmp_path, dataset, LRS)
    with pytest.raises(UserError, match="cannot be written"):
        Sweep(load(SweepConfig, path, ["run_dir=/proc/sweep"]))


def test_large_grids_are_counted_without_being_enumerated(tmp_path, dataset):
    keys = ("optimizer.lr", "optimizer.weight_decay", "optimizer.grad_clip", "mup.output_multiplier", "objective.shift")
    space = {key: {"log2": [-60, 0]} for key in keys}
    config = load(SweepConfig, write_sweep(tmp_path, dataset, space, trials=2))
    assert (config.grid_size, config.count) == (61**5, 2)
    assert list(Sweep(config).files(1).params.values()) == [2**-60] * 4 + [2**-59]
