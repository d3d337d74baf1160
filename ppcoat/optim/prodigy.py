"""Prodigy: Adam that finds its learning rate from the distance it has come."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import paddle
from paddle.nn import ClipGradByGlobalNorm

from ppcoat.errors import ConfigError
from ppcoat.fp8.adamw import dither, replace_where, rows_of_state
from ppcoat.fp8.flat import FlatGradient, FlatLayout, row_pieces
from ppcoat.optim.flat_optimizer import FlatOptimizer, Piece
from ppcoat.optim.settings import (
    POSITIVE,
    RELATIVE,
    SIGNED,
    WEIGHTS,
    FlatSettings,
    FP8QuantizationConfig,
    check_number,
)

ESTIMATE = {"s": SIGNED, "p0": WEIGHTS}  # how the states are stored that d is estimated from


@dataclass(frozen=True)
class ProdigySettings:
    """d0: the first estimate of the rate. d_coef: what all estimates are multiplied by. growth_rate: the most
    that the rate may grow in a step, as a factor. beta3: of the estimate's averages, None: sqrt(beta2).
    slice_p: estimate from every slice_p-th value only, which saves that much of two of the four states.
    use_bias_correction: Adam's. safeguard_warmup: for rates that begin at 0.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    beta3: float | None = None
    epsilon: float = 1e-8
    d0: float = 1e-6
    d_coef: float = 1.0
    growth_rate: float | None = None
    use_bias_correction: bool = False
    safeguard_warmup: bool = False
    slice_p: int = 1

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2", "beta3"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), below=1.0)
        for name in ("epsilon", "d0", "d_coef"):
            check_number(name, getattr(self, name))
        if self.d0 == 0 or self.growth_rate is not None and not self.growth_rate > 1:
            raise ConfigError(
                "d0 must be above 0 and growth_rate above 1 or none: with these the rate never grows"
            )
        if self.slice_p < 1:
            raise ConfigError(f"slice_p must be 1 or more, got {self.slice_p}")


class Prodigy(FlatOptimizer):
    """Adam whose rate is lr * d. d grows from d0 to an estimate of how far the solution is, one for all
    parameters; lr stays 1. Arguments as FlatOptimizer's; the parameters' values when it is made are where the
    distance is measured from.

    Bytes per parameter: 7.12 with both moments and the averaged gradient in FP8 (the first weights stay
    float32), 16 in float32; 2.54 with slice_p 11. Source: arXiv 2306.06101 and prodigyopt.
    """

    def __init__(
        self,
        learning_rate: float | paddle.optimizer.lr.LRScheduler,
        parameters: Iterable,
        rule: ProdigySettings | None = None,
        settings: FlatSettings | None = None,
    ) -> None:
        self.rule = rule if rule is not None else ProdigySettings()
        settings = settings if settings is not None else FlatSettings(0.0)
        self.kinds = {"m1": RELATIVE, "m2": POSITIVE}
        self.numbers = {"d": self.rule.d0, "d_max": self.rule.d0, "numerator": 0.0}
        super().__init__(learning_rate, parameters, settings)
        if self.rule.slice_p > 1 and not isinstance(settings.grad_clip, ClipGradByGlobalNorm | None):
            raise ConfigError("slice_p takes gradients clipped by their global norm, or not at all: use "
                              "paddle.nn.ClipGradByGlobalNorm")  # fmt: skip
        self._sliced = self.space
        if self.rule.slice_p > 1:
            self._sliced = FlatLayout(self._slices(self.space.params), self.fp8_config.block_size)
            self._sliced.params.clear()  # copies, of which it needs the sizes only
        self._estimate = self.fp8_config.by_name(ESTIMATE)
        self._state |= {name: codec.zeros(*self._sliced.shape) for name, codec in self._estimate.items()}
        with paddle.no_grad():
            start = self._sliced.gather(self._slices(self.space.views(self.space.current())))
            paddle.assign(start, output=self._state["p0"]["values"])

    @property
    def d(self) -> float:
        """The estimate that the learning rate is multiplied by. Reading it waits for the device."""
        return float(self._state["numbers"]["d"])

    @classmethod
    def planned_bytes(
        cls, shapes: list[Sequence[int]], config: FP8QuantizationConfig, rule: ProdigySettings | None = None
    ) -> int:
        """As FlatOptimizer.planned_bytes."""
        step = 1 if rule is None else rule.slice_p
        slices = [(-(-math.prod(shape) // step),) for shape in shapes]
        return config.state_bytes(shapes) + config.state_bytes(slices, kinds=ESTIMATE)

    def numbers_of_step(self, grad: FlatGradient) -> dict[str, paddle.Tensor]:
        """As FlatOptimizer.numbers_of_step, float64 scalars [1]: and moves the averaged gradient."""
        rule, numbers = self.rule, super().numbers_of_step(grad)
        beta3 = rule.beta3 if rule.beta3 is not None else rule.beta2**0.5
        d, rate = self._state["numbers"]["d"], paddle.full([1], float(self.get_lr()), "float64")
        if rule.use_bias_correction:
            steps, beta1, beta2 = numbers["steps"], *(paddle.full([1], b, "float64") for b in self._betas)
            rate = rate * paddle.sqrt(1.0 - beta2**steps) / (1.0 - beta1**steps)
        weight = d / rule.d0 * d
        added, total = self._averages(grad, weight if rule.safeguard_warmup else weight * rate, beta3)
        numerator = self._state["numbers"]["numerator"] * beta3 + weight * rate * added
        found = total > 0  # else there is no gradient yet, or no rate
        estimate = paddle.where(found, rule.d_coef * numerator / paddle.where(found, total, total + 1.0), d)
        d_max = paddle.maximum(self._state["numbers"]["d_max"], estimate)
        first = paddle.maximum(d, estimate)
        growing = paddle.where(d == rule.d0, first, d)
        new = d_max if rule.growth_rate is None else paddle.minimum(d_max, growing * rule.growth_rate)
        new = paddle.where(found, new, d)
        return numbers | {"d": new, "d_max": d_max, "numerator": numerator, "old_d": d, "factor": d * rate}

    def moved(
        self, piece: Piece, numbers: dict[str, paddle.Tensor]
    ) -> tuple[paddle.Tensor, dict[str, paddle.Tensor]]:
        """As FlatOptimizer.moved: values and states [n, B], float32."""
        (beta1, beta2), old = self._betas, numbers["old_d"]
        m1 = (piece.states["m1"] * beta1).add_(piece.grad * (old * (1.0 - beta1)))
        m2 = (piece.states["m2"] * beta2).add_(paddle.square(piece.grad).multiply_(old * old * (1.0 - beta2)))
        # the rate itself is in "factor": of a piece only what its groups' rates are multiplied by
        factor = numbers["factor"] * self._scale(piece.lr)
        values = piece.values * (1.0 - factor * piece.weight_decay)
        update = (m1 * factor).divide_(paddle.sqrt(m2).add_(numbers["d"] * self.rule.epsilon))
        return values.subtract_(update), {"m1": m1, "m2": m2}

    @property
    def _betas(self) -> tuple[float, float]:
        return self.rule.beta1, self.rule.beta2

    def _scale(self, lr: float | paddle.Tensor) -> float | paddle.Tensor:
        """Rate of a group -> its part of the base rate."""
        base = self.get_lr()
        return lr / base if base else 1.0

    def _slices(self, tensors: list[paddle.Tensor]) -> list[paddle.Tensor]:
        """Tensors of any shape -> every slice_p-th value of each, [n]; the tensors themselves for 1."""
        step = self.rule.slice_p
        return tensors if step == 1 else [t.reshape([-1])[::step].contiguous() for t in tensors]

    def _averages(
        self, grad: FlatGradient, factor: paddle.Tensor, beta3: float
    ) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Move s = beta3 * s + factor * gradient -> <gradient, p0 - p>, sum of |s|; float64 [1]."""
        param, codec, small = self.space.updated()[0], self._estimate["s"], factor.astype("float32")
        whole = self.rule.slice_p == 1
        if not whole:
            grad = grad.of(self._sliced, self._slices)
            views = self._slices(self.space.views(param))
        spread = dither(self._state["count"]["steps"], self.space.block_size)
        added, total = [], []
        for rows in row_pieces(*self._sliced.shape):
            piece = grad[rows]
            values = param[rows].astype("float32") if whole else self._sliced.gather(views, rows)
            states = rows_of_state(self._state["s"], rows)
            s = (codec.decode(states) * beta3).add_(piece * small)
            added.append((piece * (self._state["p0"]["values"][rows] - values)).sum(dtype="float64"))
            total.append(s.abs().sum(dtype="float64"))
            for key, tensor in codec.encode(s, spread).items():
                replace_where(grad.finite, tensor, states[key])
        return sum(added).reshape([1]), sum(total).reshape([1])
