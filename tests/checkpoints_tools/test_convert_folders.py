"""Import of diffusers folders as found on hubs: variants, shards, prefixes, missing defaults, damaged files."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
import yaml
from diffusers import DDIMScheduler, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file

from checkpoints_tools.convert.tensors import unwrapped
from data_prep.tiny_t5 import build_tiny_t5
from megatron_dit.checkpoint.load import open_checkpoint
from megatron_dit.runtime.errors import UserError
from tests.helpers.conversion import TOLERANCE, convert, difference, equal, tensors, write_alone
from tests.helpers.datasets import make_folder
from tests.helpers.foreign_models import foreign, refused
from tests.helpers.wrong_files import PAGE, POINTER

SINGLE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A random DiT in fp32, and the tensors of the run imported from it."""
    folder = tmp_path_factory.mktemp("made")
    foreign(folder / "dit", "dit")
    convert(folder / "dit", folder / "run", "--from", "diffusers")
    return folder / "dit", tensors(folder / "run")


@pytest.fixture
def theirs(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / "theirs")


def edit(path, **changes):
    """Change values of a JSON file; the value ``...`` removes a key."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))


def imported(folder, out, *words):
    convert(folder, out, "--from", "diffusers", *words)
    return tensors(out)


@pytest.mark.parametrize("size", ["10GB", "20KB"])
def test_the_only_variant_is_read_without_an_option(made, tmp_path, size):
    model = DiTTransformer2DModel.from_pretrained(made[0], torch_dtype=torch.float16)
    model.save_pretrained(tmp_path / "theirs", variant="fp16", max_shard_size=size)
    model.float().save_pretrained(tmp_path / "plain")
    found = imported(tmp_path / "theirs", tmp_path / "run")
    assert equal(found, imported(tmp_path / "plain", tmp_path / "expected"))


def test_variant_option_selects_among_several_variants(made, tmp_path, capsys):
    """The folder has shards and indexes without a variant and of one variant, and then only of two variants."""
    folder, out = tmp_path / "theirs", tmp_path / "run"
    model = DiTTransformer2DModel.from_pretrained(made[0])
    model.save_pretrained(folder, max_shard_size="20KB")
    half = DiTTransformer2DModel.from_pretrained(made[0], torch_dtype=torch.float16)
    half.save_pretrained(folder, variant="fp16", max_shard_size="20KB")
    assert equal(imported(folder, tmp_path / "plain"), made[1])
    fp16 = imported(folder, tmp_path / "fp16", "--variant", "fp16")
    assert not equal(fp16, made[1])
    torch.testing.assert_close(fp16, made[1], rtol=2**-10, atol=1e-6)
    assert "has no weights of --variant bf16" in refused(
        capsys, folder, out, "--from", "diffusers", "--variant", "bf16"
    )
    half.save_pretrained(folder, variant="other")
    (folder / f"{SINGLE}.index.json").unlink()
    assert "add --variant fp16 or --variant other" in refused(capsys, folder, out, "--from", "diffusers")


def test_an_index_with_missing_files_or_invalid_contents_is_rejected(made, tmp_path, capsys):
    folder = tmp_path / "theirs"
    DiTTransformer2DModel.from_pretrained(made[0]).save_pretrained(folder, max_shard_size="20KB")
    index = folder / f"{SINGLE}.index.json"
    second = sorted(folder.glob("*-00002-*"))[0]
    second.rename(tmp_path / second.name)
    assert f"lists {second.name}, which is not in its folder" in refused(
        capsys, folder, tmp_path / "run", "--from", "diffusers"
    )
    for weight_map, message in (
        ({"a": f"../{second.name}"}, "expected file names inside its own folder"),
        ({"a": 1}, "has no weight_map"),
        ([], "has no weight_map"),
        (..., "has no weight_map"),
    ):
        edit(index, weight_map=weight_map)
        assert message in refused(capsys, folder, tmp_path / "run", "--from", "diffusers")
    index.write_text(PAGE)
    assert "is a web page, not a JSON object" in refused(capsys, folder, tmp_path / "run", "--from", "diffusers")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.", "transformer.module."])
def test_prefixes_of_wrapping_modules_are_removed(made, theirs, tmp_path, prefix):
    weights = load_file(theirs / SINGLE)
    save_file({prefix + name: value for name, value in weights.items()}, theirs / SINGLE)
    assert equal(imported(theirs, tmp_path / "run"), made[1])


def test_unwrapped_removes_the_prefixes_that_torch_adds():
    plain = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
    names = list(plain.state_dict())
    compiled = torch.compile(plain)
    wrapped = torch.optim.swa_utils.AveragedModel(compiled).module
    assert list(unwrapped(compiled.state_dict())) == names
    assert list(unwrapped(wrapped.state_dict())) == names
    blocks = torch.nn.Sequential(plain[0], torch.compile(plain[1]))
    assert unwrapped(blocks.state_dict()) == {
        "0.weight": "0.weight", "0.bias": "0.bias", "1.weight": "1._orig_mod.weight", "1.bias": "1._orig_mod.bias",
    }  # fmt: skip
    assert unwrapped(["module.a", "b"]) == {"module.a": "module.a", "b": "b"}
    assert unwrapped([]) == {}
    with pytest.raises(UserError, match=r"a.b and a._orig_mod.b both name the parameter a.b"):
        unwrapped(["a.b", "a._orig_mod.b"])


def test_settings_missing_from_config_json_get_the_defaults_of_the_class(tmp_path):
    """diffusers' defaults are a patch size of 2 and 1000 classes."""
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "out_channels": 8, "sample_size": 8}
    model = DiTTransformer2DModel(**sizes)
    torch.nn.init.normal_(model.proj_out_2.weight)
    model.save_pretrained(tmp_path / "theirs")
    given = {"_class_name": "DiTTransformer2DModel", **sizes}
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(given))
    convert(tmp_path / "theirs", tmp_path / "run", "--from", "diffusers")
    found = open_checkpoint(tmp_path / "run").manifest["config"]["model"]
    assert (found["patch_size"], found["in_channels"], found["num_classes"]) == (2, 4, 1000)
    assert difference(tmp_path / "run", tmp_path / "theirs") <= TOLERANCE


def test_settings_missing_from_a_scheduler_get_the_defaults_of_its_class(theirs, tmp_path, capsys):
    pipe = tmp_path / "pipe"
    shutil.copytree(theirs, pipe / "transformer")
    (pipe / "scheduler").mkdir()
    config = pipe / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({"_class_name": "DDIMScheduler"}))
    assert DDIMScheduler().config.beta_schedule == "linear"
    imported(pipe, tmp_path / "run")
    for changes, message in (
        ({"prediction_type": "v_prediction"}, '"prediction_type": "v_prediction"'),
        ({"trained_betas": [0.1]}, '"trained_betas": [0.1]'),
        ({"beta_end": 0.5}, "'beta_end': 0.5"),
    ):
        config.write_text(json.dumps({"_class_name": "DDIMScheduler", **changes}))
        assert message in refused(capsys, pipe, tmp_path / "other", "--from", "diffusers")


def test_a_scheduler_shift_that_is_not_a_positive_number_is_rejected(tmp_path, capsys):
    pipe = tmp_path / "pipe"
    foreign(pipe / "transformer", "mmdit")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(pipe / "scheduler")
    convert(pipe, tmp_path / "run", "--from", "diffusers")
    assert open_checkpoint(tmp_path / "run").manifest["config"]["objective"]["shift"] == 3
    for shift in (None, 0, float("nan"), "3"):
        edit(pipe / "scheduler" / "scheduler_config.json", shift=shift)
        assert "the pipeline's scheduler has shift=" in refused(capsys, pipe, tmp_path / "other", "--from", "diffusers")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": ...}, "has no _class_name"),
        ({"num_layers": 2}, "has transformer_blocks.2."),
        ({"num_layers": 4}, "has no transformer_blocks.3."),
        ({"num_layers": "3"}, 'num_layers="3": expected an integer of at least 1'),
        ({"num_layers": None}, "num_layers=null"),
        ({"num_layers": 10**9}, "model.depth=1000000000: expected at least 1 and at most 10000"),
        ({"patch_size": 0}, "patch_size=0"),
        ({"patch_size": 4}, "of shape [16, 3, 2, 2], but its config.json and the overrides require [16, 3, 4, 4]"),
        (
            {"num_embeds_ada_norm": 7},
            "embedding_table.weight of shape [11, 16], but its config.json and the overrides require [8, 16]",
        ),
        ({"out_channels": 7}, "out_channels=7, but only 3 and 6 are supported"),
        ({"out_channels": None}, "of shape [24, 16], but its config.json and the overrides require [12, 16]"),
    ],
)
def test_a_config_json_that_does_not_match_the_weights_is_rejected(theirs, tmp_path, capsys, changes, message):
    edit(theirs / "config.json", **changes)
    assert message in refused(capsys, theirs, tmp_path / "run", "--from", "diffusers")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_rejected_by_name(theirs, tmp_path, capsys, value):
    weights = load_file(theirs / SINGLE)
    weights["proj_out_1.bias"][0] = value
    save_file(weights, theirs / SINGLE)
    line = refused(capsys, theirs, tmp_path / "run", "--from", "diffusers")
    assert "has NaN or infinite values in proj_out_1.bias" in line
    assert not (tmp_path / "run").exists()


def test_floating_point_weights_of_any_precision_are_read_and_quantized_weights_are_rejected(theirs, tmp_path, capsys):
    weights = load_file(theirs / SINGLE)
    save_file({name: value.to(torch.float8_e4m3fn) for name, value in weights.items()}, theirs / SINGLE)
    found = imported(theirs, tmp_path / "run")
    expected = weights["proj_out_1.weight"].to(torch.float8_e4m3fn).float()
    assert torch.equal(found["head.modulation.weight"], expected)
    save_file({**weights, "proj_out_1.bias": weights["proj_out_1.bias"].to(torch.int8)}, theirs / SINGLE)
    line = refused(capsys, theirs, tmp_path / "other", "--from", "diffusers")
    assert "has proj_out_1.bias of torch.int8: expected floating-point weights" in line


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (SINGLE, POINTER, "is a Git LFS pointer"),
        (SINGLE, PAGE, "is a web page"),
        (SINGLE, "", "is an empty file"),
        ("config.json", POINTER, "is a Git LFS pointer"),
        ("config.json", "[1]", "is damaged JSON or JSON of another type"),
        ("config.json", '{"a": ', "is damaged JSON"),
        ("megatron_dit.json", PAGE, "is a web page"),
        ("megatron_dit.json", "{}", "was not written by an export"),
        ("megatron_dit.json", '{"config": {"model": {}, "data": {"path": "${oc.env:HOME}"}}}', "was not written by an"),
    ],
)
def test_files_whose_contents_do_not_match_their_extension_are_rejected_by_name(
    theirs, tmp_path, capsys, name, content, message
):
    (theirs / name).write_text(content)
    line = refused(capsys, theirs, tmp_path / "run", "--from", "diffusers")
    assert str(theirs / name) in line
    assert message in line


def test_the_error_for_a_truncated_file_and_for_a_pickle_names_the_problem(theirs, tmp_path, capsys):
    whole = (theirs / SINGLE).read_bytes()
    (theirs / SINGLE).write_bytes(whole[:-5000])
    assert f"is a truncated safetensors file ({len(whole) - 5000:,} of {len(whole):,} bytes)" in refused(
        capsys, theirs, tmp_path / "run", "--from", "diffusers"
    )
    torch.save({"a": torch.zeros(1)}, theirs / SINGLE)
    line = refused(capsys, theirs, tmp_path / "run", "--from", "diffusers")
    assert "is a torch.save file (pickle), not a safetensors file" in line
    (theirs / SINGLE).rename(theirs / "diffusion_pytorch_model.bin")
    assert "safe_serialization=True" in refused(capsys, theirs, tmp_path / "run", "--from", "diffusers")


def test_a_source_that_is_not_the_folder_of_a_model_is_rejected(theirs, tmp_path, capsys):
    out = tmp_path / "run"
    assert "is a safetensors file; give the folder" in refused(capsys, theirs / SINGLE, out, "--from", "diffusers")
    assert "is not a folder" in refused(capsys, tmp_path / "missing", out, "--from", "diffusers")
    (theirs / "config.json").rename(theirs / "model_index.json")
    assert "has no transformer/config.json" in refused(capsys, theirs, out, "--from", "diffusers")


def test_a_snapshot_in_the_hub_cache_is_read(made, tmp_path):
    """Its files are symbolic links to blobs, and of a pipeline only the transformer may have been downloaded."""
    (tmp_path / "blobs").mkdir()
    folder = tmp_path / "snapshots" / "abc" / "transformer"
    folder.mkdir(parents=True)
    for path in made[0].iterdir():
        shutil.copy(path, tmp_path / "blobs" / path.name)
        (folder / path.name).symlink_to(f"../../../blobs/{path.name}")
    assert equal(imported(folder, tmp_path / "one"), made[1])
    assert equal(imported(folder.parent, tmp_path / "two"), made[1])


def test_options_that_do_not_apply_to_the_source_are_rejected(theirs, tmp_path, capsys):
    out = tmp_path / "run"
    for words, message in (
        (["--drop-clip"], "--drop-clip has no effect on DiTTransformer2DModel"),
        (["model.heads=4", "model.head_dim=4"], "the overrides give model.heads=4 and model.head_dim=4, but"),
        (["--base-shapes", "x.bsh"], "--base-shapes is only valid with --from dit-mup"),
    ):
        assert message in refused(capsys, theirs, out, "--from", "diffusers", *words)


def test_an_output_folder_that_cannot_be_written_is_rejected(theirs, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    line = refused(capsys, theirs, tmp_path / "file" / "run", "--from", "diffusers")
    assert f"{tmp_path / 'file' / 'run'} cannot be written" in line


def test_a_null_caption_of_the_wrong_shape_or_with_nan_is_rejected(tmp_path, capsys):
    pipe = tmp_path / "pipe"
    foreign(pipe / "transformer", "pixart")
    build_tiny_t5(pipe / "text_encoder", ["a b"], seed=0, d_model=32)
    line = refused(capsys, pipe, tmp_path / "run", "--from", "diffusers")
    assert "has shape [1, 32], but its config.json and the overrides require [1, 64]" in line
    null = pipe / "transformer" / "null_caption.safetensors"
    save_file({"null_caption": torch.zeros(3, 64)}, null)
    line = refused(capsys, pipe, tmp_path / "run", "--from", "diffusers")
    assert "has shape [3, 64], but its config.json and the overrides require [120, 64]" in line
    save_file({"null_caption": torch.full((120, 64), float("nan"))}, null)
    assert "NaN or infinite values in null_caption" in refused(capsys, pipe, tmp_path / "run", "--from", "diffusers")


@pytest.mark.parametrize("name", ["a.b [c] 100% %s", "-x", "e\u0301 é", "a\nb", "*?"])
def test_folder_names_may_contain_any_character(made, tmp_path, name):
    shutil.copytree(made[0], tmp_path / "in" / name)
    found = imported(tmp_path / "in" / name, tmp_path / "out" / name)
    assert equal(found, made[1])
    convert(tmp_path / "out" / name, tmp_path / "back" / name, "--to", "diffusers")
    assert equal(load_file(tmp_path / "back" / name / SINGLE), load_file(made[0] / SINGLE))


def test_pipeline_options_for_parts_that_the_run_does_not_use_are_rejected(tmp_path, capsys):
    make_folder(tmp_path / "pixels", [((8, 8), 4)])
    write_alone(tmp_path / "run", "dit", {"data.path": str(tmp_path / "pixels")})
    words = [tmp_path / "run", tmp_path / "out", "--to", "diffusers", "--pipeline"]
    line = refused(capsys, *words, "--text-encoder", "y")
    assert "--text-encoder y has no effect on a run trained with class labels" in line
    assert "--vae x has no effect on a run trained on pixels" in refused(capsys, *words, "--vae", "x")
    assert "--link has no effect: the run has neither a VAE nor" in refused(capsys, *words, "--link")


def test_special_characters_in_names_are_escaped_in_the_model_card(tmp_path):
    name = "data|a\n| b | `c` <b> [d](e) " + "long " * 40 + "```"
    write_alone(tmp_path / "run", "dit", {"data.path": name})
    convert(tmp_path / "run", tmp_path / "out", "--to", "diffusers")
    card = (tmp_path / "out" / "README.md").read_text()
    (row,) = [line for line in card.splitlines() if line.startswith("| data |")]
    assert len(re.split(r"(?<!\\)\|", row)) == 4
    assert "`c`" not in row
    block = re.search(r"^(`{3,})yaml\n(.*?)^\1$", card, re.DOTALL | re.MULTILINE)
    assert yaml.safe_load(block[2])["data"]["path"] == name
