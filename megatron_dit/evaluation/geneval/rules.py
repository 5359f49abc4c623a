"""The rules of GenEval (arXiv 2310.11513): whether the objects detected in an image are those of its prompt.

They give the same verdict as ``evaluation/evaluate_images.py`` of the official repository, djghosh13/geneval, with its
default options. Its non-maximum suppression is off by default (threshold 1), and is therefore absent here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
POSITIONS = ("left of", "right of", "above", "below")
# The official object_names.txt: COCO's 80 classes in COCO's order, some with a clearer name.
OBJECTS = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip

MIN_SCORE = 0.3  # only detections with a higher score count
COUNTING_MIN_SCORE = 0.9  # the same for the task "counting"
MAX_OBJECTS = 16  # per class; the others are ignored
DEAD_ZONE = 0.1  # an offset of less than this fraction of the sum of both sizes is not a relative position
DIRECTION = 0.5  # the remaining offset, divided by the length of the offset, has to be greater

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels; x1 and y1 are exclusive


@dataclass(frozen=True, eq=False)
class Detection:
    """A detected object.

    ``name`` is one of OBJECTS, ``score`` is in [0, 1], and ``mask`` (H, W) bool has the size of the image.
    """

    name: str
    box: Box
    score: float
    mask: np.ndarray


ColorsOf = Callable[[str, Sequence[Detection]], list[str]]  # class and objects of it -> the color of each


@dataclass(frozen=True)
class Requirement:
    """Objects of a class that an image must contain, or must not.

    ``position`` is a relation, and the index of an earlier requirement, to whose objects it refers.
    """

    name: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True)
class PromptSpec:
    """What an image of a prompt must contain, and what it must not."""

    task: str
    include: tuple[Requirement, ...]
    exclude: tuple[Requirement, ...] = ()


def select(detections: Sequence[Detection], task: str) -> dict[str, list[Detection]]:
    """Return the detections that count for a task, by class and with the highest score first."""
    least = COUNTING_MIN_SCORE if task == "counting" else MIN_SCORE
    found: dict[str, list[Detection]] = {}
    for each in sorted(detections, key=lambda each: -each.score):
        objects = found.setdefault(each.name, [])
        if each.score > least and len(objects) < MAX_OBJECTS:
            objects.append(each)
    return found


def is_correct(found: dict[str, list[Detection]], spec: PromptSpec, colors_of: ColorsOf) -> bool:
    """Return whether an image with the selected detections ``found`` is what its prompt asks for.

    Color and position are judged only for the ``count`` objects of the class with the highest scores, all of which must
    have them. Further objects are wrong only if ``exclude`` says so.
    """
    groups: list[list[Detection]] = []
    for requirement in spec.include:
        objects = found.get(requirement.name, [])[: requirement.count]
        if len(objects) < requirement.count:
            return False
        if requirement.color is not None and set(colors_of(requirement.name, objects)) != {requirement.color}:
            return False
        if requirement.position is not None:
            relation, target = requirement.position
            if not all(relation in relations(a.box, b.box) for a in objects for b in groups[target]):
                return False
        groups.append(objects)
    return all(len(found.get(excluded.name, [])) < excluded.count for excluded in spec.exclude)


def relations(a: Box, b: Box) -> set[str]:
    """Return the positions of box ``a`` relative to box ``b``: none, one, or two if it is diagonal.

    The offset of the centers, shortened by DEAD_ZONE times the sum of the sizes, and divided by the length of the full
    offset, has to exceed DIRECTION in an axis.
    """
    offset = [(a[axis] + a[axis + 2] - b[axis] - b[axis + 2]) / 2 for axis in (0, 1)]
    sizes = [a[axis + 2] - a[axis] + b[axis + 2] - b[axis] for axis in (0, 1)]
    shortened = [max(abs(d) - DEAD_ZONE * size, 0.0) for d, size in zip(offset, sizes, strict=True)]
    if max(shortened) < 1e-3:  # the centers may be equal
        return set()
    names = (("left of", "right of"), ("above", "below"))
    length = math.hypot(*offset)
    return {names[axis][offset[axis] > 0] for axis in (0, 1) if shortened[axis] / length > DIRECTION}
