"""The Triton kernels as `benchmark kernels` times them at given sizes, each beside what it replaces.

Nothing here imports Paddle: tensors are those of a library (kernel_library.py), and the launchers take them.
Their errors on small inputs are those of fp8/truth.py.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np

from ppcoat.fp8 import backend, truth
from ppcoat.fp8.formats import (
    E4M3,
    E5M2,
    FP4_BLOCK,
    INT8,
    NF4_BLOCK,
    NF4_OUTER,
    NORM_EPSILON,
    Epilogue,
    Groups,
)

LAUNCHERS = {
    name: getattr(importlib.import_module(f"ppcoat.fp8.{module}"), name)
    for name, module in backend.MODULES["triton"].items()
}
GROUP = 128
MARGIN = 2  # emptying the caches lasts at least this many times as long as starting what is timed
FROM_16_BITS = ", from 16 bits"
# AdamW steps: format of the moments (None: float32), logarithmic, beta1, dtype of the parameters, of a copy
# that is written beside them, whether each group has its own learning rate.
ADAMW = {
    "adamw_step": (E4M3, True, 0.9, "float32", None, False),
    "adamw_step, v only": (E4M3, True, 0.0, "float32", None, False),
    "adamw_step, 16-bit copy": (E4M3, True, 0.9, "float32", "bfloat16", True),
    "adamw_step, linear codes": (E4M3, False, 0.9, "float32", None, False),
    "adamw_step, float32 moments": (None, False, 0.9, "bfloat16", None, False),
}


@dataclass(frozen=True)
class Streaming:
    """A call that memory limits. name: the kernel's, behind a comma the way it is called; nbytes: read and
    written; eager: what it replaces, None where nothing does."""

    name: str
    call: Callable[[], Any]
    elements: int
    nbytes: int
    eager: Callable[[], Any] | None = None


class Kernels:
    """The launchers with a library's tensors. connect: what is put around each launcher (tests: the
    interpreter's adapter)."""

    def __init__(
        self, library: Any, connect: Callable[[Callable], Callable] = lambda launcher: launcher
    ) -> None:
        self.library = library
        self.run = {name: connect(launcher) for name, launcher in LAUNCHERS.items()}
        self.rng = np.random.default_rng(0)

    def timed(self, call: Callable[[], Any], runs: int) -> tuple[float, float]:
        """Median ms of a call on the device, and of starting it on the host; the first call, which builds
        kernels, is left out.

        Before each the caches are emptied, by as many writes as last longer than starting the call: so the
        device waits for nothing between its launches.
        """
        library = self.library
        call()
        host_ms = float(np.median([self._starting_ms(call) for _ in range(min(3, runs))]))
        writes = 1 + int(MARGIN * host_ms / max(self._elapsed_ms(library.flush), 0.01))
        times = [self._elapsed_ms(call, lambda: library.flush(writes)) for _ in range(runs)]
        return float(np.median(times)), host_ms

    def in_a_row_ms(self, call: Callable[[], Any], runs: int) -> float:
        """Median ms of a call among calls one after another, as in training: the device's time, or the host's
        where that is longer. The first is left out."""
        call()
        events = [self.library.event() for _ in range(runs + 1)]
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        events[-1].synchronize()
        pairs = zip(events[:-1], events[1:], strict=True)
        return float(np.median([began.elapsed_time(ended) for began, ended in pairs]))

    def _starting_ms(self, call: Callable[[], Any]) -> float:
        event = self.library.event()
        event.record()
        event.synchronize()
        began = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - began)

    def _elapsed_ms(self, call: Callable[[], Any], before: Callable[[], Any] = lambda: None) -> float:
        began, ended = self.library.event(), self.library.event()
        before()
        began.record()
        call()
        ended.record()
        ended.synchronize()
        return began.elapsed_time(ended)

    def errors(self) -> dict[str, float]:
        """Largest error of each kernel on small inputs, in units of what the formats allow (1.0 passes)."""
        found: dict[str, float] = {}
        for op, launcher in self.run.items():
            found |= truth.errors(op, launcher, self.library)
        return found

    def streaming(self, tokens: int, width: int, heads: int) -> Iterator[Streaming]:
        """The kernels that memory limits, the optimizer's step apart."""
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
            yield Streaming(name, partial(launcher, *arguments), count, nbytes, replaced)

    # A case: name, arguments, numbers of 16 bits and of 8 in and out for each element, eager call.

    def _codec_cases(self, tokens: int, width: int, itemsize: int) -> Iterator[tuple]:
        run, half, eager = self.run, self.library.half, self.library.eager()
        x = self._random([1, tokens, width], half)
        for name, fmt, group in (
            ("", E4M3, GROUP), (", E5M2", E5M2, GROUP), (", per tensor", E4M3, None),
            (", INT8", INT8, GROUP),
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
        yield from self._four_bit_cases(tokens, width)
        rows = self._random([tokens * width // GROUP, GROUP], "float32")
        for name, values in (("log", rows * rows), ("signed_log", rows)):
            state = run[f"{name}_encode"](values, E4M3)
            yield f"{name}_encode", (values, E4M3), (4 / itemsize, 1), None
            yield f"{name}_decode", (*state, E4M3), (4 / itemsize, 1), None

    def _four_bit_cases(self, tokens: int, width: int) -> Iterator[tuple]:
        """bytes of codes and scales count without the scale of a group of 128."""
        half, shape, count, coded = self.library.half, [tokens, width], tokens * width, 1 / (1 + 4 / GROUP)

        def random(size: int) -> Any:
            return self.library.put(self.rng.integers(0, 127, [size], dtype=np.uint8))

        codes, blocks = random(count // 2), -(-count // NF4_BLOCK)
        scale = random(count // FP4_BLOCK)
        yield "dequantize_fp4", (codes, scale, shape, half), (1, (0.5 + 1 / FP4_BLOCK) * coded), None
        outer = self._random([-(-blocks // NF4_OUTER)], "float32")
        double = random(blocks), outer, self._random([1], "float32")
        bytes_ = (0.5 + (1 + 4 / NF4_OUTER) / NF4_BLOCK) * coded
        yield "dequantize_nf4", (codes, double, shape, half), (1, bytes_), None

    def _norm_cases(self, tokens: int, width: int, heads: int) -> Iterator[tuple]:
        half, eager, gradient = self.library.half, self.library.eager(), self.library.gradient
        x, dy = (self._random([1, tokens, width], half) for _ in range(2))
        row, (codes, groups) = self._random([1, 1, width], half), self._codes(x)
        norm, rotated, rms = eager["modulated_norm"], eager["rms_norm_rotated"], eager["rms_norm"]
        weight = row[0, 0]
        norm_back = gradient(lambda h: norm(h, row, row), x, dy)
        rms_back = gradient(lambda h: rms(h, weight, row), x, dy)
        for way, h, how, (halves, bytes_) in (("", codes, (groups,), (0, 1)), (FROM_16_BITS, x, (), (1, 0))):
            forward, back = (halves + 1, bytes_), (halves + 2, bytes_)
            yield f"modulated_norm{way}", (h, row, row, *how), forward, lambda: norm(x, row, row)
            yield f"modulated_norm_grad{way}", (h, row, dy, *how), back, norm_back
            yield f"rms_norm{way}", (h, weight, row, NORM_EPSILON, *how), forward, lambda: rms(x, weight, row)
            yield f"rms_norm_grad{way}", (h, weight, row, dy, NORM_EPSILON, *how), back, rms_back
        yield "gated_residual", (x, row, dy), (3, 0), lambda: eager["gated_residual"](x, row, dy)
        yield "gated_residual, product alone", (x, row), (2, 0), None
        yield "dropout", (x, 0.1, 2**61 + 1), (2, 0), None

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
            forward, back = partial(eager[name], x), gradient(eager[name], x, dy)
            yield name, (codes, groups), (1, 1), forward
            yield f"{name}_grad", (codes, dy, groups), (2, 1), back
            yield f"{name}{FROM_16_BITS}", (x,), (2, 0), forward
            yield f"{name}_grad{FROM_16_BITS}", (x, dy), (3, 0), back

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

    def adamw(self, name: str, count: int) -> Streaming:
        """The step of ADAMW of that name on about `count` parameters."""
        fmt, expand, beta1, dtype, copied, rows = ADAMW[name]
        groups, library = -(-count // GROUP), self.library
        zeros, grad = library.zeros([groups, GROUP], "float32"), self._random([groups, GROUP], "float32")
        states = {
            part: self._moment(zeros, fmt, expand, part) for part in ("m1", "m2") if beta1 or part == "m2"
        }
        moved = sum(
            x.element_size() * math.prod(x.shape) for state in states.values() for x in state.values()
        )
        states["beta_powers"] = {each: library.put(np.ones([1], "float64")) for each in ("beta1", "beta2")}
        states["count"] = {each: library.zeros([1], "int64") for each in ("steps", "skipped")}
        codecs = tuple(library.codec(fmt, expand, positive) for positive in (False, True))
        lr = library.put(np.full([groups, 1], 1e-4, "float32")) if rows else 1e-4
        hyper = SimpleNamespace(lr=lr, weight_decay=0.01, beta1=beta1, beta2=0.999, epsilon=1e-8)
        param, stored = (zeros if dtype == "float32" else library.zeros([groups, GROUP], dtype)), None
        if copied:
            stored = library.zeros([groups, GROUP], copied)
        finite = library.put(np.array([True]))
        call = partial(self.run["adamw_step"], param, grad, states, codecs, hyper, finite, stored)
        # parameter and moments in and out, gradient in, the copy out, rates in
        widths = 2 * (4 if dtype == "float32" else 2) + 4 + (2 if copied else 0)
        nbytes = groups * (GROUP * widths + 4 * rows) + 2 * moved
        return Streaming(name, call, groups * GROUP, nbytes)

    def _moment(self, zeros: Any, fmt: Any, expand: bool, part: str) -> dict[str, Any]:
        if fmt is None:
            return {"values": self.library.zeros(list(zeros.shape), "float32")}
        if not expand:
            return dict(zip(("codes", "scale"), self.run["quantize"](zeros, fmt, GROUP), strict=True))
        encoder = "log_encode" if part == "m2" else "signed_log_encode"
        return dict(zip(("codes", "amax", "k"), self.run[encoder](zeros, fmt), strict=True))

    def _random(self, shape: list[int], dtype: str) -> Any:
        return self.library.put(self.rng.standard_normal(shape, dtype=np.float32), dtype)

    def _codes(self, x: Any) -> tuple[Any, Groups]:
        codes, scale = self.run["quantize"](x, E4M3, GROUP)
        return codes, Groups(scale, E4M3, GROUP, str(x.dtype).rpartition(".")[-1])

    def _angles(self, tokens: int, dim: int) -> tuple[Any, Any]:
        angles = self.rng.standard_normal([tokens, dim // 2]) * 3
        return tuple(self.library.put(part(angles).astype(np.float32)) for part in (np.cos, np.sin))
