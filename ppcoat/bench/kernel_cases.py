"""The Triton kernels as `benchmark kernels` times them at given sizes, each beside what it replaces.

Nothing here imports Paddle: tensors are those of a library (kernel_library.py), and the launchers take them.
Their errors on small inputs are those of fp8/truth.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np

from ppcoat.fp8 import backend, truth
from ppcoat.fp8.constants import NORM_EPSILON
from ppcoat.fp8.formats import E4M3, E5M2, Epilogue, Groups

LAUNCHERS = {
    name: getattr(importlib.import_module(f"ppcoat.fp8.{module}"), name)
    for name, module in backend.MODULES["triton"].items()
}
GROUP = 128


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
        """Largest error of each kernel on small inputs, in units of what the formats allow (1.0 passes)."""
        found: dict[str, float] = {}
        for op, launcher in self.run.items():
            found |= truth.errors(op, launcher, self.library)
        return found

    def streaming(self, tokens: int, width: int, heads: int) -> Iterator[tuple[str, Callable, int, Any]]:
        """(name, call, bytes read and written, eager call or None) of the kernels that memory limits; what
        stands behind a comma in a name is the way it is called."""
        itemsize = 2 if self.library.half == "bfloat16" else 4
        cases = (
            *self._codec_cases(tokens, width, itemsize),
            *self._norm_cases(tokens, width, heads),
            *self._pointwise_cases(tokens, width),
        )
        for name, arguments, (halves, bytes_), replaced in cases:
            count = tokens * width * (4 if name[:4] in ("gelu", "silu") else 1)
            nbytes = int(count * (itemsize * halves + bytes_ * (1 + 4 / GROUP)))
            launcher = self.run[name.partition(",")[0]]
            yield name, lambda launcher=launcher, arguments=arguments: launcher(*arguments), nbytes, replaced

    # A case: name, arguments, numbers of 16 bits and of 8 in and out for each element, eager call.

    def _codec_cases(self, tokens: int, width: int, itemsize: int) -> Iterator[tuple]:
        run, half, eager = self.run, self.library.half, self.library.eager()
        x = self._random([1, tokens, width], half)
        for name, fmt, group in (
            ("", E4M3, GROUP), (", E5M2", E5M2, GROUP), (", per tensor", E4M3, None)
        ):  # fmt: skip
            codes, scale = run["quantize"](x, fmt, group)
            known = (
                group is not None and fmt is E4M3
            )  # per tensor x is read twice: for its largest value first
            yield (f"quantize{name}", (x, fmt, group), (1 if group else 2, 1),
                   (lambda: eager["quantize"](x)) if known else None)  # fmt: skip
            yield (f"dequantize{name}", (codes, scale, fmt, group, half), (1, 1),
                   partial(eager["dequantize"], codes, scale) if known else None)  # fmt: skip
        coded = 1 / (1 + 4 / GROUP)  # a byte of codes for which no scale of a group is read
        state = run["quantize_with_residual"](x, E4M3, GROUP)
        yield "quantize_with_residual", (x, E4M3, GROUP), (1, 1 + 0.5 * coded), None
        yield "dequantize_with_residual", (*state, E4M3, GROUP, half), (1, 1 + 0.5 * coded), None
        weight = truth.random_weight(self.library, self.rng, tokens, width)
        yield "dequantize_blocks", (weight.codes, weight.scale, E4M3, GROUP, half), (1, coded), None
        rows = self._random([tokens * width // GROUP, GROUP], "float32")
        for name, values in (("log", rows * rows), ("signed_log", rows)):
            state = run[f"{name}_encode"](values, E4M3)
            yield f"{name}_encode", (values, E4M3), (4 / itemsize, 1), None
            yield f"{name}_decode", (*state, E4M3), (4 / itemsize, 1), None

    def _norm_cases(self, tokens: int, width: int, heads: int) -> Iterator[tuple]:
        half, eager, gradient = self.library.half, self.library.eager(), self.library.gradient
        x, dy = (self._random([1, tokens, width], half) for _ in range(2))
        row, (codes, groups) = self._random([1, 1, width], half), self._codes(x)
        norm, rotated = eager["modulated_norm"], eager["rms_norm_rotated"]
        yield "modulated_norm", (codes, row, row, groups), (1, 1), lambda: norm(x, row, row)
        back = gradient(lambda h: norm(h, row, row), x, dy)
        yield "modulated_norm_grad", (codes, row, dy, groups), (2, 1), back
        weight, rms = row[0, 0], eager["rms_norm"]
        arguments = codes, weight, row
        yield "rms_norm", (*arguments, NORM_EPSILON, groups), (1, 1), lambda: rms(x, weight, row)
        back = gradient(lambda h: rms(h, weight, row), x, dy)
        yield "rms_norm_grad", (*arguments, dy, NORM_EPSILON, groups), (2, 1), back
        yield "gated_residual", (x, row, dy), (3, 0), lambda: eager["gated_residual"](x, row, dy)
        yield "dropout", (x, 0.1, 1), (2, 0), None

        head, dhead = (self._random([1, tokens, heads, width // heads], half) for _ in range(2))
        angles, gain = self._angles(tokens, width // heads), self._random([width // heads], half)
        y, rstd = self.run["rms_norm_rotated"](head, gain, angles)
        turns = [angle.reshape([tokens, 1, -1]) for angle in angles]
        yield (
            "rms_norm_rotated",
            (head, gain, angles),
            (2, 0),
            lambda: rotated(head, gain, *turns),
        )
        back = gradient(lambda h: rotated(h, gain, *turns), head, dhead)
        yield "rms_norm_rotated_grad", (dhead, y, rstd, gain, angles), (3, 0), back

    def _pointwise_cases(self, tokens: int, width: int) -> Iterator[tuple]:
        half, eager, gradient = self.library.half, self.library.eager(), self.library.gradient
        x, dy = (self._random([1, tokens, 4 * width], half) for _ in range(2))
        codes, groups = self._codes(x)
        for name in ("gelu", "silu"):
            yield name, (codes, groups), (1, 1), partial(eager[name], x)
            yield f"{name}_grad", (codes, dy, groups), (2, 1), gradient(eager[name], x, dy)

    def dense_matmul(self, tokens: int, k: int, n: int) -> Callable[[], Any]:
        """The library's 16-bit product of the same shape."""
        x, w = self._random([tokens, k], self.library.half), self._random([k, n], self.library.half)
        return lambda: self.library.matmul(x, w)

    def products(self, tokens: int, k: int, n: int) -> Iterator[tuple[str, Callable, Callable]]:
        """(name, the product alone, quantising and the product) for y = x W and dx = dy W^T."""
        weight, half = truth.random_weight(self.library, self.rng, k, n), self.library.half
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

    def adamw(self, count: int, v_only: bool) -> tuple[Callable[[], Any], int, int]:
        """A step on about `count` parameters with COAT's states, v_only: without a first moment -> call,
        parameters, bytes moved."""
        groups = -(-count // GROUP)
        zeros, grad = self.library.zeros([groups, GROUP], "float32"), self._random([groups, GROUP], "float32")
        encoders = {"m2": "log_encode"} if v_only else {"m1": "signed_log_encode", "m2": "log_encode"}
        names = ("codes", "amax", "k")
        states = {
            part: dict(zip(names, self.run[encoder](zeros, E4M3), strict=True))
            for part, encoder in encoders.items()
        }
        states["beta_powers"] = {
            name: self.library.put(np.ones([1], "float32")) for name in ("beta1", "beta2")
        }
        states["count"] = {name: self.library.zeros([1], "int64") for name in ("steps", "skipped")}
        codecs = tuple(SimpleNamespace(fmt=E4M3, expand=True) for _ in range(2))
        beta1 = 0.0 if v_only else 0.9
        hyper = SimpleNamespace(lr=1e-4, weight_decay=0.01, beta1=beta1, beta2=0.999, epsilon=1e-8)
        finite = self.library.put(np.array([True]))
        arguments = zeros, grad, states, codecs, hyper, finite
        # parameter in and out, gradient; for each moment codes, amax and k in and out
        nbytes = groups * (GROUP * (4 + 4 + 4) + len(encoders) * 2 * (GROUP + 4 + 1))
        return lambda: self.run["adamw_step"](*arguments), groups * GROUP, nbytes

    def _random(self, shape: list[int], dtype: str) -> Any:
        return self.library.put(self.rng.standard_normal(shape, dtype=np.float32), dtype)

    def _codes(self, x: Any) -> tuple[Any, Groups]:
        codes, scale = self.run["quantize"](x, E4M3, GROUP)
        return codes, Groups(scale, E4M3, GROUP, str(x.dtype).rpartition(".")[-1])

    def _angles(self, tokens: int, dim: int) -> tuple[Any, Any]:
        angles = self.rng.standard_normal([tokens, dim // 2]) * 3
        return tuple(self.library.put(part(angles).astype(np.float32)) for part in (np.cos, np.sin))
