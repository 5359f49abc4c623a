"""``megatron-dit config``: the reference of all keys, the resolved config and what is generated from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from megatron_dit.cli import run
from megatron_dit.config import Config
from megatron_dit.config.convert import dotted_keys
from tests.helpers.configs import write_config

ROOT = Path(__file__).parents[2]


def test_committed_key_reference_is_current(capsys):
    """If this fails, run ``megatron-dit config > docs/config.md``."""
    assert run(["config"]) == 0
    assert capsys.readouterr().out == (ROOT / "docs" / "config.md").read_text()


def test_reference_names_every_key_once(capsys):
    assert run(["config"]) == 0
    lines = capsys.readouterr().out.splitlines()
    sections = {line.split("`")[1] for line in lines if line.startswith("## `")}
    keys = [line.split("`")[1] for line in lines if line.startswith("| `")]
    assert sorted([*keys, *sections]) == sorted(dotted_keys(Config))


def test_reference_states_range_unit_default_and_whether_a_key_may_change(capsys):
    assert run(["config"]) == 0
    out = capsys.readouterr().out
    assert "| `train.micro_batch`* | integer in [1, 2^31) (samples) | required |" in out
    assert "| `train.dtype` | `fp32`, `bf16` | `fp32` |" in out


@pytest.mark.parametrize("before", [True, False])
def test_resolved_config_and_derived_values_are_printed_and_written(tmp_path, capsys, before):
    config, results = str(write_config(tmp_path)), tmp_path / "results.json"
    flags = ["--procs", "2", "--json", str(results)]
    words = [config, "parallel.zero_stage=2"]
    assert run(["config", *flags, *words] if before else ["config", *words, *flags]) == 0
    resolved, derived = yaml.safe_load_all(capsys.readouterr().out)
    assert resolved["parallel"]["zero_stage"] == 2
    assert derived == json.loads(results.read_text())
    assert derived["data_parallel"] == 2
    assert derived["deepspeed"]["zero_optimization"]["stage"] == 2
    assert derived["deepspeed"]["train_micro_batch_size_per_gpu"] == 4
    assert derived["parameters"] > 10000
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(resolved))
    assert run(["config", str(again), "--procs", "2"]) == 0
    assert next(yaml.safe_load_all(capsys.readouterr().out)) == resolved


@pytest.mark.parametrize(
    ("tensor", "given", "most"),
    [(1, None, 2_831_616_768), (8, None, 1_000_000_000), (1, 1_500_000_000, 3_943_872_256)],
)
def test_zero_3_prefetches_a_block_and_keeps_at_most_three(tmp_path, tensor, given, most):
    """The blocks of configs/mmdit/18b.yaml have 18 D² weights per stream; D² of 5120² are 26M."""
    results = tmp_path / "results.json"
    layout = [f"parallel.tensor={tensor}", "parallel.sequence=false", "parallel.zero_stage=3"]
    if given is not None:
        layout.append(f"parallel.prefetch_bucket_size={given}")
    config = str(ROOT / "configs" / "mmdit" / "18b.yaml")
    assert run(["config", config, *layout, "--procs", "8", "--json", str(results)]) == 0
    zero = json.loads(results.read_text())["deepspeed"]["zero_optimization"]
    width, head_dim = 5120, 64
    sharded = 18 * width**2 + 13 * width  # with the biases of qkv, fc1 and the modulation
    block = 2 * (sharded // tensor + 2 * width + 2 * head_dim)  # the other biases and the QK-norms' gains
    ahead = block if given is None else given
    assert zero["stage3_prefetch_bucket_size"] == ahead
    assert zero["stage3_max_live_parameters"] == most
