"""Bucket sizes: ai-toolkit's published figures, and what our rule promises, by brute force."""

import math
import random

import pytest

from ppcoat.data.buckets import bucket_size, crop_share, default_step
from ppcoat.errors import ConfigError


@pytest.mark.parametrize(
    ("picture", "resolution", "bucket"),
    [
        ((3000, 2000), 512, (576, 448)),
        ((1920, 1080), 512, (640, 384)),
        ((1920, 1080), 768, (1024, 576)),
        ((1920, 1080), 1024, (1344, 768)),
        ((800, 600), 1024, (832, 576)),
        ((512, 512), 512, (512, 512)),
        ((1000, 40), 1024, (960, 64)),  # ideal sides 15.6 and 0.6 steps: only the upper height is above 0
        ((40, 40), 512, (64, 64)),  # smaller than a step
    ],
)
def test_ai_toolkit_figures(picture, resolution, bucket):
    """The first five are ai-toolkit's own results; the others follow its formula by hand."""
    assert bucket_size(*picture, resolution, "ai-toolkit") == bucket


@pytest.mark.parametrize(
    ("picture", "resolution", "bucket"),
    [
        ((64, 64), 64, (64, 64)),
        ((3000, 2000), 1024, (1280, 832)),  # 1.538 for 1.5, 1.6 % above the area
        ((3000, 2000), 768, (960, 640)),
        ((1920, 1080), 1024, (1344, 768)),
        ((640, 640), 1024, (640, 640)),  # not enlarged
        ((100, 100), 512, (64, 64)),  # nothing within 5 % of its area; 64 x 128 would cut off half
        ((60, 60), 64, (48, 48)),  # 32 x 112 is within 5 %, and would cut off most of it
        ((511, 511), 512, (512, 512)),  # just below its bucket: enlarged by 0.4 % of its area
        ((1020, 1020), 1024, (1024, 1024)),
        ((1000, 1012), 1024, (1024, 1024)),
        ((990, 990), 1024, (960, 960)),  # 960 x 1024 is within 5 %, and no square
        ((511, 767), 768, (512, 768)),  # not square, but just below its bucket, too
        ((2000, 2100), 512, (512, 512)),
    ],
)
def test_nearest_aspect_figures(picture, resolution, bucket):
    assert bucket_size(*picture, resolution, "aspect") == bucket


def test_no_other_size_within_five_per_cent_has_a_nearer_aspect():
    rng = random.Random(0)
    checked = 0
    for _ in range(60):
        width, height = rng.randint(600, 3000), rng.randint(600, 3000)
        got = bucket_size(width, height, 512, "aspect", 64)
        target = min(width * height, 512**2)
        inside = [
            (w, h)
            for w in range(64, 4096, 64)
            for h in range(64, 4096, 64)
            if 0.95 * target <= w * h <= 1.05 * target and w * h <= width * height
        ]
        off = [abs(math.log(w / h * height / width)) for w, h in inside]
        if got in inside:
            checked += 1
            assert off[inside.index(got)] == pytest.approx(min(off), abs=1e-8)
        else:
            assert crop_share(width, height, inside[off.index(min(off))]) > 0.25
    assert checked > 50


def test_sizes_are_multiples_of_the_step_and_hardly_enlarge():
    rng = random.Random(1)
    for _ in range(800):
        width, height, resolution = rng.randint(1, 3000), rng.randint(1, 3000), rng.choice((64, 256, 1024))
        step = default_step(resolution, "aspect")
        w, h = bucket_size(width, height, resolution)
        assert w % step == h % step == 0 and w > 0 and h > 0
        assert w * h <= max(1.05 * width * height, step**2)  # enlarged by 5 % at most
        assert w * h <= 1.05 * resolution**2
        assert bucket_size(height, width, resolution) == (h, w)  # turning the picture turns its bucket


@pytest.mark.parametrize("rule", ["aspect", "ai-toolkit"])
@pytest.mark.parametrize("picture", [(3, 4000), (4000, 3), (1, 1), (10_000, 63)])
def test_a_sliver_gets_no_more_area_than_was_asked_for(rule, picture):
    width, height = bucket_size(*picture, 64, rule)
    assert 0 < width * height <= 1.05 * 64**2


def test_crop_share_is_what_covering_and_cutting_leaves():
    assert crop_share(200, 100, (64, 64)) == pytest.approx(0.5)
    assert crop_share(300, 200, (576, 448)) == pytest.approx(1 - (576 / 448) / 1.5)
    assert crop_share(123, 77, (123 * 2, 77 * 2)) == pytest.approx(0)


def test_steps_square_and_mistakes():
    assert [default_step(r, "aspect") for r in (16, 64, 128, 256, 384, 512, 2048)] == [16] * 3 + [
        32,
        48,
        64,
        64,
    ]
    assert [default_step(r, "ai-toolkit") for r in (32, 64, 512)] == [32, 64, 64]
    assert bucket_size(1000, 10, 96, "square") == (96, 96)
    with pytest.raises(ConfigError, match="bucket_step: came 128, wanted at most the resolution 64"):
        bucket_size(100, 100, 64, "aspect", 128)
    with pytest.raises(ConfigError, match="bucket_rule: came 'kohya'"):
        bucket_size(100, 100, 64, "kohya")
