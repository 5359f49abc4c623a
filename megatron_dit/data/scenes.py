"""Small drawn scenes with captions, and a scorer that reads a picture back.

A picture is (16, 16, 3) uint8: four 8x8 cells named by their quadrant, each empty or holding one flat
coloured shape about 6 pixels wide. Captions come in three kinds:

    single   "a red circle at the top left"
    counted  "three green squares"                 drawn from the top left on, right in any cells
    pair     "a red circle at the top left and a blue square at the bottom right"

A fixed sixth of each kind's combinations is held out: training draws never show them, while every word and
every (colour, shape) still occurs in training in other combinations.
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
COLOURS: dict[str, tuple[int, int, int]] = {
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
KINDS = len(COLOURS) * len(SHAPES)

# Noise of sigma 12 alone leaves an empty cell with a spread of 12; a shape at a quarter of its contrast has
# about 20, so a visible ghost is no empty cell.
EMPTY_SPREAD = 20.0
BACKGROUND_LIMIT = 80.0
# The share of a cell's variance that one flat shape on one flat ground must explain.
FIT_LIMIT = 0.85
# Below half of the smallest distance between two palette colours, so no colour is near two names.
COLOUR_LIMIT = 75.0


@dataclass(frozen=True)
class SceneObject:
    """One shape in one cell; names are keys of COLOURS, SHAPES and POSITIONS."""

    colour: str
    shape: str
    position: str


@dataclass(frozen=True)
class Scene:
    """A caption and 1 to 4 objects, at most one per position, that fulfil it exactly."""

    caption: str
    objects: tuple[SceneObject, ...]


@dataclass(frozen=True)
class CountedKind:
    """A request for `count` (2 to 4) equal objects in any cells."""

    count: int
    colour: str
    shape: str


class _SmearError(Exception):
    """A cell is neither empty nor a shape that can be named."""


Combination = tuple[SceneObject, ...] | CountedKind


def kind_index(colour: str, shape: str) -> int:
    """Number of a (colour, shape) in [0, KINDS); the first object's is the picture's class label."""
    return tuple(COLOURS).index(colour) * len(SHAPES) + SHAPES.index(shape)


def is_held_out(combination: Combination) -> bool:
    """Whether training must never show this combination: a placed object, a counted kind or a pair of kinds.

    A pair is held out by its two (colour, shape) kinds, whatever the order and the positions.
    """
    if isinstance(combination, CountedKind):
        colour, shape = tuple(COLOURS).index(combination.colour), SHAPES.index(combination.shape)
        return (colour + 2 * shape + combination.count) % HOLD_EVERY == 0
    if len(combination) == 1:
        placed = combination[0]
        colour, shape = tuple(COLOURS).index(placed.colour), SHAPES.index(placed.shape)
        return (colour + shape + POSITIONS.index(placed.position)) % HOLD_EVERY == 0
    return sum(kind_index(placed.colour, placed.shape) for placed in combination) % HOLD_EVERY == 0


@cache
def combinations(held_out: bool) -> tuple[tuple[Combination, ...], ...]:
    """All (singles, counted, ordered pairs) of training, or those held out.

    A pair holds no held-out placed object on either side of the split, so a held-out pair is new by its
    pairing alone.
    """
    placed = [SceneObject(*names) for names in product(COLOURS, SHAPES, POSITIONS)]
    singles = [(one,) for one in placed if is_held_out((one,)) == held_out]
    counted = [CountedKind(*names) for names in product(COUNTS.values(), COLOURS, SHAPES)]
    seen = [one for one in placed if not is_held_out((one,))]
    pairs = [
        (one, other)
        for one, other in permutations(seen, 2)
        if one.position != other.position and (one.colour, one.shape) != (other.colour, other.shape)
    ]
    return (
        tuple(singles),
        tuple(kind for kind in counted if is_held_out(kind) == held_out),
        tuple(pair for pair in pairs if is_held_out(pair) == held_out),
    )


def _caption(combination: Combination) -> str:
    if isinstance(combination, CountedKind):
        number = next(word for word, count in COUNTS.items() if count == combination.count)
        return f"{number} {combination.colour} {PLURALS[combination.shape]}"
    return " and ".join(f"a {each.colour} {each.shape} at the {each.position}" for each in combination)


def draw_scene(rng: np.random.Generator, held_out: bool = False) -> Scene:
    """Draw a scene: a kind of caption with equal chances, then one of its combinations of that split."""
    kinds = combinations(held_out)
    kind = kinds[rng.integers(len(kinds))]
    combination = kind[rng.integers(len(kind))]
    if isinstance(combination, CountedKind):
        # Free cells would make each picture a set of coin flips that must agree, which small models miscount.
        cells = POSITIONS[: combination.count]
        objects = tuple(SceneObject(combination.colour, combination.shape, cell) for cell in cells)
    else:
        objects = combination
    return Scene(_caption(combination), objects)


def held_out_captions(n: int, seed: int) -> list[str]:
    """`n` distinct held-out captions, taken from the three kinds in turn while each lasts."""
    rng = np.random.default_rng(seed)
    queues = [[_caption(kind[index]) for index in rng.permutation(len(kind))] for kind in combinations(True)]
    total = sum(len(queue) for queue in queues)
    if not 0 <= n <= total:
        raise ValueError(f"held_out_captions: n must be from 0 to {total}, got {n}")
    captions: list[str] = []
    while len(captions) < n:
        captions.extend(queue.pop() for queue in queues if queue)
    return captions[:n]


def vocabulary() -> tuple[str, ...]:
    """Every word a caption can hold, sorted."""
    captions = [_caption(each) for split in (False, True) for kind in combinations(split) for each in kind]
    return tuple(sorted({word for caption in captions for word in caption.split()}))


def _coverage(shape: str, dy: float, dx: float, samples: int = 8) -> np.ndarray:
    """Share of each pixel of a cell, (8, 8) in [0, 1], that `shape` covers at (dy, dx) pixels off centre."""
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
    """Draw `scene` as (16, 16, 3) uint8, with each object's place and colour and the ground jittered."""
    ground = rng.uniform(12, 40) + rng.uniform(-4, 4, size=3)
    picture = np.broadcast_to(ground, (SIDE, SIDE, 3)).copy()
    for placed in scene.objects:
        cover = _coverage(placed.shape, *rng.uniform(-JITTER, JITTER, size=2))[..., None]
        colour = np.array(COLOURS[placed.colour]) * rng.uniform(0.9, 1.0) + rng.uniform(-10, 10, size=3)
        cell = _cell(placed.position)
        picture[cell] = picture[cell] * (1 - cover) + colour * cover
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


@cache
def _templates() -> tuple[np.ndarray, tuple[str, ...]]:
    """Centred coverages (templates, 64) at quarter-pixel shifts with the pixel means in a last column."""
    shifts = np.arange(-JITTER, JITTER + 0.01, 0.25)
    keys = list(product(SHAPES, shifts, shifts))
    cover = np.stack([_coverage(*key).ravel() for key in keys])
    mean = cover.mean(axis=1, keepdims=True)
    return np.concatenate([cover - mean, mean], axis=1), tuple(key[0] for key in keys)


def _read_cell(cell: np.ndarray) -> tuple[str, str] | None:
    """(colour, shape) of a cell (64, 3) in [0, 255], None when it is empty; _SmearError when neither."""
    mean = cell.mean(axis=0)
    centred = cell - mean
    if np.sqrt((centred**2).mean()) < EMPTY_SPREAD:
        if mean.max() > BACKGROUND_LIMIT:
            raise _SmearError("a bright cell without a shape")
        return None
    templates, names = _templates()
    cover, cover_mean = templates[:, :-1], templates[:, -1:]
    # Least squares of the cell on (coverage, 1): slope is the step from ground to object, per channel.
    power = (cover**2).sum(axis=1, keepdims=True)
    slope = cover @ centred / power
    explained = (slope**2 * power).sum(axis=1) / (centred**2).sum()
    best = int(explained.argmax())
    ground = mean - slope[best] * cover_mean[best]
    if explained[best] < FIT_LIMIT or ground.max() > BACKGROUND_LIMIT:
        raise _SmearError("a smear")
    distance = np.linalg.norm(np.array(list(COLOURS.values())) - (ground + slope[best]), axis=1)
    if distance.min() > COLOUR_LIMIT:
        raise _SmearError("a colour without a name")
    return tuple(COLOURS)[int(distance.argmin())], names[best]


def read_picture(picture: np.ndarray) -> tuple[SceneObject, ...] | None:
    """Objects of a (16, 16, 3) picture in [0, 255], in POSITIONS' order; None when a cell is a smear."""
    if picture.shape != (SIDE, SIDE, 3):
        raise ValueError(f"a picture must have shape ({SIDE}, {SIDE}, 3), got {picture.shape}")
    found = []
    for position in POSITIONS:
        try:
            kind = _read_cell(picture[_cell(position)].reshape(-1, 3).astype(np.float64))
        except _SmearError:
            return None
        if kind is not None:
            found.append(SceneObject(*kind, position))
    return tuple(found)


def parse_caption(caption: str) -> Combination:
    """What a caption asks for; ValueError when it is of none of the three kinds."""
    colours, shapes, positions = "|".join(COLOURS), "|".join(SHAPES), "|".join(POSITIONS)
    counted = re.fullmatch(f"({'|'.join(COUNTS)}) ({colours}) ({'|'.join(PLURALS.values())})", caption)
    if counted:
        shape = next(shape for shape, plural in PLURALS.items() if plural == counted[3])
        return CountedKind(COUNTS[counted[1]], counted[2], shape)
    item = re.compile(f"a ({colours}) ({shapes}) at the ({positions})")
    matches = [item.fullmatch(part) for part in caption.split(" and ")]
    objects = tuple(SceneObject(*match.groups()) for match in matches if match)
    places = {placed.position for placed in objects}
    if len(objects) != len(matches) or len(objects) > 2 or len(places) != len(objects):
        raise ValueError(f"not a caption of a scene: {caption!r}")
    return objects


def score(picture: np.ndarray, caption: str) -> bool:
    """Whether a (16, 16, 3) picture in [0, 255] shows all that `caption` asks for and nothing else."""
    wanted = parse_caption(caption)
    found = read_picture(picture)
    if found is None:
        return False
    if isinstance(wanted, CountedKind):
        kinds = [(placed.colour, placed.shape) for placed in found]
        return kinds == [(wanted.colour, wanted.shape)] * wanted.count
    return set(found) == set(wanted)
