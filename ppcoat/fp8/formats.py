"""The two FP8 formats as facts, and what the present device can do with them.

Source of the numbers: "FP8 Formats for Deep Learning" (arXiv 2209.05433), table 1. E4M3 here is the variant
without infinities (Paddle's `float8_e4m3fn`), so its largest finite value is 448.
"""

from __future__ import annotations

from dataclasses import dataclass

import paddle

from ppcoat.errors import ConfigError

MATMUL_CAPABILITY = (8, 9)  # Ada, Hopper and later multiply FP8; every device can store it


@dataclass(frozen=True)
class FP8Format:
    """One FP8 format: name, largest finite value, smallest normal and subnormal value, explicit mantissa
    bits.
    """

    name: str
    max: float
    min_normal: float
    min_subnormal: float
    mantissa_bits: int
    dtype: paddle.dtype


E4M3 = FP8Format("e4m3", 448.0, 2.0**-6, 2.0**-9, 3, paddle.float8_e4m3fn)
E5M2 = FP8Format("e5m2", 57344.0, 2.0**-14, 2.0**-16, 2, paddle.float8_e5m2)
FORMATS = {fmt.name: fmt for fmt in (E4M3, E5M2)}


def get_format(name: str) -> FP8Format:
    """`"e4m3"` or `"e5m2"` -> the format. Raises ConfigError for any other name."""
    if not isinstance(name, str) or name not in FORMATS:
        raise ConfigError(f"unknown FP8 format {name!r}; use one of {', '.join(FORMATS)}")
    return FORMATS[name]


@dataclass(frozen=True)
class FP8Support:
    """What a device does with FP8. `storage`: casts to and from it; `matmul`: multiplies it; `reason`: one
    line for people.
    """

    storage: bool
    matmul: bool
    reason: str


def fp8_support() -> FP8Support:
    """FP8 support of the current Paddle device."""
    device = paddle.get_device()
    if not device.startswith("gpu"):
        return FP8Support(True, False, f"{device}: FP8 is stored, arithmetic is float32")
    capability = paddle.device.cuda.get_device_capability()
    major_minor = f"sm_{capability[0]}{capability[1]}"
    if capability >= MATMUL_CAPABILITY:
        return FP8Support(True, True, f"{device} ({major_minor}): FP8 is stored and multiplied")
    return FP8Support(
        True, False, f"{device} ({major_minor}): FP8 is stored; FP8 matmul needs sm_89 or later"
    )
