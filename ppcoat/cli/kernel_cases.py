"""The Triton kernels as `benchmark kernels` calls them: on small inputs for their errors, and at given sizes.

Nothing here imports Paddle: tensors are those of a library (kernel_library.py), and the launchers take them.
Truth is numpy in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np

from ppcoat.fp8 import (
    adamw_triton,
    log_codes_triton,
    matmul_triton,
    norm_triton,
    pointwise_triton,
    quantize_triton,
)
from ppcoat.fp8.operands import BlockMatrix, Epilogue, Groups
from ppcoat.fp8.rules import GELU_CUBIC, GELU_LINEAR, NORM_EPSILON

E4M3 = SimpleNamespace(mantissa_bits=3)  # all that a launcher asks of a format
GROUP = 128
ROUNDINGS = 2.0**-17  # of float32, as a share of a row's largest number; see fp8/layer_checks.py
PARTIAL_SUMS = 2.0**-11  # what a tensor core cuts off a sum of FP8 products
LAUNCHERS = {
    name: getattr(module, name)
    for module, names in (
        (quantize_triton, ("quantize", "dequantize")),
        (log_codes_triton, ("log_encode", "signed_log_encode")),
        (norm_triton, ("modulated_norm", "modulated_norm_quantized", "modulated_norm_grad")),
        (norm_triton, ("rms_norm_rotated", "rms_norm_rotated_grad")),
        (pointwise_triton, ("gelu", "gelu_quantized", "gelu_grad", "silu", "silu_grad", "gated_residual")),
        (matmul_triton, ("scaled_matmul",)),
        (adamw_triton, ("adamw_step",)),
    )
    for name in names
}


class Kernels:
    """The launchers with a library's tensors. connect: what is put around each launcher (tests: the
    interpreter's adapter)."""

    def __init__(
        self, library: Any, connect: Callable[[Callable], Callable] = lambda launcher: launcher
    ) -> None:
        self.library = library
        self.run = {name: connect(launcher) for name, launcher in LAUNCHERS.items()}
        self.rng = np.random.default_rng(0)

    def errors(self) -> dict[str, float]:
        """Largest error of each kernel on a small input, in units of what the formats allow (1.0 passes)."""
        return {
            **self._codec_errors(),
            **self._norm_errors(),
            **self._pointwise_errors(),
            **self._matmul_errors(),
        }

    def streaming(self, tokens: int, width: int, heads: int) -> Iterator[tuple[str, Callable, int, Any]]:
        """(name, call, bytes read and written, eager call or None) of the kernels that memory limits."""
        run, eager, gradient = self.run, self.library.eager(), self.library.gradient
        half, itemsize = self.library.half, 2 if self.library.half == "bfloat16" else 4
        x, dy = (self._random([1, tokens, width], half) for _ in range(2))
        row = self._random([1, 1, width], half)
        codes, groups = self._codes(x)
        wide, dwide = (self._random([1, tokens, 4 * width], half) for _ in range(2))
        wide_codes, wide_groups = self._codes(wide)
        head = self._random([1, tokens, heads, width // heads], half)
        angles, weight = self._angles(tokens, width // heads), self._random([width // heads], half)
        y, rstd = run["rms_norm_rotated"](head, weight, angles)
        turns = [angle.reshape([tokens, 1, -1]) for angle in angles]
        norm, rms = eager["modulated_norm"], eager["rms_norm_rotated"]
        cases = (  # name, arguments, numbers of 16 bits and of 8 in and out for each element, eager
            ("quantize", (x, E4M3, GROUP), (1, 1), None),
            ("dequantize", (codes, groups.scale, E4M3, GROUP, half), (1, 1), None),
            ("modulated_norm", (codes, row, row, groups), (1, 1), lambda: norm(x, row, row)),
            ("modulated_norm_quantized", (x, row, row, E4M3, GROUP), (1, 1), lambda: norm(x, row, row)),
            (
                "modulated_norm_grad",
                (codes, row, dy, groups),
                (2, 1),
                gradient(lambda h: norm(h, row, row), x, dy),
            ),
            ("rms_norm_rotated", (head, weight, angles), (2, 0), lambda: rms(head, weight, *turns)),
            ("rms_norm_rotated_grad", (head, y, rstd, weight, angles), (3, 0), None),
            ("gated_residual", (x, row, dy), (3, 0), lambda: eager["gated_residual"](x, row, dy)),
            ("gelu", (wide_codes, wide_groups), (1, 1), lambda: eager["gelu"](wide)),
            ("gelu_quantized", (wide, E4M3, GROUP), (1, 1), lambda: eager["gelu"](wide)),
            ("gelu_grad", (wide_codes, dwide, wide_groups), (2, 1), gradient(eager["gelu"], wide, dwide)),
            ("silu", (wide_codes, wide_groups), (1, 1), lambda: eager["silu"](wide)),
            ("silu_grad", (wide_codes, dwide, wide_groups), (2, 1), gradient(eager["silu"], wide, dwide)),
        )
        for name, arguments, (halves, bytes_), replaced in cases:
            count = tokens * width * (4 if name[:4] in ("gelu", "silu") else 1)
            nbytes = int(count * (itemsize * halves + bytes_ * (1 + 4 / GROUP)))
            yield name, lambda name=name, arguments=arguments: run[name](*arguments), nbytes, replaced

    def dense_matmul(self, tokens: int, k: int, n: int) -> Callable[[], Any]:
        """The library's 16-bit product of the same shape."""
        x, w = self._random([tokens, k], self.library.half), self._random([k, n], self.library.half)
        return lambda: self.library.matmul(x, w)

    def products(self, tokens: int, k: int, n: int) -> Iterator[tuple[str, Callable, Callable]]:
        """(name, the product alone, quantising and the product) for y = x W and dx = dy W^T."""
        weight, half = self._weight(k, n)[0], self.library.half
        for name, transpose, width in (("y = x W", False, k), ("dx = dy W^T", True, n)):
            x = self._random([tokens, width], half)

            def product(codes: Any, scale: Any, transpose: bool = transpose) -> Any:
                return self.run["scaled_matmul"](codes, scale, weight, transpose, Epilogue(), half)

            state = self.run["quantize"](x, E4M3, GROUP)
            yield (
                name,
                lambda product=product, state=state: product(*state),
                lambda product=product, x=x: product(*self.run["quantize"](x, E4M3, GROUP)),
            )

    def adamw(self, count: int) -> tuple[Callable[[], Any], int, int]:
        """A step on about `count` parameters with COAT's states -> call, parameters, bytes moved."""
        groups = -(-count // GROUP)
        zeros, grad = self.library.zeros([groups, GROUP], "float32"), self._random([groups, GROUP], "float32")
        encoded = (self.run["signed_log_encode"](zeros, E4M3), self.run["log_encode"](zeros, E4M3))
        names = ("codes", "amax", "k")
        states = {
            part: dict(zip(names, each, strict=True))
            for part, each in zip(("m1", "m2"), encoded, strict=True)
        }
        states["beta_powers"] = {
            name: self.library.put(np.ones([1], "float32")) for name in ("beta1", "beta2")
        }
        states["count"] = {name: self.library.zeros([1], "int64") for name in ("steps", "skipped")}
        codecs = tuple(SimpleNamespace(fmt=E4M3, expand=True) for _ in range(2))
        hyper = SimpleNamespace(lr=1e-4, weight_decay=0.01, beta1=0.9, beta2=0.999, epsilon=1e-8)
        finite = self.library.put(np.array([True]))
        arguments = zeros, grad, states, codecs, hyper, finite
        # parameter in and out, gradient; for both moments codes, amax and k in and out
        nbytes = groups * (GROUP * (4 + 4 + 4) + 2 * 2 * (GROUP + 4 + 1))
        return lambda: self.run["adamw_step"](*arguments), groups * GROUP, nbytes

    def _codec_errors(self) -> dict[str, float]:
        x = self._random([6, 300], "float32")
        codes, scale = self.run["quantize"](x, E4M3, GROUP)
        exact, decoded = self.library.get(x), self._decoded(codes, scale)
        again = self.library.get(self.run["dequantize"](codes, scale, E4M3, GROUP, "float32"))
        return {
            "quantize": _codes_error(decoded, exact, self._spread(scale, 300)),
            "dequantize": _error(again, decoded),
        }

    def _norm_errors(self) -> dict[str, float]:
        run, get = self.run, self.library.get
        x, dy = (self._random([2, 3, 300], "float32") for _ in range(2))
        shift, scale = (self._random([2, 1, 300], "float32") for _ in range(2))
        codes, groups = self._codes(x)
        value, _ = _layer_norm(get(x), get(shift), get(scale), get(dy))
        seen, gradient = _layer_norm(self._decoded(codes, groups.scale), get(shift), get(scale), get(dy))
        fp8 = run["modulated_norm_quantized"](x, shift, scale, E4M3, GROUP)
        head, dhead = (self._random([2, 3, 2, 16], "float32") for _ in range(2))
        weight, angles = self._random([16], "float32"), self._angles(3, 16)
        turned, back = _rms_norm(get(head), get(weight), [get(angle) for angle in angles], get(dhead))
        y, rstd = run["rms_norm_rotated"](head, weight, angles)
        return {
            "modulated_norm": _error(get(run["modulated_norm"](codes, shift, scale, groups)), seen),
            "modulated_norm_quantized": _codes_error(self._decoded(*fp8), value, self._spread(fp8[1], 300)),
            "modulated_norm_grad": _error(
                get(run["modulated_norm_grad"](codes, scale, dy, groups)), gradient
            ),
            "rms_norm_rotated": _error(get(y), turned),
            "rms_norm_rotated_grad": _error(
                get(run["rms_norm_rotated_grad"](dhead, y, rstd, weight, angles)), back
            ),
        }

    def _pointwise_errors(self) -> dict[str, float]:
        run, get = self.run, self.library.get
        x, dy = (self._random([2, 3, 300], "float32") for _ in range(2))
        codes, groups = self._codes(x)
        found, values = {}, self._decoded(codes, groups.scale)
        for name, linear, cubic in (("gelu", 2 * GELU_LINEAR, GELU_CUBIC), ("silu", 1.0, 0.0)):
            p = 1 / (1 + np.exp(-linear * (values + cubic * values**3)))
            slope = p * (1 + values * (1 - p) * linear * (1 + 3 * cubic * values**2))
            found[name] = _error(get(run[name](codes, groups)), values * p)
            found[f"{name}_grad"] = _error(get(run[f"{name}_grad"](codes, dy, groups)), get(dy) * slope)
        exact = get(x) / (1 + np.exp(-2 * GELU_LINEAR * (get(x) + GELU_CUBIC * get(x) ** 3)))
        fp8 = run["gelu_quantized"](x, E4M3, GROUP)
        found["gelu_quantized"] = _codes_error(self._decoded(*fp8), exact, self._spread(fp8[1], 300))
        gate = self._random([2, 1, 300], "float32")
        found["gated_residual"] = _error(
            get(run["gated_residual"](x, gate, dy)), get(x) * get(gate) + get(dy)
        )
        return found

    def _matmul_errors(self) -> dict[str, float]:
        weight, exact = self._weight(200, 140)
        found = {}
        for name, transpose in (("y = x W", False), ("dx = dy W^T", True)):
            w = exact.T if transpose else exact
            codes, scale = self.run["quantize"](self._random([70, w.shape[0]], "float32"), E4M3, GROUP)
            got = self.run["scaled_matmul"](codes, scale, weight, transpose)
            x = self._decoded(codes, scale)
            difference = np.abs(self.library.get(got) - x @ w)
            found[name] = float((difference / (PARTIAL_SUMS * (np.abs(x) @ np.abs(w)))).max())
        return found

    def _random(self, shape: list[int], dtype: str) -> Any:
        return self.library.put(self.rng.standard_normal(shape, dtype=np.float32), dtype)

    def _codes(self, x: Any) -> tuple[Any, Groups]:
        codes, scale = self.run["quantize"](x, E4M3, GROUP)
        return codes, Groups(scale, E4M3, GROUP, str(x.dtype).rpartition(".")[-1])

    def _angles(self, tokens: int, dim: int) -> tuple[Any, Any]:
        angles = self.rng.standard_normal([tokens, dim // 2]) * 3
        return tuple(self.library.put(part(angles).astype(np.float32)) for part in (np.cos, np.sin))

    def _weight(self, k: int, n: int) -> tuple[BlockMatrix, np.ndarray]:
        """A stored weight and its values."""
        codes = self.rng.integers(0, 126, [k, n], dtype=np.uint8) + 128 * self.rng.integers(
            0, 2, [k, n], np.uint8
        )
        scale = np.exp2(self.rng.integers(-12, -8, [-(-k // GROUP), -(-n // GROUP)])).astype(np.float32)
        spread = np.repeat(np.repeat(scale, GROUP, 0)[:k], GROUP, 1)[:, :n]
        return BlockMatrix(self.library.put(codes), self.library.put(scale)), _e4m3(codes) * spread

    def _spread(self, scale: Any, width: int) -> np.ndarray:
        return np.repeat(self.library.get(scale), GROUP, axis=-1)[..., :width]

    def _decoded(self, codes: Any, scale: Any) -> np.ndarray:
        numbers = _e4m3(self.library.get(codes).astype(np.uint8))
        return numbers * self._spread(scale, numbers.shape[-1])


def _e4m3(codes: np.ndarray) -> np.ndarray:
    """Bits uint8 -> float64."""
    size, sign = codes.astype(np.int64) & 127, np.where(codes >= 128, -1.0, 1.0)
    return sign * np.where(size < 8, size * 2.0**-9, (8 + size % 8) * np.exp2(size // 8 - 10.0))


def _layer_norm(
    x: np.ndarray, shift: np.ndarray, scale: np.ndarray, dy: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Modulated LayerNorm and its gradient by x."""
    centred = x - x.mean(-1, keepdims=True)
    rstd = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + NORM_EPSILON)
    xhat, g = centred * rstd, dy * (1 + scale)
    gradient = rstd * (g - g.mean(-1, keepdims=True) - xhat * (g * xhat).mean(-1, keepdims=True))
    return xhat * (1 + scale) + shift, gradient


def _rms_norm(
    x: np.ndarray, weight: np.ndarray, angles: list[np.ndarray], dy: np.ndarray
) -> tuple[np.ndarray, ...]:
    """RMSNorm with rotation and its gradient by x."""
    turn = (angles[0] + 1j * angles[1])[:, None]

    def turned(x: np.ndarray, turn: np.ndarray) -> np.ndarray:
        pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
        return np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)

    rstd = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + NORM_EPSILON)
    xhat, g = x * rstd, turned(dy, turn.conj()) * weight
    return turned(xhat * weight, turn), rstd * (g - xhat * (g * xhat).mean(-1, keepdims=True))


def _error(got: np.ndarray, want: np.ndarray) -> float:
    allowed = ROUNDINGS * np.abs(want).max(-1, keepdims=True)
    return float((np.abs(got - want) / allowed).max()) if got.shape == want.shape else math.nan


def _codes_error(decoded: np.ndarray, want: np.ndarray, scales: np.ndarray) -> float:
    """Half steps of E4M3 between what was decoded and what should have been encoded."""
    binade = np.floor(np.log2(np.maximum(np.abs(want) / scales, 2.0**-6)))
    allowed = 2.0 ** (binade - 4) * scales + ROUNDINGS * np.abs(want).max(-1, keepdims=True)
    return float((np.abs(decoded - want) / allowed).max())
