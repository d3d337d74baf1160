"""One fused AdamW step over flat buffers, with both moments stored in FP8.

A flat buffer is [G, B] float32: G groups of B consecutive elements, where no group crosses two parameters.
The step is a fixed number of Paddle calls, whatever the number of parameters, and never asks the host for a
value. A step whose gradient is not finite changes nothing: every new value is selected on the device by one
boolean.

Source: AdamW as paddle.optimizer.AdamW computes it (arXiv 1711.05101); state storage as COAT section 4
(arXiv 2410.19313).
"""

from __future__ import annotations

from dataclasses import dataclass

import paddle

from .formats import FP8Format
from .quantize import dequantize, expand_decode, expand_encode, quantize

State = dict[str, paddle.Tensor]


@dataclass(frozen=True)
class MomentCodec:
    """How one moment is stored. `fmt=None`: float32. `expand`: dynamic range expansion. `positive`: values
    have no sign.

    State tensors: `values` float32 [G, B]; or `codes` uint8 [G, B] with `scale` float32 [G, 1] (linear); or
    `codes` with `amax` float32 [G, 1] and `k` uint8 [G, 1] (expanded).
    """

    fmt: FP8Format | None
    expand: bool
    positive: bool

    @property
    def name(self) -> str:
        """float32, e4m3, e5m2, e4m3+expansion ...: what a saved state says about itself."""
        if self.fmt is None:
            return "float32"
        return self.fmt.name + ("+expansion" if self.expand else "")

    def zeros(self, groups: int, block_size: int) -> State:
        return self.encode(paddle.zeros([groups, block_size], dtype="float32"))

    def encode(self, values: paddle.Tensor) -> State:
        if self.fmt is None:
            return {"values": values}
        if self.expand:
            codes, amax, k = expand_encode(values, self.fmt, keep_nonzero=self.positive)
            return {"codes": codes, "amax": amax, "k": k}
        codes, scale = quantize(values, self.fmt, group_size=values.shape[-1])
        if (
            self.positive
        ):  # a second moment that is not zero must not become zero; the code 1 is the smallest positive
            codes = (codes.astype("int32") + ((codes == 0) & (values > 0)).astype("int32")).astype("uint8")
        return {"codes": codes, "scale": scale}

    def decode(self, state: State) -> paddle.Tensor:
        if self.fmt is None:
            return state["values"]
        if self.expand:
            return expand_decode(state["codes"], state["amax"], state["k"], self.fmt)
        return dequantize(state["codes"], state["scale"], self.fmt, group_size=state["codes"].shape[-1])


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


def adamw_step(
    param: paddle.Tensor,
    grad: paddle.Tensor,
    moment1: State | None,
    moment2: State,
    beta_powers: State,
    codecs: tuple[MomentCodec, MomentCodec],
    hyper: AdamWHyper,
    finite: paddle.Tensor,
) -> None:
    """Update `param` [G, B] float32, the moment states and `beta_powers` (beta1^t, beta2^t; float32 [1] each)
    in place.

    `moment1=None` means beta1 = 0: the first moment is the gradient and nothing is stored. `finite` is a
    boolean of one element; where it is false, everything keeps its bits. Epsilon is added after the
    bias-corrected root, decay is decoupled.
    """
    codec1, codec2 = codecs
    m = grad
    if moment1 is not None:
        m = (codec1.decode(moment1) * hyper.beta1).add_(grad * (1.0 - hyper.beta1))
    v = (codec2.decode(moment2) * hyper.beta2).add_(paddle.square(grad).scale_(1.0 - hyper.beta2))
    powers = {"beta1": beta_powers["beta1"] * hyper.beta1, "beta2": beta_powers["beta2"] * hyper.beta2}
    root2 = paddle.sqrt(1.0 - powers["beta2"])

    # lr * (m / (1 - beta1^t)) / (sqrt(v) / root2 + eps), with the one-element factors gathered so that the
    # flat buffers are read as few times as possible
    rate = hyper.lr * root2 / (1.0 - powers["beta1"])
    update = (rate * m).divide_(paddle.sqrt(v).add_(hyper.epsilon * root2))
    _select(finite, (param * (1.0 - hyper.lr * hyper.weight_decay)).subtract_(update), param)
    if moment1 is not None:
        _select_state(finite, codec1.encode(m), moment1)
    _select_state(finite, codec2.encode(v), moment2)
    _select_state(finite, powers, beta_powers)


def _select_state(finite: paddle.Tensor, new: State, old: State) -> None:
    for name, tensor in old.items():
        _select(finite, new[name], tensor)


def _select(finite: paddle.Tensor, new: paddle.Tensor, old: paddle.Tensor) -> None:
    """old <- new where finite, keeping the storage of `old`. Paddle's CPU `where` lacks uint8: bytes go
    through int32.
    """
    if old.dtype == paddle.uint8:
        chosen = paddle.where(finite, new.astype("int32"), old.astype("int32")).astype("uint8")
    else:
        chosen = paddle.where(finite, new, old)
    paddle.assign(chosen, output=old)
