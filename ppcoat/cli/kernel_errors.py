"""Errors of the Triton kernels on small inputs, in units of what the formats allow (1.0 passes): those of the
FP8 codecs and of a FLUX block; kernel_optimizer_errors.py has the optimizer's.

Truth is numpy in float64 on the numbers that a kernel is given. Nothing here imports Paddle: tensors are
those of a library (kernel_library.py). Widths are no multiples of a group or a tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from ppcoat.fp8.operands import BlockMatrix, Epilogue, Groups
from ppcoat.fp8.rules import GELU_CUBIC, GELU_LINEAR, NORM_EPSILON

E4M3, E5M2 = (SimpleNamespace(mantissa_bits=bits) for bits in (3, 2))  # all that a launcher asks of a format
GROUP = 128
ROUNDINGS = 2.0**-17  # of float32, as a share of a row's largest number; see fp8/layer_checks.py
PARTIAL_SUMS = 2.0**-11  # what a tensor core cuts off a sum of FP8 products
HALF = 2.0**-8  # half a step of bfloat16, relative
SHAPE = [2, 2, 300]


@dataclass(frozen=True)
class Form:
    """An input as the ops of a block get it: floats, or codes with (groups,). values: what it stands for,
    float64; dtype: of what comes out."""

    name: str
    x: Any
    groups: tuple[Groups, ...]
    values: np.ndarray
    dtype: str


class BlockErrors:
    """The launchers `run` with tensors of `library`, each op once for each way in which it gets its input."""

    def __init__(self, library: Any, run: dict[str, Callable]) -> None:
        self.library, self.run, self.get = library, run, library.get
        self.rng = np.random.default_rng(0)

    def all(self) -> dict[str, float]:
        """Name of an op, perhaps with the way it was called -> its largest error."""
        return dict(
            [*self._codecs(), *self._norms(), *self._rotations(), *self._pointwise(), *self._products()]
        )

    def _codecs(self) -> Iterator[tuple[str, float]]:
        for name, fmt, group, dtype in (
            *(("float32", E4M3, GROUP, "float32"), ("bfloat16", E4M3, GROUP, "bfloat16")),
            *(("per tensor", E4M3, None, "bfloat16"), ("E5M2", E5M2, GROUP, "bfloat16")),
            ("E5M2 per tensor", E5M2, None, "float32"),
        ):
            x = self._random([6, 300], dtype)
            codes, scale = self.run["quantize"](x, fmt, group)
            decoded, spread = self._decoded(codes, scale, fmt), self._spread(scale, 300)
            yield f"quantize, {name}", codes_error(decoded, self.get(x), spread, fmt)
            again = self.run["dequantize"](codes, scale, fmt, group, dtype)
            yield f"dequantize, {name}", self._error(again, decoded)

    def _norms(self) -> Iterator[tuple[str, float]]:
        for form in self._forms():
            dy = self._random(SHAPE, form.dtype)
            shift, scale = (self._random([2, 1, 300], form.dtype) for _ in range(2))
            value, gradient = layer_norm(form.values, *map(self.get, (shift, scale, dy)))
            got = self.run["modulated_norm"](form.x, shift, scale, *form.groups)
            yield f"modulated_norm, {form.name}", self._error(got, value)
            got = self.run["modulated_norm_grad"](form.x, scale, dy, *form.groups)
            yield f"modulated_norm_grad, {form.name}", self._error(got, gradient)
            if not form.groups:
                codes, sizes = self.run["modulated_norm_quantized"](form.x, shift, scale, E4M3, GROUP)
                yield f"modulated_norm_quantized, {form.name}", self._codes_error(codes, sizes, value)

    def _rotations(self) -> Iterator[tuple[str, float]]:
        for dtype in ("float32", "bfloat16"):
            x, dy = (self._random([2, 3, 2, 16], dtype) for _ in range(2))
            weight = self.library.put(self.rng.uniform(0.5, 1.5, [16]).astype(np.float32), dtype)
            angles = self.rng.standard_normal([3, 8]) * 3
            angles = tuple(self.library.put(part(angles).astype(np.float32)) for part in (np.cos, np.sin))
            y, rstd = self.run["rms_norm_rotated"](x, weight, angles)
            exact = rms_norm(self.get(x), self.get(weight), [self.get(angle) for angle in angles])
            yield (
                f"rms_norm_rotated, {dtype}",
                largest(self._error(y, exact), self._error(rstd, exact_rstd(self.get(x)))),
            )
            got = self.run["rms_norm_rotated_grad"](dy, y, rstd, weight, angles)
            arguments = [self.get(each) for each in (dy, y, weight, *angles)]
            want = rms_norm_gradient(*arguments, exact_rstd(self.get(x)))
            yield f"rms_norm_rotated_grad, {dtype}", self._error(got, want)

    def _pointwise(self) -> Iterator[tuple[str, float]]:
        for form in self._forms():
            dy, x = self._random(SHAPE, form.dtype), form.values
            for name, linear, cubic in (("gelu", 2 * GELU_LINEAR, GELU_CUBIC), ("silu", 1.0, 0.0)):
                p = 1 / (1 + np.exp(-linear * (x + cubic * x**3)))
                slope = p * (1 + x * (1 - p) * linear * (1 + 3 * cubic * x**2))
                yield f"{name}, {form.name}", self._error(self.run[name](form.x, *form.groups), x * p)
                got = self.run[f"{name}_grad"](form.x, dy, *form.groups)
                yield f"{name}_grad, {form.name}", self._error(got, self.get(dy) * slope)
                if name == "gelu" and not form.groups:
                    codes, sizes = self.run["gelu_quantized"](form.x, E4M3, GROUP)
                    yield f"gelu_quantized, {form.name}", self._codes_error(codes, sizes, x * p)
        for dtype in ("float32", "bfloat16"):
            y, x, gate = (self._random(shape, dtype) for shape in (SHAPE, SHAPE, [2, 1, 300]))
            product = self.get(y) * self.get(gate)
            errors = [self._error(self.run["gated_residual"](y, gate, x), product + self.get(x)),
                      self._error(self.run["gated_residual"](y, gate), product)]  # fmt: skip
            yield f"gated_residual, {dtype}", largest(*errors)

    def _products(self) -> Iterator[tuple[str, float]]:
        weight, stored = self._weight(200, 140)
        for name, transpose in (("y = x W", False), ("dx = dy W^T", True)):
            w = stored.T if transpose else stored
            deep, wide = w.shape
            codes, scale = self.run["quantize"](self._random([70, deep], "float32"), E4M3, GROUP)
            x = self._decoded(codes, scale, E4M3)
            got = self.run["scaled_matmul"](codes, scale, weight, transpose)
            yield name, self._product_error(got, [(x, w)])
            for dtype in ("float32", "bfloat16"):
                bias, down, up = (self._random(shape, dtype) for shape in
                                  ([wide], [70, 20], [wide, 20] if transpose else [20, wide]))  # fmt: skip
                added = Epilogue(bias, down, up)
                got = self.run["scaled_matmul"](codes, scale, weight, transpose, added, dtype)
                lora = self.get(down), self.get(up).T if transpose else self.get(up)
                terms = [(x, w), lora, (np.ones([70, 1]), self.get(bias)[None])]
                yield f"{name}, bias and LoRA in {dtype}", self._product_error(got, terms)

    def _forms(self) -> Iterator[Form]:
        for name, fmt, group, dtype in (
            *(("FP8", E4M3, GROUP, "float32"), ("FP8 per tensor", E4M3, None, "bfloat16")),
            ("E5M2", E5M2, GROUP, "bfloat16"),
        ):
            codes, scale = self.run["quantize"](self._random(SHAPE, dtype), fmt, group)
            yield Form(
                name, codes, (Groups(scale, fmt, group, dtype),), self._decoded(codes, scale, fmt), dtype
            )
        for dtype in ("float32", "bfloat16"):
            x = self._random(SHAPE, dtype)
            yield Form(dtype, x, (), self.get(x), dtype)

    def _random(self, shape: list[int], dtype: str) -> Any:
        return self.library.put(self.rng.standard_normal(shape, dtype=np.float32), dtype)

    def _weight(self, k: int, n: int) -> tuple[BlockMatrix, np.ndarray]:
        """A stored weight and its values."""
        matrix = random_weight(self.library, self.rng, k, n)
        scale = np.repeat(np.repeat(self.get(matrix.scale), GROUP, 0)[:k], GROUP, 1)[:, :n]
        return matrix, numbers(self.get(matrix.codes), E4M3) * scale

    def _decoded(self, codes: Any, scale: Any, fmt: Any) -> np.ndarray:
        return numbers(self.get(codes), fmt) * self._spread(scale, codes.shape[-1])

    def _spread(self, scale: Any, width: int) -> np.ndarray:
        """Scales of groups -> one for each number; that of a tensor, of one element, stays."""
        scale = self.get(scale)
        return scale if scale.shape == (1,) else np.repeat(scale, GROUP, axis=-1)[..., :width]

    def _codes_error(self, codes: Any, scale: Any, want: np.ndarray) -> float:
        decoded = self._decoded(codes, scale, E4M3)
        return codes_error(decoded, want, self._spread(scale, want.shape[-1]), E4M3)

    def _error(self, got: Any, want: np.ndarray) -> float:
        """Roundings of a row's largest number, and the last one to the dtype of `got`."""
        if list(got.shape) != list(want.shape):
            return math.nan
        allowed = ROUNDINGS * np.abs(want).max(-1, keepdims=True) + self._half(got) * np.abs(want)
        return float((np.abs(self.get(got) - want) / allowed).max())

    def _product_error(self, got: Any, terms: list[tuple[np.ndarray, np.ndarray]]) -> float:
        want, sizes = sum(a @ b for a, b in terms), sum(np.abs(a) @ np.abs(b) for a, b in terms)
        allowed = PARTIAL_SUMS * sizes + self._half(got) * np.abs(want)
        return float((np.abs(self.get(got) - want) / allowed).max())

    def _half(self, got: Any) -> float:
        return HALF if str(got.dtype).endswith("bfloat16") else 0.0


def random_weight(library: Any, rng: np.random.Generator, k: int, n: int) -> BlockMatrix:
    """Codes and scales [k, n] as stored; no code is NaN."""
    codes = rng.integers(0, 126, [k, n], dtype=np.uint8) + 128 * rng.integers(0, 2, [k, n], np.uint8)
    scale = np.exp2(rng.integers(-12, -8, [-(-k // GROUP), -(-n // GROUP)])).astype(np.float32)
    return BlockMatrix(library.put(codes), library.put(scale))


def numbers(codes: np.ndarray, fmt: Any) -> np.ndarray:
    """Bits of E4M3 or E5M2 -> float64; NaN and infinities do not occur."""
    bits, bias = fmt.mantissa_bits, 7 if fmt.mantissa_bits == 3 else 15
    size, sign = codes.astype(np.int64) & 127, np.where(codes >= 128, -1.0, 1.0)
    exponent, mantissa = np.maximum(size >> bits, 1), size & ((1 << bits) - 1)
    return sign * (mantissa + (size >> bits > 0) * 2**bits) * np.exp2(exponent - float(bias + bits))


def codes_error(decoded: np.ndarray, want: np.ndarray, scales: np.ndarray, fmt: Any) -> float:
    """Half steps of the format between what was decoded and what should have been encoded."""
    lowest = -6 if fmt.mantissa_bits == 3 else -14  # exponent of the smallest normal number
    binade = np.floor(np.log2(np.maximum(np.abs(want) / scales, 2.0**lowest)))
    half_step = 2.0 ** (binade - fmt.mantissa_bits - 1) * scales
    return float(
        (np.abs(decoded - want) / (half_step + ROUNDINGS * np.abs(want).max(-1, keepdims=True))).max()
    )


def layer_norm(x: np.ndarray, shift: np.ndarray, scale: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, ...]:
    """Modulated LayerNorm and its gradient by x."""
    centred = x - x.mean(-1, keepdims=True)
    rstd = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + NORM_EPSILON)
    xhat, g = centred * rstd, dy * (1 + scale)
    gradient = rstd * (g - g.mean(-1, keepdims=True) - xhat * (g * xhat).mean(-1, keepdims=True))
    return xhat * (1 + scale) + shift, gradient


def exact_rstd(x: np.ndarray) -> np.ndarray:
    """1 / root mean square of each head."""
    return 1 / np.sqrt((x**2).mean(-1, keepdims=True) + NORM_EPSILON)


def rms_norm(x: np.ndarray, weight: np.ndarray, angles: list[np.ndarray]) -> np.ndarray:
    """RMSNorm, then each pair (a, b) turned."""
    return turned(x * exact_rstd(x) * weight, *angles)


def rms_norm_gradient(
    dy: np.ndarray, y: np.ndarray, weight: np.ndarray, cos: np.ndarray, sin: np.ndarray, rstd: np.ndarray
) -> np.ndarray:
    """By x, from y = rms_norm(x) as it was kept."""
    xhat, g = turned(y, cos, -sin) / weight, turned(dy, cos, -sin) * weight
    return rstd * (g - xhat * (g * xhat).mean(-1, keepdims=True))


def turned(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """[B, tokens, heads, dim], angles [tokens, dim / 2]."""
    pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * (cos + 1j * sin)[:, None]
    return np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)


def largest(*errors: Any) -> float:
    """Of numbers and arrays; NaN if one is NaN."""
    return float(np.max([np.max(each) for each in errors]))
