"""The optimizer of a run and the course of its learning rate, from the section `train` of its config."""

from __future__ import annotations

import logging

import paddle

from ppcoat.coat import COATTrainer, state_config
from ppcoat.config.schema import RunConfig
from ppcoat.optim import (
    Adafactor,
    AdafactorSettings,
    FlatOptimizer,
    FlatSettings,
    Lion,
    Prodigy,
    ProdigySettings,
    ScheduleFreeAdamW,
    ScheduleFreeSettings,
    ScheduleShape,
    lr_scheduler,
)

SMALL_FOR_PRODIGY = 0.1

_log = logging.getLogger(__name__)


def run_optimizer(
    config: RunConfig, coat: COATTrainer, parameters: list[paddle.Tensor]
) -> tuple[paddle.optimizer.Optimizer, paddle.optimizer.lr.LRScheduler]:
    """The optimizer that train.optimizer names, for float32 parameters of any shape, and its schedule."""
    train, schedule, fp8 = config.train, _schedule(config), config.uses_fp8_optimizer
    if train.optimizer in ("adamw", "coat_fp8_adamw"):
        betas, norm = (train.beta1, train.beta2), train.max_grad_norm
        return coat.create_optimizer(
            parameters, schedule, train.weight_decay, betas, train.epsilon, norm, fp8_states=fp8
        ), schedule
    return _by_name(config, parameters, schedule), schedule


def _by_name(
    config: RunConfig, parameters: list[paddle.Tensor], schedule: paddle.optimizer.lr.LRScheduler
) -> FlatOptimizer:
    train, betas = config.train, {"beta1": config.train.beta1, "beta2": config.train.beta2}
    clip = paddle.nn.ClipGradByGlobalNorm(train.max_grad_norm) if train.max_grad_norm > 0 else None
    states = state_config(config.coat, config.uses_fp8_optimizer)
    settings = FlatSettings(train.weight_decay, clip, states)
    if train.optimizer == "lion":
        return Lion(schedule, parameters, (train.beta1, train.beta2), settings)
    if train.optimizer == "prodigy":
        if train.lr < SMALL_FOR_PRODIGY:
            said = "train.lr %g: prodigy finds the rate and multiplies it by this; 1 is usual"
            _log.warning(said, train.lr)
        rule = ProdigySettings(**betas, epsilon=train.epsilon, **train.prodigy.model_dump())
        return Prodigy(schedule, parameters, rule, settings)
    if train.optimizer == "schedulefree_adamw":
        warmup = train.lr_warmup_steps if train.lr_scheduler == "constant_with_warmup" else 0
        own = {"epsilon": train.epsilon, "warmup_steps": warmup} | train.schedulefree.model_dump()
        return ScheduleFreeAdamW(schedule, parameters, ScheduleFreeSettings(**betas, **own), settings)
    rule = AdafactorSettings(**train.adafactor.model_dump())
    return Adafactor(schedule, parameters, rule, settings)


def _schedule(config: RunConfig) -> paddle.optimizer.lr.LRScheduler:
    """Schedule-free AdamW warms up by itself, and needs no fall; Adafactor may have a rate of its own."""
    train, name, warmup = config.train, config.train.lr_scheduler, config.train.lr_warmup_steps
    if train.optimizer == "schedulefree_adamw":
        if name == "constant_with_warmup":
            name, warmup = "constant", 0
        elif name != "constant":
            _log.warning(
                "train.lr_scheduler %s: schedulefree_adamw is made for a constant rate, its average stands "
                "for the fall", name,
            )  # fmt: skip
    if train.optimizer == "adafactor" and train.adafactor.relative_step and name != "constant":
        _log.warning("train.lr_scheduler %s has no effect with adafactor.relative_step", name)
    shape = ScheduleShape(train.lr_num_cycles, train.lr_power, train.lr_step_size or 1, train.lr_gamma)
    return lr_scheduler(name, train.lr, train.steps, warmup, shape)
