"""The float64 truth of the codecs and of the AdamW step; truth.py says how a case is read.

Codes follow the rules that `quantize`, `log_encode` and `signed_log_encode` state in quantize.py. Allowed are
half a step of the code around the exact value, and the few roundings of float32 before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from . import formats
from .formats import (
    E4M3,
    E5M2,
    FORMATS,
    INT8,
    K_MAX,
    K_MIN,
    K_STEP,
    LEVELS,
    NEAR_ZERO,
    SIGNED_LEVELS,
    TINY,
    FP8Format,
)

if TYPE_CHECKING:
    from .truth import Case, Inputs

FLOAT_STEPS, HALF = 8 * 2.0**-23, 2.0**-8  # relative: a few roundings of float32, half a step of bfloat16
GROUP, CODE_ROUNDINGS = 128, 0.01  # of a code: what a logarithm in float32 leaves open
STEPS, SKIPPED, POWERS = 7, 2, (0.5, 0.9)  # before the step: counters, beta1^t and beta2^t
LINEAR = [  # name in the benchmark, format, group size, dtype of the floats; "": the dtype is the name
    (name or dtype, fmt, group, dtype)
    for name, fmt, group in (
        ("", E4M3, GROUP), ("per tensor", E4M3, None), ("E5M2", E5M2, GROUP), ("E5M2 per tensor", E5M2, None),
        ("INT8", INT8, GROUP),
    )
    for dtype in ("float32", "bfloat16")
]  # fmt: skip
MOMENTS = (  # name in the benchmark, format, expansion, without a first moment, dtype of the parameters
    ("float32", E4M3, True, False, "float32"), ("v only", E4M3, True, True, "float32"),
    ("E5M2", E5M2, True, False, "float32"), ("linear codes", E4M3, False, False, "float32"),
    ("float32 moments", None, False, False, "float32"), ("bfloat16", E4M3, True, False, "bfloat16"),
    ("v only, linear codes", E4M3, False, True, "float32"),
)  # fmt: skip

State = dict[str, np.ndarray]


def quantize(inputs: Inputs, inverse: bool) -> Iterator[Case]:
    """Decoded codes lie within half a step of x; a group is NaN exactly where it holds what is not finite.
    The inverse is codes * scale, rounded once."""
    for name, fmt, group, dtype in LINEAR:
        for width in (300, 256):
            rows = edge_rows(width)[: None if group else -2]  # one NaN would be everybody's
            if inverse:
                codes, scale = encode(rows, fmt, group)
                want = fmt.numbers(codes) * per_value(scale, width, group)
                arguments = inputs.put(codes), inputs.put(scale), fmt, group, dtype
                roundings = 0.0 if dtype == "bfloat16" else FLOAT_STEPS * np.abs(want)
                yield f"dequantize, {name}", arguments, inputs.near(want, roundings)
            else:
                x = inputs.put(rows, dtype)
                error_of = inputs.measured(linear_error, inputs.get(x), fmt, group)
                yield f"quantize, {name}", (x, fmt, group), error_of


def residual(inputs: Inputs, inverse: bool) -> Iterator[Case]:
    """Residuals are the nearest step to the place of x, cut to 1..15; the inverse is rounded once."""
    for name, fmt, group, dtype in LINEAR:
        if fmt is INT8:
            continue
        rows = edge_rows(256)[: None if group else -2]
        codes, scale = encode(rows, fmt, group)
        coarse = fmt.numbers(codes) * per_value(scale, 256, group)
        packed = inputs.rng.integers(0, 256, [len(rows), 128], dtype=np.uint8)
        if inverse:
            want = coarse * (1 + (_unpacked(packed) - 8) / formats.RESIDUAL_STEPS)
            arguments = *map(inputs.put, (codes, scale, packed)), fmt, group, dtype
            yield (
                f"dequantize_with_residual, {name}",
                arguments,
                inputs.near(want, FLOAT_STEPS * np.abs(want)),
            )
        else:
            x = inputs.put(rows, dtype)
            error_of = inputs.measured(_residual_error, inputs.get(x), fmt, group)
            yield f"quantize_with_residual, {name}", (x, fmt, group), error_of


def _unpacked(packed: np.ndarray) -> np.ndarray:
    """uint8 [..., D / 2] -> the 4-bit numbers [..., D], float64."""
    packed = packed.astype(np.uint8)
    return np.stack([packed & 15, packed >> 4], -1).reshape([*packed.shape[:-1], -1]).astype(np.float64)


def _residual_error(got: tuple, x: np.ndarray, fmt: FP8Format, group: int | None) -> float:
    """Of codes and scale as `linear_error`, and of the residual in half steps from where x lies; NaN where a
    code of 0 has another residual than 8."""
    codes, scale, packed = got
    coarse, steps = fmt.numbers(codes) * per_value(scale, x.shape[-1], group), _unpacked(packed)
    if steps.shape != x.shape or (steps[np.isfinite(coarse) & (codes % 128 == 0)] != 8).any():
        return math.nan
    read = np.abs(coarse) > TINY * 2.0**16  # of smaller ones float32 and devices lose the difference
    place = (x[read] / coarse[read] - 1) * formats.RESIDUAL_STEPS + 8
    # x / coarse is rounded to float32, and 1 is taken off again
    error = np.abs(steps[read] - np.clip(place, 1, 15)) / (0.5 + 2 * formats.RESIDUAL_STEPS * FLOAT_STEPS)
    return largest(error, linear_error((codes, scale), x, fmt, group))


def dequantize_blocks(inputs: Inputs) -> Iterator[Case]:
    """Whole blocks and ragged ones, a block of zeros and one that is not finite; scales are powers of two."""
    for shape, dtype in (([140, 130], "float32"), ([128, 256], "bfloat16"), ([5, 136], "bfloat16")):
        codes = inputs.rng.integers(0, 126, shape, dtype=np.uint8)
        codes += 128 * inputs.rng.integers(0, 2, shape, dtype=np.uint8)
        scale = np.exp2(inputs.rng.integers(-12, 9, [-(-side // GROUP) for side in shape])).astype(np.float32)
        scale[0, 1], scale[-1, 0] = 0.0, np.nan if shape[0] > GROUP else 1.0
        factors = np.repeat(np.repeat(scale, GROUP, axis=0)[: shape[0]], GROUP, axis=1)[:, : shape[1]]
        want = E4M3.numbers(codes) * factors.astype(np.float64)
        arguments = inputs.put(codes), inputs.put(scale), E4M3, GROUP, dtype
        yield f"dequantize_blocks, {dtype}", arguments, inputs.near(want, 0.0)


def log_encode(inputs: Inputs, signed: bool) -> Iterator[Case]:
    """Rows of many spreads, with zeros, one very small value, NaN and infinity; two kinds of dither."""
    for shape, spread in (([24, 128], 4.0), ([9, 100], 1.5)):
        x = np.exp(inputs.rng.standard_normal(shape) * np.linspace(0.05, spread, shape[0])[:, None])
        x[:4, ::2], x[4], x[5, 7], x[6, 3], x[7, 5] = 0.0, 0.0, 1e-12, np.nan, np.inf
        x = np.float32(x * inputs.rng.choice([-1.0, 1.0], shape) if signed else x)
        for fmt in FORMATS.values():
            for dither in (0.5, np.linspace(0, 0.99, shape[1], dtype=np.float32)[None]):
                given = dither if isinstance(dither, float) else inputs.put(dither)
                error_of = inputs.measured(log_codes_error, np.float64(x), dither, fmt, signed)
                name = f"{'signed_' * signed}log_encode, {fmt.name.upper()}"
                yield name, (inputs.put(x), fmt, given), error_of


def log_decode(inputs: Inputs, signed: bool) -> Iterator[Case]:
    """Every code with every k that occurs, rows of zeros and NaN. Allowed: a hundredth of a code's step."""
    for fmt in FORMATS.values():
        smallest = SIGNED_LEVELS * K_STEP / 2**fmt.mantissa_bits / math.log2(1 + 1 / NEAR_ZERO)
        k = np.arange(int(smallest) if signed else K_MIN, K_MAX + 1).astype(np.uint8)[:, None]
        low, high = (-SIGNED_LEVELS, SIGNED_LEVELS) if signed else (0, LEVELS)
        codes = np.tile(np.arange(low, high + 1), [len(k), 1]).astype(np.uint8)
        amax = np.exp(inputs.rng.standard_normal([len(k), 1])).astype(np.float32)
        amax[3], amax[5] = 0.0, np.nan
        want, step = log_decoded(codes, amax, k, fmt, signed), K_STEP / (k * 2.0**fmt.mantissa_bits)
        # the shift of signed codes: 1 + |x| / shift is rounded before 1 is taken off again
        shift = np.minimum(amax, amax / (2 ** (SIGNED_LEVELS * step) - 1)) if signed else 0.0 * amax
        allowed = 0.01 * np.abs(want) * (2**step - 1) + FLOAT_STEPS * shift
        arguments = *map(inputs.put, (codes, amax, k)), fmt
        yield f"{'signed_' * signed}log_decode, {fmt.name.upper()}", arguments, inputs.near(want, allowed)


def adamw_step(inputs: Inputs) -> Iterator[Case]:
    """A step with each way to store moments, then one that is skipped and may change a counter only.

    Parameters are float32 with a copy in bfloat16, or bfloat16 that is rounded stochastically. Gradient and
    moments of row 2 are 0.
    """
    for name, fmt, expand, v_only, dtype in MOMENTS:
        yield from _two_steps(inputs, f"adamw_step, {name}", Storage(fmt, expand), v_only, dtype)


def _two_steps(inputs: Inputs, name: str, storage: Storage, v_only: bool, dtype: str) -> Iterator[Case]:
    put, rng = inputs.put, np.random.default_rng(4)
    param, grad = rng.standard_normal([2, 5, 48], dtype=np.float32)
    grad[2] = 0.0
    beta1, codec = 0.0 if v_only else 0.9, inputs.library.codec
    hyper = SimpleNamespace(lr=0.01, weight_decay=0.1, beta1=beta1, beta2=0.99, epsilon=1e-8)
    codecs = tuple(codec(storage.fmt, storage.expand, positive) for positive in (False, True))
    states = {part: storage.random(rng, part == "m1") for part in ("m1", "m2")[v_only:]}
    states["beta_powers"] = {"beta1": np.float64([POWERS[0]]), "beta2": np.float64([POWERS[1]])}
    states["count"] = {"steps": np.array([STEPS]), "skipped": np.array([SKIPPED])}
    states = {part: {each: put(x) for each, x in state.items()} for part, state in states.items()}
    params = [put(param, each) for each in (dtype, "bfloat16")[: 1 + (dtype == "float32")]]

    def read() -> dict[str, State]:
        everything = {**states, "param": dict(zip(("values", "copy"), params, strict=False))}
        return {k: {each: inputs.get(x).copy() for each, x in v.items()} for k, v in everything.items()}

    def step_error(_: Any) -> float:
        return largest(*_step_errors(before, read(), np.float64(grad), hyper, storage))

    def skip_error(_: Any) -> float:
        before["count"]["skipped"] += 1
        pairs = ((x, before[part][each]) for part, state in read().items() for each, x in state.items())
        return 0.0 if all(np.array_equal(got, want) for got, want in pairs) else math.nan

    for finite, error_of in ((True, step_error), (False, skip_error)):
        before = read()
        arguments = params[0], put(grad), states, codecs, hyper, put(np.array([finite])), *params[1:]
        yield name, arguments, error_of


def _step_errors(
    before: dict[str, State], after: dict[str, State], grad: np.ndarray, hyper: Any, storage: Storage
) -> Iterator[Any]:
    """Of AdamW (arXiv 1711.05101) on the decoded moments: counters, powers, new moments and parameters."""
    m1, m2 = grad, storage.decoded(before["m2"], False)
    if "m1" in before:
        m1 = storage.decoded(before["m1"], True) * storage.root(before["m2"])
    m1, m2 = hyper.beta1 * m1 + (1 - hyper.beta1) * grad, hyper.beta2 * m2 + (1 - hyper.beta2) * grad**2
    powers = hyper.beta1 * POWERS[0], hyper.beta2 * POWERS[1]
    update = (m1 / (1 - powers[0])) / (np.sqrt(m2 / (1 - powers[1])) + hyper.epsilon)
    counts = after["count"]["steps"].item(), after["count"]["skipped"].item()
    yield 0.0 if counts == (STEPS + 1, SKIPPED) else math.nan
    for name, power in zip(("beta1", "beta2"), powers, strict=True):
        yield np.abs(after["beta_powers"][name] - power) / FLOAT_STEPS
    yield storage.error(after["m2"], m2, False)
    if "m1" in after:
        yield storage.error(after["m1"], m1 / storage.root(after["m2"]), True)

    values, want = after["param"]["values"], before["param"]["values"] * (1 - hyper.lr * hyper.weight_decay)
    want = want - hyper.lr * update
    allowed = 1e-4 * hyper.lr + FLOAT_STEPS * np.abs(want)
    if "copy" in after["param"]:
        yield np.abs(after["param"]["copy"] - values) / (HALF * np.abs(values) + TINY)
    else:  # to one of the two numbers of bfloat16 around it
        allowed += 2 * HALF * np.abs(want)
    yield np.abs(values - want) / allowed


@dataclass(frozen=True)
class Storage:
    """How both moments are stored, as MomentCodec in adamw.py; signed: the first one."""

    fmt: FP8Format | None
    expand: bool

    def random(self, rng: np.random.Generator, signed: bool) -> State:
        """Of [5, 48] moments, row 2 zero."""
        size = np.exp(rng.standard_normal([5, 1])).astype(np.float32) * (np.arange(5) != 2)[:, None]
        values = rng.standard_normal([5, 48], dtype=np.float32) if signed else rng.random([5, 48], np.float32)
        if self.fmt is None:
            return {"values": values * size}
        if not self.expand:
            return dict(zip(("codes", "scale"), encode(values * size, self.fmt, 48), strict=True))
        low, high = (-SIGNED_LEVELS, SIGNED_LEVELS) if signed else (0, LEVELS)
        codes = rng.integers(low, high + 1, [5, 48])
        k = rng.integers(50, 250, [5, 1]).astype(np.uint8)
        return {"codes": (codes * (size > 0)).astype(np.uint8), "amax": np.float32(size), "k": k}

    def decoded(self, state: State, signed: bool) -> np.ndarray:
        if self.fmt is None:
            return state["values"]
        if self.expand:
            return log_decoded(state["codes"], state["amax"], state["k"], self.fmt, signed)
        return self.fmt.numbers(state["codes"]) * state["scale"]

    def root(self, m2: State) -> np.ndarray | float:
        """What the first moment is divided by: with expansion the root of the second as that decodes."""
        return np.sqrt(np.maximum(self.decoded(m2, False), TINY)) if self.expand else 1.0

    def error(self, state: State, want: np.ndarray, signed: bool) -> float:
        roundings = FLOAT_STEPS * (1 + np.abs(want))
        if self.expand:
            place = np.arange(48) * formats.DITHER_COLUMN + STEPS * formats.DITHER_STEP
            dither = place % formats.DITHER_PERIOD / formats.DITHER_PERIOD
            return log_codes_error(tuple(state.values()), want, dither, self.fmt, signed)
        if self.fmt is not None:
            if not signed:  # what is not zero gets the smallest number at least
                want = np.where(want > 0, np.maximum(want, self.fmt.min_subnormal * state["scale"]), 0.0)
            roundings = FLOAT_STEPS * (np.abs(want) + np.abs(want).max(-1, keepdims=True))
            roundings = roundings + self.fmt.half_steps(want, state["scale"])
        return largest(np.abs(self.decoded(state, signed) - want) / roundings)


def encode(x: np.ndarray, fmt: FP8Format, group: int | None) -> tuple[np.ndarray, np.ndarray]:
    """x [..., D] -> codes uint8 [..., D], scale float32, as `quantize` in quantize.py."""
    with np.errstate(invalid="ignore", over="ignore"):
        size = np.abs(x.astype(np.float64))
        if group is not None:
            ends = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % group)]
            amax = np.pad(size, ends).reshape(*x.shape[:-1], -1, group).max(-1)
        else:
            amax = size.max().reshape(1)
        scale = (np.maximum(amax / fmt.max, TINY) + amax * 0.0).astype(np.float32)
        last = {E4M3: 126, E5M2: 123, INT8: 127}[fmt]  # of the largest finite one
        table = fmt.numbers(np.arange(last + 1))
        codes = np.searchsorted((table[1:] + table[:-1]) / 2, size / per_value(scale, x.shape[-1], group))
    codes = np.where(np.signbit(x), -codes if fmt is INT8 else codes + 128, codes)
    return codes.astype(np.uint8), scale


def per_value(scale: np.ndarray, width: int, group: int | None) -> np.ndarray:
    """Scales of groups -> one for each value, float64; that of a tensor, [1], stays."""
    scale = scale.astype(np.float64)
    return scale if group is None else np.repeat(scale, group, axis=-1)[..., :width]


def edge_rows(width: int) -> np.ndarray:
    """float32 [9, width]: of four sizes, constant, zero, subnormal, ordinary; the last two not all finite."""
    rows = np.random.default_rng(width).standard_normal([9, width])
    rows *= np.float64([1, 1e-12, 448, 1e20, 1, 1, 1e-39, 1, 1])[:, None]
    rows[4], rows[5], rows[3, ::3] = 0.7, 0.0, 0.0
    rows[7, width // 2], rows[8, 3] = np.nan, -np.inf
    return rows.astype(np.float32)


def linear_error(got: tuple, x: np.ndarray, fmt: FP8Format, group: int | None) -> float:
    """Codes and scale of x against x in half steps; NaN where a NaN came or went."""
    (codes, scale), (_, exact_scale) = got, encode(x, fmt, group)
    factors, exact_factors = (per_value(each, x.shape[-1], group) for each in (scale, exact_scale))
    decoded, bad = fmt.numbers(codes) * factors, np.isnan(exact_factors + np.zeros_like(x))
    if scale.shape != exact_scale.shape or decoded.shape != x.shape or (np.isnan(decoded) != bad).any():
        return math.nan
    allowed = fmt.half_steps(x, factors) * (1 + FLOAT_STEPS) + FLOAT_STEPS * np.abs(x) + TINY
    return largest((np.abs(decoded - x) / allowed)[~bad])


def largest(*errors: Any) -> float:
    """Of numbers and arrays; NaN if one is NaN."""
    return float(np.max([np.max(each, initial=0.0) for each in errors]))


def log_decoded(codes: np.ndarray, amax: np.ndarray, k: np.ndarray, fmt: Any, signed: bool) -> np.ndarray:
    """Codes [G, B], amax and k [G, 1], all as stored -> values in float64."""
    codes, amax, k = (np.float64(part) for part in (codes, amax, k))
    octaves = K_STEP / (k * 2.0**fmt.mantissa_bits)  # of one code
    if not signed:
        return 2 ** ((codes - LEVELS) * octaves) * amax * (codes > 0)
    codes = np.where(codes >= 128, codes - 256, codes)
    size = amax / (2 ** (SIGNED_LEVELS * octaves) - 1)
    return np.sign(codes) * (2 ** (np.abs(codes) * octaves) - 1) * size


def log_codes_error(got: tuple, x: np.ndarray, dither: Any, fmt: Any, signed: bool) -> float:
    """got: codes, amax, k. Half codes between the codes and the place of x among them; NaN where amax, k, a
    zero or a sign is not what the rule says, or the amax of a row that is not finite is not NaN."""
    finite = np.isfinite(x).all(-1)
    codes, amax, k, x = (part[finite] for part in (*got, x))
    codes, top = np.where(signed & (codes >= 128), codes - 256, codes), np.abs(x).max(-1, keepdims=True)
    ratio = np.abs(x) / np.maximum(top, TINY)
    exact_k = _exact_k(ratio, 2.0**fmt.mantissa_bits / K_STEP, signed)
    low, high = (np.clip(np.floor(exact_k * factor), K_MIN, K_MAX) for factor in (1 - 1e-5, 1 + 1e-5))
    if not (
        np.isnan(got[1][~finite]).all()
        and (np.abs(amax - top) <= FLOAT_STEPS * top).all()
        and ((low <= k) & (k <= high))[top > 0].all()
        and (codes * x >= 0).all() and not codes[x == 0].any()
        and (signed or (codes > 0)[x > 0].all())
    ):  # fmt: skip
        return math.nan
    per_octave = k * 2.0**fmt.mantissa_bits / K_STEP
    if signed:
        place = per_octave * np.log2(1 + ratio * (2 ** (SIGNED_LEVELS / per_octave) - 1)) + dither - 0.5
        place = np.minimum(place, SIGNED_LEVELS)
    else:
        place = LEVELS + per_octave * np.log2(np.maximum(ratio, TINY)) + dither - 0.5
        place = np.clip(place, 0.5, LEVELS)
    return largest(np.where(x == 0, 0.0, np.abs(np.abs(codes) - place)) / (0.5 + CODE_ROUNDINGS))


def _exact_k(ratio: np.ndarray, per_octave: float, signed: bool) -> np.ndarray:
    """k [G, 1], not yet cut to a whole number. Without a sign codes span from a robust minimum to amax; with
    one the shift is the harmonic mean of what is not zero."""
    if signed:
        inverses = np.where(ratio > 0, 1 / (ratio + NEAR_ZERO), 0.0).sum(-1, keepdims=True)
        shift = np.maximum((ratio > 0).sum(-1, keepdims=True), 1) / np.maximum(inverses, 1)
        return SIGNED_LEVELS / per_octave / np.log2(1 + 1 / shift)
    octaves = [np.log2(row[row > 0]) if (row > 0).any() else np.zeros(1) for row in ratio]
    low = [max(row.min(), min(row.mean() - formats.SPREAD * row.std(), -formats.NEAR)) for row in octaves]
    return (LEVELS - 1) / per_octave / np.maximum(-np.array(low)[:, None], 1e-6)
