"""Score a checkpoint on the embedded data: are prompts whose combinations were held out drawn right?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_dit.data import scenes


@dataclass(frozen=True)
class SceneScore:
    prompts: list[str]
    pictures: np.ndarray  # (N, 16, 16, 3) uint8
    right: list[bool]

    @property
    def share(self) -> float:
        return sum(self.right) / len(self.right)


def score_pictures(pictures: np.ndarray, prompts: list[str]) -> SceneScore:
    right = [scenes.score(picture, prompt) for picture, prompt in zip(pictures, prompts, strict=True)]
    return SceneScore(prompts=prompts, pictures=pictures, right=right)
