"""Small or randomly initialized feature extractors, saved in the formats of the real ones."""

from __future__ import annotations

from unittest import mock

import torch
from torch import nn


def save_inception(path, seed=0):
    """Save an InceptionV3 with random weights in torch-fidelity's layout."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    class Blank(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, *_, **__):
            pass

    torch.manual_seed(seed)
    with mock.patch.object(module, "load_state_dict_from_url", return_value={}):
        model = Blank("inception-v3-compat", ["2048"])
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)  # activations keep their scale
    nn.init.normal_(model.fc.weight, std=0.1)
    torch.save(model.state_dict(), path)
    return str(path)


def save_clip(folder):
    """Save a tiny CLIP with a tokenizer of bytes."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    torch.manual_seed(0)
    symbols = list(bytes_to_unicode().values())
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    ends = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1, "pad_token_id": len(tokens) - 1}
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**shared, **ends, "vocab_size": len(tokens), "max_position_embeddings": 77},
        vision_config={**shared, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder)
    CLIPTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[]).save_pretrained(folder)
    return str(folder)


def save_dino(folder):
    """Save a tiny DINOv2."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    Dinov2Model(
        Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    ).save_pretrained(folder)
    return str(folder)
