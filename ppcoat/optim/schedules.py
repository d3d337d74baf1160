"""Learning rate schedules by name."""

from __future__ import annotations

import math
from dataclasses import dataclass

import paddle

from ppcoat.errors import ConfigError


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
