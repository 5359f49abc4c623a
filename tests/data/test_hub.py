"""Encoders are loaded from safetensors or plain tensors, and rejected unless all of their files belong together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    Dinov2Config,
    Dinov2Model,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from data_prep.tiny_t5 import build_tiny_t5
from megatron_dit.data.codec import VaeCodec, open_codec
from megatron_dit.data.encoder_hash import weights_sha256
from megatron_dit.data.text import TextEncoder
from megatron_dit.data.vision import VisionEncoder
from megatron_dit.runtime.errors import UserError
from tests.helpers.wrong_files import PAGE, POINTER

SAFETENSORS = {"t5": "model.safetensors", "dino": "model.safetensors", "vae": "diffusion_pytorch_model.safetensors"}
LOAD = {
    "t5": lambda path: TextEncoder(str(path), 8).model,
    "dino": lambda path: VisionEncoder(str(path))._model,
    "vae": lambda path: VaeCodec(str(path))._vae,
}


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path(self.path).touch, ())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Save tiny random encoders with their libraries in the folders ``t5``, ``dino`` and ``vae``."""
    folder = tmp_path_factory.mktemp("encoders")
    build_tiny_t5(folder / "t5", ["a red circle"], seed=0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "patch_size": 4, "image_size": 16}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder / "dino")
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, scaling_factor=0.5,
    ).save_pretrained(folder / "vae")  # fmt: skip
    return folder


@pytest.fixture
def copies(made, tmp_path):
    for name in SAFETENSORS:
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path


def edit(folder, **changes):
    """Change keys of config.json; the value ``...`` removes a key."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


def assert_rejected(load, *parts):
    """Check that the one-line error contains ``parts``, and no advice of a library to load files unsafely."""
    with pytest.raises(UserError) as caught:
        load()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    for advice in ("weights_only", "trust_remote_code", "allow_pickle", "pip install", "ignore_mismatched_sizes"):
        assert advice not in message


@pytest.fixture(params=["t5", "dino"])
def pickled(request, copies):
    """Return (folder, function that loads it, model) of an encoder saved as plain tensors in a pytorch_model.bin."""
    folder = copies / request.param
    model = {"t5": T5EncoderModel, "dino": Dinov2Model}[request.param].from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder, lambda: LOAD[request.param](folder), model


def test_pytorch_bin_files_with_plain_tensors_are_read(pickled):
    _, load, model = pickled
    for name, weight in load().state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])


def test_pickled_object_is_rejected_and_not_executed(pickled, tmp_path):
    folder, load, model = pickled
    torch.save({**model.state_dict(), "extra": Payload(tmp_path / "ran")}, folder / "pytorch_model.bin")
    assert_rejected(load, "cannot be loaded (it contains pickled objects")
    assert not (tmp_path / "ran").exists()


def test_name_without_an_encoder_is_rejected(tmp_path):
    assert_rejected(
        lambda: TextEncoder(str(tmp_path), 8), f"text encoder {tmp_path} cannot be loaded (it has no config.json)"
    )
    assert_rejected(lambda: TextEncoder(str(tmp_path / "missing"), 8), "missing is not a folder")
    (tmp_path / "file").write_text("x")
    assert_rejected(lambda: VaeCodec(str(tmp_path / "file")), "file is not a folder")
    assert_rejected(lambda: TextEncoder("a b/c", 8), "text encoder a b/c cannot be loaded")


def test_models_of_other_types_are_rejected(tmp_path):
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    CLIPTextModel(CLIPTextConfig(**sizes, num_attention_heads=1)).save_pretrained(tmp_path / "clip")
    BertModel(BertConfig(**sizes, num_attention_heads=1)).save_pretrained(tmp_path / "bert")
    channels = {"encoder_block_out_channels": (8,), "decoder_block_out_channels": (8,)}
    AutoencoderTiny(**channels, num_encoder_blocks=(1,), num_decoder_blocks=(1,)).save_pretrained(tmp_path / "tiny")
    for load in LOAD.values():
        assert_rejected(lambda load=load: load(tmp_path / "bert"), "is of type bert")
        assert_rejected(lambda load=load: load(tmp_path / "tiny"), "is of type AutoencoderTiny")
    assert_rejected(
        lambda: LOAD["t5"](tmp_path / "clip"), "is of type clip_text_model; give the folder or hub name of a T5"
    )


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("t5", {"num_layers": 2}, "lacks the weights encoder.block.1.layer.0.SelfAttention.k.weight"),
        ("t5", {"num_layers": 0}, "has unexpected weights encoder.block.0"),
        ("t5", {"vocab_size": 5}, "has shared.weight of shape [6, 64], but its config.json implies [5, 64]"),
        ("t5", {"d_model": "wide"}, "cannot be loaded"),
        ("t5", {"model_type": ..., "architectures": ..., "num_layers": 2}, "lacks the weights encoder.block.1"),
        ("dino", {"num_hidden_layers": 2}, "lacks the weights encoder.layer.1"),
        (
            "dino",
            {"patch_size": 8},
            "has embeddings.patch_embeddings.projection.weight of shape [8, 3, 4, 4], but its config.json implies "
            "[8, 3, 8, 8]",
        ),
        ("dino", {"model_type": "dinov2_with_registers"}, "is of type dinov2_with_registers"),
        ("vae", {"layers_per_block": 2}, "lacks the weights decoder.up_blocks.0.resnets.2"),
        ("vae", {"latent_channels": 8}, "decoder.conv_in.weight expected shape"),
        ("vae", {"_class_name": "VQModel"}, "is of type VQModel"),
    ],
)
def test_weights_that_do_not_match_the_config_are_rejected(copies, kind, changes, message):
    edit(copies / kind, **changes)
    assert_rejected(lambda: LOAD[kind](copies / kind), message)


@pytest.mark.parametrize("kind", SAFETENSORS)
def test_files_whose_content_does_not_match_the_extension_are_reported(copies, kind):
    weights, config = copies / kind / SAFETENSORS[kind], copies / kind / "config.json"
    original = weights.read_bytes()
    for content, message in (
        (POINTER.encode(), "is a Git LFS pointer"),
        (PAGE.encode(), "is a web page"),
        (b"", "is an empty file"),
        (original[:5000], "is a truncated safetensors file (5,000"),
        (original[:-1], f"is a truncated safetensors file ({len(original) - 1:,} of {len(original):,} bytes)"),
    ):
        weights.write_bytes(content)
        assert_rejected(lambda: LOAD[kind](copies / kind), str(weights), message)
    weights.write_bytes(original)
    config.write_text(POINTER)
    assert_rejected(lambda: LOAD[kind](copies / kind), str(config), "is a Git LFS pointer")


@pytest.mark.parametrize("kind", SAFETENSORS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_rejected_and_named(copies, kind, value):
    path = copies / kind / SAFETENSORS[kind]
    weights = load_file(path)
    name = sorted(weights)[3]
    weights[name].view(-1)[0] = value
    save_file(weights, path, {"format": "pt"})
    assert_rejected(lambda: LOAD[kind](copies / kind), "has NaN or infinite values in ", name)


@pytest.mark.parametrize("kind", SAFETENSORS)
def test_variant_is_read_if_it_is_the_only_one(copies, kind):
    path = copies / kind / SAFETENSORS[kind]
    expected = {name: value.float() for name, value in LOAD[kind](copies / kind).state_dict().items()}
    stem = path.name.removesuffix(".safetensors")
    path.rename(path.with_name(f"{stem}.fp16.safetensors"))
    found = LOAD[kind](copies / kind).state_dict()
    assert all(torch.equal(found[name].float(), value) for name, value in expected.items())
    shutil.copy(path.with_name(f"{stem}.fp16.safetensors"), path.with_name(f"{stem}.bf16.safetensors"))
    assert_rejected(lambda: LOAD[kind](copies / kind), "several variants, bf16, fp16")


def test_encoders_are_found_in_a_pipeline(made, tmp_path):
    """The T5 is found among several text encoders, with the tokenizer in the folder of the same number."""
    edit_free = {"model_type": "clip_text_model"}
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "config.json").write_text(json.dumps(edit_free))
    shutil.copytree(made / "vae", tmp_path / "vae")
    (tmp_path / "text_encoder_3").mkdir()
    (tmp_path / "tokenizer_3").mkdir()
    for path in (made / "t5").iterdir():
        part = "tokenizer_3" if path.name.startswith("tokenizer") else "text_encoder_3"
        shutil.copy(path, tmp_path / part)
    for name in (tmp_path, tmp_path / "text_encoder_3"):
        encoder, direct = TextEncoder(str(name), 8), TextEncoder(str(made / "t5"), 8)
        assert encoder.name == str(tmp_path / "text_encoder_3")
        assert [ids.tolist() for ids in encoder.tokenize(["a red circle"])] == [[3, 5, 4, 1]]
        assert torch.equal(encoder.encode(["a red circle"])[0], direct.encode(["a red circle"])[0])
        assert weights_sha256(encoder.name) == weights_sha256(str(made / "t5"))
    assert VaeCodec(str(tmp_path)).path == str(tmp_path / "vae")
    assert VaeCodec(str(tmp_path)).sha256 == weights_sha256(str(made / "vae"))


def test_encoder_of_a_complete_t5_is_read(tmp_path, made):
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 6}
    model = T5ForConditionalGeneration(T5Config(**sizes)).eval()
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    shutil.copy(made / "t5" / "tokenizer.json", tmp_path)
    ids = torch.tensor([[3, 5, 4, 1]])
    with torch.no_grad():
        expected = model.encoder(input_ids=ids).last_hidden_state[0]
    for name in ("model.safetensors", "pytorch_model.bin"):
        torch.testing.assert_close(TextEncoder(str(tmp_path), 8).encode(["a red circle"])[0], expected)
        (tmp_path / name).unlink()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scaling_factor": 0}, "has scaling_factor=0 in its config.json; expected a finite number above 0"),
        ({"scaling_factor": None}, "has scaling_factor=null"),
        ({"scaling_factor": -0.2}, "has scaling_factor=-0.2"),
        ({"scaling_factor": float("nan")}, "has scaling_factor=NaN"),
        ({"scaling_factor": float("inf")}, "has scaling_factor=Infinity"),
        ({"scaling_factor": "0.2"}, 'has scaling_factor="0.2"'),
        ({"scaling_factor": True}, "has scaling_factor=true"),
        ({"shift_factor": float("nan")}, "has shift_factor=NaN"),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0, 1.0, 0.0, 1.0]}, "has latents_std=0.0"),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0]}, "has latents_std=[1.0] in its config.json; expected 4"),
        ({"latents_std": [1.0] * 4}, "has latents_std in its config.json; expected either both latents_mean and"),
    ],
)
def test_invalid_shift_and_scaling_factors_are_rejected(copies, changes, message):
    edit(copies / "vae", **changes)
    assert_rejected(lambda: LOAD["vae"](copies / "vae"), message)


def test_latents_are_normalized_with_the_vaes_per_channel_mean_and_std(copies):
    """This is the inverse of diffusers' StableDiffusionXLPipeline: latents * latents_std / scaling_factor + mean."""
    mean, std = [0.1, -0.2, 0.3, 0.0], [2.0, 0.5, 1.0, 4.0]
    edit(copies / "vae", latents_mean=mean, latents_std=std)
    codec = VaeCodec(str(copies / "vae"))
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    vae = AutoencoderKL.from_pretrained(copies / "vae").eval()
    with torch.no_grad():
        expected = vae.encode(images / 127.5 - 1).latent_dist
    found_mean, found_std = codec.posterior(images)
    per_channel = [torch.tensor(values)[None, :, None, None] for values in (mean, std)]
    torch.testing.assert_close(found_mean * per_channel[1] / 0.5 + per_channel[0], expected.mean)
    torch.testing.assert_close(found_std * per_channel[1] / 0.5, expected.std)
    with torch.no_grad():
        decoded = vae.decode(expected.mean).sample
    assert (codec.decode(found_mean).float() - (decoded.clamp(-1, 1) + 1) * 127.5).abs().max() <= 0.51


def test_vae_with_attention_names_of_older_diffusers_is_read(copies):
    """The VAE of Stable Diffusion on the hub uses these names."""
    path = copies / "vae" / SAFETENSORS["vae"]
    expected = LOAD["vae"](copies / "vae").state_dict()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, value in load_file(path).items():
        for new, before in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        renamed[name] = value
    assert renamed.keys() != expected.keys()
    save_file(renamed, path, {"format": "pt"})
    found = LOAD["vae"](copies / "vae").state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_folders_with_special_names_are_read(made, tmp_path):
    for name in ("a.b", "a [b] c", "100% %s", "-x", "é", "e\u0301", "a\nb", "a*b?"):
        for kind in SAFETENSORS:
            shutil.copytree(made / kind, tmp_path / name / kind)
            LOAD[kind](tmp_path / name / kind)


def test_vae_whose_channels_differ_from_the_dataset_is_rejected(copies):
    described = {"kind": "vae", "path": str(copies / "vae")}
    assert open_codec(described, channels=4).channels == 4
    assert_rejected(lambda: open_codec(described, channels=8), "has 4 latent channels, but the dataset has 8")


@pytest.mark.parametrize("ending", ["bin", "safetensors"])
def test_missing_or_damaged_weight_shards_are_reported(copies, ending):
    """Every file listed in an index is checked, in both formats."""
    folder = copies / "t5"
    model = T5EncoderModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    if ending == "safetensors":
        model.save_pretrained(folder, max_shard_size="40KB")
        shards = sorted(folder.glob("model-*.safetensors"))
    else:
        state = model.state_dict()
        files = {name: f"pytorch_model-0000{i % 2 + 1}-of-00002.bin" for i, name in enumerate(state)}
        for file in set(files.values()):
            torch.save({name: value for name, value in state.items() if files[name] == file}, folder / file)
        index = {"metadata": {}, "weight_map": files}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        shards = sorted(folder.glob("pytorch_model-*.bin"))
    for name, weight in LOAD["t5"](folder).state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])
    for content, message in ((POINTER, "is a Git LFS pointer"), (PAGE, "is a web page"), ("", "is an empty file")):
        shards[1].write_text(content)
        assert_rejected(lambda: LOAD["t5"](folder), str(shards[1]), message)
    shards[1].unlink()
    assert_rejected(lambda: LOAD["t5"](folder), f"lists {shards[1].name}, which is not in its folder")
