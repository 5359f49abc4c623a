"""Toy scenes are rendered and scored correctly, and the held-out combinations never occur in training."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from megatron_dit.data.scenes import (
    COLORS,
    POSITIONS,
    SHAPES,
    CountedKind,
    Scene,
    combinations,
    draw_scene,
    held_out_captions,
    is_held_out,
    parse_caption,
    read_scene,
    render,
    score,
    vocabulary,
)


def draw(count: int, seed: int, held_out: bool = False) -> list[tuple[Scene, np.ndarray]]:
    rng = np.random.default_rng(seed)
    scenes = [draw_scene(rng, held_out) for _ in range(count)]
    return [(scene, render(scene, rng)) for scene in scenes]


def key(caption: str) -> object:
    """Return what a caption describes, ignoring the order of a pair."""
    wanted = parse_caption(caption)
    return wanted if isinstance(wanted, CountedKind) else frozenset(wanted)


def pairing(caption: str) -> object:
    """Return the combination that determines the split: for a pair, its two kinds only."""
    wanted = parse_caption(caption)
    if isinstance(wanted, CountedKind) or len(wanted) == 1:
        return wanted
    return frozenset((placed.color, placed.shape) for placed in wanted)


@pytest.mark.parametrize("held_out", [False, True])
def test_rendered_scenes_score_as_correct(held_out: bool) -> None:
    drawn = draw(500, seed=1, held_out=held_out)
    assert all(image.shape == (16, 16, 3) and image.dtype == np.uint8 for _, image in drawn)
    assert np.mean([score(image, scene.caption) for scene, image in drawn]) >= 0.99


def test_read_scene_returns_the_rendered_objects() -> None:
    drawn = draw(500, seed=2)
    right = [set(read_scene(image) or ()) == set(scene.objects) for scene, image in drawn]
    assert np.mean(right) >= 0.99


def test_shuffled_captions_score_at_chance() -> None:
    drawn = draw(4000, seed=3)
    counts = Counter(key(scene.caption) for scene, _ in draw(20000, seed=4))
    # Two independent captions are compatible only if they describe the same combination.
    chance = sum((count / 20000) ** 2 for count in counts.values())
    assert chance < 0.01
    order = np.random.default_rng(5).permutation(len(drawn))
    hits = np.mean([score(image, drawn[at][0].caption) for (_, image), at in zip(drawn, order, strict=True)])
    assert hits <= chance + 5 * np.sqrt(chance / len(drawn))


@pytest.mark.parametrize("sigma", [6, 12])
def test_noise_is_tolerated(sigma: int) -> None:
    rng = np.random.default_rng(6)
    right = []
    for scene, image in draw(500, seed=7):
        noisy = np.clip(np.rint(image + rng.normal(0, sigma, image.shape)), 0, 255).astype(np.uint8)
        right.append(score(noisy, scene.caption))
    assert np.mean(right) >= 0.98


def test_mild_blur_is_tolerated() -> None:
    right = []
    for scene, image in draw(500, seed=8):
        soft = image.astype(np.float64)
        for axis in (0, 1):
            soft = 0.7 * soft + 0.15 * np.roll(soft, 1, axis) + 0.15 * np.roll(soft, -1, axis)
        right.append(score(soft, scene.caption))
    assert np.mean(right) >= 0.95


def test_ruined_images_score_as_wrong() -> None:
    rng = np.random.default_rng(9)
    drawn = draw(300, seed=10)
    for index, (scene, image) in enumerate(drawn):
        other = drawn[index - 1][1]
        assert not score(np.zeros_like(image), scene.caption)
        assert not score(rng.integers(0, 256, image.shape, dtype=np.uint8), scene.caption)
        assert not score(np.full_like(image, image.mean()), scene.caption)
        assert not score(255 - image, scene.caption)
        if set(scene.objects) != set(drawn[index - 1][0].objects):
            assert not score(image // 2 + other // 2, scene.caption)


def test_missing_or_extra_objects_score_as_wrong() -> None:
    rng = np.random.default_rng(11)
    for scene, _ in draw(300, seed=12):
        free = [place for place in POSITIONS if place not in {placed.position for placed in scene.objects}]
        fewer = Scene(scene.caption, scene.objects[1:])
        assert not score(render(fewer, rng), scene.caption)
        if free:
            extra = type(scene.objects[0])(scene.objects[0].color, scene.objects[0].shape, free[0])
            more = Scene(scene.caption, (*scene.objects, extra))
            assert not score(render(more, rng), scene.caption)


def test_held_out_combinations_are_disjoint_from_training() -> None:
    rng = np.random.default_rng(13)
    training = [draw_scene(rng) for _ in range(20000)]
    seen = {pairing(scene.caption) for scene in training}
    placed = {(each,) for scene in training for each in scene.objects if len(scene.objects) <= 2}
    captions = held_out_captions(400, seed=14)
    assert len(set(captions)) == 400
    assert not seen & {pairing(caption) for caption in captions}
    assert not {scene.caption for scene in training} & set(captions)
    singles = {parse_caption(caption) for caption in captions if " and " not in caption and caption[1] == " "}
    assert len(singles) == 16
    assert not singles & {parse_caption(scene.caption) for scene in training}
    paired = {(each,) for scene in training if " and " in scene.caption for each in scene.objects}
    assert paired <= placed
    assert not singles & paired


def test_a_sixth_of_each_kind_is_held_out() -> None:
    for kept, held in zip(combinations(False), combinations(True), strict=True):
        assert 0.15 <= len(held) / (len(held) + len(kept)) <= 0.20
        assert all(is_held_out(each) for each in held)
        assert not any(is_held_out(each) for each in kept)


def test_all_words_and_kinds_occur_in_training() -> None:
    rng = np.random.default_rng(15)
    training = [draw_scene(rng) for _ in range(5000)]
    words = {word for scene in training for word in scene.caption.split()}
    held = {word for caption in held_out_captions(400, seed=16) for word in caption.split()}
    assert held <= words == set(vocabulary())
    for single in (True, False):
        kinds = {
            (placed.color, placed.shape)
            for scene in training
            if (len(scene.objects) == 1) == single
            for placed in scene.objects
        }
        assert len(kinds) == len(COLORS) * len(SHAPES)


def test_held_out_captions_contain_all_kinds_equally() -> None:
    kinds = Counter(
        "counted" if isinstance(parse_caption(caption), CountedKind) else len(parse_caption(caption))
        for caption in held_out_captions(30, seed=17)
    )
    assert kinds == {"counted": 10, 1: 10, 2: 10}
    assert held_out_captions(0, seed=17) == []
    with pytest.raises(ValueError, match="expected 0 to"):
        held_out_captions(10**6, seed=17)


def test_scenes_depend_only_on_the_generator() -> None:
    first, again, other = draw(50, seed=18), draw(50, seed=18), draw(50, seed=19)
    assert all(a[0] == b[0] and np.array_equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
    assert any(a[0] != b[0] for a, b in zip(first, other, strict=True))
    assert held_out_captions(64, seed=1) == held_out_captions(64, seed=1) != held_out_captions(64, seed=2)


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a red circle",
        "a pink circle at the top left",
        "five red circles",
        "two red circle",
        "a red circle at the top left and a blue square at the top left",
        " and ".join(f"a red circle at the {position}" for position in POSITIONS),
        "A red circle at the top left",
        "a red circle at the top left\n",
    ],
)
def test_invalid_captions_are_rejected(caption: str) -> None:
    with pytest.raises(ValueError, match="not a scene caption") as failure:
        score(np.zeros((16, 16, 3), np.uint8), caption)
    assert "\n" not in str(failure.value)


def test_wrong_image_shape_is_rejected() -> None:
    with pytest.raises(ValueError, match="image has shape"):
        score(np.zeros((3, 16, 16), np.uint8), "two red circles")
