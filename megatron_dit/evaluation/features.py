"""Feature extractors of the metrics: InceptionV3, DINOv2 and CLIP with local weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dit.data.hub import CLIP, DINOV2, MASK2FORMER, load, locate, reason_of
from megatron_dit.data.vision import VisionEncoder
from megatron_dit.runtime.device import device
from megatron_dit.runtime.errors import UserError

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d"  # its first digits are a part of the file's name
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
SPATIAL_CHANNELS = 7  # of Mixed_6d's first branch, for sFID (arXiv 2103.03841)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

Features = dict[str, np.ndarray]  # name -> (N, D) fp32


class Inception:
    """The InceptionV3 of FID in TensorFlow's arithmetic, as torch-fidelity has it.

    Features: ``inception`` (N, 2048), ``spatial`` (N, 2023), rows of the 17 x 17 positions and then their 7 channels as
    in ADM's evaluator, and ``logits`` (N, 1008), without the bias.
    """

    def __init__(self, path: str) -> None:
        """Load the weights, a file that exists. Raises UserError if it contains anything but these weights."""
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        try:
            # torch-fidelity unpickles its file, so only files without code are given to it.
            torch.load(path, map_location="cpu", weights_only=True)
            options = {"feature_extractor_weights_path": path}
            self._model: Any = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], **options
            )
        except MemoryError:
            raise
        except Exception as error:  # a damaged file can raise anything
            raise UserError(
                f"{path} cannot be loaded ({reason_of(error)}); download it from {INCEPTION_URL}"
            ) from error
        self._model.to(device())
        self._spatial: Tensor | None = None
        self._model.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    @torch.no_grad()
    def __call__(self, images: Sequence[np.ndarray]) -> Features:
        """Return the features of images (H, W, 3) uint8 of one size."""
        pool, logits = self._model(_stack(images))
        assert self._spatial is not None
        spatial = self._spatial[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return {"inception": _array(pool), "spatial": _array(spatial), "logits": _array(logits)}

    def _keep(self, _: Any, __: Any, output: Tensor) -> None:
        self._spatial = output


def check_weights(model: str, path: str) -> None:
    """Raise UserError, which says where to get the weights, if those of a model in a protocol do not exist."""
    if model != "inception":
        locate({"clip": CLIP, "dinov2": DINOV2, "mask2former": MASK2FORMER}[model], path)
        return
    if find_spec("torch_fidelity") is None:
        raise UserError("FID needs torch-fidelity, which is not installed: run pip install 'megatron_dit[eval]'")
    if not Path(path).is_file():
        raise UserError(
            f"the Inception weights {path} do not exist; download {INCEPTION_URL} (SHA-256 {INCEPTION_SHA256}…) and "
            "set weights.inception in the protocol to its path"
        )


class Dino:
    """DINOv2's class token for images of 224 x 224 pixels (FDD, arXiv 2306.04675). Feature: ``dinov2`` (N, D)."""

    def __init__(self, name: str) -> None:
        self._encoder = VisionEncoder(name, device())

    def __call__(self, images: Sequence[np.ndarray]) -> Features:
        return {"dinov2": _array(self._encoder.class_token(_stack(images)))}


class Clip:
    """CLIP from a local folder or hub name. Feature: ``clip`` (N, D), image embeddings of length 1."""

    def __init__(self, name: str) -> None:
        from transformers import AutoTokenizer, CLIPModel

        source = locate(CLIP, name)
        self._model: Any = load(CLIP, source, CLIPModel, weights_only=True)
        self._model.to(device()).eval()
        self._tokenizer: Any = AutoTokenizer.from_pretrained(source.repo, subfolder=source.folder)

    @torch.no_grad()
    def __call__(self, images: Sequence[np.ndarray]) -> Features:
        side = self._model.config.vision_config.image_size
        x = resize(_stack(images), side)
        mean, std = (torch.tensor(values, device=x.device)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
        pooled = self._model.vision_model(pixel_values=(x - mean) / std).pooler_output
        return {"clip": _array(F.normalize(self._model.visual_projection(pooled), dim=-1))}

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> np.ndarray:
        """Return the embeddings (N, D) of prompts, of length 1. Longer prompts are truncated to CLIP's 77 tokens."""
        limit = self._model.config.text_config.max_position_embeddings
        options = {"padding": "max_length", "max_length": limit, "truncation": True, "return_tensors": "pt"}
        tokens = self._tokenizer(list(prompts), **options).to(device())
        pooled = self._model.text_model(**tokens).pooler_output
        return _array(F.normalize(self._model.text_projection(pooled), dim=-1))


def resize(images: Tensor, side: int) -> Tensor:
    """Return images (N, 3, side, side) in [0, 1] from uint8 ones of any one size, with antialiased bicubic filtering.

    The image is stretched, not cropped, so that all of it counts.
    """
    return F.interpolate(images.float() / 255, (side, side), mode="bicubic", antialias=True).clamp(0, 1)


EXTRACTORS: dict[str, Callable[[str], Any]] = {"inception": Inception, "dinov2": Dino, "clip": Clip}


def by_shape(extract: Callable[[Sequence[np.ndarray]], Features], images: Sequence[np.ndarray]) -> Features:
    """Return the features of images of different sizes, in their order."""
    places: dict[tuple[int, ...], list[int]] = {}
    for place, image in enumerate(images):
        places.setdefault(image.shape, []).append(place)
    order = np.argsort(np.concatenate(list(places.values())))
    found = [extract([images[place] for place in group]) for group in places.values()]
    return {name: np.concatenate([each[name] for each in found])[order] for name in found[0]}


def _stack(images: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous().to(device())


def _array(values: Tensor) -> np.ndarray:
    return values.float().cpu().numpy()
