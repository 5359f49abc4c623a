"""The colors of detected objects by a CLIP (arXiv 2103.00020), as in GenEval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from megatron_dit.evaluation.features import Clip
from megatron_dit.evaluation.geneval.rules import COLORS, Detection

TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
GRAY = 0x99  # replaces the pixels outside of the mask
SIDE = 224  # pixels of the input of CLIP ViT-L/14, which GenEval uses


class ColorClassifier:
    """Zero-shot classifier of the colors of objects. GenEval's CLIP is openai/clip-vit-large-patch14."""

    def __init__(self, name: str) -> None:
        """Load a CLIP from a local folder or hub name. Raises UserError if it is not one."""
        self._clip = Clip(name)
        self._texts: dict[str, np.ndarray] = {}

    def __call__(self, image: np.ndarray, name: str, objects: Sequence[Detection]) -> list[str]:
        """Return the color, one of COLORS, of each of the objects of class ``name`` in an image (H, W, 3) uint8."""
        crops = self._clip([crop(image, each) for each in objects])["clip"]
        return [COLORS[number] for number in (crops @ self._color_texts(name).T).argmax(axis=1)]

    def _color_texts(self, name: str) -> np.ndarray:
        """Return an embedding of length 1 for each color (10, D): the mean of the templates' embeddings."""
        if name not in self._texts:
            prompts = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
            means = self._clip.texts(prompts).reshape(len(COLORS), len(TEMPLATES), -1).mean(axis=1)
            self._texts[name] = means / np.linalg.norm(means, axis=1, keepdims=True)
        return self._texts[name]


def crop(image: np.ndarray, detection: Detection) -> np.ndarray:
    """Return the object in its box (SIDE, SIDE, 3) uint8 on gray, in CLIP's preprocessing.

    The box is resized to a short side of SIDE pixels with PIL's bicubic filter, and its center is cut out.
    """
    x0, y0, x1, y1 = map(round, detection.box)
    visible = np.where(detection.mask[..., None], image, np.uint8(GRAY))[y0:y1, x0:x1]
    short = min(visible.shape[:2])
    height, width = (int(SIDE * side / short) for side in visible.shape[:2])
    top, left = round((height - SIDE) / 2), round((width - SIDE) / 2)
    scaled = Image.fromarray(visible).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(scaled.crop((left, top, left + SIDE, top + SIDE)))
