"""Steps whose numbers are not finite: what is to blame, when they end a run, and that nothing of them is
saved.

A step with such a loss or gradient changes nothing and counts as skipped. Batches and noise differ from step
to step, so the next may be well again; what never gets well ends the run at once: a weight of the base that
is damaged (ConfigError: another file), a parameter that an update has made so (FloatingPointError).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle

from ppcoat.config.schema import RunConfig
from ppcoat.errors import ConfigError
from ppcoat.finite import damaged_weight, first_not_finite
from ppcoat.lora.kinds import LARGEST
from ppcoat.train.checkpoint import named_latest
from ppcoat.train.ranks import Ranks
from ppcoat.train.report import first_bad_module
from ppcoat.train.run_state import RunState


@dataclass(frozen=True)
class BadStep:
    """A step that is not finite. number: from 1. losses: float64 [ranks, losses]; squares: of the gradient of
    each of `parameters`, float64; forward(n): the pass of loss n again."""

    number: int
    model: paddle.nn.Layer
    parameters: Mapping[str, paddle.Tensor]
    losses: np.ndarray
    squares: np.ndarray
    forward: Callable[[int], object]


def check_weights(step: BadStep, config: RunConfig, ranks: Ranks, with_base: bool) -> None:
    """Raises, on all ranks, FloatingPointError for a parameter that is not finite, and ConfigError for a
    weight of the base: all of them are read, and they do not change, so once is enough."""
    own = first_not_finite(step.parameters)
    base = damaged_weight(step.model) if own is None and with_base else None
    found = ranks.gather([float(own is not None), float(base is not None)])
    if not found.any():
        return
    ranks.close()  # they all meet this error
    if found[:, 0].any():
        name = own or f"a parameter of rank {found[:, 0].argmax()}"
        raise FloatingPointError(
            f"step {step.number}: {name} holds NaN or infinity since an update before it: training has "
            f"diverged. {last_checkpoint(config.run_dir)}. Lower train.lr"
        )
    name = base or f"a weight on rank {found[:, 1].argmax()}"
    raise ConfigError(
        f"step {step.number}: {name} of the transformer of {config.model.name_or_path} holds NaN or "
        f"infinity: fetch it again. {last_checkpoint(config.run_dir)}"
    )


def give_up(step: BadStep, in_a_row: int, config: RunConfig, ranks: Ranks) -> None:
    """Raises FloatingPointError, on all ranks, naming the first tensor of the step that is not finite."""
    ranks.close()
    raise FloatingPointError(
        f"{in_a_row} steps in a row were skipped for a loss or gradient that is not finite; in step "
        f"{step.number} the first bad tensor is {_first_bad(step, ranks)}. "
        f"{last_checkpoint(config.run_dir)}. Lower train.lr, or train in float32 or bfloat16"
    )


def check_before_saving(state: RunState, run_dir: Path) -> None:
    """Raises FloatingPointError for numbers that no checkpoint and no LoRA file may hold: parameters, their
    mean and states of optimizers that are not finite, parameters beyond what is read from a LoRA file."""
    for group, tensors in state.tensors().items():
        name = first_not_finite(tensors)
        told = f"{name} of {group} holds NaN or infinity"
        if name is None and group == "lora":
            name = next((each for each, values in tensors.items() if values.abs().max() > LARGEST), None)
            told = f"{name} has grown beyond {LARGEST:g}"
        if name is not None:
            raise FloatingPointError(
                f"step {state.step}: {told}: training has diverged, and nothing of this step is saved. "
                f"{last_checkpoint(run_dir)}. Lower train.lr"
            )


def last_checkpoint(run_dir: Path) -> str:
    """The words for what a run that ends badly leaves."""
    try:
        step = int(named_latest(run_dir / "checkpoints"))
    except (OSError, ValueError):  # not there, or damaged
        return "No checkpoint was saved before"
    return f"The last checkpoint, step {step}, is unharmed"


def _first_bad(step: BadStep, ranks: Ranks) -> str:
    bad = np.argwhere(~np.isfinite(step.losses))
    if not bad.size:
        return f"the gradient of {list(step.parameters)[np.flatnonzero(~np.isfinite(step.squares))[0]]}"
    rank, number = bad[0]
    first = f"the loss, {step.losses[rank, number]}"
    if rank != ranks.rank:
        return f"{first}, on rank {rank}, whose log says more"
    module = first_bad_module(step.model, lambda: step.forward(number))
    return first if module is None else f"{first}, and before it the output of {module}"
