"""Errors of the optimizer's Triton kernels on small inputs: logarithmic codes both ways, and the AdamW step
with each way to store its moments; units, tensors and truth as in kernel_errors.py.

The rules of the codes are those that fp8/quantize.py states, those of the step fp8/adamw.py's, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np

from ppcoat.fp8.rules import (
    DITHER_COLUMN,
    DITHER_PERIOD,
    DITHER_STEP,
    K_MAX,
    K_MIN,
    K_STEP,
    LEVELS,
    NEAR,
    NEAR_ZERO,
    SIGNED_LEVELS,
    SPREAD,
    TINY,
)

from .kernel_errors import E4M3, E5M2, HALF, codes_error, largest, numbers

FLOAT_STEPS = 8 * 2.0**-23  # relative: a few roundings of float32
CODE_ROUNDINGS = 0.01  # of a code: what a logarithm in float32 leaves open
HYPER = SimpleNamespace(lr=0.01, weight_decay=0.1, beta1=0.9, beta2=0.99, epsilon=1e-8)
STEPS, POWERS = 7, (0.5, 0.9)  # before the step: how many there were, beta1^t and beta2^t

State = dict[str, np.ndarray]


class OptimizerErrors:
    """The launchers `run` with tensors of `library`."""

    def __init__(self, library: Any, run: dict[str, Callable]) -> None:
        self.library, self.run, self.get = library, run, library.get

    def all(self) -> dict[str, float]:
        """Name of an op, perhaps with the way it was called -> its largest error."""
        return dict([*self._codecs(), *self._steps()])

    def _codecs(self) -> Iterator[tuple[str, float]]:
        rng = np.random.default_rng(3)
        rows = np.exp(rng.standard_normal([9, 100]) * np.linspace(0.05, 1.5, 9)[:, None]).astype(np.float32)
        rows[:4, ::2], rows[4] = 0.0, 0.0
        signs = rng.choice(np.float32([-1, 1]), rows.shape)
        for name, fmt in (("E4M3", E4M3), ("E5M2", E5M2)):
            for op, signed, x in (("log", False, rows), ("signed_log", True, rows * signs)):
                tensors = self.run[f"{op}_encode"](self.library.put(x), fmt)
                codes, amax, k = (self.get(tensor) for tensor in tensors)
                errors = log_codes_error(codes, amax, k, x.astype(np.float64), 0.5, fmt, signed)
                yield f"{op}_encode, {name}", errors
                want = log_decoded(codes, amax, k, fmt, signed)
                got = self.get(self.run[f"{op}_decode"](*tensors, fmt))
                hundredth = 0.01 * np.abs(want) * (2 ** (K_STEP / (k * 2**fmt.mantissa_bits)) - 1)
                yield (
                    f"{op}_decode, {name}",
                    largest(np.abs(got - want) / (hundredth + FLOAT_STEPS * amax + TINY)),
                )

    def _steps(self) -> Iterator[tuple[str, float]]:
        for name, fmt, expand, v_only in (
            *(("float32", E4M3, True, False), ("v only", E4M3, True, True), ("E5M2", E5M2, True, False)),
            *(("linear codes", E4M3, False, False), ("float32 moments", None, False, False)),
            ("v only, linear codes", E4M3, False, True),
        ):
            yield f"adamw_step, {name}", self._step_error(fmt, expand, v_only, "float32")
        yield "adamw_step, bfloat16", self._step_error(E4M3, True, False, "bfloat16")

    def _step_error(self, fmt: Any, expand: bool, v_only: bool, dtype: str) -> float:
        """A step, then one that is skipped and may change a counter only (NaN if it does more). Parameters
        are float32 with a copy in bfloat16, or bfloat16 that is rounded at random."""
        rng = np.random.default_rng(4)
        param, grad, m = rng.standard_normal([3, 5, 48], dtype=np.float32)
        grad[2] = m[2] = 0.0
        hyper = SimpleNamespace(**{**vars(HYPER), "beta1": 0.0 if v_only else HYPER.beta1})
        codecs = tuple(SimpleNamespace(fmt=fmt, expand=expand) for _ in range(2))
        states = self._states(None if v_only else m, m * m, fmt, expand)
        params = [self.library.put(param, each) for each in (dtype, "bfloat16")[: 1 + (dtype == "float32")]]
        everything = {**states, "param": dict(zip(("values", "copy"), params, strict=False))}
        runs = [self._read(everything)]
        for finite in (True, False):
            arguments = params[0], self.library.put(grad), states, codecs, hyper
            self.run["adamw_step"](*arguments, self.library.put(np.array([finite])), *params[1:])
            runs.append(self._read(everything))
        before, after, skipped = runs
        skipped["count"]["skipped"] -= 1
        if not all(
            np.array_equal(x, skipped[part][name])
            for part, state in after.items()
            for name, x in state.items()
        ):
            return math.nan
        return largest(*_step_errors(before, after, grad.astype(np.float64), hyper, fmt, expand))

    def _states(
        self, m: np.ndarray | None, v: np.ndarray, fmt: Any, expand: bool
    ) -> dict[str, dict[str, Any]]:
        """Moments as the step takes them; with expansion m is divided by the root of v as that decodes."""
        put = self.library.put
        if expand:
            states = {
                "m2": dict(zip(("codes", "amax", "k"), self.run["log_encode"](put(v), fmt), strict=True))
            }
            if m is not None:
                known = log_decoded(*(self.get(each) for each in states["m2"].values()), fmt, False)
                ratio = (m / np.sqrt(np.maximum(known, TINY))).astype(np.float32)
                encoded = self.run["signed_log_encode"](put(ratio), fmt)
                states["m1"] = dict(zip(("codes", "amax", "k"), encoded, strict=True))
        else:
            moments = {"m2": v} if m is None else {"m2": v, "m1": m}
            states = {part: {"values": put(x)} for part, x in moments.items()}
            for part, x in moments.items() if fmt else ():
                codes, scale = self.run["quantize"](put(x), fmt, x.shape[-1])
                states[part] = {"codes": codes, "scale": scale}
        states["beta_powers"] = {
            f"beta{i}": put(np.float32([power])) for i, power in zip((1, 2), POWERS, strict=True)
        }
        states["count"] = {"steps": put(np.array([STEPS])), "skipped": put(np.array([2]))}
        return states

    def _read(self, states: dict[str, dict[str, Any]]) -> dict[str, State]:
        return {
            part: {name: self.get(x).copy() for name, x in state.items()} for part, state in states.items()
        }


def _step_errors(
    before: dict[str, State], after: dict[str, State], grad: np.ndarray, hyper: Any, fmt: Any, expand: bool
) -> Iterator[Any]:
    """Of AdamW (arXiv 1711.05101) on the decoded moments: counters, powers, new moments and parameters."""
    v = decoded(before["m2"], fmt, expand, signed=False)
    m = decoded(before["m1"], fmt, expand, signed=True) if "m1" in before else grad
    if expand and "m1" in before:
        m = m * np.sqrt(np.maximum(v, TINY))
    m, v = hyper.beta1 * m + (1 - hyper.beta1) * grad, hyper.beta2 * v + (1 - hyper.beta2) * grad**2
    powers = hyper.beta1 * POWERS[0], hyper.beta2 * POWERS[1]
    update = (m / (1 - powers[0])) / (np.sqrt(v / (1 - powers[1])) + hyper.epsilon)
    yield 0.0 if after["count"]["steps"] == STEPS + 1 and after["count"]["skipped"] == 2 else math.nan
    for i, power in zip((1, 2), powers, strict=True):
        yield np.abs(after["beta_powers"][f"beta{i}"] - power) / FLOAT_STEPS
    yield _moment_error(after["m2"], v, fmt, expand, signed=False)
    if "m1" in after:
        kept = np.sqrt(np.maximum(decoded(after["m2"], fmt, expand, signed=False), TINY)) if expand else 1.0
        yield _moment_error(after["m1"], m / kept, fmt, expand, signed=True)

    values, want = after["param"]["values"], before["param"]["values"] * (1 - hyper.lr * hyper.weight_decay)
    want = want - hyper.lr * update
    allowed = 1e-4 * hyper.lr + FLOAT_STEPS * np.abs(want)
    if "copy" in after["param"]:
        yield np.abs(after["param"]["copy"] - values) / (HALF * np.abs(values) + TINY)
    else:  # to one of the two numbers of bfloat16 around it
        allowed += 2 * HALF * np.abs(want)
    yield np.abs(values - want) / allowed


def decoded(state: State, fmt: Any, expand: bool, signed: bool) -> np.ndarray:
    """A stored moment in float64."""
    if fmt is None:
        return state["values"]
    if expand:
        return log_decoded(state["codes"], state["amax"], state["k"], fmt, signed)
    return numbers(state["codes"], fmt) * state["scale"]


def _moment_error(state: State, want: np.ndarray, fmt: Any, expand: bool, signed: bool) -> float:
    if fmt is None:
        return largest(np.abs(state["values"] - want) / (FLOAT_STEPS * (1 + np.abs(want))))
    if expand:
        column = np.arange(want.shape[-1])
        dither = (column * DITHER_COLUMN + STEPS * DITHER_STEP) % DITHER_PERIOD / DITHER_PERIOD
        return log_codes_error(state["codes"], state["amax"], state["k"], want, dither, fmt, signed)
    got = decoded(state, fmt, expand, signed)
    if not signed:  # what is not zero gets the smallest number at least
        want = np.where(want > 0, np.maximum(want, numbers(np.ones(1), fmt) * state["scale"]), 0.0)
    return codes_error(got, want, state["scale"], fmt)


def log_decoded(codes: np.ndarray, amax: np.ndarray, k: np.ndarray, fmt: Any, signed: bool) -> np.ndarray:
    """Codes [G, B], amax and k [G, 1], all as stored -> values."""
    octaves = K_STEP / (k * 2.0**fmt.mantissa_bits)  # of one code
    if not signed:
        return np.where(codes > 0, amax * 2 ** ((codes - LEVELS) * octaves), 0.0)
    codes = np.where(codes >= 128, codes - 256, codes)
    size = amax / (2 ** (SIGNED_LEVELS * octaves) - 1)
    return np.sign(codes) * (2 ** (np.abs(codes) * octaves) - 1) * size


def log_codes_error(
    codes: np.ndarray, amax: np.ndarray, k: np.ndarray, x: np.ndarray, dither: Any, fmt: Any, signed: bool
) -> float:
    """Half codes between `codes` and the place of x among them; NaN if amax or k is not what the rule
    says, or a zero is none."""
    size, per_octave = np.abs(x), 2.0**fmt.mantissa_bits / K_STEP
    top = size.max(-1, keepdims=True)
    ratio = np.maximum(size / np.maximum(top, TINY), TINY)
    wanted_k = (_signed_k if signed else _k)(size / np.maximum(top, TINY), per_octave)
    bounds = (np.clip(np.floor(wanted_k * factor), K_MIN, K_MAX) for factor in (1 - 1e-5, 1 + 1e-5))
    low, high = bounds
    known = (np.abs(amax - top) <= FLOAT_STEPS * top).all() and ((low <= k) & (k <= high))[top > 0].all()
    levels = SIGNED_LEVELS if signed else LEVELS
    if signed:
        codes = np.where(codes >= 128, codes - 256, codes)
        place = k * per_octave * np.log2(1 + ratio * (2 ** (SIGNED_LEVELS / (k * per_octave)) - 1))
        signs_kept = (codes * x >= 0).all()
    else:
        place, signs_kept = levels + k * per_octave * np.log2(ratio), ((codes > 0) == (x > 0)).all()
    if not known or not signs_kept or (codes[x == 0] != 0).any():
        return math.nan
    place = (
        np.clip(place + dither - 0.5, 0.5, levels) if not signed else np.minimum(place + dither - 0.5, levels)
    )
    away = np.where(x == 0, 0.0, np.abs(np.abs(codes) - place))
    return largest(away / (0.5 + CODE_ROUNDINGS))


def _k(ratio: np.ndarray, per_octave: float) -> np.ndarray:
    """k of `log_encode`, not yet cut to a whole number: codes span from a robust minimum to amax."""
    octaves = [np.log2(row[row > 0]) if (row > 0).any() else np.zeros(1) for row in ratio]
    low = [max(row.min(), min(row.mean() - SPREAD * row.std(), -NEAR)) for row in octaves]
    return (LEVELS - 1) / per_octave / np.maximum(-np.array(low)[:, None], 1e-6)


def _signed_k(ratio: np.ndarray, per_octave: float) -> np.ndarray:
    """k of `signed_log_encode`: the shift is the harmonic mean of what is not zero."""
    inverses = np.where(ratio > 0, 1 / (ratio + NEAR_ZERO), 0.0).sum(-1, keepdims=True)
    shift = np.maximum((ratio > 0).sum(-1, keepdims=True), 1) / np.maximum(inverses, 1)
    return SIGNED_LEVELS / per_octave / np.log2(1 + 1 / shift)
