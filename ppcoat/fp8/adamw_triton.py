"""Triton twin of `adamw_step`: one launch decodes both moments, updates, encodes and writes the parameters.

Nothing is asked of the host: `finite` is read on the device, and where it is false nothing is stored but
count.skipped. beta1^t, beta2^t and the counters change after every program has read them: each program that
is done adds ARRIVAL to count.steps, and the last one writes the new values and clears the upper bits.

Parameters without a master copy are rounded stochastically. The random bits are a hash of element and step,
so a resumed run repeats them, as it repeats the dither.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from .backend import Unsuited
from .formats import DITHER_COLUMN, DITHER_PERIOD, DITHER_STEP, TINY
from .formats_triton import (
    DTYPES,
    dtype_name,
    fast_inverse,
    fast_rsqrt,
    fast_sqrt,
    from_codes,
    group_tile,
    narrowed,
    native_fp8,
    quantize_rows,
    random_bits,
    require,
)
from .log_codes_triton import (
    log_decode_rows,
    log_encode_rows,
    signed_log_decode_rows,
    signed_log_encode_rows,
)
from .quantize_triton import even, group_offsets, load_rows, store_rows

if TYPE_CHECKING:
    from .adamw import AdamWHyper, Codecs, MomentCodec, State

ARRIVAL_BIT = 40  # steps count below it, programs that are done above it
MOST_PROGRAMS = 2 ** (62 - ARRIVAL_BIT)
NONE, VALUES, LINEAR, LOG = 0, 1, 2, 3  # how a moment is stored

_TINY = tl.constexpr(TINY)
_ARRIVAL, _STEPS = tl.constexpr(1 << ARRIVAL_BIT), tl.constexpr((1 << ARRIVAL_BIT) - 1)
_NONE, _VALUES, _LINEAR = tl.constexpr(NONE), tl.constexpr(VALUES), tl.constexpr(LINEAR)
_DITHER_STEP, _DITHER_COLUMN = tl.constexpr(DITHER_STEP), tl.constexpr(DITHER_COLUMN)
_DITHER_PERIOD = tl.constexpr(DITHER_PERIOD)


def adamw_step(
    param: Any,
    grad: Any,
    states: dict[str, State],
    codecs: Codecs,
    hyper: AdamWHyper,
    finite: Any,
    stored: Any = None,
) -> None:
    """Update `param` [G, B], `stored` and `states` in place, as fp8.adamw.adamw_step.

    Raises Unsuited for tensors with gaps, more than 8192 elements in a group or 2^22 programs (8 G elements).
    """
    groups, size = param.shape
    require(param, "param", ("float32", "bfloat16"))
    require(grad, "grad", ("float32",))
    if stored is not None:
        require(stored, "stored", ("bfloat16", "float16"))
    rows, block = group_tile(size)
    programs = -(-groups // rows)
    if programs >= MOST_PROGRAMS:
        raise Unsuited(f"{groups} groups of {size} are too many for one launch")
    m1, m1_kind = _moment(states.get("m1"), codecs[0], param)
    m2, m2_kind = _moment(states["m2"], codecs[1], param)
    lr, lr_rows = _per_group(hyper.lr)
    decay, decay_rows = _per_group(hyper.weight_decay)
    powers, count = states["beta_powers"], states["count"]
    adamw_kernel[(programs,)](
        param, param if stored is None else stored, grad, *m1, *m2,
        powers["beta1"], powers["beta2"], count["steps"], count["skipped"], finite,
        lr, decay, hyper.beta1, hyper.beta2, hyper.epsilon, groups, size,
        M1_KIND=m1_kind, M1_MANTISSA=_mantissa(codecs[0]), M2_KIND=m2_kind, M2_MANTISSA=_mantissa(codecs[1]),
        LR_ROWS=lr_rows, DECAY_ROWS=decay_rows, STOCHASTIC=dtype_name(param.dtype) == "bfloat16",
        STORED=None if stored is None else DTYPES[dtype_name(stored.dtype)], NATIVE=native_fp8(),
        EVEN=even(size, size, block), ROWS=rows, BLOCK=block,
    )  # fmt: skip


def _moment(state: State | None, codec: MomentCodec, unused: Any) -> tuple[tuple[Any, Any, Any], int]:
    """State tensors of a moment -> (values or codes, scale or amax, k), kind; `unused` where one has none."""
    if state is None:
        return (unused, unused, unused), NONE
    for name, tensor in state.items():
        require(tensor, name, ("uint8",) if name in ("codes", "k") else ("float32",))
    if codec.fmt is None:
        return (state["values"], unused, unused), VALUES
    if codec.expand:
        return (state["codes"], state["amax"], state["k"]), LOG
    return (state["codes"], state["scale"], unused), LINEAR


def _mantissa(codec: MomentCodec) -> int:
    return 0 if codec.fmt is None else codec.fmt.mantissa_bits


def _per_group(value: Any) -> tuple[Any, bool]:
    """A number, or a tensor float32 [G, 1] -> it, whether it is a tensor."""
    if isinstance(value, int | float):
        return float(value), False
    require(value, "lr or weight_decay", ("float32",))
    return value, True


@triton.jit
def adamw_kernel(
    p_param, p_stored, p_grad, p_m1, p_m1_size, p_m1_k, p_m2, p_m2_size, p_m2_k,
    p_power1, p_power2, p_steps, p_skipped, p_finite,
    lr, decay, beta1, beta2, epsilon, groups, size,
    M1_KIND: tl.constexpr, M1_MANTISSA: tl.constexpr, M2_KIND: tl.constexpr, M2_MANTISSA: tl.constexpr,
    LR_ROWS: tl.constexpr, DECAY_ROWS: tl.constexpr, STOCHASTIC: tl.constexpr, STORED: tl.constexpr,
    NATIVE: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS groups, in the order of the reference and with its names.

    33 arguments, because a launch takes only pointers and numbers: each moment alone is three tensors, a kind
    and a format, and the step's counters stay on the device.
    """
    i_group, offset, inside = group_offsets(groups, size, size, 1, ROWS, BLOCK, EVEN)
    present = i_group < groups
    finite = tl.load(p_finite).to(tl.int1)
    steps = tl.load(p_steps) & _STEPS
    power1, power2 = tl.load(p_power1) * beta1, tl.load(p_power2) * beta2
    if LR_ROWS:
        lr = load_rows(lr, i_group, present, 0.0)
    if DECAY_ROWS:
        decay = load_rows(decay, i_group, present, 0.0)

    grad = tl.load(p_grad + offset, mask=inside, other=0.0)
    param = tl.load(p_param + offset, mask=inside, other=0.0).to(tl.float32)
    m2 = decoded(
        p_m2, p_m2_size, p_m2_k, i_group, offset, inside, present, False, M2_KIND, M2_MANTISSA, NATIVE
    )
    m1 = grad
    if M1_KIND != _NONE:
        m1 = decoded(
            p_m1, p_m1_size, p_m1_k, i_group, offset, inside, present, True, M1_KIND, M1_MANTISSA, NATIVE
        )
        if M1_KIND > _LINEAR:  # expanded: stored divided by the root of m2
            m1 *= fast_sqrt(tl.maximum(m2, _TINY))  # away from zero: where m2 has underflown, m1 is as small
        m1 = m1 * beta1 + grad * (1.0 - beta1)
    m2 = m2 * beta2 + grad * grad * (1.0 - beta2)

    root2 = tl.sqrt_rn((1.0 - power2).to(tl.float32))
    rate = lr * root2 / (1.0 - power1).to(tl.float32)
    param = param * (1.0 - lr * decay) - rate * m1 * fast_inverse(fast_sqrt(m2) + epsilon * root2)
    write_param(p_param, p_stored, param, offset, inside & finite, steps, STOCHASTIC, STORED)

    # a column has 13 bits, its step 15: the product fits 32
    place = tl.arange(0, BLOCK)[None, :] * _DITHER_COLUMN + (steps * _DITHER_STEP % _DITHER_PERIOD).to(
        tl.int32
    )
    dither = (place & (_DITHER_PERIOD - 1)).to(tl.float32)
    dither = dither * (1.0 / _DITHER_PERIOD)
    writable, writable_rows = inside & finite, present & finite
    stored_m2 = encode_and_store(
        p_m2, p_m2_size, p_m2_k, m2, dither, i_group, offset, writable, writable_rows, False, M2_KIND,
        M2_MANTISSA, NATIVE,
    )  # fmt: skip
    if M1_KIND != _NONE:
        if M1_KIND > _LINEAR:
            m1 = tl.where(inside, m1 * fast_rsqrt(tl.maximum(stored_m2, _TINY)), 0.0)
        encode_and_store(
            p_m1, p_m1_size, p_m1_k, m1, dither, i_group, offset, writable, writable_rows, True, M1_KIND,
            M1_MANTISSA, NATIVE,
        )  # fmt: skip
    arrive(p_power1, p_power2, p_steps, p_skipped, power1, power2, finite)


@triton.jit
def arrive(p_power1, p_power2, p_steps, p_skipped, power1, power2, finite):
    """This program is done; the last one moves powers and counters on."""
    tl.debug_barrier()  # all its threads have read them
    before = tl.atomic_add(p_steps, tl.full([], _ARRIVAL, tl.int64))
    last = before // _ARRIVAL == tl.num_programs(0) - 1
    tl.store(p_steps, (before & _STEPS) + finite.to(tl.int64), mask=last)
    tl.store(p_power1, power1, mask=last & finite)
    tl.store(p_power2, power2, mask=last & finite)
    skipped = tl.load(p_skipped)  # by one program only is it ever written
    tl.store(p_skipped, skipped + (1 - finite.to(tl.int64)), mask=last)


@triton.jit
def decoded(
    p_values, p_size, p_k, i_group, offset, inside, present,
    SIGNED: tl.constexpr, KIND: tl.constexpr, MANTISSA: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """A stored moment -> float32 [R, B], zeros where a row has ended."""
    if KIND == _VALUES:
        values = tl.load(p_values + offset, mask=inside, other=0.0)
    else:
        codes = tl.load(p_values + offset, mask=inside, other=0)
        size = load_rows(p_size, i_group, present, 0.0)
        if KIND == _LINEAR:
            values = from_codes(codes, MANTISSA, NATIVE) * size
        else:
            k = load_rows(p_k, i_group, present, 1).to(tl.float32)
            if SIGNED:
                values = signed_log_decode_rows(codes, size, k, MANTISSA)
            else:
                values = log_decode_rows(codes, size, k, MANTISSA)
    return values


@triton.jit
def encode_and_store(
    p_values, p_size, p_k, x, dither, i_group, offset, writable, writable_rows,
    SIGNED: tl.constexpr, KIND: tl.constexpr, MANTISSA: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Inverse of `decoded` -> what the codes of an expanded second moment say, else x."""
    result = x
    if KIND == _VALUES:
        tl.store(p_values + offset, x, mask=writable)
    else:
        if KIND == _LINEAR:
            codes, size = quantize_rows(x, MANTISSA, NATIVE)
            if not SIGNED:  # a second moment that is not zero must not become zero; code 1 is the smallest
                codes = tl.where((codes == 0) & (x > 0), 1, codes).to(tl.uint8)
            result = from_codes(codes, MANTISSA, NATIVE) * size
        else:
            if SIGNED:
                codes, size, k = signed_log_encode_rows(x, dither, MANTISSA)
            else:
                codes, size, k = log_encode_rows(x, dither, MANTISSA)
                result = log_decode_rows(codes, size, k, MANTISSA)
            store_rows(p_k, k.to(tl.int32).to(tl.uint8), i_group, writable_rows)
        tl.store(p_values + offset, codes, mask=writable)
        store_rows(p_size, size, i_group, writable_rows)
    return result


@triton.jit
def write_param(
    p_param, p_stored, param, offset, writable, steps, STOCHASTIC: tl.constexpr, STORED: tl.constexpr
):
    """float32, and rounded to nearest to `stored` (STORED: its dtype or None); or to bfloat16 at random."""
    if STOCHASTIC:
        bits = param.to(tl.int32, bitcast=True) + (random_bits(offset, steps) & 0xFFFF)
        tl.store(
            p_param + offset, (bits & -65536).to(tl.float32, bitcast=True).to(tl.bfloat16), mask=writable
        )
    else:
        tl.store(p_param + offset, param, mask=writable)
    if STORED is not None:
        tl.store(p_stored + offset, narrowed(param, STORED), mask=writable)
