"""The size at which a picture is trained: few sizes for many shapes, so that pictures can share a batch.

A bucket is (width, height), both multiples of the step. A picture is resized to cover its bucket and cropped
to the centre (sources.load_image); crop_share is the part of the picture that is cut off.

    "aspect"      of the sizes within 5 % of the target area, the one whose aspect is nearest; a picture that
                  is square but for half a step stays square
    "ai-toolkit"  of the four sizes around the scaled picture, the one whose area is nearest
    "square"      resolution x resolution for every picture

The target area is resolution^2, or the picture's own area where that is smaller: "aspect" enlarges a picture
by at most 5 % of its area, and only "square" by more. No rule gives more than 5 % above resolution^2.
"""

from __future__ import annotations

import math
from functools import lru_cache

from ppcoat.config.schema import BucketRule
from ppcoat.errors import ConfigError

Size = tuple[int, int]  # width, height in pixels

AREA_TOLERANCE = 0.05
MOST_CROP = 0.25  # "aspect" leaves the target area rather than crop more than this share


def default_step(resolution: int, rule: BucketRule) -> int:
    """Pixels between bucket sides: 64, below 512 px an eighth of the resolution in multiples of 16, at least
    16.

    "ai-toolkit": 64, or the resolution if that is smaller.
    """
    if rule == "ai-toolkit":
        return min(64, resolution)
    return max(16, min(64, resolution // 8 // 16 * 16))


@lru_cache(maxsize=4096)
def bucket_size(
    width: int, height: int, resolution: int, rule: BucketRule = "aspect", step: int | None = None
) -> Size:
    """Width and height of an upright picture in pixels -> (width, height) of its bucket.

    step: pixels between bucket sides; None: default_step. Raises ConfigError for a step above the resolution
    and for an unknown rule.
    """
    step = default_step(resolution, rule) if step is None else step
    if step > resolution:
        raise ConfigError(
            f"bucket_step: came {step}, wanted at most the resolution {resolution}; lower it or leave it out"
        )
    if rule == "square":
        return resolution, resolution
    if rule not in _RULES:
        raise ConfigError(f"bucket_rule: came {rule!r}, wanted square, {' or '.join(_RULES)}")
    return _RULES[rule](width, height, resolution, step)


def crop_share(width: int, height: int, bucket: Size) -> float:
    """Part of the picture, 0..1, that is cut off when it is resized to cover the bucket."""
    scale = max(bucket[0] / width, bucket[1] / height)
    return 1 - (bucket[0] * bucket[1]) / (scale * width * scale * height)


def crop_box(width: int, height: int, bucket: Size) -> tuple[float, float, float, float]:
    """What is left of the picture when it is resized to cover the bucket and cropped to the centre: left,
    top, width, height, as parts 0..1 of its sides."""
    scale = max(bucket[0] / width, bucket[1] / height)
    wide, high = bucket[0] / (scale * width), bucket[1] / (scale * height)
    return (1 - wide) / 2, (1 - high) / 2, wide, high


def _nearest_aspect(width: int, height: int, resolution: int, step: int) -> Size:
    """Our rule "aspect". A picture only a few steps wide may have no size within 5 % of the area that crops
    at most MOST_CROP. It gets the size whose sides are nearest to the ideal ones, measured by the worse of
    the two; the aspect decides ties."""
    target = min(width * height, resolution**2)
    scale = math.sqrt(target / (width * height))
    ideal = width * scale / step, height * scale / step  # sides in steps
    units = target / step**2
    most = units * (1 + AREA_TOLERANCE)
    side = math.isqrt(math.floor(most))
    if side and abs(ideal[0] - ideal[1]) < 0.5:
        return side * step, side * step
    near = [
        (i, j)
        for i in range(max(1, math.floor(ideal[0] / 2)), math.ceil(ideal[0] * 2) + 1)
        for j in range(
            max(1, math.ceil(units * (1 - AREA_TOLERANCE) / i)),
            math.floor(most / i) + 1,
        )
    ]

    def off_aspect(sides: Size) -> tuple[float, float]:
        aspect = abs(math.log(sides[0] / sides[1]) - math.log(width / height))
        return round(aspect, 9), abs(math.log(sides[0] * sides[1] / units))

    if near:
        i, j = min(near, key=off_aspect)
        if crop_share(width, height, (i, j)) <= MOST_CROP:
            return i * step, j * step

    def worse_side(sides: Size) -> tuple[float, tuple[float, float]]:
        worse = max(abs(math.log(side / wanted)) for side, wanted in zip(sides, ideal, strict=True))
        return round(worse, 9), off_aspect(sides)

    around = [(i, j) for i, j in _around(*ideal) if i * j <= most]
    # a side shorter than one step becomes one step, and the area limits the other side
    longest = max(1, math.floor(units))
    i, j = min(around or [(longest, 1) if width > height else (1, longest)], key=worse_side)
    return i * step, j * step


def _nearest_area(width: int, height: int, resolution: int, step: int) -> Size:
    """ai-toolkit's rule (its toolkit/buckets.py): area first, so that 3:2 at 512 becomes 576 x 448. For a
    picture that is less than a step wide its rule bounds no area; here the other side is bounded."""
    target = min(width * height, resolution**2)
    scale = math.sqrt(target / (width * height))
    i, j = width * scale / step, height * scale / step
    sizes = [
        (a * step, b * step)
        for a in (math.floor(i), math.ceil(i))
        for b in (math.floor(j), math.ceil(j))
        if a > 0 and b > 0 and a * b * step**2 <= resolution**2
    ]
    if not sizes:
        longest = max(1, resolution**2 // step**2)
        return tuple(min(max(1, math.floor(side)), longest) * step for side in (i, j))
    return min(sizes, key=lambda size: abs(size[0] * size[1] - target))


def _around(i: float, j: float) -> list[Size]:
    """Whole sides around the ideal ones, at least one step each."""
    return [
        (a, b)
        for a in {max(1, math.floor(i)), max(1, math.ceil(i))}
        for b in {max(1, math.floor(j)), max(1, math.ceil(j))}
    ]


_RULES = {"aspect": _nearest_aspect, "ai-toolkit": _nearest_area}
