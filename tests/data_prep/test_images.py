"""Images are decoded and resized to independently known pixels, and unusable ones are rejected with a reason."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageFile

from data_prep.buckets import Buckets, fit
from megatron_dit.data.images import Limits, Unusable, decode
from megatron_dit.runtime.errors import UserError
from tests.helpers.image_files import photo, png, written
from tests.helpers.unusual_images import LIMITS, cases

CASES = cases()
KEPT = [name for name, case in CASES.items() if not case.reason]
RATIOS = ["1:1", "3:2", "2:3", "16:9", "9:16"]


@pytest.mark.parametrize("name", KEPT)
def test_usable_images_decode_to_the_expected_pixels(name):
    case = CASES[name]
    image = decode(case.data, LIMITS)
    assert image.mode == "RGB"
    found = np.asarray(image)
    assert found.shape == case.pixels.shape
    assert np.abs(found.astype(int) - case.pixels.astype(int)).max() <= case.tolerance


@pytest.mark.parametrize("name", [name for name in CASES if name not in KEPT])
def test_unusable_images_are_rejected_with_the_expected_reason(name):
    with pytest.raises(Unusable) as caught:
        decode(CASES[name].data, LIMITS)
    assert caught.value.reason == CASES[name].reason


def test_truncated_or_changed_files_decode_or_are_unusable():
    rng = np.random.default_rng(0)
    outcomes = set()
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        original = written(photo(), kind)
        for _ in range(60):
            data = bytearray(original[: rng.integers(1, len(original) + 1)])
            for place in rng.integers(0, min(len(data), 200), 3):
                data[place] = rng.integers(256)
            try:
                outcomes.add(decode(bytes(data), LIMITS).mode)
            except Unusable as unusable:
                outcomes.add(unusable.reason)
    assert {"RGB", "truncated", "not an image"} < outcomes


def test_limit_above_that_of_pil_reports_the_limit_of_pil():
    with pytest.raises(Unusable, match=f"^more than {2 * Image.MAX_IMAGE_PIXELS} pixels$"):
        decode(png(60000, 60000, 8, bytes(1000)), Limits(8, 4.0, 10**12))


def test_image_exactly_at_the_limits_is_accepted():
    size = decode(written(np.zeros((10, 40, 3), np.uint8)), Limits(10, 4.0, 400)).size
    assert size == (40, 10)


def test_decoding_does_not_change_pil_settings_or_print_warnings():
    code = (
        "from tests.helpers.unusual_images import LIMITS, cases\n"
        "from megatron_dit.data.images import Limits, Unusable, decode\n"
        "from PIL import Image\n"
        "most = Image.MAX_IMAGE_PIXELS\n"
        "for case in cases().values():\n"
        "    for limits in (LIMITS, Limits(1, 1e9, 10**12)):\n"
        "        try:\n"
        "            decode(case.data, limits)\n"
        "        except Unusable:\n"
        "            pass\n"
        "assert Image.MAX_IMAGE_PIXELS == most\n"
    )
    done = subprocess.run([sys.executable, "-W", "always::UserWarning", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_buckets_keep_the_area_and_the_ratio():
    buckets = Buckets.of(512, RATIOS, 16)
    assert buckets.sides[0] == (512, 512)
    assert len(buckets.sides) == len(RATIOS)
    for (height, width), ratio in zip(buckets.sides, RATIOS, strict=True):
        across, down = map(int, ratio.split(":"))
        assert height % 16 == width % 16 == 0
        assert height * width == pytest.approx(512**2, rel=0.04)
        assert width / height == pytest.approx(across / down, rel=0.05)


def test_ratios_that_round_to_the_same_sides_share_a_bucket():
    assert Buckets.of(64, ["1:1", "17:16"], 16).sides == ((64, 64),)


def test_nearest_bucket_has_the_smallest_log_ratio():
    buckets = Buckets.of(256, RATIOS, 8)
    logs = [np.log(width / height) for height, width in buckets.sides]
    for width, height in np.random.default_rng(0).integers(50, 2000, (200, 2)).tolist():
        expected = np.argmin(np.abs(np.array(logs) - np.log(width / height)))
        assert buckets.nearest(width, height) == buckets.sides[expected]


def test_ties_go_to_the_first_bucket():
    assert Buckets(((30, 40), (40, 30))).nearest(7, 7) == (30, 40)
    assert Buckets(((40, 30), (30, 40))).nearest(7, 7) == (40, 30)


@pytest.mark.parametrize(
    ("size", "ratios", "multiple", "message"),
    [
        (256, ["1x1"], 16, "aspect ratio '1x1': expected width:height"),
        (256, ["0:1"], 16, "aspect ratio '0:1': expected"),
        (256, ["-3:2"], 16, "aspect ratio '-3:2': expected"),
        (256, [], 16, "no aspect ratio given; expected at least one"),
        (8, ["1:1"], 16, "size 8: expected at least 16"),
        (256, ["1:1"], 0, "size 256: expected at least 1"),
        (64, ["100:1"], 16, "aspect ratio 100:1 at size 64: the shorter side rounds to 0"),
    ],
)
def test_invalid_sizes_and_ratios_are_rejected(size, ratios, multiple, message):
    with pytest.raises(UserError) as caught:
        Buckets.of(size, ratios, multiple)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_image_of_the_size_of_the_bucket_is_unchanged():
    np.testing.assert_array_equal(fit(Image.fromarray(photo()), (24, 32)), photo())


def test_fit_crops_the_centre():
    thirds = np.zeros((40, 120, 3), np.uint8)
    thirds[:, :40, 0] = thirds[:, 40:80, 1] = thirds[:, 80:, 2] = 255
    assert fit(Image.fromarray(thirds), (40, 40))[..., 1].min() == 255
    assert fit(Image.fromarray(thirds.transpose(1, 0, 2)), (40, 40))[..., 1].min() == 255


@pytest.mark.parametrize("factor", [0.5, 3])
def test_fit_resizes_to_cover_and_crops(factor):
    image = Image.fromarray(photo(40, 100))
    height, width = round(40 * factor), round(100 * factor)
    covering = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS)).astype(int)
    margin = (width - height) // 2
    found = fit(image, (height, height))
    assert found.dtype == np.uint8
    assert np.abs(found - covering[:, margin : margin + height]).max() <= 1
