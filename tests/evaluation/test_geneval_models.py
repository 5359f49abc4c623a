"""GenEval's detector and color classifier against plain computations, with tiny models."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_dit.evaluation.evaluate import check_files, evaluate
from megatron_dit.evaluation.features import resize
from megatron_dit.evaluation.geneval.colors import ColorClassifier, crop
from megatron_dit.evaluation.geneval.detector import Detector, box_of, resized
from megatron_dit.evaluation.geneval.rules import COLORS, OBJECTS, TASKS, Detection
from megatron_dit.evaluation.geneval.score import geneval, read_metadata
from megatron_dit.evaluation.images import open_images
from megatron_dit.evaluation.protocol import Protocol, WeightsConfig
from megatron_dit.runtime.errors import UserError
from megatron_dit.sampling.folder import MANIFEST
from tests.helpers.detections import LABELS, save_detector
from tests.helpers.feature_models import save_clip
from tests.helpers.pictures import pictures, write


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("geneval")
    return save_detector(root / "detector"), save_clip(root / "clip")


def bilinear(values, height, width):
    """Resize (H, W, ...) in fp64 between the centers of pixels, without antialiasing."""
    for axis, size in enumerate((height, width)):
        length = values.shape[axis]
        centers = ((np.arange(size) + 0.5) * length / size - 0.5).clip(0, length - 1)
        weights = np.maximum(0, 1 - np.abs(centers[:, None] - np.arange(length)))
        values = np.moveaxis(np.tensordot(weights, values, (1, axis)), 0, axis)
    return values


@pytest.mark.parametrize(
    ("size", "inner", "padded"), [((40, 52), (800, 1040), (800, 1056)), ((90, 30), (1333, 444), (1344, 448))]
)
def test_the_detector_equals_a_plain_computation(models, size, inner, padded):
    (image,) = pictures(1, 1, size)
    detector, kept = Detector(models[0]), {}
    detector._model.register_forward_hook(
        lambda _, __, inputs, outputs: kept.update(inputs, outputs=outputs), with_kwargs=True
    )
    found = detector([image])[0]

    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    expected = np.full((*padded, 3), 128.0)
    expected[: inner[0], : inner[1]] = bilinear(image.astype(float), *inner).round()
    difference = np.abs(kept["pixel_values"][0].permute(1, 2, 0).numpy() * std + mean - expected)
    assert difference.max() < 1.001  # pixels near x.5 may be rounded up or down
    assert (difference > 1e-3).mean() < 5e-3

    logits = kept["outputs"].class_queries_logits[0].double().numpy()
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    masks = []
    for mask in kept["outputs"].masks_queries_logits[0].double().numpy():
        masks.append(bilinear(bilinear(mask, *padded)[: inner[0], : inner[1]], *size))
    pairs = [(probabilities[query, label], query, label) for query in range(8) for label in range(80)]
    plain = []
    for probability, query, label in sorted(pairs)[-100:]:
        inside = masks[query] > 0
        score = probability * (1 / (1 + np.exp(-masks[query][inside]))).mean()
        if score > 0.3:
            plain.append((score, OBJECTS[label], masks[query]))
    assert len(plain) == len(found) > 2
    for (score, name, mask), detection in zip(sorted(plain, key=lambda each: each[0]),
                                              sorted(found, key=lambda each: each.score), strict=True):  # fmt: skip
        assert detection.score == pytest.approx(score, rel=1e-4)
        assert detection.name == name
        assert detection.mask.shape == size
        sure = np.abs(mask) > 1e-5
        np.testing.assert_array_equal(detection.mask[sure], (mask > 0)[sure])
        assert detection.box == box_of(detection.mask)


def test_boxes_and_classes_of_logits_made_by_hand(models, monkeypatch):
    """An image of 800 x 800 pixels is not resized, and the logits have a quarter of its side."""
    classes, masks = torch.zeros(1, 8, 81), torch.full((1, 8, 200, 200), -10.0)
    masks[0, 0, 50:100, 20:60] = 10.0
    masks[0, 1, :, 190:] = 10.0
    masks[0, 3] = 10.0
    classes[..., 80] = 100.0  # "no object", such as query 3
    classes[0, 0, OBJECTS.index("tv remote")] = 200.0
    classes[0, 1, OBJECTS.index("dog")] = classes[0, 1, OBJECTS.index("cat")] = 200.0  # each 0.5
    classes[0, 2, OBJECTS.index("bird")] = 200.0  # with an empty mask
    detector = Detector(models[0])
    outputs = SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)
    monkeypatch.setattr(detector, "_model", lambda pixel_values: outputs)
    (found,) = detector([np.zeros((800, 800, 3), np.uint8)])
    by_name = {each.name: each for each in found}
    assert set(by_name) == {"tv remote", "dog", "cat"}
    assert by_name["tv remote"].box == (80, 200, 240, 400)
    # A pixel in a corner has a weight of (5/8)² < 1/2 inside, so that it is not in the mask.
    assert by_name["tv remote"].mask.sum() == 160 * 200 - 4
    assert by_name["dog"].box == by_name["cat"].box == (760, 0, 800, 800)  # at the border of the image
    assert by_name["tv remote"].score == pytest.approx(1.0, abs=0.02)
    assert by_name["dog"].score == pytest.approx(0.5, abs=0.02)


def test_images_of_different_sizes_keep_their_order(models):
    detector = Detector(models[0])
    first, last = pictures(2, 3, (24, 24))
    images = [first, *pictures(1, 4, (24, 30)), last]
    for image, found in zip(images, detector(images), strict=True):
        alone = detector([image])[0]
        assert [each.name for each in found] == [each.name for each in alone]
        assert [each.score for each in found] == pytest.approx([each.score for each in alone], rel=1e-4)
        assert {each.mask.shape for each in found} == {image.shape[:2]}


@pytest.mark.parametrize(
    ("size", "expected"), [((512, 512), (800, 800)), ((1024, 512), (1333, 667)), ((256, 300), (800, 938))]
)
def test_images_are_resized_as_by_mmdet(size, expected):
    assert resized(*size) == expected


def test_other_models_are_refused(models, tmp_path):
    labels = ["screen" if label == "tvmonitor" else label for label in LABELS]
    with pytest.raises(UserError, match="no class for 1 of GenEval's 80 objects, such as tv; expected"):
        Detector(save_detector(tmp_path / "other", labels))
    with pytest.raises(UserError, match="give the folder or hub name of a Mask2Former"):
        Detector(models[1])
    pickled = tmp_path / "other" / "model.safetensors"
    torch.save({}, pickled.with_name("pytorch_model.bin"))
    pickled.unlink()
    with pytest.raises(UserError, match="not in safetensors"):
        Detector(str(tmp_path / "other"))


def objects_of(image, count, seed):
    """Detections with random masks in an image."""
    rng, (height, width) = np.random.default_rng(seed), image.shape[:2]
    found = []
    for _ in range(count):
        mask = np.zeros((height, width), bool)
        y, x = rng.integers(0, height // 2), rng.integers(0, width // 2)
        mask[y : y + rng.integers(3, height // 2), x : x + rng.integers(3, width // 2)] = True
        mask &= rng.random((height, width)) < 0.9
        found.append(Detection("car", box_of(mask), 0.9, mask))
    return found


def reference_crop(image, detection):
    """Crop as the official code and open_clip do."""
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    image = Image.fromarray(image)
    masked = Image.composite(image, Image.new("RGB", image.size, "#999"), Image.fromarray(detection.mask))
    transform = Compose([Resize(224, interpolation=InterpolationMode.BICUBIC), CenterCrop(224)])
    return np.asarray(transform(masked.crop(detection.box)))


def test_crops_equal_those_of_open_clip():
    (image,) = pictures(1, 5, (50, 70))
    for detection in objects_of(image, 6, 0):
        np.testing.assert_array_equal(crop(image, detection), reference_crop(image, detection))


def test_colors_equal_those_of_a_plain_clip(models):
    from transformers import CLIPModel, CLIPTokenizer

    (image,) = pictures(1, 6, (50, 70))
    objects = objects_of(image, 12, 1)
    model, tokenizer = CLIPModel.from_pretrained(models[1]).eval(), CLIPTokenizer.from_pretrained(models[1])
    prompts = []
    for color in COLORS:
        prompts += [f"a photo of a {color} car", f"a photo of a {color}-colored car", f"a photo of a {color} object"]
    pixels = torch.from_numpy(np.stack([reference_crop(image, each) for each in objects])).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(values)[:, None, None] for values in (
        (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))  # fmt: skip
    tokens = tokenizer(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = model(**tokens, pixel_values=(resize(pixels, 32) - mean) / std)
    texts = out.text_embeds.reshape(10, 3, -1).mean(dim=1)
    cosines = torch.nn.functional.cosine_similarity(out.image_embeds[:, None], texts[None], dim=-1)
    found = ColorClassifier(models[1])(image, "car", objects)
    assert found == [COLORS[number] for number in cosines.argmax(dim=1)]
    assert len(set(found)) > 1


def test_the_score_of_the_models_is_that_of_their_detections(models, tmp_path):
    detector, colors, images = Detector(models[0]), ColorClassifier(models[1]), pictures(6, 7, (24, 24))
    best = [max(found, key=lambda each: each.score) for found in detector(images)]
    names = [each.name for each in best]
    red, green = (colors(images[i], names[i], [best[i]])[0] for i in (3, 5))
    other = next(color for color in COLORS if color != green)
    lines = [
        {"tag": "single_object", "include": [{"class": names[0], "count": 1}], "prompt": "0"},
        {"tag": "two_object", "include": [{"class": names[1], "count": 1}, {"class": names[1], "count": 1}],
         "prompt": "1"},
        {"tag": "counting", "include": [{"class": names[2], "count": 1}], "prompt": "2"},  # no score exceeds 0.9
        {"tag": "colors", "include": [{"class": names[3], "count": 1, "color": red}], "prompt": "3"},
        {"tag": "position", "include": [{"class": names[4], "count": 1},
                                        {"class": names[4], "count": 1, "position": ["above", 0]}], "prompt": "4"},
        {"tag": "color_attr", "include": [{"class": names[5], "count": 1, "color": other}], "prompt": "5"},
    ]  # fmt: skip
    write(tmp_path / "images", images)
    manifest = [json.dumps({"file": f"{number:03d}.png", "prompt": str(number), "copy": 0}) for number in range(6)]
    (tmp_path / "images" / MANIFEST).write_text("\n".join(manifest))
    (tmp_path / "m.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    specs = read_metadata(str(tmp_path / "m.jsonl"))
    expected = {f"geneval/{task}": float(task in ("single_object", "two_object", "colors")) for task in TASKS}
    opened = open_images(tmp_path / "images")
    assert geneval(opened, specs, detector, colors, 6) == {"geneval": 0.5, **expected}
    protocol = Protocol(
        name="geneval", metrics=["geneval"], images=6, prompts=str(tmp_path / "m.jsonl"), steps=1, guidance=1.0,
        weights=WeightsConfig(mask2former=models[0], clip=models[1]),
    )  # fmt: skip
    result = evaluate(opened, protocol, "it")
    assert result.metrics == {"geneval": 0.5, **expected}
    assert set(result.hashes) == {"mask2former", "clip", "prompts"}
    (tmp_path / "m.jsonl").write_text("{}")
    with pytest.raises(UserError, match="line 1: expected a string 'prompt'"):
        check_files(protocol)
    with pytest.raises(UserError, match="mask2former is not set"):
        replace(protocol, weights=WeightsConfig(clip=models[1]))
