"""Detections made by hand, and a tiny Mask2Former saved like the published ones."""

from __future__ import annotations

import numpy as np
import torch

from megatron_dit.evaluation.geneval.rules import OBJECTS, Detection

# The labels of the published models for transformers where they differ from GenEval's names.
PUBLISHED = {
    "motorcycle": "motorbike", "airplane": "aeroplane", "couch": "sofa", "potted plant": "pottedplant",
    "dining table": "diningtable", "tv": "tvmonitor", "computer mouse": "mouse", "tv remote": "remote",
    "computer keyboard": "keyboard",
}  # fmt: skip
LABELS = tuple(PUBLISHED.get(name, name) for name in OBJECTS)


def thing(name, score, box=(0, 0, 10, 10)):
    return Detection(name, box, score, np.ones((1, 1), bool))


def save_detector(folder, labels=LABELS):
    """Save a tiny Mask2Former, whose probabilities are large enough for detections, as transformers 4.26 did."""
    from safetensors.torch import load_file, save_file
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    torch.manual_seed(0)
    stages = {"out_features": ["stage1", "stage2", "stage3", "stage4"], "depths": [1] * 4, "num_heads": [1] * 4}
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(image_size=32, patch_size=4, embed_dim=8, window_size=2, **stages),
        feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32, dim_feedforward=32,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=8, id2label=dict(enumerate(labels)),
    )  # fmt: skip
    model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        model.class_predictor.weight *= 100
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    weights = {name: value for name, value in load_file(path).items() if ".swin.layernorm." not in name}
    block = "model.pixel_level_module.encoder.encoder.layers.0.blocks.0.attention.self"
    assert f"{block}.query.weight" in weights
    weights[f"{block}.relative_position_index"] = torch.zeros(4, 4, dtype=torch.long)
    save_file(weights, path, metadata={"format": "pt"})
    return str(folder)
