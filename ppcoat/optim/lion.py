"""Lion: the sign of a momentum as the update, one state a parameter."""

from __future__ import annotations

from collections.abc import Iterable

import paddle

from ppcoat.optim.flat_optimizer import FlatOptimizer, Piece
from ppcoat.optim.settings import SIGNED, FlatSettings, check_number


class Lion(FlatOptimizer):
    """p -= lr * sign(beta1 * m + (1 - beta1) * g), after decoupled decay; then m = beta2 * m + (1 - beta2) *
    g. Arguments as FlatOptimizer's; betas in [0, 1). Rates are 3 to 10 times lower than AdamW's. Bytes per
    parameter: 1.04 in FP8, 4 in float32.

    Source: arXiv 2302.06675.
    """

    kinds = {"m1": SIGNED}

    def __init__(
        self,
        learning_rate: float | paddle.optimizer.lr.LRScheduler,
        parameters: Iterable,
        betas: tuple[float, float] = (0.9, 0.99),
        settings: FlatSettings | None = None,
    ) -> None:
        for name, beta in zip(("beta1", "beta2"), betas, strict=True):
            check_number(name, beta, below=1.0)
        self._betas = betas
        super().__init__(learning_rate, parameters, settings if settings is not None else FlatSettings(0.0))

    def moved(
        self, piece: Piece, numbers: dict[str, paddle.Tensor]
    ) -> tuple[paddle.Tensor, dict[str, paddle.Tensor]]:
        """As FlatOptimizer.moved: values and states [n, B], float32."""
        beta1, beta2 = self._betas
        m1 = piece.states["m1"]
        update = (m1 * beta1).add_(piece.grad * (1.0 - beta1)).sign()
        values = (piece.values * (1.0 - piece.lr * piece.weight_decay)).subtract_(update * piece.lr)
        return values, {"m1": (m1 * beta2).add_(piece.grad * (1.0 - beta2))}
