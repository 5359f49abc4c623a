"""Toy dataset of rendered scenes with captions, and a scorer that recognizes the objects in an image.

An image is (16, 16, 3) uint8: four 8x8 cells named by their quadrant, each empty or containing one flat
colored shape about 6 pixels wide. There are three kinds of captions:

    single   "a red circle at the top left"
    counted  "three green squares"                 rendered from the top left on; any cells score as correct
    pair     "a red circle at the top left and a blue square at the bottom right"

A fixed sixth of each kind's combinations is held out: training scenes never contain them, while every word and
every (color, shape) still occurs in training in other combinations.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from itertools import permutations, product

import numpy as np

SIDE = 16
CELL = 8
RADIUS = 3.0
JITTER = 0.5
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (230, 50, 50),
    "green": (50, 200, 70),
    "blue": (60, 90, 240),
    "yellow": (240, 220, 50),
    "purple": (220, 60, 220),
    "white": (240, 240, 240),
}
PLURALS: dict[str, str] = {
    "square": "squares",
    "circle": "circles",
    "triangle": "triangles",
    "cross": "crosses",
}
SHAPES: tuple[str, ...] = tuple(PLURALS)
POSITIONS: tuple[str, ...] = ("top left", "top right", "bottom left", "bottom right")
COUNTS: dict[str, int] = {"two": 2, "three": 3, "four": 4}
HOLD_EVERY = 6
KINDS = len(COLORS) * len(SHAPES)

# An empty cell with noise of sigma 12 has a standard deviation of 12; a shape at a quarter of its contrast has
# about 20. A cell with a faintly visible shape therefore does not count as empty.
EMPTY_SPREAD = 20.0
BACKGROUND_LIMIT = 80.0
# Fraction of a cell's variance that one flat shape on a flat background must explain.
FIT_LIMIT = 0.85
# Less than half of the smallest distance between two palette colors, so that no color matches two names.
COLOR_LIMIT = 75.0


@dataclass(frozen=True)
class SceneObject:
    """One shape in one cell; names are keys of COLORS, SHAPES and POSITIONS."""

    color: str
    shape: str
    position: str


@dataclass(frozen=True)
class Scene:
    """A caption and the 1 to 4 objects, at most one per position, that it describes exactly."""

    caption: str
    objects: tuple[SceneObject, ...]


@dataclass(frozen=True)
class CountedKind:
    """A request for ``count`` (2 to 4) identical objects in any cells."""

    count: int
    color: str
    shape: str


class _UnrecognizedCell(Exception):
    """Raised if a cell is neither empty nor a recognizable shape."""


Combination = tuple[SceneObject, ...] | CountedKind


def kind_index(color: str, shape: str) -> int:
    """Return the index of a (color, shape) in [0, KINDS). The image's class label is that of its first object."""
    return tuple(COLORS).index(color) * len(SHAPES) + SHAPES.index(shape)


def is_held_out(combination: Combination) -> bool:
    """Return whether a combination (a placed object, a counted kind or a pair) is excluded from training.

    For a pair this depends only on the two (color, shape) kinds, not on their order or positions.
    """
    if isinstance(combination, CountedKind):
        color, shape = tuple(COLORS).index(combination.color), SHAPES.index(combination.shape)
        return (color + 2 * shape + combination.count) % HOLD_EVERY == 0
    if len(combination) == 1:
        placed = combination[0]
        color, shape = tuple(COLORS).index(placed.color), SHAPES.index(placed.shape)
        return (color + shape + POSITIONS.index(placed.position)) % HOLD_EVERY == 0
    return sum(kind_index(placed.color, placed.shape) for placed in combination) % HOLD_EVERY == 0


@cache
def combinations(held_out: bool) -> tuple[tuple[Combination, ...], ...]:
    """Return all (singles, counted, ordered pairs) of training, or all held-out ones.

    Pairs of both splits contain only placed objects that occur in training, so that only the pairing is new in a
    held-out pair.
    """
    placed = [SceneObject(*names) for names in product(COLORS, SHAPES, POSITIONS)]
    singles = [(one,) for one in placed if is_held_out((one,)) == held_out]
    counted = [CountedKind(*names) for names in product(COUNTS.values(), COLORS, SHAPES)]
    seen = [one for one in placed if not is_held_out((one,))]
    pairs = [
        (one, other)
        for one, other in permutations(seen, 2)
        if one.position != other.position and (one.color, one.shape) != (other.color, other.shape)
    ]
    return (
        tuple(singles),
        tuple(kind for kind in counted if is_held_out(kind) == held_out),
        tuple(pair for pair in pairs if is_held_out(pair) == held_out),
    )


def _caption(combination: Combination) -> str:
    if isinstance(combination, CountedKind):
        number = next(word for word, count in COUNTS.items() if count == combination.count)
        return f"{number} {combination.color} {PLURALS[combination.shape]}"
    return " and ".join(f"a {each.color} {each.shape} at the {each.position}" for each in combination)


def draw_scene(rng: np.random.Generator, held_out: bool = False) -> Scene:
    """Sample a scene: first the kind of caption, then one of its combinations in the split, both uniformly."""
    kinds = combinations(held_out)
    kind = kinds[rng.integers(len(kinds))]
    combination = kind[rng.integers(len(kind))]
    if isinstance(combination, CountedKind):
        # With random cells, the model's choices for the individual cells would have to agree on the total count, which
        # small models get wrong.
        cells = POSITIONS[: combination.count]
        objects = tuple(SceneObject(combination.color, combination.shape, cell) for cell in cells)
    else:
        objects = combination
    return Scene(_caption(combination), objects)


def held_out_captions(n: int, seed: int) -> list[str]:
    """Return ``n`` distinct held-out captions, taken in turn from each of the three kinds until it is exhausted."""
    rng = np.random.default_rng(seed)
    queues = [[_caption(kind[index]) for index in rng.permutation(len(kind))] for kind in combinations(True)]
    total = sum(len(queue) for queue in queues)
    if not 0 <= n <= total:
        raise ValueError(f"held_out_captions: n={n}, expected 0 to {total}")
    captions: list[str] = []
    while len(captions) < n:
        captions.extend(queue.pop() for queue in queues if queue)
    return captions[:n]


def vocabulary() -> tuple[str, ...]:
    """Return all words that occur in captions, sorted."""
    captions = [_caption(each) for split in (False, True) for kind in combinations(split) for each in kind]
    return tuple(sorted({word for caption in captions for word in caption.split()}))


def _coverage(shape: str, dy: float, dx: float, samples: int = 8) -> np.ndarray:
    """Return the fraction of each pixel of a cell, (8, 8), that ``shape`` covers if shifted by (dy, dx) pixels."""
    at = (np.arange(CELL * samples) + 0.5) / samples - CELL / 2
    y, x = (at[:, None] - dy) / RADIUS, (at[None, :] - dx) / RADIUS
    reach = np.maximum(abs(y), abs(x)) <= 1
    if shape == "square":
        inside = reach
    elif shape == "circle":
        inside = y**2 + x**2 <= 1
    elif shape == "triangle":
        inside = reach & (abs(x) <= (y + 1) / 2)
    else:
        inside = reach & (np.minimum(abs(y), abs(x)) <= 1 / 3)
    return inside.reshape(CELL, samples, CELL, samples).mean(axis=(1, 3))


def _cell(position: str) -> tuple[slice, slice]:
    row, column = divmod(POSITIONS.index(position), SIDE // CELL)
    return slice(row * CELL, (row + 1) * CELL), slice(column * CELL, (column + 1) * CELL)


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Render ``scene`` as (16, 16, 3) uint8, with random jitter of object positions, object colors and background."""
    ground = rng.uniform(12, 40) + rng.uniform(-4, 4, size=3)
    image = np.broadcast_to(ground, (SIDE, SIDE, 3)).copy()
    for placed in scene.objects:
        cover = _coverage(placed.shape, *rng.uniform(-JITTER, JITTER, size=2))[..., None]
        color = np.array(COLORS[placed.color]) * rng.uniform(0.9, 1.0) + rng.uniform(-10, 10, size=3)
        cell = _cell(placed.position)
        image[cell] = image[cell] * (1 - cover) + color * cover
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


@cache
def _templates() -> tuple[np.ndarray, tuple[str, ...]]:
    """Return zero-mean coverages (templates, 64) at quarter-pixel shifts, with their means as the last column."""
    shifts = np.arange(-JITTER, JITTER + 0.01, 0.25)
    keys = list(product(SHAPES, shifts, shifts))
    cover = np.stack([_coverage(*key).ravel() for key in keys])
    mean = cover.mean(axis=1, keepdims=True)
    return np.concatenate([cover - mean, mean], axis=1), tuple(key[0] for key in keys)


def _read_cell(cell: np.ndarray) -> tuple[str, str] | None:
    """Return the (color, shape) in a cell (64, 3) with values in [0, 255], or None if it is empty.

    Raise _UnrecognizedCell if it is neither.
    """
    mean = cell.mean(axis=0)
    centered = cell - mean
    if np.sqrt((centered**2).mean()) < EMPTY_SPREAD:
        if mean.max() > BACKGROUND_LIMIT:
            raise _UnrecognizedCell("bright cell without a shape")
        return None
    templates, names = _templates()
    cover, cover_mean = templates[:, :-1], templates[:, -1:]
    # Least-squares fit of the cell on (coverage, 1): the slope is the step from background to object, per channel.
    power = (cover**2).sum(axis=1, keepdims=True)
    slope = cover @ centered / power
    explained = (slope**2 * power).sum(axis=1) / (centered**2).sum()
    best = int(explained.argmax())
    ground = mean - slope[best] * cover_mean[best]
    if explained[best] < FIT_LIMIT or ground.max() > BACKGROUND_LIMIT:
        raise _UnrecognizedCell("no shape fits the cell")
    distance = np.linalg.norm(np.array(list(COLORS.values())) - (ground + slope[best]), axis=1)
    if distance.min() > COLOR_LIMIT:
        raise _UnrecognizedCell("color is not in the palette")
    return tuple(COLORS)[int(distance.argmin())], names[best]


def read_scene(image: np.ndarray) -> tuple[SceneObject, ...] | None:
    """Return the objects in a (16, 16, 3) image with values in [0, 255], in the order of POSITIONS.

    Return None if a cell cannot be recognized.
    """
    if image.shape != (SIDE, SIDE, 3):
        raise ValueError(f"image has shape {image.shape}, expected ({SIDE}, {SIDE}, 3)")
    found = []
    for position in POSITIONS:
        try:
            kind = _read_cell(image[_cell(position)].reshape(-1, 3).astype(np.float64))
        except _UnrecognizedCell:
            return None
        if kind is not None:
            found.append(SceneObject(*kind, position))
    return tuple(found)


def parse_caption(caption: str) -> Combination:
    """Return the combination that a caption describes. Raise ValueError if it is none of the three kinds."""
    colors, shapes, positions = "|".join(COLORS), "|".join(SHAPES), "|".join(POSITIONS)
    counted = re.fullmatch(f"({'|'.join(COUNTS)}) ({colors}) ({'|'.join(PLURALS.values())})", caption)
    if counted:
        shape = next(shape for shape, plural in PLURALS.items() if plural == counted[3])
        return CountedKind(COUNTS[counted[1]], counted[2], shape)
    item = re.compile(f"a ({colors}) ({shapes}) at the ({positions})")
    matches = [item.fullmatch(part) for part in caption.split(" and ")]
    objects = tuple(SceneObject(*match.groups()) for match in matches if match)
    places = {placed.position for placed in objects}
    if len(objects) != len(matches) or len(objects) > 2 or len(places) != len(objects):
        raise ValueError(f"not a scene caption: {caption!r}")
    return objects


def score(image: np.ndarray, caption: str) -> bool:
    """Return whether a (16, 16, 3) image with values in [0, 255] shows exactly what ``caption`` describes."""
    wanted = parse_caption(caption)
    found = read_scene(image)
    if found is None:
        return False
    if isinstance(wanted, CountedKind):
        kinds = [(placed.color, placed.shape) for placed in found]
        return kinds == [(wanted.color, wanted.shape)] * wanted.count
    return set(found) == set(wanted)
