"""Score images generated for prompts of the toy dataset, whose held-out combinations test generalisation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_dit.data import scenes


@dataclass(frozen=True)
class SceneScore:
    """Generated images and whether each shows what its prompt describes."""

    prompts: list[str]
    pictures: np.ndarray  # (N, 16, 16, 3) uint8
    right: list[bool]

    @property
    def share(self) -> float:
        """Fraction of correct images."""
        return sum(self.right) / len(self.right)


def score_pictures(pictures: np.ndarray, prompts: list[str]) -> SceneScore:
    """Return the score of images (N, 16, 16, 3) uint8, one per prompt."""
    right = [scenes.score(picture, prompt) for picture, prompt in zip(pictures, prompts, strict=True)]
    return SceneScore(prompts=prompts, pictures=pictures, right=right)
