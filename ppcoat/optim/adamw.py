"""FP8AdamW: AdamW whose two moments are stored in FP8. And Lion, which has one, of which it takes the sign.

A step of FP8AdamW gathers the gradients with one call and does the rest in `fp8.adamw`. Its number of Paddle
calls therefore does not depend on the number of parameters, except for one cast for each bfloat16 or float16
gradient.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import paddle
from paddle.nn import ClipGradByGlobalNorm, ClipGradByNorm, ClipGradByValue

from ppcoat.errors import ConfigError
from ppcoat.fp8.adamw import AdamWHyper, adamw_step
from ppcoat.fp8.flat import PIECE, FlatGradient
from ppcoat.optim.flat_optimizer import FlatOptimizer, Piece
from ppcoat.optim.settings import (
    POSITIVE,
    RELATIVE,
    SIGNED,
    FlatSettings,
    FP8QuantizationConfig,
    check_number,
)


class FP8AdamW(FlatOptimizer):
    """AdamW (decoupled weight decay) with FP8 moments; with both moments in float32 it equals
    paddle.optimizer.AdamW.

    parameters: a list of trainable tensors, or of dicts {"params": [...], "learning_rate": scale of the base
    rate, "weight_decay": float}; all of one dtype: float32, bfloat16 or float16. learning_rate: a float or an
    LRScheduler, for which `lr` is another name. The parameters may also come first, as in PyTorch:
    FP8AdamW(model.parameters(), lr=1e-4, fp8_config=config).

    grad_clip: ClipGradByGlobalNorm, ClipGradByNorm or ClipGradByValue. beta1 = 0 stores no first moment.
    stochastic_rounding: for bfloat16 parameters, which then have no float32 master copy (4 bytes each); the
    updated value is rounded up or down at random to bfloat16, with the exact value as its mean.

    A gradient with NaN or inf skips the whole step: parameters and state do not change, and `skipped_steps`
    counts it. space: the flat buffer. Raises ConfigError for wrong settings, and at `step()` if some
    parameters have a gradient and others have none.
    """

    def __init__(
        self,
        learning_rate: float | paddle.optimizer.lr.LRScheduler | Iterable = 1e-4,
        parameters: Iterable | float | paddle.optimizer.lr.LRScheduler | None = None,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        weight_decay: float = 0.01,
        grad_clip: ClipGradByGlobalNorm | ClipGradByNorm | ClipGradByValue | None = None,
        fp8_config: FP8QuantizationConfig | None = None,
        stochastic_rounding: bool = False,
        lr: float | paddle.optimizer.lr.LRScheduler | None = None,
    ) -> None:
        learning_rate, parameters = _rate_and_parameters(learning_rate, parameters, lr)
        for name, beta in (("beta1", beta1), ("beta2", beta2)):
            check_number(name, beta, below=1.0)
        check_number("epsilon", epsilon)
        self.kinds = {"m1": RELATIVE, "m2": POSITIVE} if beta1 > 0 else {"m2": POSITIVE}
        settings = FlatSettings(weight_decay, grad_clip, fp8_config, stochastic_rounding)
        super().__init__(learning_rate, parameters, settings)
        # Betas as float32, as a kernel gets them: 1 - beta2 and 1 - beta2^t then carry the same rounding, and
        # it cancels. Their powers are float64: near 1, float32 leaves few digits of 1 - beta2^t.
        self._betas = (float(np.float32(beta1)), float(np.float32(beta2)))
        self._epsilon = float(epsilon)
        self._state["beta_powers"] = {name: paddle.ones([1], dtype="float64") for name in ("beta1", "beta2")}

    def update(self, grad: FlatGradient) -> None:
        """Move parameters and states by the gradients [G, B], float32: one kernel on a GPU."""
        hyper = AdamWHyper(self.get_lr() * self._lr_scale, self._weight_decay, *self._betas, self._epsilon)
        param, stored = self.space.updated()
        adamw_step(param, grad.tensor, self._state, self._codecs, hyper, grad.finite, stored)

    def set_state_dict(self, state_dict: dict[str, paddle.Tensor]) -> None:
        """As FlatOptimizer.set_state_dict. Powers of beta may be float32, as checkpoints once had them."""
        powers = {
            name: power.astype("float64")
            for name, power in state_dict.items()
            if name.startswith("beta_powers.")
        }
        super().set_state_dict({**state_dict, **powers})

    def _layout(self) -> dict:
        layout = super()._layout()
        del layout["optimizer"]  # so states that were saved before there were others are still its own
        return layout if "m1" in self.kinds else layout | {"m1_format": "none (beta1 = 0)"}


# Bytes a parameter that a step allocates besides with FP8 states, where all parameters are one piece and
# where there are several; with float32 states it is less. Measured on a CPU.
_TRANSIENT = {
    "adamw": (37.2, 39.3), "lion": (32.2, 33.2), "schedulefree_adamw": (33.1, 37.1), "prodigy": (45.2, 46.3),
    "adafactor": (8.1, 10.8),
}  # fmt: skip


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


def update_bytes(parameters: int, on_gpu: bool, optimizer: str = "adamw") -> int:
    """What a step allocates besides for so many float32 parameters. On a CPU all works in pieces. Calculated
    for a GPU: the gradients as one buffer, and their squares before; then AdamW's kernel needs no more, and
    the others, which are plain Paddle, go through pieces."""
    one, several = _TRANSIENT[optimizer]
    piece = int(one * parameters if parameters <= PIECE else several * PIECE)
    if on_gpu:
        return 8 * parameters + (0 if optimizer == "adamw" else piece)
    return piece


def _rate_and_parameters(learning_rate: Any, parameters: Any, lr: Any) -> tuple[Any, Any]:
    """The two in Paddle's order, however they were given."""
    alone = learning_rate if parameters is None else parameters
    if isinstance(alone, paddle.nn.Layer | paddle.Tensor):
        name = type(alone).__name__
        raise ConfigError(f"FP8AdamW takes a list of tensors, got one {name}: give model.parameters()")
    if isinstance(learning_rate, Iterable) and not isinstance(learning_rate, str | paddle.Tensor):
        if isinstance(parameters, Iterable) and not isinstance(parameters, str):
            raise ConfigError("FP8AdamW takes one list of parameters, got two: learning_rate is a number")
        learning_rate, parameters = 1e-4 if parameters is None else parameters, learning_rate
    return learning_rate if lr is None else lr, parameters
