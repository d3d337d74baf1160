"""The two FP8 formats and INT8 as facts, the numbers that references and kernels share, what ops take beside
plain tensors (how codes are read, a stored weight, what is added to a product), and what the present device
can do with FP8.

Kernels read the same objects with tensors of another library, too: importing this does not import Paddle.

Source of the numbers: "FP8 Formats for Deep Learning" (arXiv 2209.05433), table 1. E4M3 here is the variant
without infinities (Paddle's `float8_e4m3fn`), so its largest finite value is 448.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ppcoat.errors import ConfigError

if TYPE_CHECKING:
    import paddle

MATMUL_CAPABILITY = (8, 9)  # Ada, Hopper and later multiply FP8; every device can store it

# Numbers that references and kernels share. Those of the optimizer's codecs come first; what they mean is
# said where they are used: `log_encode` and `signed_log_encode` in quantize.py, `dither` in adamw.py.
TINY = 2.0**-126  # smallest normal float32: smaller numbers are flushed to zero on many devices
LARGE = 2.0**127  # brings every normal number above 1
K_STEP = 16  # the exponent k is stored in 16ths, as COAT
K_MIN, K_MAX = 4, 255  # in 16ths, so that it fits a byte
LEVELS, SIGNED_LEVELS = 255, 127  # codes of positive values without and with a sign
# The robust minimum lies SPREAD standard deviations of log x below its mean, or NEAR octaves below amax if
# that is further down: NEAR octaves cost little (steps of 3 %), so anything within them is always covered.
SPREAD, NEAR = 5.0, 12.0
NEAR_ZERO = 1e-3  # of amax: magnitudes below this count as this when the shift is chosen
# Steps of the dither sequence from one step to the next and from one column to the next, in 65536ths: the
# golden section, and a fraction that keeps neighbouring columns apart.
DITHER_STEP, DITHER_COLUMN, DITHER_PERIOD = 40503, 25717, 65536

RESIDUAL_STEPS = 120.0  # steps of a 4-bit residual per unit of relative distance: 7.5 / (1/16)
# Of the hash that random numbers come from (`random_bits` in pointwise.py): what the upper half of a position
# and a seed are multiplied by, and the two factors of the mixer.
HASH_HIGH, HASH_SEED, HASH_FIRST, HASH_SECOND = 0x632BE5AB, 0x9E3779B9, 0x7FEB352D, 0x846CA68B

NORM_EPSILON = 1e-6  # of all norms of FLUX
GELU_LINEAR, GELU_CUBIC = 0.7978845608028654, 0.044715  # sqrt(2 / pi), and the factor of x^3

# Weights in 4 bits, four_bit.py. NF4: values of a block, scales that share one, the levels of the codes.
NF4_BLOCK, NF4_OUTER = 64, 256
NF4_LEVELS = (
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
)  # fmt: skip
# FP4: values of a block; the code c has the level u + FP4_CUBIC * u^3, u = c - FP4_ZERO; sizes of a scale,
# how many of them make an octave, and which of them is 1.
FP4_BLOCK, FP4_ZERO, FP4_CUBIC = 16, 8.125, 0.00625
FP4_SIZES, FP4_OCTAVE, FP4_ONE = 126, 6, 120


@dataclass(frozen=True)
class FP8Format:
    """One FP8 format: name, largest finite value, smallest normal and subnormal value, explicit mantissa
    bits, name of the dtype in Paddle and in torch.
    """

    name: str
    max: float
    min_normal: float
    min_subnormal: float
    mantissa_bits: int
    dtype: str

    def numbers(self, codes: np.ndarray) -> np.ndarray:
        """Bits of finite numbers, any shape -> the numbers, float64."""
        bits, bias = self.mantissa_bits, 7 if self.mantissa_bits == 3 else 15
        size, sign = codes.astype(np.int64) & 127, np.where(codes >= 128, -1.0, 1.0)
        exponent, mantissa = np.maximum(size >> bits, 1), size & ((1 << bits) - 1)
        return sign * (mantissa + (size >> bits > 0) * 2**bits) * np.exp2(exponent - float(bias + bits))

    def half_steps(self, x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """Half the distance between the two codes around each x / scale, times scale; float64."""
        _, exponent = np.frexp(np.abs(x) / scale)
        exponent = np.maximum(exponent - 1, np.log2(self.min_normal))
        return 2.0 ** (exponent - self.mantissa_bits - 1) * scale


E4M3 = FP8Format("e4m3", 448.0, 2.0**-6, 2.0**-9, 3, "float8_e4m3fn")
E5M2 = FP8Format("e5m2", 57344.0, 2.0**-14, 2.0**-16, 2, "float8_e5m2")
FORMATS = {fmt.name: fmt for fmt in (E4M3, E5M2)}


@dataclass(frozen=True)
class IntegerFormat:
    """Whole numbers from -max to max, two's complement in a byte: `quantize` and `dequantize` take it as they
    take an FP8Format. mantissa_bits: of the largest number; kernels tell formats apart by it.
    """

    name: str
    max: float
    mantissa_bits: int
    dtype: str

    def numbers(self, codes: np.ndarray) -> np.ndarray:
        """Bits, any shape -> the numbers, float64."""
        return codes.astype(np.uint8).view(np.int8).astype(np.float64)

    def half_steps(self, x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """Half the distance between the two codes around each x / scale, times scale; float64."""
        return 0.5 * scale + 0.0 * x


INT8 = IntegerFormat("int8", 127.0, 7, "int8")


def get_format(name: str) -> FP8Format:
    """`"e4m3"` or `"e5m2"` -> the format. Raises ConfigError for any other name."""
    if not isinstance(name, str) or name not in FORMATS:
        raise ConfigError(f"unknown FP8 format {name!r}; use one of {', '.join(FORMATS)}")
    return FORMATS[name]


@dataclass(frozen=True)
class Groups:
    """How to read codes uint8 [..., D]: `scale`, `fmt` and `group_size` as `quantize` gave and took them, and
    the dtype of the values."""

    scale: paddle.Tensor
    fmt: FP8Format
    group_size: int | None
    dtype: str | paddle.dtype = "float32"


@dataclass(frozen=True)
class BlockMatrix:
    """A weight [in, out] as `quantize_blocks` gives it: codes uint8, scale float32 for 128 x 128 values."""

    codes: paddle.Tensor
    scale: paddle.Tensor


@dataclass(frozen=True)
class Epilogue:
    """What is added to a product [M, N] before it is rounded: bias [N], and down [M, rank] times `up`.

    up: [rank, N], a LoRA's B; where the weight is transposed [N, rank], its A. The LoRA's factor is in `down`
    already.
    """

    bias: paddle.Tensor | None = None
    down: paddle.Tensor | None = None
    up: paddle.Tensor | None = None


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
    import paddle

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
