"""``plan --build`` builds one rank of a large job: its memory equals closed forms, and errors are reported."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
import yaml

from megatron_dit.cli import run
from megatron_dit.models.param_specs import param_specs
from megatron_dit.training.memory import state_bytes
from tests.helpers.configs import small, small_dict

WORLD = 16


def share(tmp_path, rank, **options):
    """Return the results of ``plan --build``."""
    config, results = tmp_path / "c.yaml", tmp_path / "f.json"
    config.write_text(yaml.safe_dump(small_dict("mmdit", heads=8, base_heads=2, **options)))
    words = ["plan", str(config), "--gpus", str(WORLD), "--build", str(rank), "--json", str(results)]
    assert run(words) == 0
    return json.loads(results.read_text())


def up(count, unit):
    return math.ceil(count / unit) * unit


def local_sizes(options):
    """Yield each parameter with its number of elements per tensor-parallel rank. Its name shows whether it is split."""
    config = small("mmdit", heads=8, base_heads=2, **options)
    tensor = config.parallel.tensor
    column = ("qkv.weight", "qkv.bias", "fc1.weight", "fc1.bias", "modulation.weight", "modulation.bias")
    row = ("out.weight", "fc2.weight")
    for param in param_specs(config).values():
        split = param.name.endswith(column + row) and "_embed" not in param.name
        yield param, math.prod(param.shape) // (tensor if split else 1)


def updated_by_muon(param):
    return param.role == "hidden" and "modulation" not in param.name


@pytest.mark.parametrize(("rank", "muon_lr"), [(0, None), (WORLD - 1, None), (1, 0.02)])
def test_memory_equals_closed_form_for_zero_3_with_tensor_parallelism_in_bf16(tmp_path, rank, muon_lr):
    options = {"parallel.tensor": 2, "parallel.zero_stage": 3, "train.dtype": "bf16", "train.micro_batch": 1}
    options |= {"ema.sigma_rel": [0.05, 0.1], "optimizer.muon_lr": muon_lr}
    found = share(tmp_path, rank, **options)
    sizes = [(param, math.ceil(size / 8)) for param, size in local_sizes(options)]
    elements = sum(size for _, size in sizes)
    expected = {"weights": 2, "gradients": 4, "masters": 4, "moments": 8, "ema": 12, "fp8_weights": 0}
    expected = {key: elements * size for key, size in expected.items()}
    if muon_lr:
        expected["moments"] -= 4 * sum(size for param, size in sizes if updated_by_muon(param))
    assert found["held"] == found["expected"] == expected


@pytest.mark.parametrize(("rank", "stage", "muon_lr"), [(0, 0, None), (WORLD - 1, 1, None), (WORLD - 1, 1, 0.02)])
def test_memory_and_bubble_equal_closed_forms_for_zero_1_with_a_pipeline_in_fp32(tmp_path, rank, stage, muon_lr):
    options = {"parallel.tensor": 2, "parallel.pipeline": 2, "parallel.zero_stage": 1, "train.micro_batch": 1}
    options["optimizer.muon_lr"] = muon_lr
    found = share(tmp_path, rank, **options)
    of_stage = [{"blocks.0", "patch_embed", "time_embed", "text_embed"}, {"blocks.1", "head"}][stage]
    # Block or not, in an optimizer group: hidden weights have their own learning rate and decay, or are Muon's.
    units = Counter()
    for param, size in local_sizes(options):
        if param.name.startswith(tuple(of_stage)):
            muon = muon_lr is not None and updated_by_muon(param)
            units[muon, param.role == "hidden", param.name.startswith("blocks.")] += size
    padded = sum(up(size, 8 * 4) for size in units.values())
    expected = {"weights": padded, "gradients": padded + padded // 4, "masters": padded // 4, "moments": padded // 2}
    expected |= {"ema": padded // 4, "fp8_weights": 0}
    if muon_lr:
        expected["moments"] -= sum(up(size, 8 * 4) // 4 for (muon, _, _), size in units.items() if muon)
    assert found["held"] == found["expected"] == {key: 4 * size for key, size in expected.items()}
    assert found["blocks"] == [stage]
    assert found["bubble"] == pytest.approx(1 / 3)  # one stage idles for one of 2 + 1 micro-batch times
    assert sum(found["stage_flops"]) > 0
    assert found["imbalance"] >= 1


@pytest.mark.parametrize(
    ("options", "stage", "squares"),
    [
        ({}, 0, 39),
        ({"parallel.tensor": 2}, 0, 39 / 2),
        ({"parallel.pipeline": 2, "parallel.zero_stage": 1}, 0, 24),
        ({"parallel.pipeline": 2, "parallel.zero_stage": 1}, 1, 15),
        ({"train.micro_batch": 8}, 0, 0),  # one micro-batch
        ({"train.recompute": "full"}, 0, 0),
        ({"parallel.zero_stage": 3}, 0, 0),
        ({"train.fp8": "none"}, 0, 0),
    ],
)
def test_kept_fp8_weights_equal_closed_form(options, stage, squares):
    """A stream has qkv, out, fc1 and fc2 with 12 squares of the width; in the last block the text has only qkv."""
    config = small("mmdit", **{"train.dtype": "bf16", "train.fp8": "current", **options})
    found = state_bytes(config, param_specs(config).values(), data_parallel=1, stage=stage)
    assert found.fp8_weights == 2 * squares * config.model.width**2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "6", "parallel.tensor=4"], "6 ranks are not divisible by parallel.tensor=4"),
        (["--gpus", "256", "parallel.tensor=3"], "model.heads=4"),
        (["--gpus", "256"], "train.global_batch=8"),
        (["--gpus", "4", "parallel.pipeline=4"], "model.depth=2"),
        (["--gpus", "4", "--build=4"], "--build 4: expected a rank from 0 to 3"),
        (["--gpus", "4", "parallel.pipeline=2", "parallel.zero_stage=3"], "parallel.zero_stage=1 with the pipeline"),
    ],
)
def test_invalid_layout_is_refused_on_one_line(tmp_path, capsys, words, message):
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(small_dict("mmdit")))
    assert run(["plan", str(config), "--build=0", *words]) == 2
    line = capsys.readouterr().err.strip()
    assert message in line
    assert "\n" not in line
