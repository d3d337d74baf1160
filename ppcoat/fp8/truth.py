"""The float64 truth of every FP8 op: inputs from a seed, what the op must give for them, and how far off a
version may be. The check on first use (backend.py), `doctor`, `benchmark kernels` and the tests read it.

An op has one generator of cases, under its name in CASES. A case is its name in the benchmark, the arguments
of one call, and a function: result -> error in units of what is allowed; 1.0 passes, NaN fails. Truth is
NumPy in float64 on the numbers that the op is given, after their rounding to its dtype.

The ops of a block and weights in 4 bits come here, codecs and AdamW in truth_codecs.py. A version of them
computes in float32 and rounds once: allowed are ROUNDINGS of the largest number of the row, and half a step
of the dtype that comes out. Nothing here imports Paddle: tensors are those of a library, PaddleTensors unless
another is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from . import truth_codecs as codecs
from .backend import Unsuited
from .formats import (
    E4M3,
    E5M2,
    FP4_BLOCK,
    FP4_CUBIC,
    FP4_OCTAVE,
    FP4_ONE,
    FP4_ZERO,
    GELU_CUBIC,
    GELU_LINEAR,
    HASH_FIRST,
    HASH_HIGH,
    HASH_SECOND,
    HASH_SEED,
    NF4_BLOCK,
    NF4_LEVELS,
    NF4_OUTER,
    NORM_EPSILON,
    TINY,
    BlockMatrix,
    Epilogue,
    Groups,
)
from .truth_codecs import FLOAT_STEPS, GROUP, HALF, largest

ROUNDINGS = 2.0**-17  # 128 of float32: a row is summed up, and 1 - tanh(z)^2 loses digits
# A tensor core keeps 14 bits of a sum of FP8 products (DeepSeek-V3, arXiv 2412.19437, section 3.5.2).
PARTIAL_SUMS = 2.0**-11

Case = tuple[str, tuple, Callable[[Any], float]]


def errors(op: str, run: Callable, library: Any = None) -> dict[str, float]:
    """Name of a case in the benchmark -> the largest error of `run`, a version of `op`, in units of what is
    allowed. Cases that it does not take (Unsuited) are left out."""
    found: dict[str, float] = {}
    for name, arguments, error_of in CASES[op](Inputs(library or PaddleTensors())):
        try:
            result = run(*arguments)
        except Unsuited:
            continue
        with np.errstate(all="ignore"):
            found[name] = largest(found.get(name, 0.0), error_of(result))
    return found


def largest_error(op: str, run: Callable) -> float:
    """Of all cases; NaN where none was taken."""
    found = errors(op, run)
    return largest(*found.values()) if found else math.nan


class PaddleTensors:
    """What the cases ask of a library. `benchmark kernels` has the same for torch."""

    def put(self, values: np.ndarray, dtype: str | None = None) -> Any:
        """A tensor in `dtype` or the array's own, on the current device."""
        import paddle

        tensor = paddle.to_tensor(values)
        return tensor if dtype is None else tensor.astype(dtype)

    def get(self, x: Any) -> np.ndarray:
        """A float64 array."""
        return x.astype("float32").numpy().astype(np.float64)

    def codec(self, fmt: Any, expand: bool, positive: bool) -> Any:
        """How `adamw_step` stores a moment."""
        from .adamw import MomentCodec

        return MomentCodec(fmt, expand, positive)


@dataclass(frozen=True)
class Form:
    """An input as the ops of a block get it: floats, or codes with (groups,). values: what it stands for,
    float64; dtype: of what comes out."""

    name: str
    x: Any
    groups: tuple[Groups, ...]
    values: np.ndarray
    dtype: str


class Inputs:
    """Tensors of a library, random ones always the same."""

    def __init__(self, library: Any) -> None:
        self.library, self.put, self.get = library, library.put, library.get
        self.rng = np.random.default_rng(0)

    def normal(self, shape: list[int], dtype: str = "float32") -> Any:
        return self.put(self.rng.standard_normal(shape, dtype=np.float32), dtype)

    def forms(self) -> Iterator[Form]:
        """x [2, 3, 300] as floats and as codes. One token is constant, others are small, large, far from 0,
        and one holds a NaN; groups and rows are no multiples of each other."""
        x = self.rng.standard_normal([2, 3, 300], dtype=np.float32)
        x = x * np.float32([1, 1e-3, 30])[:, None] + np.float32([1, 0, 5])[:, None]
        x[1, 1], x[1, 2, 7] = 0.0, np.nan
        for name, fmt, group, dtype in (
            ("FP8", E4M3, GROUP, "float32"), ("FP8 per tensor", E4M3, None, "float32"),
            ("FP8 per tensor", E4M3, None, "bfloat16"), ("E5M2", E5M2, GROUP, "bfloat16"),
        ):  # fmt: skip
            codes, scale = codecs.encode(x if group else np.nan_to_num(x), fmt, group)
            values = fmt.numbers(codes) * codecs.per_value(scale, 300, group)
            groups = Groups(self.put(scale), fmt, group, dtype)
            yield Form(name, self.put(codes), (groups,), values, dtype)
        for dtype in ("float32", "bfloat16"):
            tensor = self.put(x, dtype)
            yield Form(dtype, tensor, (), self.get(tensor), dtype)

    def near(self, want: np.ndarray, allowed: np.ndarray | float | None = None) -> Callable[[Any], float]:
        """result -> its error against `want`. allowed: before the rounding to the result's dtype."""
        if allowed is None:
            allowed = ROUNDINGS * np.abs(np.where(np.isnan(want), 0.0, want)).max(-1, keepdims=True)

        def error_of(result: Any) -> float:
            got, bad = self.get(result), np.isnan(want)
            if got.shape != want.shape or (np.isnan(got) != bad).any():
                return math.nan
            half = HALF if str(result.dtype).endswith("bfloat16") else 0.0
            return largest((np.abs(got - want) / (allowed + half * np.abs(want) + TINY))[~bad])

        return error_of

    def measured(self, error: Callable, *arguments: Any) -> Callable[[Any], float]:
        """result, some tensors -> error(their arrays, *arguments)."""
        return lambda result: error(tuple(self.get(part) for part in result), *arguments)


def modulated_norm(inputs: Inputs, gradient: bool) -> Iterator[Case]:
    """Modulation in the dtype of the values, and in float32."""
    for form in inputs.forms():
        for dtype in sorted({form.dtype, "float32"}):
            shift, scale = (inputs.normal([2, 1, 300], dtype) for _ in range(2))
            dy, factor = inputs.normal([2, 3, 300], form.dtype), 1 + inputs.get(scale)
            xhat, rstd = normalised(form.values - form.values.mean(-1, keepdims=True), NORM_EPSILON)
            if gradient:
                g = inputs.get(dy) * factor
                want = norm_gradient(xhat, rstd, g - g.mean(-1, keepdims=True))
                arguments = form.x, scale, dy, *form.groups
            else:
                want, arguments = xhat * factor + inputs.get(shift), (form.x, shift, scale, *form.groups)
            yield f"modulated_norm{'_grad' * gradient}, {form.name}", arguments, inputs.near(want)


def rms_norm(inputs: Inputs, gradient: bool) -> Iterator[Case]:
    """With and without modulation, with two epsilons."""
    for form in inputs.forms():
        for modulated, epsilon in ((False, NORM_EPSILON), (True, 1e-5)):
            weight, dy = inputs.normal([300], form.dtype), inputs.normal([2, 3, 300], form.dtype)
            scale = inputs.normal([2, 1, 300], form.dtype) if modulated else None
            factor = inputs.get(weight) * (1 + inputs.get(scale) if modulated else 1.0)
            xhat, rstd = normalised(form.values, epsilon)
            want = norm_gradient(xhat, rstd, inputs.get(dy) * factor) if gradient else xhat * factor
            arguments = form.x, weight, scale, *([dy] if gradient else []), epsilon, *form.groups
            yield f"rms_norm{'_grad' * gradient}, {form.name}", arguments, inputs.near(want)


def rms_norm_rotated(inputs: Inputs, gradient: bool) -> Iterator[Case]:
    """y and 1 / rms, one head 0 and one with a NaN; the gradient from y as it is stored."""
    for shape, epsilon in (([2, 5, 3, 12], NORM_EPSILON), ([2, 3, 2, 16], 1e-5)):
        for dtype in ("float32", "bfloat16"):
            x = inputs.rng.standard_normal(shape, dtype=np.float32)
            x[0, 0, 1], x[1, 1, 0, 3] = 0.0, np.nan
            weight = inputs.put(inputs.rng.uniform(0.5, 1.5, shape[-1:]).astype(np.float32), dtype)
            angles = inputs.rng.standard_normal([shape[1], shape[-1] // 2]) * 3
            cos, sin = np.float32(np.cos(angles)), np.float32(np.sin(angles))
            angles = inputs.put(cos), inputs.put(sin)
            x, dy = inputs.put(x, dtype), inputs.normal(shape, dtype)
            xhat, rstd = normalised(inputs.get(x), epsilon)
            factor = inputs.get(weight)
            y = rotated(xhat * factor, cos, sin)
            if gradient:
                y = inputs.put(np.float32(y), dtype)
                xhat, g = (rotated(inputs.get(each), cos, -sin) for each in (y, dy))
                arguments = dy, y, inputs.put(np.float32(rstd)), weight, angles
                error_of = inputs.near(norm_gradient(xhat / factor, rstd, g * factor))
            else:
                arguments, error_of = (x, weight, angles, epsilon), _pair(inputs.near(y), inputs.near(rstd))
            yield f"rms_norm_rotated{'_grad' * gradient}, {dtype}", arguments, error_of


def activation(inputs: Inputs, name: str, gradient: bool) -> Iterator[Case]:
    """GELU and SiLU are both x p, p the logistic function of linear * (x + cubic * x^3)."""
    linear, cubic = (2 * GELU_LINEAR, GELU_CUBIC) if name == "gelu" else (1.0, 0.0)
    for form in inputs.forms():
        x = form.values
        with np.errstate(over="ignore"):
            p = 1 / (1 + np.exp(-linear * (x + cubic * x**3)))
        if not gradient:
            yield f"{name}, {form.name}", (form.x, *form.groups), inputs.near(x * p)
            continue
        dy = inputs.normal([2, 3, 300], form.dtype)
        slope = p * (1 + x * (1 - p) * linear * (1 + 3 * cubic * x**2))
        want = inputs.near(inputs.get(dy) * slope)
        yield f"{name}_grad, {form.name}", (form.x, dy, *form.groups), want


def gated_residual(inputs: Inputs) -> Iterator[Case]:
    """The sum, and the product alone."""
    for form in inputs.forms():
        if not form.groups:
            y, gate = inputs.normal([2, 3, 300], form.dtype), inputs.normal([2, 1, 300], form.dtype)
            product = inputs.get(y) * inputs.get(gate)
            yield f"gated_residual, {form.name}", (y, gate, form.x), inputs.near(product + form.values)
            yield f"gated_residual, {form.name}", (y, gate), inputs.near(product)


def dropout(inputs: Inputs) -> Iterator[Case]:
    """Two rates, a short seed and one of 62 bits."""
    for form in inputs.forms():
        for rate, seed in ((0.1, 7), (0.5, 2**61 + 3 * 2**40 + 11)):
            if not form.groups:
                bits = hashed(np.arange(form.values.size).reshape(form.values.shape), seed)
                want = form.values * np.where(bits >= rate * 2.0**32, 1 / (1 - rate), 0.0)
                yield (
                    f"dropout, {form.name}",
                    (form.x, rate, seed),
                    inputs.near(want, FLOAT_STEPS * np.abs(want)),
                )


def scaled_matmul(inputs: Inputs) -> Iterator[Case]:
    """Both directions from one stored weight; alone, and with bias and LoRA. Few rows, more, and so many that
    a program makes two tiles; sides that end within a tile, and sides that cuBLASLt takes."""
    for m, sides, added in (
        (50, (208, 144), (None, "float32")), (70, (208, 144), (None,)), (528, (512, 512), ("bfloat16",))
    ):  # fmt: skip
        weight = random_weight(inputs.library, inputs.rng, *sides)
        tall = np.repeat(inputs.get(weight.scale), GROUP, axis=0)[: sides[0]]
        stored = E4M3.numbers(inputs.get(weight.codes)) * np.repeat(tall, GROUP, axis=1)[:, : sides[1]]
        for name, transpose in (("y = x W", False), ("dx = dy W^T", True)):
            w = stored.T if transpose else stored
            deep, wide = w.shape
            codes, scale = codecs.encode(inputs.rng.standard_normal([m, deep]), E4M3, GROUP)
            terms = [(E4M3.numbers(codes) * codecs.per_value(scale, deep, GROUP), w)]
            product = inputs.put(codes), inputs.put(scale), weight, transpose
            for dtype in added:
                if dtype is None:
                    yield name, product, _sum_of_products(inputs, terms)
                    continue
                bias, down, up = (inputs.normal(shape, dtype) for shape in
                                  ([wide], [m, 20], [wide, 20] if transpose else [20, wide]))  # fmt: skip
                lora = inputs.get(down), inputs.get(up).T if transpose else inputs.get(up)
                every = [*terms, lora, (np.ones([m, 1]), inputs.get(bias)[None])]
                arguments = *product, Epilogue(bias, down, up), dtype
                yield f"{name}, bias and LoRA in {dtype}", arguments, _sum_of_products(inputs, every)


def dequantize_fp4(inputs: Inputs) -> Iterator[Case]:
    """Every scale and every code; numbers that end within a block and within a byte."""
    sizes = np.exp2((np.arange(128.0) - FP4_ONE) / FP4_OCTAVE)
    sizes[[0, 127]] = 0.0, np.nan
    scales = np.concatenate([sizes, -sizes])
    for shape, dtype in (([48, 100], "float32"), ([3, 5, 7], "bfloat16"), ([64, 64], "bfloat16")):
        count, block = math.prod(shape), FP4_BLOCK
        codes, packed = _nibbles(inputs, count)
        scale = np.arange(-(-count // block)).astype(np.uint8)
        u = codes - FP4_ZERO
        want = (u + FP4_CUBIC * u**3) * np.repeat(scales[scale], block)[:count]
        arguments = inputs.put(packed), inputs.put(scale), shape, dtype
        want = want.reshape(shape)
        yield f"dequantize_fp4, {dtype}", arguments, inputs.near(want, FLOAT_STEPS * np.abs(want))


def dequantize_nf4(inputs: Inputs) -> Iterator[Case]:
    """Every code; scales as floats, and every code of a scale, of three sizes; one is NaN."""
    steps = [10.0 ** (i - 6) * (0.1 + 0.9 * (np.arange(2**i) + 0.5) / 2**i) for i in range(7)]
    table = np.sort(np.concatenate([[0.0, 1.0], *steps, *(-each for each in steps)]))
    for shape, dtype, double in (
        ([300, 152], "float32", True), ([300, 149], "bfloat16", True), ([8, 40], "bfloat16", False)
    ):  # fmt: skip
        count, block = math.prod(shape), NF4_BLOCK
        codes, packed = _nibbles(inputs, count)
        blocks = np.arange(-(-count // block))
        absmax = np.where(blocks == 3, np.nan, np.exp2(blocks % 9)).astype(np.float32)
        scale, roundings = (inputs.put(absmax),), 0.0
        if double:
            outer = np.float32([0.75, 3.0, np.nan])[: -(-len(blocks) // NF4_OUTER)]
            scale = inputs.put(blocks.astype(np.uint8)), inputs.put(outer), inputs.put(np.float32([0.25]))
            each = np.float64(outer)[blocks // NF4_OUTER]
            absmax = table[blocks % 256] * each + 0.25
            roundings = FLOAT_STEPS * np.repeat(np.abs(each), block)[:count].reshape(shape)
        want = np.float64(np.float32(NF4_LEVELS))[codes] * np.repeat(absmax, block)[:count]
        want = want.reshape(shape)
        allowed = FLOAT_STEPS * np.abs(want) + roundings
        yield (
            f"dequantize_nf4, {dtype}",
            (inputs.put(packed), scale, shape, dtype),
            inputs.near(want, allowed),
        )


def _nibbles(inputs: Inputs, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Random codes [count] of 4 bits, and the bytes that hold them, the first in the upper half."""
    codes = inputs.rng.integers(0, 16, count + count % 2)
    return codes[:count], (16 * codes[::2] + codes[1::2]).astype(np.uint8)


_BOTH_WAYS: dict[str, Callable] = {
    "modulated_norm": modulated_norm,
    "rms_norm": rms_norm,
    "rms_norm_rotated": rms_norm_rotated,
    "gelu": partial(activation, name="gelu"),
    "silu": partial(activation, name="silu"),
}
CASES: dict[str, Callable[[Inputs], Iterator[Case]]] = {
    "quantize": partial(codecs.quantize, inverse=False),
    "dequantize": partial(codecs.quantize, inverse=True),
    "quantize_with_residual": partial(codecs.residual, inverse=False),
    "dequantize_with_residual": partial(codecs.residual, inverse=True),
    "dequantize_blocks": codecs.dequantize_blocks,
    "dequantize_fp4": dequantize_fp4,
    "dequantize_nf4": dequantize_nf4,
    "log_encode": partial(codecs.log_encode, signed=False),
    "log_decode": partial(codecs.log_decode, signed=False),
    "signed_log_encode": partial(codecs.log_encode, signed=True),
    "signed_log_decode": partial(codecs.log_decode, signed=True),
    "adamw_step": codecs.adamw_step,
    **{name: partial(cases, gradient=False) for name, cases in _BOTH_WAYS.items()},
    **{f"{name}_grad": partial(cases, gradient=True) for name, cases in _BOTH_WAYS.items()},
    "gated_residual": gated_residual,
    "dropout": dropout,
    "scaled_matmul": scaled_matmul,
}


def random_weight(library: Any, rng: np.random.Generator, k: int, n: int) -> BlockMatrix:
    """Codes and scales of a stored weight [k, n]; no code is NaN."""
    codes = rng.integers(0, 126, [k, n], dtype=np.uint8) + 128 * rng.integers(0, 2, [k, n], np.uint8)
    scale = np.exp2(rng.integers(-12, -8, [-(-k // GROUP), -(-n // GROUP)])).astype(np.float32)
    return BlockMatrix(library.put(codes), library.put(scale))


def normalised(x: np.ndarray, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """x / rms(x), 1 / rms(x) of the last axis."""
    rstd = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)
    return x * rstd, rstd


def norm_gradient(xhat: np.ndarray, rstd: np.ndarray, g: np.ndarray) -> np.ndarray:
    """By x, where g is the gradient of xhat, and without its mean where x was centred."""
    return rstd * (g - xhat * (g * xhat).mean(-1, keepdims=True))


def rotated(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """x [B, tokens, heads, dim], angles [tokens, dim / 2]: each pair of neighbours."""
    pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * (cos + 1j * sin)[:, None]
    return np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)


def hashed(position: np.ndarray, seed: int) -> np.ndarray:
    """`random_bits` of pointwise.py, with the order that int32 have: int64 from 0 to 2^32 - 1."""
    position = position.astype(np.uint64)
    mixed = (position + (position >> np.uint64(32)) * np.uint64(HASH_HIGH)).astype(np.uint32)
    mixed = mixed + np.uint32(seed * HASH_SEED % 2**32)
    mixed = mixed ^ np.uint32((seed >> 32) * HASH_FIRST % 2**32)
    mixed = (mixed ^ (mixed >> np.uint32(16))) * np.uint32(HASH_FIRST)
    mixed = (mixed ^ (mixed >> np.uint32(15))) * np.uint32(HASH_SECOND)
    return ((mixed ^ (mixed >> np.uint32(16))) ^ np.uint32(2**31)).astype(np.int64)


def _pair(*parts: Callable[[Any], float]) -> Callable[[Any], float]:
    return lambda result: largest(*(part(each) for part, each in zip(parts, result, strict=True)))


def _sum_of_products(inputs: Inputs, terms: list[tuple[np.ndarray, np.ndarray]]) -> Callable[[Any], float]:
    sizes = sum(np.abs(a) @ np.abs(b) for a, b in terms)
    return inputs.near(sum(a @ b for a, b in terms), PARTIAL_SUMS * sizes)
