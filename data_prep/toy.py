"""The toy dataset: rendered scenes, as a source for the encoding job."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.recipe import Recipe
from data_prep.run import Done, run
from data_prep.sources import Caption, Record
from megatron_dit.data import scenes
from megatron_dit.data.index import SCENES, Index

UNIT = 1000


@dataclass(frozen=True)
class Vision:
    """Vision encoder for REPA: its folder or hub name, and the side of a token in latent pixels."""

    encoder: str
    patch: int


class SceneSource:
    """Source of ``images`` scenes of 16 x 16 pixels without held-out combinations, each seeded by its number."""

    kind = spec = SCENES
    classes = tuple(f"{color} {shape}" for color in scenes.COLORS for shape in scenes.SHAPES)

    def __init__(self, images: int, seed: int) -> None:
        self._images, self._seed = images, seed

    @property
    def units(self) -> int:
        return -(-self._images // UNIT)

    def scan(self, unit: int) -> Iterator[tuple[Record, None]]:
        """Yield records without image bytes, because rendered images need no check."""
        for number in range(unit * UNIT, min((unit + 1) * UNIT, self._images)):
            scene, _ = self._draw(number)
            label = scenes.kind_index(scene.objects[0].color, scene.objects[0].shape)
            yield Record(f"scene {number}", (number,), (Caption(scene.caption, 1.0),), label, {}), None

    def read(self, record: Record) -> np.ndarray:
        (number,) = record.place
        return scenes.render(*self._draw(int(number)))

    def _draw(self, number: int) -> tuple[scenes.Scene, np.random.Generator]:
        rng = np.random.Generator(np.random.Philox(key=[self._seed, number]))
        return scenes.draw_scene(rng), rng


def run_toy(folder: Path, images: int, seed: int, per_shard: int = 2500, vision: Vision | None = None) -> Done:
    """Create a dataset of ``images`` scenes, with a tiny T5 whose vocabulary contains all their words."""
    recipe = Recipe(
        size=scenes.SIDE,
        tokens=24,
        per_shard=per_shard,
        vision_encoder=vision.encoder if vision else None,
        patch=vision.patch if vision else 1,
    )
    arguments = {"source": SCENES, "images": images, "seed": seed}
    return run(folder, lambda: SceneSource(images, seed), recipe, arguments, words=scenes.vocabulary(), seed=seed)


def make_toy_dataset(
    folder: Path, images: int, seed: int, per_shard: int = 2500, vision: Vision | None = None
) -> Index:
    """Create the toy dataset as :func:`run_toy` does, and return its index."""
    return run_toy(folder, images, seed, per_shard, vision).index
