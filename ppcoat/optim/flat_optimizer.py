"""What all optimizers here share: parameters as views of one flat buffer, states in FP8 or float32, steps
that are skipped, clipping, states in files.

All parameters are views of one flat buffer [G, block_size]. Each parameter starts a new group, so no group
contains values of two parameters. States are flat buffers of the same shape, as is the float32 master copy of
bfloat16 and float16 parameters. A subclass names its states and says how a piece of them moves.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle

from ppcoat.device import dtype_name
from ppcoat.errors import ConfigError
from ppcoat.finite import first_not_finite
from ppcoat.fp8.adamw import (
    State,
    decode_moments,
    dither,
    encode_moments,
    number_of,
    replace_where,
    rows_of_state,
)
from ppcoat.fp8.flat import CLIPS, LOW_PRECISION, FlatGradient, FlatSpace, round_into, row_pieces
from ppcoat.optim.settings import (
    RELATIVE,
    FlatSettings,
    FP8QuantizationConfig,
    check_number,
)

GROUP_KEYS = ("params", "learning_rate", "weight_decay")


@dataclass
class Piece:
    """Some groups [n, B] of the flat buffer in a step, all float32: the parameters' values, their gradients,
    decoded states by name; learning rate and decay of these groups, floats or [n, 1]."""

    values: paddle.Tensor
    grad: paddle.Tensor
    states: dict[str, paddle.Tensor]
    lr: float | paddle.Tensor
    weight_decay: float | paddle.Tensor


_NOT_COUNTED = ("count", "beta_powers", "numbers")


class FlatOptimizer(paddle.optimizer.Optimizer):
    """Base of the optimizers. parameters: a list of trainable tensors of any shape, or of dicts {"params":
    [...], "learning_rate": scale of the base rate, "weight_decay": float}; all of one dtype: float32,
    bfloat16 or float16. learning_rate: a float or an LRScheduler.

    A gradient with NaN or inf skips the whole step: parameters and state do not change, and `skipped_steps`
    counts it. space: the flat buffer. Raises ConfigError for wrong settings, and at `step()` if some
    parameters have a gradient and others have none.

    A subclass has in `kinds` {state: how it is stored}, in `numbers` {number of a step: first value}, and
    `moved`, or an `update` of its own.
    """

    kinds: dict[str, str] = {}
    numbers: dict[str, float] = {}

    def __init__(
        self,
        learning_rate: float | paddle.optimizer.lr.LRScheduler,
        parameters: Iterable,
        settings: FlatSettings | None = None,
    ) -> None:
        settings = settings if settings is not None else FlatSettings()
        if not isinstance(learning_rate, paddle.optimizer.lr.LRScheduler):
            check_number("learning_rate", learning_rate)
        check_number("weight_decay", settings.weight_decay)
        clip, config = settings.grad_clip, settings.fp8_config
        if clip is not None and type(clip) not in CLIPS:
            names = ", ".join(clip.__name__ for clip in CLIPS)
            raise ConfigError(f"grad_clip must be one of {names}, got {type(clip).__name__}")
        self.fp8_config = config if config is not None else FP8QuantizationConfig()
        if not isinstance(self.fp8_config, FP8QuantizationConfig):
            name = type(config).__name__
            raise ConfigError(f"fp8_config: came a {name}, wanted FP8QuantizationConfig(use_fp8_m1=True)")
        groups = self._parameter_groups(parameters, settings.weight_decay)
        params = [param for group in groups for param in group["params"]]
        _check_parameters(params)
        _check_stochastic_rounding(settings.stochastic_rounding, params[0])
        learning_rate = float(learning_rate) if isinstance(learning_rate, int) else learning_rate
        super().__init__(learning_rate=learning_rate, parameters=params, grad_clip=clip)

        self._stochastic_rounding = settings.stochastic_rounding
        block_size = self.fp8_config.block_size
        self.space = FlatSpace(params, block_size, keep_master=not settings.stochastic_rounding)
        self._lr_scale = self.space.per_group([g["learning_rate"] for g in groups for _ in g["params"]])
        self._weight_decay = self.space.per_group([g["weight_decay"] for g in groups for _ in g["params"]])
        self._codecs = self.fp8_config.codecs()
        self._state = {
            name: codec.zeros(*self.space.shape)
            for name, codec in self.fp8_config.by_name(self.kinds).items()
        }
        self._state["count"] = {name: paddle.zeros([1], dtype="int64") for name in ("steps", "skipped")}
        if self.numbers:
            self._state["numbers"] = {
                name: paddle.full([1], value, dtype="float64") for name, value in self.numbers.items()
            }

    @classmethod
    def planned_bytes(
        cls, shapes: list[Sequence[int]], config: FP8QuantizationConfig, rule: object | None = None
    ) -> int:
        """Bytes that state_bytes() gives for parameters of these shapes; allocates nothing. rule: the
        optimizer's own settings, where they matter."""
        return config.state_bytes(shapes, kinds=cls.kinds)

    @property
    def skipped_steps(self) -> int:
        """Steps skipped so far for a non-finite gradient. Reading it waits for the device."""
        return int(self._state["count"]["skipped"])

    def state_bytes(self) -> int:
        """Bytes of the states, counted from the buffers; without the master copy of parameters."""
        moments = [t for part, own in self._state.items() if part not in _NOT_COUNTED for t in own.values()]
        return sum(tensor.size * tensor.element_size() for tensor in moments)

    @paddle.no_grad()
    def step(self) -> None:
        """One update from the parameters' gradients. Does nothing if no parameter has one; raises ConfigError
        if only some have one."""
        grads = [param.grad for param in self.space.params]
        if all(grad is None for grad in grads):
            return
        for param, grad in zip(self.space.params, grads, strict=True):
            if grad is None:
                raise ConfigError(
                    f"parameter {param.name} {list(param.shape)} has no gradient: "
                    "leave it out of `parameters`"
                )
        self.space.adopt_moved()
        self.update(FlatGradient(self.space, grads, self._grad_clip))

    def update(self, grad: FlatGradient) -> None:
        """Move parameters and states, where grad.finite (bool [1]), by the gradients [G, B]: here piece by
        piece with `moved`."""
        numbers = self.numbers_of_step(grad)
        self.update_pieces(grad, numbers)
        self.finish(grad.finite, numbers)

    def numbers_of_step(self, grad: FlatGradient) -> dict[str, paddle.Tensor]:
        """What `moved` needs besides, float64 scalars [1] after this step: the optimizer's own numbers, and
        what else it wants under other names. steps: 1 in the first step."""
        return {"steps": (self._state["count"]["steps"] + 1).astype("float64")}

    def moved(
        self, piece: Piece, numbers: dict[str, paddle.Tensor]
    ) -> tuple[paddle.Tensor, dict[str, paddle.Tensor]]:
        """A piece, and numbers float32 [1] -> values and states of its groups after the step, [n, B]."""
        raise NotImplementedError

    def update_pieces(self, grad: FlatGradient, numbers: dict[str, paddle.Tensor]) -> None:
        """`moved` for all pieces of the flat buffer [G, B], kept where grad.finite; numbers as of
        `numbers_of_step`."""
        param, stored = self.space.updated()
        small = {name: number.astype("float32") for name, number in numbers.items()}
        spread, lr = dither(self._state["count"]["steps"], param.shape[-1]), self.get_lr() * self._lr_scale
        for rows in row_pieces(*param.shape):
            states = {name: rows_of_state(self._state[name], rows) for name in self.kinds}
            values = param[rows] if param.dtype == paddle.float32 else param[rows].astype("float32")
            decay = number_of(self._weight_decay, rows)
            piece = Piece(values, grad[rows], self._decoded(states), number_of(lr, rows), decay)
            new_values, new = self.moved(piece, small)
            replace_where(grad.finite, new_values, values)
            if stored is not None or param.dtype != paddle.float32:
                round_into((param if stored is None else stored)[rows], values, stochastic=stored is None)
            for name, state in self._encoded(new, spread).items():
                for key, tensor in states[name].items():
                    replace_where(grad.finite, state[key], tensor)

    def finish(self, finite: paddle.Tensor, numbers: dict[str, paddle.Tensor]) -> None:
        """Count the step, and keep its numbers where finite (bool [1]); float64 scalars [1]."""
        for name in self.numbers:
            replace_where(finite, numbers[name], self._state["numbers"][name])
        count = self._state["count"]
        count["steps"].add_(finite.astype("int64"))
        count["skipped"].add_(1 - finite.astype("int64"))

    def _decoded(self, states: dict[str, State]) -> dict[str, paddle.Tensor]:
        codecs, decoded = self.fp8_config.by_name(self.kinds), {}
        if self.kinds.get("m1") == RELATIVE:
            decoded["m1"], decoded["m2"] = decode_moments(states, self._codecs)
        return {
            name: codecs[name].decode(states[name]) for name in self.kinds if name not in decoded
        } | decoded

    def _encoded(self, values: dict[str, paddle.Tensor], spread: paddle.Tensor) -> dict[str, State]:
        codecs = self.fp8_config.by_name(self.kinds)
        alone = {name: kind for name, kind in self.kinds.items() if name in values}
        encoded = {}
        if alone.get("m1") == RELATIVE:
            encoded = encode_moments(values["m1"], values["m2"], self._codecs, spread)
            alone = {name: kind for name, kind in alone.items() if name not in ("m1", "m2")}
        return encoded | {name: codecs[name].encode(values[name], spread) for name in alone}

    def minimize(self, loss, startup_program=None, parameters=None, no_grad_set=None):
        """Paddle's form of `step()` after `loss.backward()`: returns (None, [(parameter, gradient), ...])."""
        if startup_program is not None or parameters is not None or no_grad_set is not None:
            raise ConfigError(
                f"{type(self).__name__}.minimize takes only the loss: the parameters are given when it "
                "is built"
            )
        self.step()
        return None, [(param, param.grad) for param in self.space.params]

    def state_dict(self) -> dict[str, paddle.Tensor]:
        """Float32, float64, int64 and uint8 tensors of any shape, which safetensors stores exactly.

        `layout` and `LR_Scheduler` are JSON text as uint8 [bytes]. `master` is the master copy of
        low-precision parameters, float32 [G, block_size], if there is one.
        """
        state = {
            f"{part}.{name}": t.clone() for part, group in self._state.items() for name, t in group.items()
        }
        state["layout"] = _json_tensor(self._layout())
        if self.space.master is not None:
            state["master"] = self.space.master.clone()
        if isinstance(self._learning_rate, paddle.optimizer.lr.LRScheduler):
            state["LR_Scheduler"] = _json_tensor(self._learning_rate.state_dict())
        return state

    def set_state_dict(self, state_dict: dict[str, paddle.Tensor]) -> None:
        """Restore a `state_dict`. Raises ConfigError, before anything is changed, if its layout or the shape
        or dtype of a tensor differs from this optimizer's, and if a state does not decode to finite numbers.
        """
        if "layout" not in state_dict:
            raise ConfigError(f"this is not a state of {type(self).__name__}: it has no `layout`")
        saved, own = _json_value(state_dict["layout"]), self._layout()
        for field, value in own.items():
            if saved.get(field) != value:
                raise ConfigError(_layout_difference(field, saved.get(field), value))
        own_state = {f"{part}.{name}": t for part, group in self._state.items() for name, t in group.items()}
        if self.space.master is not None:
            own_state["master"] = self.space.master
        for name, tensor in own_state.items():
            loaded = state_dict.get(name)
            if loaded is None or loaded.shape != tensor.shape or loaded.dtype != tensor.dtype:
                got = "nothing" if loaded is None else f"{loaded.dtype} {list(loaded.shape)}"
                raise ConfigError(
                    f"optimizer state {name}: wanted {tensor.dtype} {list(tensor.shape)}, got {got}"
                )
        self._check_finite(state_dict)
        for name, tensor in own_state.items():
            paddle.assign(state_dict[name], output=tensor)
        if isinstance(self._learning_rate, paddle.optimizer.lr.LRScheduler) and "LR_Scheduler" in state_dict:
            self._learning_rate.set_state_dict(_json_value(state_dict["LR_Scheduler"]))
        if self.space.master is not None:
            self.space.store(self.space.master)

    def _check_finite(self, given: dict[str, paddle.Tensor]) -> None:
        """Raises ConfigError for states of which a code or a scale is NaN, as their numbers then are."""
        for rows in row_pieces(*self.space.shape):
            states = {name: {key: given[f"{name}.{key}"] for key in self._state[name]} for name in self.kinds}
            decoded = self._decoded({name: rows_of_state(state, rows) for name, state in states.items()})
            if (name := first_not_finite(decoded)) is not None:
                raise ConfigError(f"optimizer state {name}: holds NaN or infinity; take an earlier one")

    def _parameter_groups(self, parameters: Iterable | None, weight_decay: float) -> list[dict]:
        """`parameters` as given -> groups with all of GROUP_KEYS."""
        items = [] if parameters is None else list(parameters)
        if not items:
            raise ConfigError(
                f"{type(self).__name__} needs `parameters`: a list of trainable tensors, got none"
            )
        if not isinstance(items[0], dict):
            return [{"params": items, "learning_rate": 1.0, "weight_decay": weight_decay}]
        groups = []
        for item in items:
            unknown = set(item) - set(GROUP_KEYS)
            if unknown or not item.get("params"):
                problem = f"unknown key {sorted(unknown)[0]!r}" if unknown else "no `params`"
                raise ConfigError(
                    f"parameter group {len(groups)}: {problem}; it takes {', '.join(GROUP_KEYS)}"
                )
            group = {
                "learning_rate": 1.0,
                "weight_decay": weight_decay,
                **item,
                "params": list(item["params"]),
            }
            check_number(f"learning_rate of parameter group {len(groups)}", group["learning_rate"])
            check_number(f"weight_decay of parameter group {len(groups)}", group["weight_decay"])
            groups.append(group)
        return groups

    def _layout(self) -> dict:
        codecs = self.fp8_config.by_name(self.kinds)
        return {
            "optimizer": type(self).__name__,
            "block_size": self.fp8_config.block_size,
            **{f"{name}_format": codec.name for name, codec in codecs.items()},
            "dtype": dtype_name(self.space.params[0].dtype),
            "stochastic_rounding": self._stochastic_rounding,
            "shapes": [list(param.shape) for param in self.space.params],
        }


def _check_parameters(params: list[paddle.Tensor]) -> None:
    accepted = (paddle.float32, *LOW_PRECISION)
    for param in params:
        if not isinstance(param, paddle.Tensor):
            raise ConfigError(f"`parameters` must hold paddle tensors, got {type(param).__name__}")
        if param.dtype not in accepted or param.dtype != params[0].dtype:
            wanted = "all float32, all bfloat16 or all float16"
            raise ConfigError(f"parameter {param.name} is {param.dtype}; the parameters must be {wanted}")
        if param.stop_gradient:
            raise ConfigError(
                f"parameter {param.name} is frozen (stop_gradient): leave it out of `parameters`"
            )
    if len({id(param) for param in params}) != len(params):
        raise ConfigError("a parameter appears twice in `parameters`")


def _check_stochastic_rounding(value: bool, param: paddle.Tensor) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"stochastic_rounding must be true or false, got {value!r}")
    if value and param.dtype != paddle.bfloat16:
        raise ConfigError(
            f"stochastic_rounding needs bfloat16 parameters, parameter {param.name} is {param.dtype}"
        )


def _json_tensor(value: object) -> paddle.Tensor:
    return paddle.to_tensor(np.frombuffer(json.dumps(value).encode(), dtype=np.uint8).copy())


def _json_value(tensor: paddle.Tensor) -> dict:
    try:
        return json.loads(tensor.numpy().tobytes().decode())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"damaged text in the optimizer state: {error}") from error


def _layout_difference(field: str, saved: Any, own: Any) -> str:
    if field == "shapes" and isinstance(saved, list):
        if len(saved) != len(own):
            return f"optimizer state shapes: saved for {len(saved)} parameters, this optimizer has {len(own)}"
        index = next(i for i, pair in enumerate(zip(saved, own, strict=True)) if pair[0] != pair[1])
        saved, own, field = saved[index], own[index], f"shape of parameter {index}"
    return f"optimizer state {field}: saved {saved}, this optimizer {own}; use the settings it was saved with"
