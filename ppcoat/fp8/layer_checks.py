"""The checks on first use for the ops of a FLUX block; how checks work is said in checks.py.

A kernel computes in float32 and rounds once, so it is compared with the reference on float32 copies of its
input: allowed are ROUNDINGS of the largest number of the row, and half a step of the dtype or of the codes
that come out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import paddle

from .checks import half_steps, largest, ratio
from .formats import E4M3
from .rules import TINY

ROUNDINGS = 2.0**-17  # 128 of float32: a row is summed up, and 1 - tanh(z)^2 loses digits
# A tensor core keeps 14 bits of a sum of FP8 products (DeepSeek-V3, arXiv 2412.19437, section 3.5.2).
PARTIAL_SUMS = 2.0**-11
GROUP = 128


def modulated_norm(candidate: Callable, reference: Callable) -> float:
    """Values from floats, codes by groups and codes per tensor."""
    x, shift, scale, _ = _norm_tensors()
    return largest([
        _error(candidate(each, shift, scale, *groups), reference(exact, shift, scale))
        for each, groups, exact in _forms(x, candidate is reference)
    ])  # fmt: skip


def modulated_norm_quantized(candidate: Callable, reference: Callable) -> float:
    """What the codes decode to against the values."""
    from .norm import modulated_norm as exact

    x, shift, scale, _ = _norm_tensors()
    codes = candidate(x, shift, scale, E4M3, GROUP)
    return _codes_error(codes, exact.reference(x, shift, scale))


def modulated_norm_grad(candidate: Callable, reference: Callable) -> float:
    """Gradients for the inputs of `modulated_norm`."""
    x, _, scale, dy = _norm_tensors()
    return largest([
        _error(candidate(each, scale, dy.astype(each.dtype) if not groups else dy, *groups),
               reference(exact, scale, _as_seen(dy, each, groups)))
        for each, groups, exact in _forms(x, candidate is reference)
    ])  # fmt: skip


def rms_norm_rotated(candidate: Callable, reference: Callable) -> float:
    """Values and 1 / rms."""
    x, weight, angles, _ = _head_tensors()
    pairs = zip(candidate(x, weight, angles), reference(x, weight, angles), strict=True)
    return largest([_error(got, want) for got, want in pairs])


def rms_norm_rotated_grad(candidate: Callable, reference: Callable) -> float:
    """Gradients by the input."""
    from .norm import rms_norm_rotated as forward

    x, weight, angles, dy = _head_tensors()
    y, rstd = forward.reference(x, weight, angles)
    arguments = dy, y, rstd, weight, angles
    return _error(candidate(*arguments), reference(*arguments))


def gelu(candidate: Callable, reference: Callable) -> float:
    """Values from floats, codes by groups and codes per tensor."""
    return _activation_error(candidate, reference)


def silu(candidate: Callable, reference: Callable) -> float:
    """As `gelu`."""
    return _activation_error(candidate, reference)


def gelu_grad(candidate: Callable, reference: Callable) -> float:
    """Gradients for the inputs of `gelu`."""
    return _activation_error(candidate, reference, _random([2, 3, 300], 6))


def silu_grad(candidate: Callable, reference: Callable) -> float:
    """As `gelu_grad`."""
    return _activation_error(candidate, reference, _random([2, 3, 300], 6))


def gelu_quantized(candidate: Callable, reference: Callable) -> float:
    """What the codes decode to against the values."""
    from .pointwise import gelu as exact

    x = _norm_tensors()[0]
    return _codes_error(candidate(x, E4M3, GROUP), exact.reference(x))


def gated_residual(candidate: Callable, reference: Callable) -> float:
    """Sums, and the product alone."""
    x, gate, _, y = _norm_tensors()
    return largest([_error(candidate(*each), reference(*each)) for each in ((y, gate, x), (y, gate))])


def scaled_matmul(candidate: Callable, reference: Callable) -> float:
    """Both directions, plain and with all that is added, against float64."""
    from .blocks import quantize_blocks
    from .operands import BlockMatrix, Epilogue
    from .quantize import quantize

    k, n, errors = 200, 140, []
    weight = quantize_blocks(_random([k, n], 1))
    for transpose, (deep, wide) in ((False, (k, n)), (True, (n, k))):
        codes, scale = quantize.reference(_random([70, deep], 2), E4M3, GROUP)
        down, up = _random([70, 20], 3), _random([wide, 20] if transpose else [20, wide], 4)
        for epilogue in (Epilogue(), Epilogue(_random([wide], 5), down, up)):
            got = candidate(codes, scale, BlockMatrix(*weight), transpose, epilogue)
            want, sizes = exact_product(codes, scale, weight, transpose, epilogue)
            errors.append(ratio(got.numpy() - want, PARTIAL_SUMS * sizes + TINY))
    return largest(errors)


def exact_product(
    codes: paddle.Tensor, scale: paddle.Tensor, weight: tuple[paddle.Tensor, paddle.Tensor], transpose: bool,
    epilogue: object,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """What `scaled_matmul` of these is in float64, and the sum of its terms' magnitudes."""
    from .blocks import dequantize_blocks
    from .quantize import dequantize

    def double(x: paddle.Tensor) -> np.ndarray:
        return x.astype("float32").numpy().astype(np.float64)

    x, w = double(dequantize.reference(codes, scale, E4M3, GROUP)), double(dequantize_blocks(*weight))
    terms = [(x, w.T if transpose else w)]
    if epilogue.down is not None:
        up = double(epilogue.up)
        terms.append((double(epilogue.down), up.T if transpose else up))
    bias = np.zeros(terms[0][1].shape[1]) if epilogue.bias is None else double(epilogue.bias)
    return sum(a @ b for a, b in terms) + bias, sum(np.abs(a) @ np.abs(b) for a, b in terms) + np.abs(bias)


def _activation_error(candidate: Callable, reference: Callable, dy: paddle.Tensor | None = None) -> float:
    errors = []
    for each, groups, exact in _forms(_norm_tensors()[0], candidate is reference):
        mine = () if dy is None else (dy.astype(each.dtype) if not groups else dy,)
        theirs = () if dy is None else (_as_seen(dy, each, groups),)
        errors.append(_error(candidate(each, *mine, *groups), reference(exact, *theirs)))
    return largest(errors)


def _forms(x: paddle.Tensor, plain: bool) -> Iterator[tuple[paddle.Tensor, tuple, paddle.Tensor]]:
    """An input as ops get it: tensor, (groups,) where it has codes, and its values in float32. plain: without
    16-bit floats, in which the reference rounds more than once, and a CPU does not compute."""
    from .operands import Groups
    from .quantize import dequantize, quantize

    yield x, (), x
    if not plain:
        half = x.astype("bfloat16")
        yield half, (), half.astype("float32")
    for group in (GROUP, None):
        known = x if group else paddle.nan_to_num(x)  # one NaN would be everybody's
        codes, scale = quantize.reference(known, E4M3, group)
        values = dequantize.reference(codes, scale, E4M3, group)
        yield codes, (Groups(scale, E4M3, group),), values


def _as_seen(dy: paddle.Tensor, x: paddle.Tensor, groups: tuple) -> paddle.Tensor:
    """dy in float32 after the dtype in which a version gets it."""
    return dy if groups else dy.astype(x.dtype).astype("float32")


def _error(got: paddle.Tensor, want: paddle.Tensor) -> float:
    """In units of what is allowed; NaN where a NaN came or went."""
    half = 2.0**-8 if got.dtype == paddle.bfloat16 else 0.0
    got, want = (t.astype("float32").numpy().astype(np.float64) for t in (got, want))
    bad = np.isnan(want)
    if got.shape != want.shape or (np.isnan(got) != bad).any():
        return np.nan
    got, want = np.where(bad, 0.0, got), np.where(bad, 0.0, want)
    return ratio(got - want, _float_error(want) + half * np.abs(want) + TINY)


def _codes_error(state: tuple[paddle.Tensor, paddle.Tensor], want: paddle.Tensor) -> float:
    """What codes decode to, in half steps."""
    from .quantize import dequantize

    codes, scale = state
    got = dequantize.reference(codes, scale, E4M3, GROUP).numpy().astype(np.float64)
    want = want.numpy().astype(np.float64)
    scales = np.repeat(scale.numpy().astype(np.float64), GROUP, axis=-1)[..., : want.shape[-1]]
    bad = np.isnan(scales)
    if (np.isnan(got) != bad).any() or not bad[np.isnan(want)].all():
        return np.nan
    got, want, scales = np.where(bad, 0.0, got), np.where(bad, 0.0, want), np.where(bad, 1.0, scales)
    return ratio(got - want, half_steps(want, scales, E4M3) + _float_error(want) + TINY)


def _float_error(want: np.ndarray) -> np.ndarray:
    return ROUNDINGS * np.abs(want).max(axis=-1, keepdims=True)


def _norm_tensors() -> list[paddle.Tensor]:
    """x [2, 3, 300] with a constant token, small and large ones and one with a NaN; shift, scale [2, 1, 300];
    dy of x's shape."""
    x, dy = (_random([2, 3, 300], seed).numpy() for seed in (0, 6))
    x = x * np.float32([1, 1e-3, 30])[:, None] + np.float32([1, 0, 5])[:, None]
    x[1, 1], x[1, 2, 7] = 0.0, np.nan
    return [paddle.to_tensor(x), *(_random([2, 1, 300], seed) for seed in (1, 2)), paddle.to_tensor(dy)]


def _head_tensors() -> tuple:
    """x [2, 5, 3, 12], weight [12], (cos, sin) [5, 6], dy of x's shape."""
    angles = _random([5, 6], 3)
    return (
        _random([2, 5, 3, 12], 4),
        _random([12], 5).abs() + 0.5,
        (angles.cos(), angles.sin()),
        _random([2, 5, 3, 12], 6),
    )


def _random(shape: list[int], seed: int) -> paddle.Tensor:
    return paddle.to_tensor(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))
