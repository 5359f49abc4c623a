"""REPA: closed forms of the loss, features compared with transformers, roles with mup, and layouts with one process."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from data_prep.__main__ import main as data_prep
from data_prep.toy import Vision, make_toy_dataset
from megatron_dit.cli import run
from megatron_dit.data.index import read_index
from megatron_dit.data.stream import batches
from megatron_dit.data.vision import MEAN, STD, VisionEncoder
from megatron_dit.models.param_specs import param_specs
from megatron_dit.mup.groups import optimizer_groups
from megatron_dit.objectives.repa import alignment_loss
from megatron_dit.verify import layout_parity
from megatron_dit.verify.layouts import LAYOUTS, REFERENCE
from tests.helpers.configs import ARCHITECTURES, small, small_dict
from tests.helpers.mup_groups import package_groups, table
from tests.helpers.traces import trace

REPA = {"model.repa_block": 1, "model.repa_dim": 24}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """Folder of a tiny random DINOv2, saved like a pretrained one."""
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4, "image_size": 16}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory, encoder):
    folder = tmp_path_factory.mktemp("repa") / "scenes"
    make_toy_dataset(folder, 200, seed=0, vision=Vision(encoder, patch=4))
    return str(folder)


def test_alignment_loss_of_equal_opposite_and_orthogonal_features():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 5, 7, generator=generator)
    same = features.transpose(0, 1)
    assert alignment_loss(2 * same, features).tolist() == pytest.approx([-1, -1, -1])
    assert alignment_loss(-same, features).tolist() == pytest.approx([1, 1, 1])
    orthogonal = torch.zeros(5, 3, 7)
    assert alignment_loss(orthogonal, features).tolist() == [0, 0, 0]


def test_features_equal_those_of_transformers(encoder):
    """The images have the encoder's own size and are preprocessed by transformers' image processor."""
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    processor = BitImageProcessor(do_resize=False, do_center_crop=False, image_mean=MEAN, image_std=STD)
    inputs = processor(list(images), return_tensors="pt")
    expected = Dinov2Model.from_pretrained(encoder).eval()(**inputs).last_hidden_state[:, 1:]
    found = VisionEncoder(encoder).features(images, 4, 4)
    assert torch.allclose(found, expected, atol=1e-4)
    assert VisionEncoder(encoder).features(images, 2, 3).shape == (3, 6, 24)


def test_online_features_equal_precomputed_ones(data, encoder):
    options = {**REPA, "data.path": data, "train.steps": 1}
    (stored,) = batches([read_index(data)], small("mmdit", **options), 0, 0, 1)
    (online,) = batches([read_index(data)], small("mmdit", **options, **{"data.repa_encoder": encoder}), 0, 0, 1)
    assert stored.features.shape == (8, 16, 24)
    assert torch.equal(stored.latents, online.latents)
    assert torch.allclose(stored.features, online.features, atol=2e-2)  # fp16 pixels and features


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_projector_weights_have_the_expected_roles(arch):
    config = small(arch, heads=8, base_heads=2, **REPA)
    params = param_specs(config)
    roles = {name: params[f"projector.{name}.weight"].role for name in ("fc1", "fc2", "fc3")}
    assert roles == {"fc1": "hidden", "fc2": "hidden", "fc3": "output"}
    assert params["projector.fc3.weight"].multiplier == 1 / 4
    assert params["projector.fc3.weight"].init_std > 0
    expected, target = package_groups(config)
    ours = optimizer_groups(target.named_parameters(), params, config.optimizer)
    assert table(ours, {id(p): name for name, p in target.named_parameters()}) == expected


@pytest.mark.parametrize("arch", ["mmdit", "uvit"])
def test_training_lowers_the_alignment_loss(data, tmp_path, arch):
    options = {**REPA, "data.path": data, "run_dir": str(tmp_path / "run"), "train.steps": 40, "optimizer.lr": 2**-6}
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(small_dict(arch, **options)))
    assert run(["train", str(path)]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, last = (np.mean([line["alignment"] for line in part]) for part in (lines[:5], lines[-5:]))
    assert -1 <= last < first - 0.2


@pytest.mark.parametrize("arch", ["dit", "uvit"])
def test_layouts_with_repa_equal_one_process(pool, data, tmp_path, arch):
    scratch = tmp_path / "reference"
    reference = pool.run(1, trace, arch, REFERENCE, data, scratch, **REPA)[0]
    for name in ("tp2-sp", "dp2-tp2-zero3", "pp2"):  # the projector is on the pipeline's first stage
        found = pool.run(LAYOUTS[name].ranks, trace, arch, LAYOUTS[name], data, tmp_path, scratch, **REPA)[0]
        result = layout_parity.compare(name, found, reference)
        assert result.good, result


def test_invalid_inputs_are_rejected_in_one_line(data, dataset, encoder, tmp_path, capsys):
    def rejected(words, *overrides, **options):
        path = tmp_path / "c.yaml"
        path.write_text(yaml.safe_dump(small_dict("mmdit", **{"run_dir": str(tmp_path / "run"), **options})))
        assert run(["train", str(path), *overrides]) == 2
        line = capsys.readouterr().err.strip()
        assert words in line
        assert "\n" not in line

    rejected("set both or neither", "model.repa_block=1")
    rejected("has no features", **REPA, **{"data.path": str(dataset)})
    rejected("has features with dim=24", **{"model.repa_block": 1, "model.repa_dim": 12, "data.path": data})
    rejected("cannot be loaded", **REPA, **{"data.path": data, "data.repa_encoder": str(tmp_path)})
    rejected(
        "has features of dimension 24",
        **{"model.repa_block": 1, "model.repa_dim": 12, "data.path": data, "data.repa_encoder": encoder},
    )
    assert data_prep(["toy", str(tmp_path / "d"), "--images", "4", "--vision-encoder", encoder, "--patch", "3"]) == 2
    assert "--patch 3" in capsys.readouterr().err
