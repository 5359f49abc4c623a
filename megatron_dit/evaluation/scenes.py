"""Score images generated for prompts of the toy dataset, whose held-out combinations test generalization."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_dit.data import scenes
from megatron_dit.evaluation.images import Images
from megatron_dit.runtime.errors import UserError


@dataclass(frozen=True)
class SceneScore:
    """Generated images and whether each shows what its prompt describes."""

    prompts: Sequence[str]
    images: Sequence[np.ndarray] | np.ndarray  # each (16, 16, 3) uint8
    right: list[bool]

    @property
    def fraction(self) -> float:
        """Fraction of correct images."""
        return sum(self.right) / len(self.right)


def score_images(images: Sequence[np.ndarray] | np.ndarray, prompts: Sequence[str]) -> SceneScore:
    """Return the score of images (16, 16, 3) uint8, one per prompt. Raises ValueError for other sizes or prompts."""
    right = [scenes.score(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
    return SceneScore(prompts=prompts, images=images, right=right)


def scene_score(images: Images, source: str) -> float:
    """Return the fraction of images that show what their prompt of the toy dataset describes."""
    arrays = [image for _, part in images.parts(len(images), 0, 1) for image in part]
    try:
        return score_images(arrays, images.prompts).fraction
    except ValueError as error:
        raise UserError(f"scene_score of {source}: {error}; it is for images of the toy dataset only") from None
