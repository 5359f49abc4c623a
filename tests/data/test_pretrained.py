"""Encoders come from safetensors, or from plain tensors: no pickled object is made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model, T5EncoderModel

from data_prep.tiny_t5 import build_tiny_t5
from megatron_dit.data.text import TextEncoder
from megatron_dit.data.vision import VisionEncoder
from megatron_dit.errors import UserError


class Payload:
    """Unpickled, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path(self.path).touch, ())


@pytest.fixture(params=["T5", "DINOv2"])
def encoder(request, tmp_path):
    """(how to load it, its weights by name), saved as plain tensors in a pytorch_model.bin."""
    folder = tmp_path / "encoder"
    if request.param == "T5":
        build_tiny_t5(folder, ["a red circle"], seed=0)
        model = T5EncoderModel.from_pretrained(folder)
    else:
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "patch_size": 4, "image_size": 16}
        model = Dinov2Model(Dinov2Config(**sizes))
        model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")

    def load():
        return TextEncoder(str(folder), 8).model if request.param == "T5" else VisionEncoder(str(folder))._model

    return folder, load, model


def test_older_files_of_plain_tensors_are_read(encoder):
    _, load, model = encoder
    for name, weight in load().state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])


def test_a_payload_in_them_is_refused_and_not_run(encoder, tmp_path):
    folder, load, model = encoder
    torch.save({**model.state_dict(), "extra": Payload(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded") as told:
        load()
    assert "\n" not in str(told.value)
    assert not (tmp_path / "ran").exists()


def test_what_is_no_encoder_is_told_in_one_line(tmp_path):
    for name in (str(tmp_path), str(tmp_path / "missing"), "a b/c"):
        with pytest.raises(UserError, match=f"text encoder {name} cannot be loaded") as told:
            TextEncoder(name, 8)
        assert "\n" not in str(told.value)
