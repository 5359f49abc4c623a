"""Conversion of checkpoints to diffusers and back: outputs are equal and weights bit-exact, for any layout."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.helpers.configs import ARCHITECTURES
from tests.helpers.conversion import (
    TOLERANCE,
    convert,
    difference,
    equal,
    our_model,
    tensors,
    weights_of,
    write_alone,
    write_checkpoint,
)

LAYOUTS = {
    "dp2-zero3": (2, {"parallel.zero_stage": 3}),
    "tp2-pp2": (4, {"parallel.tensor": 2, "parallel.pipeline": 2, "train.micro_batch": 2}),
}
# Width multiplier 4 by heads and 2 by head_dim: the readout's factor 0.3 / 8 and the attention's sqrt(1/2) both round.
ROUNDING = {"heads": 8, "base_heads": 2, "model.base_head_dim": 4, "mup.output_multiplier": 0.3}


@st.composite
def options(draw, arch):
    """Options of a tiny model with random head_dim and a width multiplier of 1 or 4."""
    base, multiplier = draw(st.integers(1, 2)), draw(st.sampled_from([1, 4]))
    head_dim, patch = 4 * draw(st.integers(1, 5)), draw(st.sampled_from([1, 2, 4]))
    found = {
        "heads": base * multiplier,
        "base_heads": base,
        "model.head_dim": head_dim,
        "model.base_head_dim": draw(st.sampled_from([None, 4, head_dim])),
        "model.depth": draw(st.sampled_from([1, 3])),
        "model.patch_size": patch,
        "model.sample_size": patch * draw(st.integers(2, 4)),
        "model.in_channels": draw(st.integers(1, 4)),
        "mup.output_multiplier": draw(st.sampled_from([1.0, 0.7])),
        "mup.base_depth": draw(st.sampled_from([2, None])),
        "optimizer.muon_lr": draw(st.sampled_from([0.02, None])),
    }
    if arch == "mmdit":
        found["model.position_size"] = draw(st.sampled_from([None, 5]))
    if arch == "pixart":
        found["model.interpolation_scale"] = draw(st.sampled_from([1.0, 2.0]))
    if arch not in ("dit", "uvit-class"):
        found["model.text_dim"] = draw(st.integers(1, 12))
        found["model.text_tokens"] = draw(st.integers(2, 6))
    return found


@pytest.mark.parametrize("arch", [*ARCHITECTURES, "uvit-class"])
@settings(max_examples=2, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=HealthCheck)
@given(data=st.data())
def test_exported_model_has_equal_outputs_and_reimports_bit_exactly(tmp_path_factory, arch, data):
    folder = tmp_path_factory.mktemp("random")
    write_alone(folder, arch, data.draw(options(arch)))
    convert(folder, folder / "out", "--to", "diffusers")
    assert difference(folder, folder / "out") <= TOLERANCE
    convert(folder / "out", folder / "back", "--from", "diffusers")
    assert equal(tensors(folder / "back"), tensors(folder))


@pytest.mark.parametrize(
    ("arch", "learn_sigma", "objective"),
    [
        ("dit", False, "rectified_flow"),  # SiT
        ("dit", False, "ddpm"),
        ("pixart", False, "ddpm"),
        ("uvit", True, "ddpm"),
        ("uvit-class", True, "ddpm"),
    ],
)
def test_a_model_is_exported_and_imported_with_and_without_a_learned_variance(tmp_path, arch, learn_sigma, objective):
    write_alone(tmp_path, arch, {"model.learn_sigma": learn_sigma, "objective.name": objective})
    convert(tmp_path, tmp_path / "out", "--to", "diffusers")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["in_channels"] == 3
    assert settings.get("out_channels", 3) == 3
    assert difference(tmp_path, tmp_path / "out") <= TOLERANCE
    (tmp_path / "out" / "megatron_dit.json").unlink()  # as a model of another origin
    text = ["model.text_tokens=24"] if arch == "pixart" else []
    convert(tmp_path / "out", tmp_path / "back", "--from", "diffusers", *text)
    assert difference(tmp_path / "back", tmp_path / "out") <= TOLERANCE
    assert our_model(tmp_path / "back").config.learn_sigma == learn_sigma


@pytest.fixture(scope="module", params=ARCHITECTURES)
def exported(request, tmp_path_factory):
    """The folder of a run of one process whose factors round, with its export in ``out``."""
    folder = tmp_path_factory.mktemp(request.param)
    write_alone(folder, request.param, {**ROUNDING, "model.depth": 3})
    convert(folder, folder / "out", "--to", "diffusers")
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_export_does_not_depend_on_the_checkpoint_layout(pool, exported, tmp_path, layout):
    ranks, options = LAYOUTS[layout]
    arch = json.loads((exported / "out" / "megatron_dit.json").read_text())["config"]["model"]["arch"]
    pool.run(ranks, write_checkpoint, str(tmp_path), arch, {**ROUNDING, "model.depth": 3}, options)
    convert(tmp_path, tmp_path / "out", "--to", "diffusers")
    assert equal(weights_of(tmp_path / "out"), weights_of(exported / "out"))
    assert difference(tmp_path, tmp_path / "out") <= TOLERANCE


def test_weights_option_selects_raw_weights_or_averages(exported, tmp_path):
    convert(exported, tmp_path / "raw", "--to", "diffusers", "--weights", "raw")
    assert difference(exported, tmp_path / "raw", ema=False) <= TOLERANCE
    assert difference(exported, tmp_path / "raw") > 0.1
    assert difference(exported, exported / "out") <= TOLERANCE


def test_reimported_run_starts_at_step_0_with_the_exported_weights(exported, tmp_path):
    convert(exported / "out", tmp_path / "back", "--from", "diffusers")
    for key in ("master", "ema"):
        assert equal(tensors(tmp_path / "back", key), tensors(exported))
    for key in ("exp_avg", "exp_avg_sq"):
        assert not any(value.any() for value in tensors(tmp_path / "back", key).values())
    assert difference(tmp_path / "back", exported / "out") <= TOLERANCE
    convert(tmp_path / "back", tmp_path / "again", "--to", "diffusers")
    assert equal(weights_of(tmp_path / "again"), weights_of(exported / "out"))
    assert (tmp_path / "again" / "config.json").read_text() == (exported / "out" / "config.json").read_text()


def test_weights_files_respect_max_shard_size_and_contain_the_same_weights(exported, tmp_path):
    convert(exported, tmp_path / "out", "--to", "diffusers", "--max-shard-size", "50KB")
    files = sorted((tmp_path / "out").glob("diffusion_pytorch_model-*.safetensors"))
    largest = max(value.nbytes for value in weights_of(exported / "out").values())
    assert len(files) > 2
    assert max(path.stat().st_size for path in files) <= max(50_000, largest) + 10_000  # the header
    assert equal(weights_of(tmp_path / "out"), weights_of(exported / "out"))
    assert difference(exported, tmp_path / "out") <= TOLERANCE
    convert(tmp_path / "out", tmp_path / "back", "--from", "diffusers")
    assert equal(tensors(tmp_path / "back"), tensors(exported))


def test_bf16_and_fp16_exports_contain_the_rounded_weights(exported, tmp_path):
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        convert(exported, tmp_path / name, "--to", "diffusers", "--dtype", name)
        expected = {key: value.to(dtype) for key, value in weights_of(exported / "out").items()}
        assert equal(weights_of(tmp_path / name), expected)
        assert difference(exported, tmp_path / name) <= 0.05
        convert(tmp_path / name, tmp_path / f"{name}-run", "--from", "diffusers")
        convert(tmp_path / f"{name}-run", tmp_path / f"{name}-again", "--to", "diffusers", "--dtype", name)
        assert equal(weights_of(tmp_path / f"{name}-again"), expected)


def test_recorded_factors_match_the_multipliers_and_are_reported_in_the_card(exported):
    facts = json.loads((exported / "out" / "megatron_dit.json").read_text())
    readout = 0.3 / 8
    query = math.sqrt(4) / 8 * math.sqrt(8)
    assert {round(factor, 12) for factor in facts["factors"].values()} == {round(readout, 12), round(query, 12)}
    card = (exported / "out" / "README.md").read_text()
    assert "Forward multipliers are folded" in card
    assert "samples seen | 56 (8 per step)" in card


def test_rounding_differences_are_ignored_for_weights_saved_by_another_program(exported, tmp_path):
    """The factors are still removed, but only up to rounding."""
    from tests.helpers.conversion import their_model

    arch = json.loads((exported / "out" / "megatron_dit.json").read_text())["config"]["model"]["arch"]
    for path in (exported / "out").iterdir():
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / path.name).write_bytes(path.read_bytes())
    model = their_model(tmp_path / "out", arch)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    model.save_pretrained(tmp_path / "out")
    convert(tmp_path / "out", tmp_path / "back", "--from", "diffusers")
    for name, value in tensors(tmp_path / "back").items():
        if name != "null_caption.table":
            torch.testing.assert_close(value, 2 * tensors(exported)[name], rtol=1e-6, atol=0)
