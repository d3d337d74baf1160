"""LoKr: an update that is the Kronecker product of a small and a large matrix, as LyCORIS defines it.

    W [out, in] += scale * kron(w1 [a, b], w2 [c, d])        out = a c,  in = b d

w2 is a product w2_a w2_b of rank `rank` where that is smaller, and scale is then alpha / rank; a LoKr of two
full matrices has scale 1, whatever alpha and rank are. The product is never built: x is read as [b, d] and
multiplied by w2, then by w1; backward does that again instead of saving what lies between. Matrices are in
torch's order, [out, in], as in LyCORIS' files.
Source: LyCORIS (arXiv 2309.14859, section 4) and its public code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import paddle
from paddle import nn

from ppcoat.errors import ConfigError
from ppcoat.nn.base_weight import times, times_transposed
from ppcoat.nn.linear import AdaptedLinear, FrozenLinear, LinearUse

from .kinds import LoKr

# A matrix is stored whole under the first name or as a product of the other two.
FACTORS = {"lokr_w1": ("lokr_w1_a", "lokr_w1_b"), "lokr_w2": ("lokr_w2_a", "lokr_w2_b")}


@dataclass(frozen=True)
class LoKrSettings:
    """rank: of w2; where it is not below half of w2's larger side, or with `full`, w2 is full. factor:
    largest side of w1, -1 for any."""

    rank: int
    alpha: float
    factor: int = -1
    full: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1 or not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigError(f"LoKr: came rank {self.rank}, alpha {self.alpha}; wanted both above 0")
        if self.factor != -1 and self.factor < 1:
            raise ConfigError(f"LoKr: came factor {self.factor}, wanted -1 or at least 1")


class LoKrLinear(AdaptedLinear):
    """A frozen Linear plus a trainable LoKr: x [..., in] -> [..., out].

    factors: the matrices by name (FACTORS), float32 in torch's order. dropout: the share of output rows that
    a training step leaves out, and the probability that it leaves out the whole update. Raises ConfigError
    for factors that do not fit the Linear.
    """

    def __init__(
        self,
        base: nn.Linear | FrozenLinear,
        factors: Mapping[str, np.ndarray],
        settings: LoKrSettings,
        dropout: tuple[float, float] = (0.0, 0.0),
        policy: str = "none",
        group_size: int | None = 128,
    ) -> None:
        super().__init__(base, policy, group_size)
        for name, value in factors.items():
            self.add_factor(name, value)
        self.factors = tuple(factors)
        self.rank, self.alpha = settings.rank, settings.alpha
        self.rank_dropout, self.module_dropout = dropout
        self._check(*base.weight.shape)

    @property
    def is_full(self) -> bool:
        """Whether both matrices are whole, so that alpha and rank mean nothing."""
        return all(name in self.factors for name in FACTORS)

    @property
    def own_scale(self) -> float:
        """Factor of the update without `scale_multiplier`."""
        return 1.0 if self.is_full else self.alpha / self.rank

    @property
    def scale(self) -> float:
        """Factor of the update."""
        return self.own_scale * self.scale_multiplier

    @paddle.no_grad()
    def use(self, dtype: paddle.dtype) -> LinearUse:
        """For one forward pass of x [..., in] in `dtype`."""
        mask = None
        # what is left out is multiplied by zero: its gradients are zeros, and the device decides alone
        for rate, size in ((self.rank_dropout, self.weight.shape[1]), (self.module_dropout, 1)):
            if self.training and rate > 0:
                kept = (paddle.rand([size]) >= rate).astype("float32")
                mask = kept if mask is None else mask * kept
        return _LoKrUse(self, self.scale, mask)

    def delta(self) -> paddle.Tensor:
        """scale * kron(w1, w2) as it is added to the weight: float32 [in, out]."""
        return paddle.kron(self.matrix("lokr_w1"), self.matrix("lokr_w2")).t() * self.scale

    def matrix(self, name: str) -> paddle.Tensor:
        """w1 or w2 ("lokr_w1", "lokr_w2"), float32, multiplied out where it is a product."""
        if name in self.factors:
            return getattr(self, name)
        left, right = FACTORS[name]
        return paddle.matmul(getattr(self, left), getattr(self, right))

    def of_factors(self, name: str, gradient: paddle.Tensor) -> dict[str, paddle.Tensor]:
        """Gradient of w1 or w2, of its shape and any floating dtype -> those of what is trained of it,
        float32, by name."""
        gradient = gradient.astype("float32")
        if name in self.factors:
            found = {name: gradient}
        else:
            left, right = (getattr(self, each) for each in FACTORS[name])
            of_left = paddle.matmul(gradient, right, transpose_y=True)
            of_right = paddle.matmul(left, gradient, transpose_x=True)
            found = dict(zip(FACTORS[name], (of_left, of_right), strict=True))
        return {each: value for each, value in found.items() if not getattr(self, each).stop_gradient}

    def extra_repr(self) -> str:
        shapes = " x ".join(str(list(getattr(self, name).shape)) for name in self.factors)
        return f"{shapes}, scale={self.scale:g}"

    def _check(self, width_in: int, width_out: int) -> None:
        for name, parts in FACTORS.items():
            if (name in self.factors) == all(part in self.factors for part in parts):
                raise ConfigError(
                    f"LoKr has {', '.join(self.factors)}; wanted {name} or {' and '.join(parts)}"
                )
        (a, b), (c, d) = (self.matrix(name).shape for name in FACTORS)
        if (a * c, b * d) != (width_out, width_in):
            raise ConfigError(
                f"LoKr: kron([{a}, {b}], [{c}, {d}]) does not fit a Linear {width_in} -> {width_out}"
            )


@dataclass(frozen=True)
class _LoKrUse(LinearUse):
    """mask: ones and zeros, float32 [out] or [1]; None where nothing is left out."""

    layer: LoKrLinear
    mask: paddle.Tensor | None

    @property
    def statistics(self) -> tuple[paddle.Tensor, ...]:
        return () if self.mask is None else (self.mask,)

    def forward(self, x: paddle.Tensor) -> tuple[paddle.Tensor, None]:
        layer, (w1, w2) = self.layer, self._matrices(x.dtype)
        rows = x.reshape([-1, w1.shape[1], w2.shape[1]])
        update = paddle.matmul(w1, paddle.matmul(rows, w2, transpose_y=True))
        y = times(x, layer.weight, layer.bias)
        return y.add_(self._masked(update.reshape(y.shape))), None

    def gradients(
        self, x: paddle.Tensor | None, dy: paddle.Tensor, needs_dx: bool, xa: None
    ) -> tuple[paddle.Tensor | None, ...]:
        """dx, and those of w1 and w2 or of their factors."""
        layer, (w1, w2) = self.layer, self._matrices(dy.dtype)
        (a, b), (c, d) = w1.shape, w2.shape
        outer, dx, of_factors = self._masked(dy).reshape([-1, a, c]), None, {}
        if self.needs_x:
            x = x.reshape([-1, b, d])
            of_factors = layer.of_factors(
                "lokr_w1", _by_blocks(outer, paddle.matmul(x, w2, transpose_y=True))
            )
        inner = paddle.matmul(w1, outer, transpose_x=True)  # gradient of w2 x, [rows, b, c]
        if self.needs_x:
            dw2 = paddle.matmul(inner.reshape([-1, c]), x.reshape([-1, d]), transpose_x=True)
            of_factors |= layer.of_factors("lokr_w2", dw2)
        if needs_dx:
            dx = times_transposed(dy, layer.weight)
            dx.add_(paddle.matmul(inner, w2).reshape(dx.shape))
        return dx, *(of_factors.get(name) for name in layer.factors)

    def _masked(self, x: paddle.Tensor) -> paddle.Tensor:
        """x [..., out] times scale and mask."""
        x = x if self.scale == 1.0 else x * self.scale
        return x if self.mask is None else x * self.mask.astype(x.dtype)

    def _matrices(self, dtype: paddle.dtype) -> list[paddle.Tensor]:
        return [self.layer.matrix(name).astype(dtype) for name in FACTORS]


def _by_blocks(x: paddle.Tensor, y: paddle.Tensor) -> paddle.Tensor:
    """x [rows, a, c] and y [rows, b, c] -> sum over rows and c of x y, [a, b]: one product, where one for
    each row would take a, b numbers a row."""
    flat = (each.transpose([1, 0, 2]).reshape([each.shape[1], -1]) for each in (x, y))
    return paddle.matmul(*flat, transpose_y=True)


def new_factors(width_in: int, width_out: int, settings: LoKrSettings, seed: int) -> dict[str, np.ndarray]:
    """The matrices that training starts from: kron(w1, w2) = 0, because w2 (or w2_b) is zero; the others are
    Kaiming-uniform with a = sqrt(5)."""
    (a, c), (b, d) = (kronecker_sides(width, settings.factor) for width in (width_out, width_in))
    rng, rank = np.random.default_rng(seed), settings.rank

    def uniform(rows: int, columns: int) -> np.ndarray:
        bound = 1.0 / math.sqrt(columns)
        return rng.uniform(-bound, bound, [rows, columns]).astype("float32")

    w1 = {"lokr_w1": uniform(a, b)}
    if settings.full or rank >= max(c, d) / 2:
        return w1 | {"lokr_w2": np.zeros([c, d], "float32")}
    return w1 | {"lokr_w2_a": uniform(c, rank), "lokr_w2_b": np.zeros([rank, d], "float32")}


def lokr_norm(kind: LoKr) -> float:
    """Frobenius norm of what a file's LoKr adds at strength 1."""
    w1, w2 = _matrices(kind)
    return float(np.linalg.norm(w1) * np.linalg.norm(w2))


def lokr_difference(got: LoKr, want: LoKr) -> float:
    """Relative error of what `got` adds: at most, the errors of both matrices added up."""
    (w1, w2), (v1, v2) = _matrices(got), _matrices(want)
    if (w1.shape, w2.shape) != (v1.shape, v2.shape):
        return float("inf")
    size = np.linalg.norm(v1) * np.linalg.norm(v2)
    apart = np.linalg.norm(w1 - v1) * np.linalg.norm(w2) + np.linalg.norm(v1) * np.linalg.norm(w2 - v2)
    return 0.0 if apart == 0 else float(apart / size) if size else float("inf")


def _matrices(kind: LoKr) -> tuple[np.ndarray, np.ndarray]:
    """w1, and w2 times the scale, float64."""
    factors = {name: values.astype(np.float64) for name, values in kind.factors.items()}
    w1, w2 = (
        factors[name] if name in factors else factors[left] @ factors[right]
        for name, (left, right) in FACTORS.items()
    )
    return w1, w2 * kind.scale


def kronecker_sides(width: int, factor: int = -1) -> tuple[int, int]:
    """width as (small, large) with small * large = width.

    The factor itself where it divides the width; else the largest divisor that is above neither the factor
    nor the root of the width.
    """
    if factor > 0 and width % factor == 0:
        small = min(factor, width // factor)
        return small, width // small
    most = math.isqrt(width) if factor < 0 else min(factor, math.isqrt(width))
    small = next(each for each in range(most, 0, -1) if width % each == 0)
    return small, width // small
