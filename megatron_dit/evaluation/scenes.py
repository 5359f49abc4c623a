"""Score images generated for prompts of the toy dataset, whose held-out combinations test generalization."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_dit.data import scenes


@dataclass(frozen=True)
class SceneScore:
    """Generated images and whether each shows what its prompt describes."""

    prompts: list[str]
    images: np.ndarray  # (N, 16, 16, 3) uint8
    right: list[bool]

    @property
    def fraction(self) -> float:
        """Fraction of correct images."""
        return sum(self.right) / len(self.right)


def score_images(images: np.ndarray, prompts: list[str]) -> SceneScore:
    """Return the score of images (N, 16, 16, 3) uint8, one per prompt."""
    right = [scenes.score(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
    return SceneScore(prompts=prompts, images=images, right=right)
