"""Adafactor: the second moment of a matrix as one number for each row and each column."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import paddle

from ppcoat.errors import ConfigError
from ppcoat.fp8.adamw import dither, number_of, replace_where, rows_of_state
from ppcoat.fp8.flat import FlatGradient, round_into
from ppcoat.optim.flat_optimizer import FlatOptimizer
from ppcoat.optim.settings import SIGNED, FlatSettings, FP8QuantizationConfig, check_number


@dataclass(frozen=True)
class AdafactorSettings:
    """relative_step: the rate is min(1e-2, 1 / sqrt(step)), whatever lr says; warmup_init: its 1e-2 is 1e-6 *
    step. scale_parameter: rates are multiplied by the root mean square of a parameter, at least eps2. beta1:
    of a momentum, 0 for none. eps1: added to squares. clip_threshold: the largest root mean square of an
    update before the rate. decay_rate: beta2 is 1 - step^decay_rate.
    """

    beta1: float = 0.0
    eps1: float = 1e-30
    eps2: float = 1e-3
    clip_threshold: float = 1.0
    decay_rate: float = -0.8
    scale_parameter: bool = False
    relative_step: bool = False
    warmup_init: bool = False

    def __post_init__(self) -> None:
        check_number("beta1", self.beta1, below=1.0)
        for name in ("eps1", "eps2", "clip_threshold"):
            check_number(name, getattr(self, name))
        if self.warmup_init and not self.relative_step:
            raise ConfigError("warmup_init needs relative_step: true; it is the rise of that rate")
        if not self.decay_rate < 0 < self.clip_threshold:
            raise ConfigError("decay_rate must be below 0 and clip_threshold above 0")


class Adafactor(FlatOptimizer):
    """Arguments as FlatOptimizer's. Parameters of two and more axes keep the means of squares over the last
    axis and over the one before; those of one axis keep all squares. These are float32 and small. A momentum
    (beta1) is a flat buffer, in FP8 or float32. Each parameter takes some 20 calls, so a step of hundreds of
    them costs more on a GPU than one of the other optimizers.

    Bytes per parameter: near 0, with a momentum 1.04 more in FP8. Source: arXiv 1804.04235 in the form of
    transformers, which kohya's sd-scripts and ai-toolkit use.
    """

    def __init__(
        self,
        learning_rate: float | paddle.optimizer.lr.LRScheduler,
        parameters: Iterable,
        rule: AdafactorSettings | None = None,
        settings: FlatSettings | None = None,
    ) -> None:
        self.rule = rule if rule is not None else AdafactorSettings()
        self.kinds = {"m1": SIGNED} if self.rule.beta1 > 0 else {}
        super().__init__(learning_rate, parameters, settings if settings is not None else FlatSettings(0.0))
        counts = factored_counts([param.shape for param in self.space.params])
        self._state["squares"] = {name: paddle.zeros([count]) for name, count in counts.items() if count}

    @classmethod
    def planned_bytes(
        cls, shapes: list[Sequence[int]], config: FP8QuantizationConfig, rule: AdafactorSettings | None = None
    ) -> int:
        """As FlatOptimizer.planned_bytes."""
        kinds = {"m1": SIGNED} if rule is not None and rule.beta1 > 0 else {}
        return 4 * sum(factored_counts(shapes).values()) + config.state_bytes(shapes, kinds=kinds)

    def update(self, grad: FlatGradient) -> None:
        """Move parameters and states, where grad.finite (bool [1]), by the gradients [G, B], float32."""
        numbers = self.numbers_of_step(grad)
        steps = numbers["steps"]
        beta2 = (1.0 - steps**self.rule.decay_rate).astype("float32")
        relative = None
        if self.rule.relative_step:
            most = 1e-6 * steps if self.rule.warmup_init else paddle.full_like(steps, 1e-2)
            relative = paddle.minimum(most, 1.0 / paddle.sqrt(steps)).astype("float32")
        spread = dither(self._state["count"]["steps"], self.space.block_size)
        param, stored = self.space.updated()
        taken = dict.fromkeys(self._state["squares"], 0)
        for shape, rows in zip((p.shape for p in self.space.params), self.space.rows_of_each(), strict=True):
            squares = {}
            for name, count in factored_counts([shape]).items():
                if count:
                    squares[name] = self._state["squares"][name][taken[name] : taken[name] + count]
                    taken[name] += count
            values = param[rows] if param.dtype == paddle.float32 else param[rows].astype("float32")
            lr, decay = (number_of(x, rows) for x in (self.get_lr() * self._lr_scale, self._weight_decay))
            lr, decay = (x[:1, 0] if isinstance(x, paddle.Tensor) else x for x in (lr, decay))
            old = values.reshape([-1])[: math.prod(shape)].reshape(shape)
            gradient = grad[rows].reshape([-1])[: old.size].reshape(shape)
            update, new_squares = self._direction(gradient, squares, beta2)
            if relative is not None:
                lr = relative
            if self.rule.scale_parameter:
                lr = lr * paddle.clip(_rms(old), min=self.rule.eps2)
            update = update * lr
            if self.kinds:
                update = self._with_momentum(update, rows, spread, grad.finite)
            replace_where(grad.finite, old * (1.0 - decay * lr) - update, old)
            for name, tensor in squares.items():
                replace_where(grad.finite, new_squares[name].reshape([-1]), tensor)
            if stored is not None or param.dtype != paddle.float32:
                round_into((param if stored is None else stored)[rows], values, stochastic=stored is None)
        self.finish(grad.finite, numbers)

    def _direction(
        self, grad: paddle.Tensor, squares: dict[str, paddle.Tensor], beta2: paddle.Tensor
    ) -> tuple[paddle.Tensor, dict[str, paddle.Tensor]]:
        """A parameter's gradient and means of squares -> clipped update before the rate, new means."""
        new = paddle.square(grad) + self.rule.eps1
        if "all" in squares:
            means = {"all": squares["all"].reshape(grad.shape) * beta2 + new * (1.0 - beta2)}
            update = grad * paddle.rsqrt(means["all"])
        else:
            means = {}
            for name, axis in (("rows", -1), ("columns", -2)):
                mean = new.mean(axis)
                means[name] = squares[name].reshape(mean.shape) * beta2 + mean * (1.0 - beta2)
            rows = paddle.rsqrt(means["rows"] / means["rows"].mean(-1, keepdim=True)).unsqueeze(-1)
            update = grad * rows * paddle.rsqrt(means["columns"]).unsqueeze(-2)
        return update / paddle.clip(_rms(update) / self.rule.clip_threshold, min=1.0), means

    def _with_momentum(
        self, update: paddle.Tensor, rows: slice, spread: paddle.Tensor, finite: paddle.Tensor
    ) -> paddle.Tensor:
        codec = self.fp8_config.by_name(self.kinds)["m1"]
        state, flat = rows_of_state(self._state["m1"], rows), update.reshape([-1])
        missing = (rows.stop - rows.start) * self.space.block_size - flat.size
        padded = paddle.concat([flat, paddle.zeros([missing])]) if missing else flat
        new = codec.decode(state) * self.rule.beta1
        new = new.add_(padded.reshape(new.shape) * (1.0 - self.rule.beta1))
        for key, tensor in codec.encode(new, spread).items():
            replace_where(finite, tensor, state[key])
        return new.reshape([-1])[: flat.size].reshape(update.shape)


def factored_counts(shapes: Iterable[Iterable[int]]) -> dict[str, int]:
    """Numbers that stand for the squares of parameters of these shapes: means over their last axis (rows),
    over the one before (columns), and all squares of those of one axis."""
    counts = {"rows": 0, "columns": 0, "all": 0}
    for shape in map(tuple, shapes):
        if len(shape) < 2:
            counts["all"] += math.prod(shape)
        else:
            counts["rows"] += math.prod(shape[:-1])
            counts["columns"] += math.prod(shape[:-2]) * shape[-1]
    return counts


def _rms(x: paddle.Tensor) -> paddle.Tensor:
    return paddle.sqrt(paddle.square(x).mean())
