"""Transfer from a sweep: ranking checked by hand, groups against the package mup, cost against the paper's formula."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from megatron_dit.cli import run
from megatron_dit.config import load_config
from megatron_dit.tuning import report
from megatron_dit.tuning.cost import Cost
from megatron_dit.tuning.transfer import read_sweep
from tests.helpers.configs import small, small_dict
from tests.helpers.mup_groups import package_groups
from tests.helpers.sweeps import plant, write_sweep

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def planted(tmp_path, dataset):
    """Two widths, learning rates, grad_clips and seeds; the wide model's best setting is lr 2^-7 and grad_clip 1."""
    space = {
        "model.heads": {"choice": [2, 4]},
        "optimizer.lr": {"log2": [-8, -7]},
        "optimizer.grad_clip": {"choice": [0.1, 1.0]},
        "seed": {"choice": [5, 6]},
    }
    path = write_sweep(tmp_path, dataset, space)
    losses = {(2, -8, 0.1): 0.9, (2, -8, 1.0): 0.8, (2, -7, 0.1): 0.7, (2, -7, 1.0): 0.75}
    losses |= {(4, -8, 0.1): 0.6, (4, -8, 1.0): 0.5, (4, -7, 0.1): 0.3, (4, -7, 1.0): 0.45}
    outcomes = []
    for (heads, power, clip), loss in losses.items():
        for seed in (5, 6):
            params = {"model.heads": heads, "optimizer.lr": 2.0**power, "optimizer.grad_clip": clip, "seed": seed}
            diverged = (heads, power, clip, seed) == (4, -7, 0.1, 6)  # the lowest loss, but one of its seeds diverged
            outcomes.append((params, "diverged" if diverged else "complete", None if diverged else loss + seed / 100))
    return plant(path, outcomes)


def target(tmp_path, **options):
    path = tmp_path / "target.yaml"
    values = {"model.heads": 8, "optimizer.weight_decay": 0.03, "train.steps": 500, "run_dir": "runs/target", **options}
    path.write_text(yaml.safe_dump(small_dict("mmdit", **values)))
    return path


def test_best_setting_is_that_of_the_widest_model_averaged_over_seeds(planted):
    chosen = report.best(read_sweep(planted.folder)[1], planted)
    assert chosen is not None
    assert dict(chosen.hyperparameters) == {"optimizer.lr": 2**-7, "optimizer.grad_clip": 1.0}
    assert chosen.loss == pytest.approx(0.45 + 0.055)
    assert dict(chosen.model) == {"model.heads": 4}


def test_transfer_writes_the_target_with_its_groups_and_cost(planted, tmp_path, capsys):
    out, results = tmp_path / "out" / "wide.yaml", tmp_path / "results.json"
    words = ["transfer", str(planted.folder), str(target(tmp_path)), "--out", str(out), "--json", str(results)]
    assert run(words) == 0
    written = load_config(out)
    assert (written.optimizer.lr, written.optimizer.grad_clip) == (2**-7, 1.0)
    assert (written.model.heads, written.train.steps, written.run_dir) == (8, 500, "runs/target")
    head = out.read_text().split("\nrun_dir:")[0]
    assert "trial 14, 15 (seeds 5, 6)" in head
    groups, _ = package_groups(small("mmdit", heads=8, **{"optimizer.lr": 2**-7, "optimizer.weight_decay": 0.03}))
    for lr, decay in set(groups.values()):
        assert f"lr {lr:.6g}, weight decay {decay:.6g}" in head
    # Expected: the sizes of the three models, 6 steps of 4 samples per trial, 500 steps of 8 samples for the target.
    sizes = [int(size.replace(",", "")) for size in re.findall(r"8 \* ([\d,]+) \* 24", head)]
    assert len(sizes) == 2
    fraction = 8 * 24 * sum(sizes) / (size_of(out) * 500 * 8)
    assert json.loads(results.read_text())["cost"] == pytest.approx(fraction)
    assert f"{100 * fraction:.2f}%" in head
    assert head in capsys.readouterr().out


def size_of(path):
    from megatron_dit.models.build import build_unsharded

    return sum(p.numel() for p in build_unsharded(load_config(path).model).parameters())


def test_search_costs_equal_those_of_the_paper(tmp_path):
    """5 * 0.04B * 5 epochs / (0.61B * 30 epochs) = 5.46%; for MMDiT 80 * 0.18B * 30K / (17.9B * 200K) steps."""
    for arch, target, by_hand in (
        ("pixart", "target", 5 * 0.04 * 5 / (0.61 * 30)),
        ("mmdit", "18b", 80 * 0.18 * 30_000 / (17.86 * 200_000)),
    ):
        results = tmp_path / f"{arch}.json"
        goal = str(CONFIGS / arch / f"{target}.yaml")
        words = ["sweep", str(CONFIGS / arch / "sweep.yaml"), "--cost", "--target", goal, "--json", str(results)]
        assert run([word.replace(str(CONFIGS.parent) + "/", "") for word in words]) == 0
        assert json.loads(results.read_text())["cost_rounded"] == pytest.approx(by_hand, rel=1e-6)
    assert round(100 * 5 * 0.04 * 5 / (0.61 * 30), 2) == 5.46


def test_searched_learning_rates_by_role_are_transferred(tmp_path, dataset):
    space = {
        "optimizer.lr": {"log2": [-8, -7]},
        "mup.lr_multiplier.vector": {"choice": [0.25, 1.0]},
        "mup.output_multiplier": {"choice": [2.0]},
    }
    outcomes = [
        (
            {"optimizer.lr": 2.0**power, "mup.lr_multiplier.vector": factor, "mup.output_multiplier": 2.0},
            "complete",
            abs(power + 7) + factor,
        )
        for power in (-8, -7)
        for factor in (0.25, 1.0)
    ]
    planted, out = plant(write_sweep(tmp_path, dataset, space), outcomes), tmp_path / "wide.yaml"
    assert run(["transfer", str(planted.folder), str(target(tmp_path)), "--out", str(out)]) == 0
    written = load_config(out)
    assert (written.optimizer.lr, written.mup.lr_multiplier.vector) == (2**-7, 0.25)
    assert written.mup.output_multiplier == 2.0
    assert "mup.lr_multiplier.vector = 2^-2" in out.read_text()


RATIOS = {"train.global_batch": 16, "train.steps": 30}  # of the target; the trials have 6 steps of 4 samples


def rule_target(tmp_path, **options):
    return target(tmp_path, **RATIOS, **options)


@pytest.fixture
def tuned(tmp_path, dataset):
    space = {"optimizer.lr": {"log2": [-8, -7]}, "optimizer.weight_decay": {"choice": [0.5]}}
    outcomes = [
        ({"optimizer.lr": 2.0**power, "optimizer.weight_decay": 0.5}, "complete", abs(power + 7)) for power in (-8, -7)
    ]
    base = {"optimizer.warmup_steps": 2}
    return plant(write_sweep(tmp_path, dataset, space, base=base), outcomes).folder


def transferred(tuned, tmp_path, *words, **options):
    out = tmp_path / "rules.yaml"
    assert run(["transfer", str(tuned), str(rule_target(tmp_path, **options)), "--out", str(out), *words]) == 0
    return load_config(out), out.read_text()


def test_rule_batch_keeps_the_stochastic_differential_equation_of_adam(tuned, tmp_path):
    """Four times the batch, by hand: twice the lr, half of eps, 1 - beta four times as large (arXiv 2205.10343)."""
    written, text = transferred(tuned, tmp_path, "--rules", "batch")
    optimizer = written.optimizer
    assert (optimizer.lr, optimizer.eps) == (pytest.approx(2**-6), pytest.approx(5e-9))
    assert (optimizer.beta1, optimizer.beta2) == (pytest.approx(0.6), pytest.approx(0.996))
    assert optimizer.weight_decay == 0.5
    assert "found at batch 4 and 6 steps; the target has 4 times the batch and 5 times the steps" in text
    assert "rule batch (arXiv 2205.10343, 2405.14578): optimizer.lr 0.0078125 -> 0.015625" in text


@pytest.mark.parametrize(("critical", "factor"), [(8, 2 * 12 / 24), (1e9, 2.0), (0.001, 0.5)])
def test_rule_batch_with_a_critical_batch_size(tuned, tmp_path, critical, factor):
    """lr is in proportion to 1 / (sqrt(C / B) + sqrt(B / C)) (arXiv 2405.14578), at B = 4 and 16."""
    written, _ = transferred(tuned, tmp_path, "--rules", "batch", "--critical-batch", str(critical))
    assert written.optimizer.lr == pytest.approx(2**-7 * factor, rel=1e-3)


def test_rule_decay_keeps_the_time_scale_of_adamw(tuned, tmp_path):
    for rules in ("decay", "batch,decay", "decay,duration,batch"):
        written, _ = transferred(tuned, tmp_path, "--rules", rules)
        optimizer = written.optimizer
        assert optimizer.lr * optimizer.weight_decay * 30 == pytest.approx(2**-7 * 0.5 * 6)


def test_rule_duration_lowers_the_learning_rate_of_longer_runs(tuned, tmp_path):
    written, _ = transferred(tuned, tmp_path, "--rules", "duration")
    assert written.optimizer.lr == pytest.approx(2**-7 * (20**-0.32))


def test_rule_fractions_scales_lengths_with_the_training(tuned, tmp_path):
    written, _ = transferred(tuned, tmp_path, "--rules", "fractions")
    assert written.optimizer.warmup_steps == 10  # 2 of the proxy's 6 steps
    assert written.ema.decay == pytest.approx(1 - 0.1 / 5)


@pytest.mark.parametrize("key", ["mup.base_depth", "mup.enabled"])
def test_a_searched_parametrization_must_be_that_of_the_target(tmp_path, dataset, capsys, key):
    """Its best value is not transferred, because it is no hyperparameter."""
    values = {"mup.base_depth": [2, None], "mup.enabled": [True, False]}[key]
    space = {"optimizer.lr": {"log2": [-8, -7]}, key: {"choice": values}}
    outcomes = [
        ({"optimizer.lr": 2.0**power, key: value}, "complete", 1.0 + (value != values[0]))
        for power in (-8, -7)
        for value in values
    ]
    folder, out = plant(write_sweep(tmp_path, dataset, space), outcomes).folder, tmp_path / "out.yaml"
    words = ["transfer", str(folder), str(target(tmp_path)), "--out", str(out)]
    assert run([*words, f"{key}={'null' if values[1] is None else 'false'}"]) == 2
    assert f"{key} is {values[0]!r} in the sweep and {values[1]!r} in the target" in capsys.readouterr().err
    assert run([*words, f"{key}={str(values[0]).lower()}"]) == 0


def test_rule_decay_uses_the_learning_rate_of_the_proxy_if_it_was_not_searched(tmp_path, dataset):
    space = {"optimizer.weight_decay": {"choice": [0.1]}}
    base = {"optimizer.lr": 0.002}
    planted = plant(
        write_sweep(tmp_path, dataset, space, base=base), [({"optimizer.weight_decay": 0.1}, "complete", 1.0)]
    )
    written, _ = transferred(planted.folder, tmp_path, "--rules", "decay", **{"optimizer.lr": 0.001})
    assert written.optimizer.lr == 0.002
    assert written.optimizer.lr * written.optimizer.weight_decay * 30 == pytest.approx(0.002 * 0.1 * 6)


def test_rule_batch_allows_a_beta_of_zero(tmp_path, dataset):
    """20 times the batch with beta1 = 0.95, whose 1 - 20 * 0.05 is -9e-16 in floating point."""
    base = {"optimizer.beta1": 0.95, "train.global_batch": 5, "train.micro_batch": 5}
    sweep = write_sweep(tmp_path, dataset, {"optimizer.lr": {"log2": [-8, -7]}}, base=base)
    planted = plant(sweep, [({"optimizer.lr": 2.0**power}, "complete", 1.0) for power in (-8, -7)])
    out = tmp_path / "out.yaml"
    goal = target(tmp_path, **{"train.global_batch": 100, "train.micro_batch": 5})
    assert run(["transfer", str(planted.folder), str(goal), "--out", str(out), "--rules", "batch"]) == 0
    assert load_config(out).optimizer.beta1 == 0.0


def test_rules_for_adamw_are_refused_with_muon(tmp_path, dataset, capsys):
    space = {"optimizer.lr": {"log2": [-8, -7]}}
    sweep = write_sweep(tmp_path, dataset, space, base={"optimizer.muon_lr": 0.02})
    planted = plant(sweep, [({"optimizer.lr": 2.0**power}, "complete", 1.0) for power in (-8, -7)])
    words = ["transfer", str(planted.folder), str(target(tmp_path)), "--out", str(tmp_path / "out.yaml")]
    assert run(words) == 2
    assert "optimizer.muon_lr is 0.02 in the sweep and None in the target" in capsys.readouterr().err
    assert run([*words, "optimizer.muon_lr=0.02", "--rules", "fractions,decay"]) == 2
    assert "rule decay has no form for Muon" in capsys.readouterr().err
    assert run([*words, "optimizer.muon_lr=0.02", "--rules", "fractions"]) == 0


def test_rules_are_refused_if_they_do_not_apply(tuned, tmp_path, capsys):
    goal, out = str(target(tmp_path, **{"train.global_batch": 64})), str(tmp_path / "no.yaml")
    for words, message in (
        (["--rules", "sde"], "'sde' is not a rule; choose among batch, duration, decay, fractions"),
        (["--rules", "decay", "--critical-batch", "9"], "--critical-batch 9 has no effect without --rules batch"),
        (["--rules", "batch"], "use a proxy with a batch of at least 7"),
        (["--rules", "fractions", "optimizer.schedule=cosine"], "schedule is constant in the sweep and cosine"),
        (["mup.base_depth=2"], "mup.base_depth is None in the sweep and 2 in the target"),
    ):
        assert run(["transfer", str(tuned), goal, "--out", out, *words]) == 2
        assert message in capsys.readouterr().err
    assert not Path(out).exists()


def test_a_target_of_another_depth_is_warned_about(tuned, tmp_path, caplog):
    transferred(tuned, tmp_path, **{"model.depth": 3})
    assert "the proxy's depth is 1 and the target's 3, but mup.base_depth is not set" in caplog.text


def test_rounded_cost_is_none_if_a_size_rounds_to_zero():
    assert Cost(((2_000_000, 10),), (600_000_000, 100)).rounded_fraction is None
    assert Cost(((2_000_000, 10),), (4_000_000, 100)).fraction == 0.05


def test_invalid_sweep_folders_and_targets_are_rejected(planted, tmp_path, dataset, capsys):
    def assert_rejected(words, *arguments):
        assert run(["transfer", *map(str, arguments), "--out", str(tmp_path / "x.yaml")]) == 2
        line = capsys.readouterr().err.strip()
        assert words in line
        assert "\n" not in line
        assert not (tmp_path / "x.yaml").exists()

    assert_rejected("is not a sweep folder", tmp_path / "none", target(tmp_path))
    assert_rejected("base width", planted.folder, target(tmp_path, **{"mup.base_heads": 4}))
    assert_rejected("mup.enabled", planted.folder, target(tmp_path, **{"mup.enabled": False}))
    assert_rejected("mup.output_multiplier", planted.folder, target(tmp_path, **{"mup.output_multiplier": 2.0}))
    assert_rejected("mup.lr_multiplier.vector", planted.folder, target(tmp_path, **{"mup.lr_multiplier.vector": 0.25}))
    (tmp_path / "bad").mkdir()
    empty = write_sweep(tmp_path / "bad", dataset, {"optimizer.lr": {"log2": [-8, -7]}})
    diverged = plant(empty, [({"optimizer.lr": 2**-8}, "diverged", None)])
    assert_rejected("no completed", diverged.folder, target(tmp_path))
