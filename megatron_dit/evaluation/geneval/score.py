"""The GenEval score (arXiv 2310.11513) of generated images, and its metadata."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_dit.evaluation.geneval.rules import (
    COLORS,
    OBJECTS,
    POSITIONS,
    TASKS,
    Detection,
    PromptSpec,
    Requirement,
    is_correct,
    select,
)
from megatron_dit.evaluation.images import Images
from megatron_dit.parallel.collectives import on_all_ranks, sum_over_ranks
from megatron_dit.parallel.topology import connect
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.io import read_text
from megatron_dit.runtime.progress import ProgressBar

Detect = Callable[[Sequence[np.ndarray]], list[list[Detection]]]
ClassifyColors = Callable[[np.ndarray, str, Sequence[Detection]], list[str]]

SOURCE = "evaluation_metadata.jsonl of https://github.com/djghosh13/geneval"


def geneval(
    images: Images, specs: Mapping[str, PromptSpec], detect: Detect, colors: ClassifyColors, batch: int = 32
) -> dict[str, float]:
    """Return the fraction of correct images in each task, ``geneval/TASK``, and its mean, ``geneval``. Collective.

    The mean is over the six tasks, whatever their numbers of images. Each rank takes every n-th batch.
    ``specs``: what the images of each prompt must contain. ``detect``: a Detector. ``colors``: a ColorClassifier.
    Raises UserError if the images are not those of exactly the prompts in ``specs``, or a task is missing.
    """
    connect()
    check_images(images, specs)
    rank, world = dist.get_rank(), dist.get_world_size()

    def count_correct() -> Counter[str]:
        correct: Counter[str] = Counter()
        with ProgressBar("GenEval", -(-len(images) // (batch * world)), show=rank == 0) as bar:
            for start, part in images.parts(batch, rank, world):
                prompts = images.prompts[start : start + len(part)]
                for prompt, image, detections in zip(prompts, part, detect(part), strict=True):
                    spec = specs[prompt]
                    correct[spec.task] += is_correct(select(detections, spec.task), spec, partial(colors, image))
                bar.advance()
        return correct

    own = on_all_ranks(count_correct)
    totals = Counter(specs[prompt].task for prompt in images.prompts)
    correct = sum_over_ranks([own[task] for task in TASKS])
    scores = {f"geneval/{task}": count / totals[task] for task, count in zip(TASKS, correct, strict=True)}
    return {"geneval": sum(scores.values()) / len(scores), **scores}


def check_images(images: Images, specs: Mapping[str, PromptSpec]) -> None:
    """Raise UserError unless the images are those of exactly the prompts in ``specs``, which have all tasks."""
    absent = [task for task in TASKS if task not in {spec.task for spec in specs.values()}]
    if absent:
        raise UserError(f"GenEval's metadata have no prompts of the tasks {', '.join(absent)}; use {SOURCE}")
    if not images.prompts:
        raise UserError(
            "GenEval needs the prompts of the images, but these have no manifest.jsonl; generate them with "
            "'megatron-dit sample --prompts evaluation_metadata.jsonl --per-prompt 4 --folder FOLDER'"
        )
    unknown = next((prompt for prompt in images.prompts if prompt not in specs), None)
    if unknown is not None:
        raise UserError(f"GenEval's metadata have no prompt {unknown!r}; generate images of its prompts only")
    missing = sorted(specs.keys() - set(images.prompts))
    if missing:
        raise UserError(
            f"{len(missing)} of GenEval's {len(specs)} prompts have no image, such as {missing[0]!r}; generate images "
            "of all of them"
        )


def read_metadata(path: str) -> dict[str, PromptSpec]:
    """Return what the image of each prompt must contain, from a file in the format of ``evaluation_metadata.jsonl``.

    Raises UserError for any other file, with the line.
    """
    specs: dict[str, PromptSpec] = {}
    text = read_text(Path(path), f"GenEval metadata {path}", SOURCE)
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            prompt, spec = _parse(line)
            if specs.setdefault(prompt, spec) != spec:
                raise ValueError(f"prompt {prompt!r} has other objects than in an earlier line; remove one")
        except (ValueError, RecursionError) as error:
            raise UserError(f"GenEval metadata {path}, line {number}: {error}; use {SOURCE}") from None
    if not specs:
        raise UserError(f"GenEval metadata {path} contain no prompt; use {SOURCE}")
    return specs


def _parse(line: str) -> tuple[str, PromptSpec]:
    """Return the prompt of a line and its specification. Raises ValueError if it is not one."""
    try:
        value: Any = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    _expect(isinstance(value, dict), "an object", value)
    _expect(set(value) <= {"tag", "prompt", "include", "exclude"}, "only tag, prompt, include and exclude", list(value))
    prompt, task = value.get("prompt"), value.get("tag")
    _expect(isinstance(prompt, str), "a string 'prompt'", prompt)
    _expect(task in TASKS, f"a 'tag' of {', '.join(TASKS)}", task)
    include, exclude = value.get("include"), value.get("exclude", [])
    _expect(isinstance(include, list) and include != [], "a list 'include' of objects", include)
    _expect(isinstance(exclude, list), "a list 'exclude' of objects", exclude)
    included = tuple(_requirement(each, ("color", "position"), index) for index, each in enumerate(include))
    return prompt, PromptSpec(task, included, tuple(_requirement(each, (), 0) for each in exclude))


def _requirement(value: Any, optional: Sequence[str], earlier: int) -> Requirement:
    """Return a requirement from JSON. ``earlier``: number of requirements to which its position can refer."""
    _expect(isinstance(value, dict), "an object with class and count", value)
    keys = ("class", "count", *optional)
    _expect(set(value) <= set(keys), f"only {', '.join(keys)}", list(value))
    name, count = value.get("class"), value.get("count")
    _expect(name in OBJECTS, "a 'class' that is one of COCO's 80 in GenEval's names", name)
    _expect(type(count) is int and count > 0, "a positive 'count'", count)
    color, position = value.get("color"), value.get("position")
    _expect(color is None or color in COLORS, f"a 'color' of {', '.join(COLORS)}", color)
    if position is None:
        return Requirement(name, count, color)
    valid = isinstance(position, list) and len(position) == 2 and position[0] in POSITIONS
    valid = valid and type(position[1]) is int and 0 <= position[1] < earlier
    _expect(valid, f"a 'position' of {', '.join(POSITIONS)} with the index of an earlier object", position)
    return Requirement(name, count, color, (position[0], position[1]))


def _expect(valid: bool, expected: str, found: Any) -> None:
    if not valid:
        raise ValueError(f"expected {expected}, found {json.dumps(found)[:80]}")
