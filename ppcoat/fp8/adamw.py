"""One fused AdamW step over flat buffers, with both moments stored in 8 bits.

A flat buffer is [G, B] float32: G groups of B consecutive elements, where no group crosses two parameters.
The step is a fixed number of Paddle calls, whatever the number of parameters, and never asks the host for a
value. A step whose gradient is not finite changes nothing: every new value is selected on the device by one
boolean.

Source: AdamW as paddle.optimizer.AdamW computes it (arXiv 1711.05101); 8-bit state with dynamic range
expansion as COAT section 4 (arXiv 2410.19313), changed in three ways, each measured by
`python -m ppcoat accuracy`: the second moment uses the sign bit (see quantize.py); the first moment is stored
divided by the root of the second; and rounding is dithered.
"""

from __future__ import annotations

from dataclasses import dataclass

import paddle

from . import backend
from .flat import FlatGradient, round_into, row_pieces
from .formats import DITHER_COLUMN, DITHER_PERIOD, DITHER_STEP, TINY, FP8Format
from .quantize import dequantize, log_decode, log_encode, quantize, signed_log_decode, signed_log_encode

State = dict[str, paddle.Tensor]


@dataclass(frozen=True)
class MomentCodec:
    """How one moment is stored. `fmt=None`: float32. `expand`: dynamic range expansion. `positive`: values
    have no sign. alone: a moment with sign is stored as it is, as there is no second one to divide it by.

    State tensors: `values` float32 [G, B]; or `codes` uint8 [G, B] with `scale` float32 [G, 1] (linear); or
    `codes` with `amax` float32 [G, 1] and `k` uint8 [G, 1] (expanded).
    """

    fmt: FP8Format | None
    expand: bool
    positive: bool
    alone: bool = False

    @property
    def name(self) -> str:
        """float32, e4m3, e5m2, e4m3+log, e4m3+signed_log/root ...: what a saved state says about itself."""
        if self.fmt is None or not self.expand:
            return "float32" if self.fmt is None else self.fmt.name
        return self.fmt.name + (
            "+log" if self.positive else "+signed_log/root" if self.relative else "+signed_log"
        )

    @property
    def relative(self) -> bool:
        """Whether this first moment is stored divided by the root of the second."""
        return self.fmt is not None and self.expand and not self.positive and not self.alone

    def group_bytes(self, block_size: int) -> int:
        """Bytes of one group of `block_size` elements."""
        if self.fmt is None:
            return 4 * block_size
        return block_size + (5 if self.expand else 4)  # codes; amax and k, or scale

    def zeros(self, groups: int, block_size: int) -> State:
        """State tensors of a moment [groups, block_size] that is 0. All its groups are like one."""
        one = self.encode(paddle.zeros([1, block_size], dtype="float32"))
        return {name: part.tile([groups, 1]) for name, part in one.items()}

    def encode(self, values: paddle.Tensor, dither: paddle.Tensor | float = 0.5) -> State:
        """float32 [G, B] -> state tensors. `dither` in [0, 1), [1, B] or a number: see `log_encode`."""
        if self.fmt is None:
            return {"values": values}
        if self.expand:
            encode = log_encode if self.positive else signed_log_encode
            codes, amax, k = encode(values, self.fmt, dither)
            return {"codes": codes, "amax": amax, "k": k}
        codes, scale = quantize(values, self.fmt, group_size=values.shape[-1])
        if self.positive:  # a second moment that is not zero must not become zero; code 1 is the smallest
            codes = (codes.astype("int32") + ((codes == 0) & (values > 0)).astype("int32")).astype("uint8")
        return {"codes": codes, "scale": scale}

    def decode(self, state: State) -> paddle.Tensor:
        """State tensors -> float32 [G, B]."""
        if self.fmt is None:
            return state["values"]
        if self.expand:
            decode = log_decode if self.positive else signed_log_decode
            return decode(state["codes"], state["amax"], state["k"], self.fmt)
        return dequantize(state["codes"], state["scale"], self.fmt, group_size=state["codes"].shape[-1])


Codecs = tuple[MomentCodec, MomentCodec]


def encode_moments(
    m1: paddle.Tensor | None, m2: paddle.Tensor, codecs: Codecs, dither: paddle.Tensor | float = 0.5
) -> dict[str, State]:
    """Moments float32 [G, B] -> {"m1": state, "m2": state}, without "m1" where m1 is None.

    With expansion the first moment is divided by the root of the second as that will be decoded. All values
    of a group then have one size, however far apart their gradients are, and the codes of m1 go where they
    matter: its error counts in the update m1 / sqrt(m2).
    """
    states = {"m2": codecs[1].encode(m2, dither)}
    if m1 is not None:
        if codecs[0].relative:
            m1 = m1 / _root(codecs[1].decode(states["m2"]))
        states["m1"] = codecs[0].encode(m1, dither)
    return states


def decode_moments(states: dict[str, State], codecs: Codecs) -> tuple[paddle.Tensor | None, paddle.Tensor]:
    """Inverse of `encode_moments` -> (m1 or None, m2), float32 [G, B]."""
    m2 = codecs[1].decode(states["m2"])
    if "m1" not in states:
        return None, m2
    m1 = codecs[0].decode(states["m1"])
    return (m1 * _root(m2) if codecs[0].relative else m1), m2


def dither(steps: paddle.Tensor, block_size: int) -> paddle.Tensor:
    """int64 [1] -> float32 [1, block_size] in [0, 1): what step number `steps` adds before cutting codes off.

    Rounded to nearest, a moment that changes by less than half a step of its code would never change: m2
    moves by a thousandth a step. Over the steps this sequence (Weyl's, by multiples of the golden section)
    fills [0, 1) evenly, so small changes add up. It depends on the step alone: a resumed run repeats it.
    """
    columns = paddle.arange(block_size, dtype="int64") * DITHER_COLUMN
    place = paddle.remainder(columns + steps * DITHER_STEP, paddle.full([1], DITHER_PERIOD, dtype="int64"))
    return (place.astype("float32") / DITHER_PERIOD).unsqueeze(0)


@dataclass(frozen=True)
class AdamWHyper:
    """Numbers of one step. `lr` and `weight_decay` are floats, or float32 [G, 1] where parameter groups
    differ.
    """

    lr: float | paddle.Tensor
    weight_decay: float | paddle.Tensor
    beta1: float
    beta2: float
    epsilon: float


@backend.op
def adamw_step(
    param: paddle.Tensor,
    grad: paddle.Tensor | FlatGradient,
    states: dict[str, State],
    codecs: Codecs,
    hyper: AdamWHyper,
    finite: paddle.Tensor,
    stored: paddle.Tensor | None = None,
) -> None:
    """Update `param` [G, B] and `states` in place, from the gradient `grad` float32 [G, B], in
    pieces (flat.py): beside these it holds some ten float32 tensors of a piece.

    param: float32, with `stored` (bfloat16 or float16 [G, B]) as its master copy: `stored` gets it rounded to
    nearest; or bfloat16, without a master: the new value is rounded stochastically.
    states: "m2" and perhaps "m1" as `encode_moments` gives them; "beta_powers" (beta1^t, beta2^t; float64
    [1]); "count" (steps, skipped; int64 [1]). Without "m1" beta1 must be 0: the first moment is the gradient.
    finite: a boolean tensor of one element; where it is false, all but count.skipped keeps its bits.
    Epsilon is added after the bias-corrected root, decay is decoupled.
    """
    old, count = states["beta_powers"], states["count"]
    powers = {"beta1": old["beta1"] * hyper.beta1, "beta2": old["beta2"] * hyper.beta2}
    step = {"finite": finite, "dither": dither(count["steps"], param.shape[-1]), **powers}
    for rows in row_pieces(*param.shape):
        moments: dict[str, State] = {
            part: rows_of_state(states[part], rows) for part in ("m1", "m2") if part in states
        }
        values = param[rows] if param.dtype == paddle.float32 else param[rows].astype("float32")
        step |= {"lr": number_of(hyper.lr, rows), "weight_decay": number_of(hyper.weight_decay, rows)}
        new = _moved(values, grad[rows], moments, codecs, hyper, step)
        for part, state in new.items():
            for name, tensor in moments[part].items():
                replace_where(finite, state[name], tensor)
        if stored is not None or param.dtype != paddle.float32:
            round_into((param if stored is None else stored)[rows], values, stochastic=stored is None)
    for name, tensor in old.items():
        replace_where(finite, powers[name], tensor)
    count["steps"].add_(finite.astype("int64"))
    count["skipped"].add_(1 - finite.astype("int64"))


def _moved(
    values: paddle.Tensor,
    grad: paddle.Tensor,
    moments: dict[str, State],
    codecs: Codecs,
    hyper: AdamWHyper,
    step: dict[str, float | paddle.Tensor],
) -> dict[str, State]:
    """Update `values` [n, B] of some groups in place where step["finite"] -> their new moments.

    step: "finite"; "dither" [1, B]; "beta1" and "beta2", their powers after this step; "lr" and
    "weight_decay" of these groups.
    """
    m1, m2 = decode_moments(moments, codecs)  # m and v of the papers
    m1 = grad if m1 is None else (m1 * hyper.beta1).add_(grad * (1.0 - hyper.beta1))
    m2 = (m2 * hyper.beta2).add_(paddle.square(grad).scale_(1.0 - hyper.beta2))
    rest1, rest2 = ((1.0 - step[name]).astype("float32") for name in ("beta1", "beta2"))
    root2 = paddle.sqrt(rest2)

    # lr * (m1 / (1 - beta1^t)) / (sqrt(m2) / root2 + eps), with the one-element factors gathered so that the
    # flat buffers are read as few times as possible
    rate = step["lr"] * root2 / rest1
    update = (rate * m1).divide_(paddle.sqrt(m2).add_(hyper.epsilon * root2))
    kept = 1.0 - step["lr"] * step["weight_decay"]
    replace_where(step["finite"], (values * kept).subtract_(update), values)
    return encode_moments(m1 if "m1" in moments else None, m2, codecs, step["dither"])


def number_of(value: float | paddle.Tensor, rows: slice) -> float | paddle.Tensor:
    """A number of all groups or float32 [G, 1] -> the same of these groups."""
    return value[rows] if isinstance(value, paddle.Tensor) else value


def rows_of_state(state: State, rows: slice) -> State:
    """The part of a moment's state tensors [G, ...], any dtype, that these groups have; it shares their
    memory."""
    return {name: tensor[rows] for name, tensor in state.items()}


def _root(m2: paddle.Tensor) -> paddle.Tensor:
    """sqrt(m2), away from zero: where m2 has underflown, m1 is as small."""
    return paddle.sqrt(paddle.clip(m2, min=TINY))


def replace_where(finite: paddle.Tensor, new: paddle.Tensor, old: paddle.Tensor) -> None:
    """old <- new where finite (bool [1]), keeping the storage of `old`; any shape and dtype.

    Paddle's CPU `where` lacks uint8: four codes go as one int32, and single bytes are widened. Of a slice
    Paddle 3.3 takes the int32 from the wrong place, hence the copy.
    """
    if old.dtype != paddle.uint8:
        chosen = paddle.where(finite, new, old)
    elif old.shape[-1] % 4 == 0:
        chosen = paddle.where(finite, new.view("int32"), old.clone().view("int32")).view("uint8")
    else:
        chosen = paddle.where(finite, new.astype("int32"), old.astype("int32")).astype("uint8")
    paddle.assign(chosen, output=old)
