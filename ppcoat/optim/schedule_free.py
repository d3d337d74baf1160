"""Schedule-free AdamW: an average of the weights in place of a learning rate schedule."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import paddle

from ppcoat.errors import ConfigError
from ppcoat.fp8.flat import FlatGradient, row_pieces
from ppcoat.optim.flat_optimizer import FlatOptimizer, Piece
from ppcoat.optim.settings import POSITIVE, WEIGHTS, FlatSettings, check_number


@dataclass(frozen=True)
class ScheduleFreeSettings:
    """warmup_steps: in which the rate rises, from a first step of lr / warmup_steps. r and weight_lr_power:
    step k has the weight k^r * (largest rate so far)^weight_lr_power in the average."""

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    warmup_steps: int = 0
    r: float = 0.0
    weight_lr_power: float = 2.0

    def __post_init__(self) -> None:
        check_number("beta1", self.beta1, below=1.0)
        check_number("beta2", self.beta2, below=1.0)
        for name in ("epsilon", "warmup_steps", "r", "weight_lr_power"):
            check_number(name, getattr(self, name))
        if self.beta1 == 0:
            raise ConfigError(
                "beta1 must be above 0 for schedule-free AdamW, whose average it is; 0.9 is usual"
            )


class ScheduleFreeAdamW(FlatOptimizer):
    """AdamW without first moment and without a schedule. Arguments as FlatOptimizer's.

    While it trains, parameters are y, where gradients are taken. z is what AdamW's steps move; it is a set of
    weights and stays float32. The weights to draw with and to write are their average x = y + (z - y) *
    (1 - 1 / beta1): see `evaluation_weights`. Bytes per parameter: 5.04 with the second moment in FP8, 8 in
    float32. Source: arXiv 2405.15682; decay is applied at y, as the authors' code does.
    """

    kinds = {"m2": POSITIVE, "z": WEIGHTS}
    numbers = {"weight_sum": 0.0, "lr_max": 0.0}

    def __init__(
        self,
        learning_rate: float | paddle.optimizer.lr.LRScheduler,
        parameters: Iterable,
        rule: ScheduleFreeSettings | None = None,
        settings: FlatSettings | None = None,
    ) -> None:
        self.rule = rule if rule is not None else ScheduleFreeSettings()
        super().__init__(learning_rate, parameters, settings if settings is not None else FlatSettings(0.0))
        paddle.assign(self.space.current(), output=self._state["z"]["values"])

    def numbers_of_step(self, grad: FlatGradient) -> dict[str, paddle.Tensor]:
        """As FlatOptimizer.numbers_of_step, float64 scalars [1]."""
        rule, numbers = self.rule, super().numbers_of_step(grad)
        steps, own = numbers["steps"], self._state["numbers"]
        rise = (
            paddle.clip(steps / rule.warmup_steps, max=1.0) if rule.warmup_steps else paddle.ones_like(steps)
        )
        rate = rise * self.get_lr()
        lr_max = paddle.maximum(own["lr_max"], rate)
        weight = steps**rule.r * lr_max**rule.weight_lr_power
        weight_sum = own["weight_sum"] + weight
        share = weight / paddle.clip(weight_sum, min=1e-300)
        root2 = paddle.sqrt(1.0 - paddle.full([1], rule.beta2, "float64") ** steps)
        return numbers | {
            "lr_max": lr_max, "weight_sum": weight_sum, "rise": rise, "root2": root2, "share": share,
            "back": rule.beta1 * (1.0 - share) - 1.0,
        }  # fmt: skip

    def moved(
        self, piece: Piece, numbers: dict[str, paddle.Tensor]
    ) -> tuple[paddle.Tensor, dict[str, paddle.Tensor]]:
        """As FlatOptimizer.moved: values and states [n, B], float32."""
        rule, y, z = self.rule, piece.values, piece.states["z"]
        m2 = (piece.states["m2"] * rule.beta2).add_(paddle.square(piece.grad).scale_(1.0 - rule.beta2))
        update = piece.grad / (paddle.sqrt(m2) / numbers["root2"] + rule.epsilon)
        update = update.add_(y * piece.weight_decay) * (piece.lr * numbers["rise"])
        values = (z - y).multiply_(numbers["share"]).add_(y).add_(update * numbers["back"])
        return values, {"m2": m2, "z": z - update}

    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """Context manager: the parameters (any shape) hold x; afterwards, in any case, their own bits."""
        with paddle.no_grad():
            self.space.adopt_moved()
            held = self.space.updated()[-1]
            held = self.space.updated()[0] if held is None else held
            values, z = self.space.values(), self._state["z"]["values"]
            own, weight = held.clone(), 1.0 - 1.0 / self.rule.beta1
            for rows in row_pieces(*self.space.shape):
                x = values[rows] + (z[rows] - values[rows]) * weight
                paddle.assign(x.astype(held.dtype), output=held[rows])
        try:
            yield
        finally:
            with paddle.no_grad():
                paddle.assign(own, output=held)
