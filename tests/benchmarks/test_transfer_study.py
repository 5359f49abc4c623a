"""The transfer study: its sweeps are valid, and its tables compare what they say."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from benchmarks import transfer_study
from benchmarks.transfer.studies import CONFIGS, ROLES, STUDIES
from benchmarks.transfer.tables import comparison, optima, seeds_table
from benchmarks.transfer_study import HERE, promising
from megatron_dit.config import load
from megatron_dit.tuning.report import settings
from megatron_dit.tuning.space import SweepConfig
from megatron_dit.tuning.trial import Result, TrialFiles, stored_result

STUDY = STUDIES["width"]


def results(losses):
    """Return a result for each (heads, μP enabled, lr, input factor, vector factor, seed) in ``losses``."""
    keys = ("model.heads", "mup.enabled", "optimizer.lr", *ROLES, "seed")
    return [
        Result(i, dict(zip(keys, key, strict=True)), "complete", loss, "", 0, 0, 1.0)
        for i, (key, loss) in enumerate(losses.items())
    ]


def example():
    """Return results in which another rate than the transferred one is better at width 128."""
    losses = {}
    for seed in range(3):
        losses |= {(4, on, lr, 0.25, 1.0, seed): loss for on in (True, False) for lr, loss in ((0.5, 0.3), (0.25, 0.4))}
        losses |= {(4, False, 0.5, 1.0, 1.0, seed): 0.35}
        losses |= {(8, True, lr, 0.25, 1.0, seed): loss + seed for lr, loss in ((0.5, 0.2), (0.25, 0.1))}
        losses |= {(8, False, 0.125, 1.0, 1.0, seed): 0.5, (8, False, 0.125, 0.25, 1.0, seed): 0.45}
    losses[8, False, 0.0625, 1.0, 1.0, 0] = 0.01  # one seed only
    return results(losses)


def rows(found):
    """Return results as they are in a results file."""
    return [{"params": result.params, "loss": result.loss} for result in found]


def test_optima_have_enough_seeds_and_the_lowest_mean():
    rows = optima(STUDY, settings(example()), 16)
    best = {(row["parametrization"], row["width"]): (row["best_lr"], row["loss"]) for row in rows}
    assert best == {
        ("standard", 64): ("2^-1", pytest.approx(0.3)),
        ("standard", 128): ("2^-3", pytest.approx(0.45)),
        ("μP", 64): ("2^-1", pytest.approx(0.3)),
        ("μP", 128): ("2^-2", pytest.approx(1.1)),
    }


def test_comparison_uses_the_hyperparameters_found_at_the_base_width():
    *_, row, _ = comparison(STUDY, settings(example()), 16)
    assert row == (
        "| 128 | 1.2000 (0.2000 to 2.2000), 2^-1, [0.25, 1.0] | 0.5000 (0.5000 to 0.5000), 2^-3, [1.0, 1.0] "
        "| 0.4500 (0.4500 to 0.4500), 2^-3, [0.25, 1.0] |"
    )


def test_fresh_seeds_are_compared_pairwise():
    losses = {
        (16, True, 0.5): [0.1, 0.2, 0.4],
        (16, False, 0.5): [0.11, 0.22, 0.44],
        (16, False, 0.25): [0.1, 0.22, 0.4],
    }
    found = results(
        {
            (*key, 1.0, 1.0, seed): loss
            for key, each in losses.items()
            for seed, loss in zip((3, 4, 5), each, strict=True)
        }
    )
    lines = seeds_table(STUDIES["seeds"], settings(found))
    assert "| standard, 2^-1, [1.0, 1.0] | 0.1100 | 0.2200 | 0.4400 | 0.2567 | +10.0% ± 0.0% |" in lines
    (other,) = (line for line in lines if line.startswith("| standard, 2^-2"))
    assert other.endswith("| +3.3% ± 3.3% |")  # 0, 10 and 0%, whose standard deviation is 10 / sqrt(3)


def test_the_best_settings_of_each_width_get_more_seeds():
    losses = {(8, False, lr, role, 1.0, 0): lr + role for lr, role in itertools.product((1.0, 2.0, 3.0), (0.25, 1.0))}
    found = [dict(s.hyperparameters) for s in promising(results(losses))]
    assert [(values["optimizer.lr"], values[ROLES[0]]) for values in found] == [(1, 0.25), (1, 1), (2, 1)]


def test_finished_trials_of_an_interrupted_study_are_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(transfer_study, "UNFINISHED", tmp_path / "unfinished")
    monkeypatch.chdir(HERE.parent)
    config = load(SweepConfig, HERE / "transfer" / "longer.yaml", values={"run_dir": str(tmp_path / "here")})
    done = Result(1, {"model.heads": 4, "optimizer.lr": 2**-6}, "complete", 0.25, "", 174, 5568, 9.0)
    other = replace(config, run_dir=str(tmp_path / "elsewhere"))

    class Interrupted:
        def __init__(self, config):
            self.files = TrialFiles(config.trial_folder(1), {})

        def run(self):
            self.files.write(done)
            raise KeyboardInterrupt

    monkeypatch.setattr(transfer_study, "Sweep", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        transfer_study.run(STUDIES["longer"], config)
    (kept,) = (tmp_path / "unfinished").iterdir()
    transfer_study.restore(kept, other)
    assert stored_result(other, 0) is None
    assert stored_result(other, 1) == done


def test_every_sweep_is_valid_for_its_architectures(monkeypatch):
    monkeypatch.chdir(HERE.parent)
    counted = {}

    def fake_run(study, config):
        config = replace(config)  # validates
        counted[config.run_dir] = config.count
        params = config.trial_config({key: dimension.finite[0] for key, dimension in config.space.items()}, 0)
        assert params.model.arch in config.run_dir
        return results({(8, False, 0.5, 1.0, 1.0, 0): 0.5})

    monkeypatch.setattr(transfer_study, "run", fake_run)
    monkeypatch.setattr(transfer_study, "read", lambda path: {"trials": dict.fromkeys(CONFIGS, rows(example()))})
    for study in STUDIES.values():
        for arch in study.architectures:
            transfer_study.run_study(study, arch)
    assert counted["runs/transfer/width-mup-dit-fresh-0"] == counted["runs/transfer/width-standard-dit-fresh-2"] == 3
    assert counted["runs/transfer/depth-uvit"] == 32
    assert counted["runs/transfer/linear-mup-dit"] == 3 * counted["runs/transfer/linear-mup-uvit"] / 2 == 36
    assert counted["runs/transfer/depth-none-uvit"] == 32
    assert len({folder.split("-")[0] for folder in counted}) > 3
    for path in (HERE / "transfer").glob("*.yaml"):
        load(SweepConfig, path)
    assert set(CONFIGS) == {arch for study in STUDIES.values() for arch in study.architectures}
