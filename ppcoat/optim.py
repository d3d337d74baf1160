"""FP8AdamW: AdamW whose two moments are stored in FP8, and learning rate schedules by name.

All parameters are views of one flat buffer [G, block_size]. Each parameter starts a new group, so no group
contains values of two parameters. The moments are flat buffers of the same shape, as is the float32 master
copy of bfloat16 and float16 parameters. A step gathers the gradients with one call and does the rest in
`fp8.adamw`. Its number of Paddle calls therefore does not depend on the number of parameters, except for one
cast for each bfloat16 or float16 gradient.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from paddle.nn import ClipGradByGlobalNorm, ClipGradByNorm, ClipGradByValue

from ppcoat.errors import ConfigError
from ppcoat.fp8.adamw import AdamWHyper, MomentCodec, adamw_step, encode_moments
from ppcoat.fp8.flat import CLIPS, LOW_PRECISION, PIECE, FlatGradient, FlatSpace
from ppcoat.fp8.formats import get_format

GROUP_KEYS = ("params", "learning_rate", "weight_decay")


@dataclass(frozen=True)
class FP8QuantizationConfig:
    """How the moments are stored. `m1` is the first moment, `m2` the second; formats "e4m3" or "e5m2".

    block_size: elements per group, a positive multiple of 16. Bytes per parameter for both moments at 128:
    2 + 2 * (4 + 1) / 128 = 2.078 with expansion (amax float32, k one byte), 2.0625 without.
    Raises ConfigError for a wrong value.
    """

    use_fp8_m1: bool = True
    use_fp8_m2: bool = True
    m1_format: str = "e4m3"
    m2_format: str = "e4m3"
    block_size: int = 128
    use_dynamic_range_expansion: bool = True

    def __post_init__(self) -> None:
        for name in ("use_fp8_m1", "use_fp8_m2", "use_dynamic_range_expansion"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, got {getattr(self, name)!r}")
        get_format(self.m1_format)
        get_format(self.m2_format)
        size = self.block_size
        if isinstance(size, bool) or not isinstance(size, int) or size <= 0 or size % 16:
            raise ConfigError(f"block_size must be a positive multiple of 16, got {size!r}")

    def codecs(self) -> tuple[MomentCodec, MomentCodec]:
        """The codecs of the first and the second moment; the second moment is never negative."""
        expand = self.use_dynamic_range_expansion
        fmt1 = get_format(self.m1_format) if self.use_fp8_m1 else None
        fmt2 = get_format(self.m2_format) if self.use_fp8_m2 else None
        return MomentCodec(fmt1, expand, positive=False), MomentCodec(fmt2, expand, positive=True)

    def state_bytes(self, shapes: Sequence[Sequence[int]], beta1: float = 0.9) -> int:
        """Bytes that FP8AdamW.state_bytes() gives for parameters of these shapes; allocates nothing."""
        groups = sum(-(-math.prod(shape) // self.block_size) for shape in shapes)
        stored = self.codecs() if beta1 > 0 else self.codecs()[1:]
        return groups * sum(codec.group_bytes(self.block_size) for codec in stored)


def update_bytes(parameters: int, on_gpu: bool) -> int:
    """What a step of FP8AdamW allocates besides for so many float32 parameters. Measured on a CPU, where it
    works in pieces; calculated for a GPU, whose kernel needs the gradients as one buffer, and their squares
    before."""
    if on_gpu:
        return 8 * parameters
    return int(37.2 * parameters if parameters <= PIECE else 39.3 * PIECE)


class FP8AdamW(paddle.optimizer.Optimizer):
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
        _check_numbers(learning_rate, beta1, beta2, epsilon, weight_decay)
        if grad_clip is not None and type(grad_clip) not in CLIPS:
            names = ", ".join(clip.__name__ for clip in CLIPS)
            raise ConfigError(f"grad_clip must be one of {names}, got {type(grad_clip).__name__}")
        self.fp8_config = fp8_config if fp8_config is not None else FP8QuantizationConfig()
        if not isinstance(self.fp8_config, FP8QuantizationConfig):
            name = type(fp8_config).__name__
            raise ConfigError(f"fp8_config: came a {name}, wanted FP8QuantizationConfig(use_fp8_m1=True)")
        groups = _parameter_groups(parameters, weight_decay)
        params = [param for group in groups for param in group["params"]]
        _check_parameters(params)
        _check_stochastic_rounding(stochastic_rounding, params[0])
        learning_rate = float(learning_rate) if isinstance(learning_rate, int) else learning_rate
        super().__init__(learning_rate=learning_rate, parameters=params, grad_clip=grad_clip)

        # Betas as float32, as their powers are: 1 - beta2 and 1 - beta2^t then carry the same rounding, and
        # it cancels.
        self._betas = (float(np.float32(beta1)), float(np.float32(beta2)))
        self._epsilon = float(epsilon)
        self._stochastic_rounding = stochastic_rounding
        self.space = FlatSpace(params, self.fp8_config.block_size, keep_master=not stochastic_rounding)
        self._lr_scale = self.space.per_group([g["learning_rate"] for g in groups for _ in g["params"]])
        self._weight_decay = self.space.per_group([g["weight_decay"] for g in groups for _ in g["params"]])
        self._codecs = self.fp8_config.codecs()
        zeros = paddle.zeros(self.space.shape, dtype="float32")
        self._state = encode_moments(zeros if beta1 > 0 else None, zeros.clone(), self._codecs)
        self._state["beta_powers"] = {name: paddle.ones([1], dtype="float32") for name in ("beta1", "beta2")}
        self._state["count"] = {name: paddle.zeros([1], dtype="int64") for name in ("steps", "skipped")}

    @property
    def skipped_steps(self) -> int:
        """Steps skipped so far for a non-finite gradient. Reading it waits for the device."""
        return int(self._state["count"]["skipped"])

    def state_bytes(self) -> int:
        """Bytes of the moment buffers, counted from the buffers; without the master copy of parameters."""
        moments = [tensor for part in ("m1", "m2") for tensor in self._state.get(part, {}).values()]
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
        grad = FlatGradient(self.space, grads, self._grad_clip)
        hyper = AdamWHyper(self.get_lr() * self._lr_scale, self._weight_decay, *self._betas, self._epsilon)
        param, stored = self.space.updated()
        adamw_step(param, grad.tensor, self._state, self._codecs, hyper, grad.finite, stored)

    def minimize(self, loss, startup_program=None, parameters=None, no_grad_set=None):
        """Paddle's form of `step()` after `loss.backward()`: returns (None, [(parameter, gradient), ...])."""
        if startup_program is not None or parameters is not None or no_grad_set is not None:
            raise ConfigError(
                "FP8AdamW.minimize takes only the loss: the parameters are given when it is built"
            )
        self.step()
        return None, [(param, param.grad) for param in self.space.params]

    def state_dict(self) -> dict[str, paddle.Tensor]:
        """Float32, int64 and uint8 tensors, which safetensors stores exactly.

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
        or dtype of a tensor differs from this optimizer's.
        """
        if "layout" not in state_dict:
            raise ConfigError("this is not the state of an FP8AdamW: it has no `layout`")
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
        for name, tensor in own_state.items():
            paddle.assign(state_dict[name], output=tensor)
        if isinstance(self._learning_rate, paddle.optimizer.lr.LRScheduler) and "LR_Scheduler" in state_dict:
            self._learning_rate.set_state_dict(_json_value(state_dict["LR_Scheduler"]))
        if self.space.master is not None:
            self.space.store(self.space.master)

    def _layout(self) -> dict:
        return {
            "block_size": self.fp8_config.block_size,
            "m1_format": self._codecs[0].name if "m1" in self._state else "none (beta1 = 0)",
            "m2_format": self._codecs[1].name,
            "dtype": str(self.space.params[0].dtype).removeprefix("paddle."),
            "stochastic_rounding": self._stochastic_rounding,
            "shapes": [list(param.shape) for param in self.space.params],
        }


@dataclass(frozen=True)
class ScheduleShape:
    """Settings that only some schedules use. cycles: cosine falls of cosine_with_restarts; power: exponent of
    polynomial; step_size, gamma: of the schedule "step", which multiplies by gamma every step_size steps."""

    cycles: int = 1
    power: float = 1.0
    step_size: int = 1
    gamma: float = 0.1


def lr_scheduler(
    name: str,
    base_lr: float,
    total_steps: int,
    warmup_steps: int = 0,
    shape: ScheduleShape | None = None,
) -> paddle.optimizer.lr.LambdaDecay:
    """A learning rate schedule by its usual name, one of SCHEDULES.

    Warm-up rises linearly from 0 over `warmup_steps`; linear, cosine, cosine_with_restarts and polynomial
    then fall to 0 at `total_steps` (the formulas of the Hugging Face schedules of these names, with a final
    rate of 0); step multiplies by gamma every step_size steps (torch's StepLR). Call `.step()` once per
    optimizer step. Raises ConfigError for an unknown name or step numbers that do not fit.
    """
    shape = shape if shape is not None else ScheduleShape()
    if name not in SCHEDULES:
        raise ConfigError(f"unknown lr_scheduler {name!r}; use one of {', '.join(SCHEDULES)}")
    if total_steps <= 0 or not 0 <= warmup_steps <= total_steps:
        raise ConfigError(
            f"lr_scheduler {name}: wanted 0 <= warmup_steps <= total_steps, total_steps > 0; "
            f"got warmup_steps {warmup_steps}, total_steps {total_steps}"
        )
    if name == "constant" and warmup_steps:
        raise ConfigError(f"constant has no warm-up (warmup_steps {warmup_steps}): use constant_with_warmup")
    decay = SCHEDULES[name]

    def factor(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        if name == "step":
            return shape.gamma ** ((step - warmup_steps) // shape.step_size)
        return decay(min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps)), shape)

    return paddle.optimizer.lr.LambdaDecay(learning_rate=base_lr, lr_lambda=factor)


# factor of the base rate at `progress` in [0, 1] between the end of the warm-up and the last step
SCHEDULES = {
    "constant": lambda progress, shape: 1.0,
    "constant_with_warmup": lambda progress, shape: 1.0,
    "linear": lambda progress, shape: 1.0 - progress,
    "cosine": lambda progress, shape: _half_wave(progress),
    "cosine_with_restarts": lambda progress, shape: (
        _half_wave(shape.cycles * progress % 1.0) if progress < 1.0 else 0.0
    ),
    "polynomial": lambda progress, shape: (1.0 - progress) ** shape.power,
    "step": None,  # counts steps, not progress
}


def _half_wave(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


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


def _check_numbers(
    learning_rate: float | paddle.optimizer.lr.LRScheduler,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
) -> None:
    if not isinstance(learning_rate, paddle.optimizer.lr.LRScheduler):
        _check_number("learning_rate", learning_rate)
    _check_number("beta1", beta1, below=1.0)
    _check_number("beta2", beta2, below=1.0)
    _check_number("epsilon", epsilon)
    _check_number("weight_decay", weight_decay)


def _check_number(name: str, value: float, below: float = math.inf) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value < below:  # false for NaN too
        wanted = "0 or more" if below == math.inf else f"in [0, {below:g})"
        came = repr(value) if isinstance(value, int | float | str) else type(value).__name__
        raise ConfigError(f"{name} must be a number {wanted}, got {came}")


def _parameter_groups(parameters: Iterable | None, weight_decay: float) -> list[dict]:
    """`parameters` as given -> groups with all of GROUP_KEYS."""
    items = [] if parameters is None else list(parameters)
    if not items:
        raise ConfigError("FP8AdamW needs `parameters`: a list of trainable tensors, got none")
    if not isinstance(items[0], dict):
        return [{"params": items, "learning_rate": 1.0, "weight_decay": weight_decay}]
    groups = []
    for item in items:
        unknown = set(item) - set(GROUP_KEYS)
        if unknown or not item.get("params"):
            problem = f"unknown key {sorted(unknown)[0]!r}" if unknown else "no `params`"
            raise ConfigError(f"parameter group {len(groups)}: {problem}; it takes {', '.join(GROUP_KEYS)}")
        group = {"learning_rate": 1.0, "weight_decay": weight_decay, **item, "params": list(item["params"])}
        _check_number(f"learning_rate of parameter group {len(groups)}", group["learning_rate"])
        _check_number(f"weight_decay of parameter group {len(groups)}", group["weight_decay"])
        groups.append(group)
    return groups


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


def _layout_difference(field: str, saved: object, own: object) -> str:
    if field == "shapes" and isinstance(saved, list):
        if len(saved) != len(own):
            return f"optimizer state shapes: saved for {len(saved)} parameters, this optimizer has {len(own)}"
        index = next(i for i, pair in enumerate(zip(saved, own, strict=True)) if pair[0] != pair[1])
        saved, own, field = saved[index], own[index], f"shape of parameter {index}"
    return f"optimizer state {field}: saved {saved}, this optimizer {own}; use the settings it was saved with"
