"""What every faster version of an op is compared on before it is trusted: check(candidate, reference) -> the
largest error in units of what is allowed, so that 1.0 passes.

A check has the name of its op. What is allowed follows from the formats: half a step of the code against the
exact value, one step where two versions may fall to the two sides of a limit. Cases that a version does not
take (`Unsuited`) are left out; NaN is returned where none remains or a NaN is not kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import paddle

from .backend import Unsuited
from .formats import E4M3, FORMATS, FP8Format
from .rules import K_STEP, SIGNED_LEVELS, TINY

if TYPE_CHECKING:
    from .adamw import AdamWHyper, Codecs, MomentCodec

FLOAT_STEPS = 8 * 2.0**-23  # relative: a few roundings of float32


def quantize(candidate: Callable, reference: Callable) -> float:
    """Decoded values against what was quantised, in half steps of the format; NaN and inf must stay."""
    errors = []
    for x in (_edge_rows(300), _edge_rows(256)):
        for fmt, group, dtype in (*((fmt, 128, "float32") for fmt in FORMATS.values()),
                                  (E4M3, None, "float32"), (E4M3, 128, "bfloat16")):  # fmt: skip
            rows = x if group else x[:-2]  # one NaN would be everybody's
            tensor = paddle.to_tensor(rows).astype(dtype)
            try:
                codes, scale = candidate(tensor, fmt, group)
            except Unsuited:
                continue
            errors.append(_linear_error(tensor, codes, scale, fmt, group))
    return largest(errors)


def dequantize(candidate: Callable, reference: Callable) -> float:
    """Values against the reference's, in roundings of their dtype."""
    from .quantize import quantize as op

    errors = []
    for width in (300, 256):
        x = paddle.to_tensor(_edge_rows(width)[:-2])
        for fmt, group, dtype in ((E4M3, 128, "bfloat16"), (E4M3, 128, "float32"), (E4M3, None, "float32"),
                                  (FORMATS["e5m2"], 128, "float32")):  # fmt: skip
            codes, scale = op.reference(x, fmt, group)
            try:
                got = candidate(codes, scale, fmt, group, dtype)
            except Unsuited:
                continue
            want = reference(codes, scale, fmt, group, dtype).astype("float32").numpy()
            step = 2.0**-8 if dtype == "bfloat16" else FLOAT_STEPS
            errors.append(ratio(got.astype("float32").numpy() - want, step * np.abs(want) + TINY))
    return largest(errors)


def log_encode(candidate: Callable, reference: Callable) -> float:
    """What both decode to, in steps of the codes."""
    return _encoded_error(candidate, reference, signed=False)


def signed_log_encode(candidate: Callable, reference: Callable) -> float:
    """What both decode to, in steps of the codes."""
    return _encoded_error(candidate, reference, signed=True)


def log_decode(candidate: Callable, reference: Callable) -> float:
    """Values against the reference's, in hundredths of a step of the codes."""
    return _decoded_error(candidate, reference, signed=False)


def signed_log_decode(candidate: Callable, reference: Callable) -> float:
    """Values against the reference's, in hundredths of a step of the codes."""
    return _decoded_error(candidate, reference, signed=True)


def adamw_step(candidate: Callable, reference: Callable) -> float:
    """One step for each way to store moments: parameters, counters and decoded moments; then a skipped step,
    which may change nothing but a counter."""
    from .adamw import AdamWHyper, MomentCodec

    errors = []
    for fmt, expand, beta1 in ((E4M3, True, 0.9), (E4M3, True, 0.0), (FORMATS["e5m2"], True, 0.9),
                               (E4M3, False, 0.9), (None, False, 0.9)):  # fmt: skip
        codecs = tuple(MomentCodec(fmt, expand, positive) for positive in (False, True))
        hyper = AdamWHyper(lr=0.01, weight_decay=0.1, beta1=beta1, beta2=0.99, epsilon=1e-8)
        runs = [_adamw_run(version, codecs, hyper) for version in (candidate, reference)]
        errors.append(_adamw_error(*runs, codecs, hyper.lr))
    return largest(errors)


def _edge_rows(width: int) -> np.ndarray:
    """Rows float32 [9, width]: ordinary ones of several sizes, constant, zeros, subnormal; the last two hold
    a NaN and an infinity."""
    rng = np.random.default_rng(width)
    rows = rng.standard_normal([9, width]) * np.float64(
        [[1], [1e-12], [448], [1e20], [1], [1], [1], [1], [1]]
    )
    rows[4], rows[5], rows[6] = 0.7, 0.0, rows[6] * 1e-39
    rows[3, ::3] = 0.0
    rows[7, width // 2], rows[8, 3] = np.nan, -np.inf
    return rows.astype(np.float32)


def _linear_error(
    x: paddle.Tensor, codes: paddle.Tensor, scale: paddle.Tensor, fmt: FP8Format, group: int | None
) -> float:
    from .quantize import dequantize as op

    exact = x.astype("float32").numpy().astype(np.float64)
    decoded = op.reference(codes, scale, fmt, group).numpy().astype(np.float64)
    scales = scale.numpy().astype(np.float64)
    if group is not None:
        scales = np.repeat(scales, group, axis=-1)[..., : exact.shape[-1]]
    bad = _holders_of_bad(exact, group)
    if not (np.isnan(decoded) == bad).all():
        return np.nan
    exact, decoded, scales = (np.where(bad, 0.0, each) for each in (exact, decoded, scales))
    half_step = half_steps(exact, np.where(bad, 1.0, scales), fmt)
    return ratio(decoded - exact, half_step * (1 + FLOAT_STEPS) + FLOAT_STEPS * np.abs(exact) + TINY)


def half_steps(exact: np.ndarray, scales: np.ndarray, fmt: FP8Format) -> np.ndarray:
    """Half the distance of the two codes around each number, for float64 arrays of one shape."""
    _, exponent = np.frexp(np.abs(exact) / scales)
    exponent = np.maximum(exponent - 1, np.log2(fmt.min_normal))
    return 2.0 ** (exponent - fmt.mantissa_bits - 1) * scales


def _holders_of_bad(exact: np.ndarray, group: int | None) -> np.ndarray:
    """Where the group of a value holds one that is not finite."""
    bad = ~np.isfinite(exact)
    if group is None:
        return np.full(exact.shape, bad.any())
    starts = np.arange(0, exact.shape[-1], group)
    return np.repeat(np.logical_or.reduceat(bad, starts, axis=-1), group, axis=-1)[..., : exact.shape[-1]]


def _log_rows(signed: bool) -> paddle.Tensor:
    rng = np.random.default_rng(3)
    rows = np.exp(rng.standard_normal([24, 128]) * np.linspace(0.05, 4, 24)[:, None])
    rows[:4, ::2], rows[4], rows[5, 7] = 0.0, 0.0, 1e-12
    signs = rng.choice([-1.0, 1.0], rows.shape) if signed else 1.0
    return paddle.to_tensor((rows * signs).astype(np.float32))


def _encoded_error(candidate: Callable, reference: Callable, signed: bool) -> float:
    from . import quantize as ops

    decode = (ops.signed_log_decode if signed else ops.log_decode).reference
    errors = []
    dithers = (0.5, paddle.linspace(0, 0.99, 128).unsqueeze(0))
    for fmt in FORMATS.values():
        for dither in dithers:
            x = _log_rows(signed)
            mine, want = candidate(x, fmt, dither), reference(x, fmt, dither)
            values = [decode(*state, fmt).numpy().astype(np.float64) for state in (mine, want)]
            step = log_step(values[1], want[1].numpy(), want[2].numpy(), fmt, signed)
            errors.append(ratio(values[0] - values[1], step * 1.02 + TINY))
        bad = paddle.to_tensor(np.float32([[1.0] * 15 + [value] for value in (np.nan, np.inf)]))
        errors.append(0.0 if np.isnan(decode(*candidate(bad, fmt), fmt).numpy()).all() else np.nan)
    return largest(errors)


def _decoded_error(candidate: Callable, reference: Callable, signed: bool) -> float:
    from . import quantize as ops

    encode = (ops.signed_log_encode if signed else ops.log_encode).reference
    errors = []
    for fmt in FORMATS.values():
        state = encode(_log_rows(signed), fmt)
        got, want = (version(*state, fmt).numpy().astype(np.float64) for version in (candidate, reference))
        step = log_step(want, state[1].numpy(), state[2].numpy(), fmt, signed)
        errors.append(ratio(got - want, 0.01 * step + TINY))
    return largest(errors)


def log_step(values: np.ndarray, amax: np.ndarray, k: np.ndarray, fmt: FP8Format, signed: bool) -> np.ndarray:
    """Distance to the next code at decoded `values` [G, B], for amax and k [G, 1] as stored."""
    octaves = K_STEP / (np.maximum(k, 1).astype(np.float64) * 2**fmt.mantissa_bits)
    shift = amax / (2 ** (SIGNED_LEVELS * octaves) - 1) if signed else 0.0
    return (np.abs(values) + shift) * (2**octaves - 1)


def _adamw_run(version: Callable, codecs: Codecs, hyper: AdamWHyper) -> list[dict[str, np.ndarray]]:
    """A step and then a skipped one -> every tensor by name, after each of them."""
    from .adamw import encode_moments

    rng = np.random.default_rng(4)
    param, grad, m = rng.standard_normal([3, 5, 48]).astype(np.float32)
    grad[2] = m[2] = 0.0
    v = paddle.to_tensor(np.square(m))
    states = encode_moments(paddle.to_tensor(m) if hyper.beta1 else None, v, codecs)
    states["beta_powers"] = {"beta1": paddle.full([1], 0.5), "beta2": paddle.full([1], 0.9)}
    states["count"] = {"steps": paddle.full([1], 7, "int64"), "skipped": paddle.full([1], 2, "int64")}
    master, stored = paddle.to_tensor(param), paddle.to_tensor(param).astype("bfloat16")
    after = []
    for finite in (True, False):
        version(master, paddle.to_tensor(grad), states, codecs, hyper, paddle.to_tensor([finite]), stored)
        tensors = {f"{part}.{name}": t for part, state in states.items() for name, t in state.items()}
        tensors |= {"param": master, "stored": stored.astype("float32")}
        after.append({name: tensor.numpy().copy() for name, tensor in tensors.items()})
    return after


def _adamw_error(
    got: list[dict[str, np.ndarray]], want: list[dict[str, np.ndarray]], codecs: Codecs, lr: float
) -> float:
    """NaN where a counter is wrong or a skipped step changed something."""
    (mine, skipped), (theirs, _) = got, want
    counted = all(
        (mine[name] == theirs[name]).all() for mine, theirs in zip(got, want, strict=True)
        for name in ("count.steps", "count.skipped")
    )  # fmt: skip
    if not counted or any((mine[name] != skipped[name]).any() for name in mine if name != "count.skipped"):
        return np.nan
    errors = [
        ratio(mine["param"] - theirs["param"], 1e-4 * lr + FLOAT_STEPS * np.abs(theirs["param"])),
        ratio(mine["stored"] - mine["param"], 2.0**-8 * np.abs(mine["param"]) + TINY),
    ]
    for power in ("beta_powers.beta1", "beta_powers.beta2"):
        errors.append(ratio(mine[power] - theirs[power], FLOAT_STEPS))
    parts = zip(("m1", "m2"), codecs, strict=True)
    errors += [_moment_error(mine, theirs, part, codec) for part, codec in parts if f"{part}.codes" in theirs]
    for values in (name for name in theirs if name.endswith(".values")):
        allowed = FLOAT_STEPS * (1 + np.abs(theirs[values]))
        errors.append(ratio(mine[values] - theirs[values], allowed))
    return largest(errors)


def _moment_error(
    mine: dict[str, np.ndarray], theirs: dict[str, np.ndarray], part: str, codec: MomentCodec
) -> float:
    """A stored moment decoded from both: in steps of its codes."""
    values = []
    for run in (mine, theirs):
        state = {name: paddle.to_tensor(t) for name, t in run.items() if name.startswith(f"{part}.")}
        state = {name.partition(".")[2]: tensor for name, tensor in state.items()}
        values.append(codec.decode(state).numpy().astype(np.float64))
    if codec.expand:
        amax, k = theirs[f"{part}.amax"], theirs[f"{part}.k"]
        step = log_step(values[1], amax, k, codec.fmt, signed=not codec.positive)
    else:
        smallest = codec.fmt.min_subnormal * theirs[f"{part}.scale"].astype(np.float64)
        step = np.maximum(np.abs(values[1]) * 2.0**-codec.fmt.mantissa_bits, smallest)
    return ratio(values[0] - values[1], 1.05 * step + TINY)


def ratio(difference: np.ndarray, allowed: np.ndarray | float) -> float:
    """Largest |difference| / allowed, NaN if one is NaN."""
    return float(np.max(np.abs(difference) / allowed, initial=0.0))


def largest(errors: list[float]) -> float:
    return float(np.max(errors)) if errors else float("nan")
