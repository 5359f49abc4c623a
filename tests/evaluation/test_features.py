"""Inception, DINOv2 and CLIP features against torch-fidelity and transformers."""

import numpy as np
import pytest
import torch

from megatron_dit.evaluation.evaluate import evaluate
from megatron_dit.evaluation.features import Clip, Dino, Inception, by_shape, check_weights
from megatron_dit.evaluation.images import open_images
from megatron_dit.evaluation.protocol import Protocol, WeightsConfig
from megatron_dit.runtime.errors import UserError
from tests.helpers.feature_models import save_clip, save_dino, save_inception
from tests.helpers.pictures import pictures, write

COUNT = 12


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_inception(tmp_path_factory.mktemp("inception") / "weights.pth")


def test_metrics_of_folders_equal_those_of_torch_fidelity(weights, tmp_path):
    from torch_fidelity import calculate_metrics

    generated, real = (write(tmp_path / str(seed), pictures(COUNT, seed)) for seed in (1, 2))
    expected = calculate_metrics(
        input1=str(generated), input2=str(real), feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=weights, cuda=False, cache=False, verbose=False, save_cpu_ram=True,
        fid=True, isc=True, kid=True, prc=True, isc_splits=1, samples_shuffle=False, kid_subset_size=COUNT,
    )  # fmt: skip
    protocol = Protocol(
        name="test", metrics=["fid", "inception_score", "kid", "precision", "recall"], images=COUNT, labels="equal",
        steps=1, guidance=1.0, reference=str(real), weights=WeightsConfig(inception=weights),
    )  # fmt: skip
    found = evaluate(open_images(generated), protocol, "test", batch=7).metrics
    names = {
        "fid": "frechet_inception_distance", "inception_score": "inception_score_mean", "precision": "precision",
        "kid": "kernel_inception_distance_mean", "recall": "recall",
    }  # fmt: skip
    assert expected["frechet_inception_distance"] > 0.1
    for name, theirs in names.items():
        assert found[name] == pytest.approx(expected[theirs], rel=1e-4, abs=1e-4), name


def test_spatial_features_are_in_the_order_of_adm(weights):
    """ADM flattens TensorFlow's (N, 17, 17, channels); a reference in another order gives a wrong sFID."""
    extract, images = Inception(weights), pictures(2, 3)
    kept = []
    extract._model.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, output: kept.append(output))
    spatial = extract(images)["spatial"].reshape(2, 17, 17, 7)
    np.testing.assert_array_equal(spatial, kept[0][:, :7].permute(0, 2, 3, 1))
    assert spatial.std() > 0


def test_images_of_different_sizes_keep_their_order(weights):
    extract = Inception(weights)
    images = [each for pair in zip(pictures(2, 4), pictures(2, 5, side=(32, 32)), strict=True) for each in pair]
    found = by_shape(extract, images)["inception"]
    np.testing.assert_allclose(found, np.concatenate([extract([each])["inception"] for each in images]), rtol=1e-4)


def test_clip_embeddings_equal_transformers(tmp_path):
    from transformers import CLIPModel, CLIPTokenizer

    name = save_clip(tmp_path)
    model, tokenizer = CLIPModel.from_pretrained(name).eval(), CLIPTokenizer.from_pretrained(name)
    images, prompts = pictures(3, 6, side=(32, 32)), ["a red circle", "a blue square " * 40, ""]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (
        (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))  # fmt: skip
    tokens = tokenizer(prompts, padding=True, truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        out = model(**tokens, pixel_values=(pixels - mean) / std)
    clip = Clip(name)
    np.testing.assert_allclose(clip(images)["clip"], out.image_embeds, atol=1e-5)
    np.testing.assert_allclose(clip.texts(prompts), out.text_embeds, atol=1e-5)


def test_dino_feature_is_the_class_token(tmp_path):
    from transformers import Dinov2Model

    name = save_dino(tmp_path)
    images = pictures(3, 7, side=(224, 224))
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(name).eval()(pixel_values=(pixels - mean) / std).pooler_output
    np.testing.assert_allclose(Dino(name)(images)["dinov2"], expected, atol=1e-4)


def test_missing_or_unsafe_weights_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"do not exist; download https://.* \(SHA-256 6726825d…\)"):
        check_weights("inception", str(tmp_path / "none.pth"))
    with pytest.raises(UserError, match="the folder or hub name of a CLIP"):
        check_weights("clip", str(tmp_path))
    torch.save({"x": pytest.raises}, tmp_path / "code.pth")
    with pytest.raises(UserError, match="pickled objects, which are not loaded for safety"):
        Inception(str(tmp_path / "code.pth"))
