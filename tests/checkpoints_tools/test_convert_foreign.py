"""Import of diffusers folders of other origin: equal outputs, bit-exact re-export, and rejected models."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

from checkpoints_tools.__main__ import main
from data_prep.tiny_t5 import build_tiny_t5
from megatron_dit.checkpoint.load import open_checkpoint
from megatron_dit.cli import run
from megatron_dit.data.encoder_hash import weights_sha256
from tests.helpers.conversion import (
    TOLERANCE,
    convert,
    difference,
    equal,
    inputs,
    our_model,
    tensors,
    their_model,
    weights_of,
    write_alone,
)
from tests.helpers.datasets import TEXT, make_folder
from tests.helpers.foreign_models import SETTINGS, foreign, refused


@pytest.mark.parametrize("arch", SETTINGS)
def test_imported_model_has_equal_outputs_and_reexports_bit_exactly(tmp_path, arch):
    folder = foreign(tmp_path / "theirs", arch)
    tokens = ["model.text_tokens=24"] if arch in ("mmdit", "pixart") else []
    convert(folder, tmp_path / "run", "--from", "diffusers", *tokens)
    assert difference(tmp_path / "run", folder) <= TOLERANCE
    convert(tmp_path / "run", tmp_path / "again", "--to", "diffusers")
    assert equal(weights_of(tmp_path / "again"), weights_of(folder))
    assert difference(tmp_path / "run", tmp_path / "again") <= TOLERANCE
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "again"))
    assert {name: before[name] for name in after if name != "_class_name"} == {
        name: value for name, value in after.items() if name != "_class_name"
    }


@pytest.mark.parametrize("arch", ["dit", "pixart"])
def test_the_old_class_name_is_resolved_by_the_norm_type(tmp_path, arch):
    folder = foreign(tmp_path / "theirs", arch)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_class_name": "Transformer2DModel"}))
    convert(folder, tmp_path / "run", "--from", "diffusers")
    assert open_checkpoint(tmp_path / "run").manifest["config"]["model"]["arch"] == arch


def test_weights_are_unfolded_for_the_parametrization_given_by_set(tmp_path):
    folder = foreign(tmp_path / "theirs", "dit")
    mup = ["mup.enabled=true", "mup.base_heads=1", "mup.output_multiplier=3", "model.base_head_dim=4"]
    convert(folder, tmp_path / "run", "--from", "diffusers", *mup)
    assert open_checkpoint(tmp_path / "run").manifest["multipliers"] == {"head.linear.weight": 3 / 4}
    assert difference(tmp_path / "run", folder) <= TOLERANCE


def test_an_imported_run_can_be_sampled_and_trained(tmp_path, capsys):
    build_tiny_t5(tmp_path / "t5", ["a b"], seed=0)
    text = {**TEXT, "encoder": str(tmp_path / "t5"), "sha256": weights_sha256(str(tmp_path / "t5"))}
    make_folder(tmp_path / "data", [((8, 8), 16)], text=text)
    folder = foreign(tmp_path / "theirs", "mmdit")
    changes = ["model.text_tokens=24", "train.steps=2", "train.global_batch=4", "train.micro_batch=4"]
    convert(folder, tmp_path / "run", "--from", "diffusers", "--data", tmp_path / "data", *changes)
    assert main(["inspect", str(tmp_path / "run")]) == 0
    sampling = ["sample", str(tmp_path / "run"), "--prompt", "a b", "--steps", "2", "--out", str(tmp_path / "grid.png")]
    assert run(sampling) == 0
    before = tensors(tmp_path / "run", "master")
    assert run(["train", str(tmp_path / "run" / "config.yaml"), "parallel.zero_stage=1"]) == 0
    assert "resumed" in capsys.readouterr().out
    reader = open_checkpoint(tmp_path / "run")
    assert (reader.step, reader.manifest["num_updates"]) == (2, 2)
    assert not equal(tensors(tmp_path / "run", "master"), before)


def test_drop_clip_keeps_the_embedding_of_zero_pooled_text(tmp_path, capsys):
    """That embedding does not depend on the text."""
    folder = foreign(tmp_path / "theirs", "mmdit", keep_clip=True)
    assert "add --drop-clip to import it" in refused(capsys, folder, tmp_path / "run", "--from", "diffusers")
    convert(folder, tmp_path / "run", "--from", "diffusers", "--drop-clip")
    assert difference(tmp_path / "run", folder) <= TOLERANCE


def test_the_null_caption_of_a_pipeline_is_its_text_encoders_output_for_an_empty_prompt(tmp_path, capsys):
    """Attending to all its copies has the same effect as diffusers' single token of ''."""
    foreign(tmp_path / "pipe" / "transformer", "pixart")
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    build_tiny_t5(tmp_path / "pipe" / "text_encoder", ["a b"], seed=0)
    convert(tmp_path / "pipe", tmp_path / "run", "--from", "diffusers", "model.text_tokens=6")
    assert "the text encoder's output for ''" in capsys.readouterr().out
    encoder = T5EncoderModel.from_pretrained(tmp_path / "pipe" / "text_encoder")
    ours, theirs = our_model(tmp_path / "run"), their_model(tmp_path / "pipe" / "transformer", "pixart")
    x, t, condition = inputs(ours.config)
    with torch.no_grad():
        empty = encoder(input_ids=torch.tensor([[1]])).last_hidden_state  # only the end-of-sequence token
        expected = theirs(x[1:2], encoder_hidden_states=empty, timestep=t[1:2]).sample
        assert (ours(x, t, condition)[1:2] - expected).norm() <= TOLERANCE * expected.norm()


@pytest.mark.parametrize(
    ("arch", "changes", "message"),
    [
        ("mmdit", {"qk_norm": None}, "config.json has qk_norm=None, but only 'rms_norm' is supported"),
        ("mmdit", {"dual_attention_layers": (0,)}, "dual_attention_layers=[0]"),
        ("pixart", {"use_additional_conditions": True}, "use_additional_conditions=True"),
        ("dit", {"out_channels": 5}, "out_channels=5, but only 3 and 6 are supported"),
        ("pixart", {"out_channels": 9}, "out_channels=9, but only 3 and 6 are supported"),
    ],
)
def test_models_with_unsupported_settings_are_rejected(tmp_path, capsys, arch, changes, message):
    folder = foreign(tmp_path / "theirs", arch, **changes)
    assert message in refused(capsys, folder, tmp_path / "run", "--from", "diffusers")
    assert not (tmp_path / "run").exists()


def test_unexpected_missing_and_unequal_weights_are_rejected(tmp_path, capsys):
    folder = foreign(tmp_path / "theirs", "dit")
    path = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file({**weights, "extra.weight": torch.ones(2)}, path)
    line = refused(capsys, folder, tmp_path / "run", "--from", "diffusers")
    assert "has extra.weight, which has no counterpart in dit" in line
    name = "transformer_blocks.2.norm1.emb.class_embedder.embedding_table.weight"
    save_file({**weights, name: weights[name] + 1}, path)
    assert f"{name} is not equal to" in refused(capsys, folder, tmp_path / "run", "--from", "diffusers")
    save_file({key: value for key, value in weights.items() if key != "proj_out_1.bias"}, path)
    assert "has no proj_out_1.bias" in refused(capsys, folder, tmp_path / "run", "--from", "diffusers")
    path.rename(folder / "diffusion_pytorch_model.bin")
    line = refused(capsys, folder, tmp_path / "run", "--from", "diffusers")
    assert "diffusion_pytorch_model.bin, a safetensors file: rename it" in line
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    path.write_bytes((folder / "diffusion_pytorch_model.bin").read_bytes())
    assert "is a UNet2DModel: expected one of" in refused(capsys, folder, tmp_path / "run", "--from", "diffusers")


def test_runs_that_diffusers_cannot_represent_are_rejected(tmp_path, capsys):
    for name, arch, options, message in (
        ("ratio", "mmdit", {"model.mlp_ratio": 2}, "model.mlp_ratio=2 cannot be exported"),
        ("scale", "dit", {"model.interpolation_scale": 2.0}, "model.interpolation_scale=2.0 cannot be exported"),
    ):
        write_alone(tmp_path / name, arch, options)
        assert message in refused(capsys, tmp_path / name, tmp_path / "out", "--to", "diffusers")
    write_alone(tmp_path / "large", "uvit", {"mup.output_multiplier": 1e9})
    words = [tmp_path / "large", tmp_path / "out", "--to", "diffusers", "--dtype", "fp16"]
    assert "proj_out.weight reaches" in refused(capsys, *words)
    assert not list(tmp_path.glob("out*"))


def test_repa_projector_is_left_out_and_reported(tmp_path, capsys):
    write_alone(tmp_path, "dit", {"model.repa_block": 1, "model.repa_dim": 5})
    convert(tmp_path, tmp_path / "out", "--to", "diffusers")
    assert "left out, only used in training: projector.fc1.weight" in capsys.readouterr().out
    convert(tmp_path / "out", tmp_path / "back", "--from", "diffusers")
    kept = {name: value for name, value in tensors(tmp_path).items() if not name.startswith("projector")}
    assert equal(tensors(tmp_path / "back"), kept)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give exactly one of --to diffusers and --from"),
        (["--to", "diffusers", "--from", "diffusers"], "give exactly one of --to diffusers and --from"),
        (["--to", "diffusers", "--drop-clip"], "--drop-clip is only valid with --from"),
        (["--from", "diffusers", "--max-shard-size", "1GB"], "--max-shard-size is only valid with --to"),
        (["--to", "diffusers", "--vae", "x"], "add --pipeline"),
        (["--to", "diffusers", "--variant", "fp16"], "--variant is only valid with --from"),
        (["--from", "dit", "--variant", "fp16"], "--variant fp16 is only valid with --from diffusers"),
        (["--to", "diffusers", "--max-shard-size", "5 GiB"], "expected a size such as 500MB"),
        (["--from", "diffusers"], "has no config.json"),
    ],
)
def test_invalid_combinations_of_options_are_rejected(tmp_path, capsys, words, message):
    (tmp_path / "run").mkdir()
    if "--max-shard-size" in words and "--to" in words:
        write_alone(tmp_path / "run", "dit", {})
    assert message in refused(capsys, tmp_path / "run", tmp_path / "out", *words)


def test_an_existing_output_folder_is_rejected(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert "give a folder that does not exist" in refused(capsys, tmp_path, tmp_path / "out", "--to", "diffusers")
    assert "is also the source" in refused(capsys, tmp_path, tmp_path, "--to", "diffusers")
