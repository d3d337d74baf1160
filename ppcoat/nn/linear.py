"""Frozen Linears that save for backward only what backward needs, with and without a LoRA.

Paddle's Linear saves its input even when its weight is frozen. Here a frozen Linear saves nothing (dx = dy
W^T needs only the weight), and a LoRA on it saves one copy of x (FP8 under the policy "coat") for dA and
the small s x A for dB.

    y  = x W + b + s * drop(x) A B          s = alpha / rank * scale_multiplier
    dx = dy W^T + s * drop'(dy B^T A^T),  dA = s * drop(x)^T (dy B^T),  dB = s * (drop(x) A)^T dy

Weights are in Paddle's layout, [in, out]. A frozen weight may be stored in FP8 (base_weight.py): forward and
dx each turn the one stored copy into the compute dtype and drop it at once. Source: LoRA (arXiv 2106.09685);
one FP8 copy of x as COAT section 5 stores it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np
import paddle
from paddle import nn
from paddle.autograd import PyLayer

from ppcoat.errors import ConfigError
from ppcoat.fp8.flat import FlatLayout
from ppcoat.fp8.formats import E4M3
from ppcoat.fp8.pointwise import dropout, gated_residual

from .base_weight import Weight, times, times_transposed
from .policy import check_policy
from .saved_tensors import saver

GATHERED = 128  # a factor starts at a multiple of so many numbers: 256 bytes in 16 bits


class FrozenLinear(nn.Layer):
    """x [..., in] -> x W + b [..., out] that saves nothing for backward. Shares `weight` (float or FP8) and
    `bias` of `base`, frozen.
    """

    def __init__(self, base: nn.Linear | LinearParameters) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        _freeze(self)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return frozen_linear(x, self.weight, self.bias)


class AdaptedLinear(nn.Layer):
    """A frozen Linear under a trainable adapter: x [..., in] -> [..., out]. Subclasses say what it does.

    `weight` (float or FP8) and `bias` are those of `base` (not copies), so names in a state_dict stay.
    policy: "none" saves x as the active Saver does, every other in E4M3, one scale per `group_size` features
    (None: one per tensor); where an op offers x nothing is saved, and in what is computed again x is saved as
    it is. The forward result and dx are exact; gradients of the adapter carry the rounding of x.

    Set `enabled` to False to switch the adapter off, `scale_multiplier` to weaken or strengthen it.
    """

    factors: tuple[str, ...]  # names of what is trained, float32 whatever the weight's dtype

    def __init__(self, base: nn.Linear | FrozenLinear, policy: str, group_size: int | None) -> None:
        super().__init__()
        self.__dict__["base"] = base  # not a sublayer: its parameters are registered here, under their names
        self.weight, self.bias = base.weight, base.bias
        _freeze(self)
        self.policy, self.group_size = check_policy(policy), group_size
        self.enabled, self.scale_multiplier = True, 1.0

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        if not self.enabled:
            return frozen_linear(x, self.weight, self.bias)
        factors = [getattr(self, name) for name in self.factors]
        if paddle.is_grad_enabled() and not all(each.stop_gradient for each in (x, *factors)):
            return _Adapted.apply(x, self.use(x.dtype), *factors)
        with paddle.no_grad():
            return self.use(x.dtype).forward(x)[0]

    def use(self, dtype: paddle.dtype) -> LinearUse:
        """For one forward pass of x [..., in] in `dtype`."""
        raise NotImplementedError

    def add_factor(self, name: str, value: np.ndarray) -> None:
        """A trained parameter that starts at `value` (any shape), float32."""
        start = nn.initializer.Assign(np.ascontiguousarray(value, dtype="float32"))
        shape = list(value.shape)
        self.add_parameter(name, self.create_parameter(shape, dtype="float32", default_initializer=start))


class LoRALinear(AdaptedLinear):
    """A frozen Linear plus a trainable low-rank update: x [..., in] -> [..., out].

    `lora_A` [in, rank] is Kaiming-uniform as in the LoRA reference code, `lora_B` [rank, out] zeros, both
    float32. Raises ConfigError for wrong settings.
    """

    factors = ("lora_A", "lora_B")

    def __init__(
        self,
        base: nn.Linear | FrozenLinear,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        policy: str = "none",
        group_size: int | None = 128,
        seed: int = 0,
    ) -> None:
        _check_settings(rank, alpha, dropout)
        super().__init__(base, policy, group_size)
        width_in, width_out = base.weight.shape
        bound = 1.0 / math.sqrt(width_in)  # Kaiming-uniform with a = sqrt(5)
        start = np.random.default_rng(seed).uniform(-bound, bound, [width_in, rank]).astype("float32")
        self.add_factor("lora_A", start)
        self.add_factor("lora_B", np.zeros([rank, width_out], "float32"))
        self.rank, self.alpha, self.dropout = rank, float(alpha), float(dropout)

    @property
    def scale(self) -> float:
        """Factor of the low-rank update: alpha / rank * scale_multiplier."""
        return self.alpha / self.rank * self.scale_multiplier

    def use(self, dtype: paddle.dtype) -> LinearUse:
        """For one forward pass of x [..., in] in `dtype`. With dropout this draws a number from the host's
        generator (`paddle.seed` seeds it), so that nobody waits for the device."""
        return LoRAUse(self, self.scale, self.new_seed())

    def new_seed(self) -> int | None:
        """Of a dropout mask; None where nothing is dropped."""
        drops = self.training and self.dropout > 0
        return paddle.framework.core.default_cpu_generator().random() >> 2 if drops else None

    def extra_repr(self) -> str:
        width_in, width_out = self.weight.shape
        return f"in={width_in}, out={width_out}, rank={self.rank}, alpha={self.alpha:g}, policy={self.policy}"


def frozen_linear(x: paddle.Tensor, weight: Weight, bias: paddle.Tensor | None) -> paddle.Tensor:
    """x [..., in], weight [in, out], bias [out] or None -> x W + b; nothing is saved, only x receives a
    gradient.
    """
    if x.stop_gradient or not paddle.is_grad_enabled():
        with paddle.no_grad():
            return times(x, weight, bias)
    return _FrozenLinear.apply(x, LinearParameters(weight, bias))


@dataclass(frozen=True)
class LinearParameters:
    """weight [in, out] and bias [out] or None of a Linear. Hides them from PyLayer.apply, which would
    otherwise take tensors for inputs that want gradients.
    """

    weight: Weight
    bias: paddle.Tensor | None


class _FrozenLinear(PyLayer):
    @staticmethod
    def forward(ctx, x: paddle.Tensor, of: LinearParameters) -> paddle.Tensor:
        ctx.weight = of.weight
        return times(x, of.weight, of.bias)

    @staticmethod
    def backward(ctx, dy: paddle.Tensor) -> paddle.Tensor:
        return times_transposed(dy, ctx.weight)


class _Adapted(PyLayer):
    @staticmethod
    def forward(ctx, x: paddle.Tensor, use: LinearUse, *factors: paddle.Tensor) -> paddle.Tensor:
        ctx.use, ctx.x_needs_grad, layer = use, not x.stop_gradient, use.layer
        ctx.x = ctx.xa = None
        y, xa = use.forward(x)
        # What is saved hangs on ctx, not in save_for_backward: the hooks would count and pack it once more.
        ctx.statistics = [saver().save_plain(each, statistic=True) for each in use.statistics]
        if use.needs_x:
            fmt = None if layer.policy == "none" else E4M3
            ctx.x = saver().save_input(x, fmt, layer.group_size)
            ctx.xa = None if xa is None else saver().save_plain(xa)
        return y

    @staticmethod
    def backward(ctx, dy: paddle.Tensor) -> tuple[paddle.Tensor | None, ...]:
        x, xa = (None if saved is None else saved.unpack() for saved in (ctx.x, ctx.xa))
        ctx.x = ctx.xa = None  # an op that offered x goes with it
        return ctx.use.gradients(x, dy, ctx.x_needs_grad, xa)


@dataclass(frozen=True)
class LinearUse:
    """An AdaptedLinear as one forward pass meets it, so that backward (or a second forward) meets the same.
    scale: factor of the update. Nothing here builds a graph."""

    layer: AdaptedLinear
    scale: float

    @property
    def statistics(self) -> tuple[paddle.Tensor, ...]:
        """What it holds until backward besides, float32 of any shape."""
        return ()

    @property
    def needs_x(self) -> bool:
        """Whether backward wants the input: for the gradients of what is trained."""
        return not all(getattr(self.layer, name).stop_gradient for name in self.layer.factors)

    def forward(self, x: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor | None]:
        """x [..., in] -> y [..., out], and what `gradients` wants beside x, of any shape."""
        raise NotImplementedError

    def gradients(
        self, x: paddle.Tensor | None, dy: paddle.Tensor, needs_dx: bool, xa: paddle.Tensor | None
    ) -> tuple[paddle.Tensor | None, ...]:
        """dy [..., out] -> dx, and those of the layer's `factors`; None for what needs no gradient.

        x [..., in] is wanted where `needs_x`, and so is xa, as `forward` gave it.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class LoRAUse(LinearUse):
    """seed: of the dropout mask, None without dropout; the mask itself is drawn again where it is wanted, and
    never saved."""

    layer: LoRALinear
    seed: int | None

    def forward(self, x: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
        """x [..., in] -> y [..., out], and s drop(x) A [..., rank]."""
        xa = self.down(x)
        return self.product(x, xa, self.layer.bias), xa

    def down(self, x: paddle.Tensor) -> paddle.Tensor:
        """x [..., in] -> s drop(x) A [..., rank]."""
        return self._scaled_(paddle.matmul(self.drop(x), in_dtype(self.layer.lora_A, x.dtype)))

    def product(self, x: paddle.Tensor, xa: paddle.Tensor, bias: paddle.Tensor | None) -> paddle.Tensor:
        """x [..., in] and xa as `down` gives it -> x W + xa B + bias [..., out]."""
        return times(x, self.layer.weight, bias, (xa, in_dtype(self.layer.lora_B, x.dtype)))

    def gradients(
        self, x: paddle.Tensor | None, dy: paddle.Tensor, needs_dx: bool, xa: paddle.Tensor | None
    ) -> tuple[paddle.Tensor | None, ...]:
        """dy [..., out] -> dx, dA, dB."""
        layer, da, db = self.layer, None, None
        lora_a, lora_b = (in_dtype(factor, dy.dtype) for factor in (layer.lora_A, layer.lora_B))
        dyb = self._scaled_(paddle.matmul(dy, lora_b, transpose_y=True))
        if not layer.lora_A.stop_gradient:
            dropped = self.drop(x)
            da = paddle.matmul(_rows(dropped), _rows(dyb), transpose_x=True).astype(layer.lora_A.dtype)
        if not layer.lora_B.stop_gradient:
            db = paddle.matmul(_rows(xa), _rows(dy), transpose_x=True).astype(layer.lora_B.dtype)
        if not needs_dx:
            return None, da, db
        if self.seed is None:
            return times_transposed(dy, layer.weight, (dyb, lora_a)), da, db
        # dropping is its own transpose
        dropped = self.drop(paddle.matmul(dyb, lora_a, transpose_y=True))
        return times_transposed(dy, layer.weight).add_(dropped), da, db

    def drop(self, x: paddle.Tensor) -> paddle.Tensor:
        """Inverted dropout on the LoRA's input x [..., in]; x itself without dropout."""
        return x if self.seed is None else dropout(x, self.layer.dropout, self.seed)

    def _scaled_(self, x: paddle.Tensor) -> paddle.Tensor:
        """x times the scale, in place; where alpha is the rank that is 1, and nothing is launched."""
        return x if self.scale == 1.0 else x.scale_(self.scale)


class FactorCopies:
    """The factors of all LoRAs in the dtype in which the model computes, made by one cast for a whole step.

        copies = FactorCopies(factors)
        with copies.in_use():  # forward and backward of a step
            ...

    factors: each lora_A [in, rank] and lora_B [rank, out], float32; layout: the optimizer's flat buffer that
    holds them, if one does, which spares gathering them. The cast is made when the first LoRALinear inside
    asks, into the same memory each time (2 bytes for each number of a factor). Inside nobody may change the
    factors; outside, and for any other factor, each call casts for itself. So nothing is ever served that an
    optimizer, a file or a running mean has replaced. float32 models need no copies.
    """

    def __init__(self, factors: Sequence[paddle.Tensor], layout: FlatLayout | None = None) -> None:
        self._layout = FlatLayout(factors, GATHERED) if layout is None else layout
        self._index = {id(param): i for i, param in enumerate(self._layout.params)}
        self._made: dict[paddle.dtype, tuple[paddle.Tensor, list[paddle.Tensor]]] = {}
        self._fresh: set[paddle.dtype] = set()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Context manager: LoRALinears take the copies. They are made anew in each."""
        self._fresh.clear()
        token = _copies.set(self)
        try:
            yield
        finally:
            _copies.reset(token)

    def of(self, factor: paddle.Tensor, dtype: paddle.dtype) -> paddle.Tensor:
        """lora_A [in, rank] or lora_B [rank, out] in `dtype`."""
        index = self._index.get(id(factor))
        if index is None:
            return factor.astype(dtype)
        if dtype not in self._fresh:
            self._cast(dtype)
        return self._made[dtype][1][index]

    @paddle.no_grad()
    def _cast(self, dtype: paddle.dtype) -> None:
        cast = self._layout.current().astype(dtype)
        if dtype not in self._made:
            self._made[dtype] = cast, self._layout.views(cast)
        else:
            paddle.assign(cast, output=self._made[dtype][0])
        self._fresh.add(dtype)


_copies: ContextVar[FactorCopies | None] = ContextVar("ppcoat_factor_copies", default=None)


def in_dtype(factor: paddle.Tensor, dtype: paddle.dtype) -> paddle.Tensor:
    """lora_A [in, rank] or lora_B [rank, out] in `dtype`: from the copies of the step where there are any."""
    if factor.dtype == dtype:
        return factor
    copies = _copies.get()
    return factor.astype(dtype) if copies is None else copies.of(factor, dtype)


def grown(x: paddle.Tensor, by: paddle.Tensor) -> paddle.Tensor:
    """x + by x, for x [..., D] and by [D] of one floating dtype."""
    rows = x.reshape([1, -1, x.shape[-1]])
    return gated_residual(rows, by.reshape([1, 1, -1]), rows).reshape(x.shape)


def _rows(x: paddle.Tensor) -> paddle.Tensor:
    return x.reshape([-1, x.shape[-1]])


def _freeze(layer: nn.Layer) -> None:
    layer.weight.stop_gradient = True
    if layer.bias is not None:
        layer.bias.stop_gradient = True


def _check_settings(rank: int, alpha: float, dropout: float) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"LoRA rank must be a positive whole number, got {rank!r}")
    if not (isinstance(alpha, int | float) and math.isfinite(alpha)) or isinstance(alpha, bool):
        raise ConfigError(f"LoRA alpha must be a finite number, got {alpha!r}")
    if not (isinstance(dropout, int | float) and 0 <= dropout < 1) or isinstance(dropout, bool):
        raise ConfigError(f"LoRA dropout must be in [0, 1), got {dropout!r}")
