"""GenEval's rules on detections made by hand, its score on any number of ranks, and its metadata."""

import json

import numpy as np
import pytest

from megatron_dit.evaluation.geneval.rules import PromptSpec, Requirement, is_correct, relations, select
from megatron_dit.evaluation.geneval.score import geneval, read_metadata
from megatron_dit.evaluation.images import open_images
from megatron_dit.runtime.errors import UserError
from megatron_dit.sampling.folder import MANIFEST
from tests.helpers.detections import thing
from tests.helpers.pictures import pictures, write

LEFT, RIGHT, FAR_RIGHT = (0, 0, 10, 10), (20, 0, 30, 10), (40, 0, 50, 10)


def verdict(task, include, detections, exclude=(), colors=None):
    """Whether detections are correct. ``colors``: the color of each object by its score."""
    spec = PromptSpec(task, tuple(include), tuple(exclude))
    return is_correct(
        select(detections, task), spec, lambda _, objects: [(colors or {})[each.score] for each in objects]
    )


@pytest.mark.parametrize(("score", "expected"), [(0.301, True), (0.3, False), (0.299, False)])
def test_a_single_object_needs_a_score_above_the_threshold(score, expected):
    assert verdict("single_object", [Requirement("dog", 1)], [thing("dog", score), thing("cat", 0.9)]) is expected
    assert verdict("single_object", [Requirement("cat", 1)], [thing("dog", score)]) is False


def test_two_objects_need_both_classes_and_may_have_others():
    both = [Requirement("dog", 1), Requirement("tv remote", 1)]
    assert verdict("two_object", both, [thing("tv remote", 0.31), thing("dog", 0.31), thing("dog", 0.5)])
    assert not verdict("two_object", both, [thing("tv remote", 0.9), thing("dog", 0.29)])
    assert not verdict("two_object", both, [thing("dog", 0.9), thing("dog", 0.8)])


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ((0.95, 0.92, 0.901), True),
        ((0.95, 0.92, 0.9), False),  # too few above 0.9
        ((0.95, 0.92), False),
        ((0.95, 0.92, 0.91, 0.901), False),  # too many
        ((0.95, 0.92, 0.91, 0.9), True),  # the fourth does not count
    ],
)
def test_counting_has_its_own_threshold_and_rejects_too_many(scores, expected):
    three, four = Requirement("clock", 3), Requirement("clock", 4)
    # Equal boxes are separate objects: the official non-maximum suppression is off.
    assert verdict("counting", [three], [thing("clock", score) for score in scores], [four]) is expected


def test_at_most_16_objects_of_a_class_count():
    found = [thing("bird", 0.91 + 0.005 * number) for number in range(17)]
    selected = select([*found, thing("cat", 0.95)], "counting")
    assert [each.score for each in selected["bird"]] == [each.score for each in found[:0:-1]]
    assert len(selected["cat"]) == 1
    one = [Requirement("bird", 1)]
    assert verdict("counting", one, found, [Requirement("bird", 17)])
    assert not verdict("counting", one, found, [Requirement("bird", 16)])


def test_excluded_objects_are_wrong_if_any_of_them_is_found():
    one, excluded = [Requirement("dog", 1)], [Requirement("cat", 2), Requirement("bird", 1)]
    dog, cat = thing("dog", 0.9), thing("cat", 0.9)
    assert verdict("single_object", one, [dog, cat], excluded)
    assert not verdict("single_object", one, [dog, cat, cat], excluded)
    assert not verdict("single_object", one, [dog, thing("bird", 0.31)], excluded)
    assert verdict("single_object", one, [dog, thing("bird", 0.29)], excluded)


def test_the_color_is_that_of_the_objects_with_the_highest_scores():
    red, found = [Requirement("car", 1, "red")], [thing("car", 0.5), thing("car", 0.9)]
    assert verdict("colors", red, found, colors={0.9: "red", 0.5: "blue"})
    assert not verdict("colors", red, found, colors={0.9: "blue", 0.5: "red"})
    two = [Requirement("car", 2, "red")]
    assert verdict("colors", two, found, colors={0.9: "red", 0.5: "red"})
    assert not verdict("colors", two, found, colors={0.9: "red", 0.5: "blue"})
    assert not verdict("colors", red, [thing("car", 0.3)], colors={0.3: "red"})


def test_each_object_needs_its_own_color():
    both = [Requirement("car", 1, "red"), Requirement("dog", 1, "white")]
    found = [thing("car", 0.9), thing("dog", 0.8)]
    assert verdict("color_attr", both, found, colors={0.9: "red", 0.8: "white"})
    assert not verdict("color_attr", both, found, colors={0.9: "white", 0.8: "red"})
    assert not verdict("color_attr", both, found[:1], colors={0.9: "red"})


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        # Sizes 10 and 30: 0.1 * (10 + 30) = 4 pixels of the offset do not count, and (d - 4) / d > 0.5 from d > 8.
        ((18, 10, 28, 20), (0, 0, 30, 30), set()),  # offset 8: 4 / 8 = 0.5
        ((18.1, 10, 28.1, 20), (0, 0, 30, 30), {"right of"}),  # offset 8.1
        ((2, 10, 12, 20), (0, 0, 30, 30), set()),
        ((1.9, 10, 11.9, 20), (0, 0, 30, 30), {"left of"}),
        ((10, 18.1, 20, 28.1), (0, 0, 30, 30), {"below"}),
        ((10, 1.9, 20, 11.9), (0, 0, 30, 30), {"above"}),
        ((0, 0, 10, 10), (0, 0, 10, 10), set()),  # equal centers
        ((2, 0, 12, 10), (0, 0, 10, 10), set()),  # offset 2, all of which does not count
        # Offset (20, 20) of length 28.3, of which 18 count: 0.64 in both axes.
        ((20, 20, 30, 30), (0, 0, 10, 10), {"right of", "below"}),
        ((20, 0, 30, 10), (0, 20, 10, 30), {"right of", "above"}),
        # Offset (20, 10) of length 22.4: 18 / 22.4 = 0.80 and 8 / 22.4 = 0.36.
        ((20, 10, 30, 20), (0, 0, 10, 10), {"right of"}),
        # Wide boxes of 100 x 10: 20 pixels do not count in x, 2 in y. Offset (30, 10), length 31.6: 0.32 and 0.25.
        ((30, 10, 130, 20), (0, 0, 100, 10), set()),
    ],
)
def test_relations_of_boxes(a, b, expected):
    assert relations(a, b) == expected


def test_the_position_is_relative_to_the_objects_of_the_other_requirement():
    def right_of(cats, dogs, count=1):
        found = [thing("cat", 0.9, box) for box in cats] + [
            thing("dog", 0.8 - number / 10, box) for number, box in dogs
        ]
        include = [Requirement("cat", len(cats)), Requirement("dog", count, position=("right of", 0))]
        return verdict("position", include, found)

    assert right_of([LEFT], [(0, RIGHT)])
    assert not right_of([RIGHT], [(0, LEFT)])
    assert right_of([LEFT], [(0, RIGHT), (1, LEFT)])  # only the dog with the highest score counts
    assert not right_of([RIGHT], [(0, LEFT), (1, FAR_RIGHT)])
    assert right_of([LEFT], [(0, RIGHT), (1, FAR_RIGHT)], count=2)
    assert not right_of([LEFT, FAR_RIGHT], [(0, RIGHT)])  # all pairs count
    assert not right_of([LEFT], [])
    assert not verdict("position", [Requirement("cat", 1), Requirement("dog", 1, position=("right of", 0))],
                       [thing("cat", 0.3, LEFT), thing("dog", 0.9, RIGHT)])  # fmt: skip


# Six prompts, one of each task, and images of a constant value that names the detections in it.
METADATA = [
    {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a dog"},
    {"tag": "two_object", "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1}], "prompt": "both"},
    {"tag": "counting", "include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 3}],
     "prompt": "two cats"},
    {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}], "prompt": "a red dog"},
    {"tag": "position", "include": [{"class": "cat", "count": 1},
                                    {"class": "dog", "count": 1, "position": ["left of", 0]}], "prompt": "left"},
    {"tag": "color_attr", "include": [{"class": "dog", "count": 1, "color": "red"},
                                      {"class": "cat", "count": 1, "color": "white"}], "prompt": "red and white"},
]  # fmt: skip
SCENES = [
    [],
    [thing("dog", 0.8, LEFT)],
    [thing("dog", 0.8, LEFT), thing("cat", 0.95, RIGHT)],
    [thing("dog", 0.8, RIGHT), thing("cat", 0.95, LEFT), thing("cat", 0.95, FAR_RIGHT)],
    [thing("cat", 0.95, LEFT)] * 3,
]
# prompt, scene, and whether it is correct: dogs are red, cats are white
CASES = [
    ("a dog", 1, True), ("a dog", 4, False), ("a dog", 2, True), ("a dog", 3, True),
    ("both", 1, False), ("both", 2, True),
    ("two cats", 2, False), ("two cats", 3, True), ("two cats", 4, False),
    ("a red dog", 1, True), ("a red dog", 0, False),
    ("left", 2, True), ("left", 3, False), ("left", 0, False),
    ("red and white", 3, True),
]  # fmt: skip
EXPECTED = {
    "geneval/single_object": 3 / 4, "geneval/two_object": 1 / 2, "geneval/counting": 1 / 3, "geneval/colors": 1 / 2,
    "geneval/position": 1 / 3, "geneval/color_attr": 1.0,
    "geneval": (3 / 4 + 1 / 2 + 1 / 3 + 1 / 2 + 1 / 3 + 1.0) / 6,
}  # fmt: skip


def detect(images):
    return [SCENES[image[0, 0, 0]] for image in images]


def colors_of(image, name, objects):
    return [{"dog": "red", "cat": "white"}[name] for _ in objects]


def save_images(folder, cases):
    write(folder, [np.full((4, 4, 3), scene, np.uint8) for _, scene, _ in cases])
    lines = [{"file": f"{i:03d}.png", "prompt": prompt, "copy": 0} for i, (prompt, _, _) in enumerate(cases)]
    (folder / MANIFEST).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def save_metadata(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def scored(folder, metadata, batch):
    return geneval(open_images(folder), read_metadata(metadata), detect, colors_of, batch)


def test_the_score_is_the_mean_over_tasks_on_any_number_of_ranks(pool, tmp_path):
    folder, metadata = save_images(tmp_path / "images", CASES), save_metadata(tmp_path / "m.jsonl", METADATA)
    alone = scored(folder, metadata, 4)
    assert alone == pytest.approx(EXPECTED, abs=1e-12)
    for batch in (4, 16):  # with 16, the second rank has no image
        assert pool.run(2, scored, folder, metadata, batch) == [alone, alone]


def test_images_of_other_prompts_are_refused(tmp_path):
    metadata = save_metadata(tmp_path / "m.jsonl", METADATA)
    with pytest.raises(UserError, match="no prompt 'a horse'; generate images of its prompts only"):
        scored(save_images(tmp_path / "more", [*CASES, ("a horse", 0, False)]), metadata, 4)
    with pytest.raises(UserError, match="1 of GenEval's 6 prompts have no image, such as 'red and white'"):
        scored(save_images(tmp_path / "fewer", CASES[:-1]), metadata, 4)
    with pytest.raises(UserError, match=r"no manifest\.jsonl; generate them with 'megatron-dit sample"):
        scored(write(tmp_path / "without", pictures(2, 8)), metadata, 4)
    part = save_metadata(tmp_path / "part.jsonl", [METADATA[0], METADATA[2]])
    with pytest.raises(UserError, match="no prompts of the tasks two_object, colors, position, color_attr; use"):
        scored(save_images(tmp_path / "images", CASES), part, 4)


def test_an_unreadable_image_is_an_error_on_all_ranks(pool, tmp_path):
    folder, metadata = save_images(tmp_path / "images", CASES), save_metadata(tmp_path / "m.jsonl", METADATA)
    (folder / "005.png").write_text("not an image")
    for outcome in pool.outcomes(2, scored, folder, metadata, 4):
        assert "1 unreadable images: 005.png" in outcome.user_error


def test_metadata_are_read(tmp_path):
    specs = read_metadata(save_metadata(tmp_path / "m.jsonl", [*METADATA, METADATA[0]]))
    assert list(specs) == [line["prompt"] for line in METADATA]
    assert specs["two cats"] == PromptSpec("counting", (Requirement("cat", 2),), (Requirement("cat", 3),))
    position = Requirement("dog", 1, position=("left of", 0))
    assert specs["left"] == PromptSpec("position", (Requirement("cat", 1), position))
    assert specs["a red dog"] == PromptSpec("colors", (Requirement("dog", 1, "red"),))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tag": "text"}, "expected a 'tag' of single_object, .*, found \"text\""),
        ({"prompt": None}, "expected a string 'prompt', found null"),
        ({"include": []}, r"expected a list 'include' of objects, found \[\]"),
        ({"exclude": 3}, "expected a list 'exclude' of objects, found 3"),
        ({"style": "oil"}, "expected only tag, prompt, include and exclude, found"),
        ({"include": ["dog"]}, "expected an object with class and count, found \"dog\""),
        ({"include": [{"class": "keyboard", "count": 1}]}, "expected a 'class' .*, found \"keyboard\""),
        ({"include": [{"class": "dog", "count": 0}]}, "expected a positive 'count', found 0"),
        ({"include": [{"class": "dog", "count": True}]}, "expected a positive 'count', found true"),
        ({"include": [{"class": "dog", "count": 1, "color": "gray"}]}, "expected a 'color' of red, .*, found \"gray\""),
        ({"include": [{"class": "dog", "count": 1, "size": 2}]}, "expected only class, count, color, position, found"),
        ({"exclude": [{"class": "dog", "count": 1, "color": "red"}]}, "expected only class, count, found"),
        ({"include": [{"class": "dog", "count": 1, "position": ["above", 0]}]}, ".*the index of an earlier object"),
        ({"include": [{"class": "dog", "count": 1, "position": "above"}]}, "expected a 'position' of left of, .*above"),
        ({"prompt": "a dog", "tag": "counting"}, "prompt 'a dog' has other objects than in an earlier line"),
    ],
)  # fmt: skip
def test_other_metadata_are_refused_with_the_line(tmp_path, changes, words):
    path = save_metadata(tmp_path / "m.jsonl", [METADATA[0], METADATA[0] | {"prompt": "new"} | changes])
    with pytest.raises(UserError, match=f"GenEval metadata {path}, line 2: {words}") as error:
        read_metadata(path)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith("use evaluation_metadata.jsonl of https://github.com/djghosh13/geneval")


def test_files_without_metadata_are_refused(tmp_path):
    (tmp_path / "text.jsonl").write_text("\na photo of a dog\n")
    with pytest.raises(UserError, match="line 2: not JSON"):
        read_metadata(str(tmp_path / "text.jsonl"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="contain no prompt"):
        read_metadata(str(tmp_path / "empty.jsonl"))
    with pytest.raises(UserError, match="does not exist"):
        read_metadata(str(tmp_path / "none.jsonl"))
