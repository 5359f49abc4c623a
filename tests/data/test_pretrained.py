"""Encoders come from safetensors alone."""

from __future__ import annotations

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model, T5EncoderModel

from data_prep.tiny_t5 import build_tiny_t5
from megatron_dit.data.text import TextEncoder
from megatron_dit.data.vision import VisionEncoder
from megatron_dit.errors import UserError


def pickled(model, folder):
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("kind", ["T5", "DINOv2"])
def test_pickled_weights_are_refused_in_one_line(tmp_path, kind):
    if kind == "T5":
        build_tiny_t5(tmp_path, ["a red circle"], seed=0)
        pickled(T5EncoderModel.from_pretrained(tmp_path), tmp_path)
    else:
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "patch_size": 4, "image_size": 16}
        Dinov2Model(Dinov2Config(**sizes)).save_pretrained(tmp_path)
        pickled(Dinov2Model.from_pretrained(tmp_path), tmp_path)
    with pytest.raises(UserError, match=rf"no file named model\.safetensors.*give a {kind} folder") as told:
        TextEncoder(str(tmp_path), 8) if kind == "T5" else VisionEncoder(str(tmp_path))
    assert "\n" not in str(told.value)


def test_what_is_no_encoder_is_told_in_one_line(tmp_path):
    for name in (str(tmp_path), str(tmp_path / "missing"), "a b/c"):
        with pytest.raises(UserError, match=f"text encoder {name} cannot be loaded") as told:
            TextEncoder(name, 8)
        assert "\n" not in str(told.value)
