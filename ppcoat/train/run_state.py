"""What a run must remember to go on exactly where it stopped, into a checkpoint and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import paddle

from ppcoat.errors import ConfigError
from ppcoat.train.checkpoint import Checkpoint, check_compatible, load_latest, save_checkpoint
from ppcoat.train.optimizer_state import optimizer_tensors, set_optimizer_tensors

if TYPE_CHECKING:
    from ppcoat.train.trainer import Trainer


def save_run(trainer: Trainer) -> None:
    """A checkpoint of this step: weights, optimizer, running mean, schedule, position of the data, counters.

    The generators need no state: what a step draws follows from seed and step. Raises OSError as
    save_checkpoint does.
    """
    state = {
        "compatible": trainer.compatible,
        "batches": trainer.batches.state_dict(),
        "schedule": {"last_epoch": trainer.schedule.last_epoch, "last_lr": trainer.schedule.last_lr},
        "skipped": {"steps": trainer.skipped, "in_a_row": trainer.skipped_in_a_row},
        "bins": trainer.bins.state_dict(),
    }
    optimizer = optimizer_tensors(trainer.optimizer, trainer.parameters)
    tensors = {"lora": trainer.parameters, "optimizer": optimizer}
    if trainer.ema is not None:
        tensors["ema"] = trainer.ema.tensors
    config = trainer.config
    save_checkpoint(config.run_dir, trainer.step, tensors, state, config.save.max_step_saves_to_keep)


def resume_run(trainer: Trainer) -> None:
    """Go on from the latest checkpoint, if there is one, and make all ranks start alike.

    The number of ranks may differ from the checkpoint's where the global batch does not. Raises ConfigError
    for a checkpoint of other settings, a damaged one with save.strict_resume, and where the ranks do not see
    the same pictures and checkpoints.
    """
    config = trainer.config
    with trainer.ranks.first_ahead():  # it also removes what a killed save left
        checkpoint = load_latest(config.run_dir, config.save.strict_resume, trainer.words.strict_flag)
    if checkpoint is not None:
        _go_on_from(checkpoint, trainer)
    facts = {"step": trainer.step, **trainer.batches.state_dict()}
    for name, values in zip(facts, trainer.ranks.gather(list(facts.values())).T, strict=True):
        if (values != values[0]).any():
            raise ConfigError(
                f"the ranks do not start alike: {name} is {', '.join(f'{value:.0f}' for value in values)}; "
                "all machines need the same pictures, and one output_dir that they share"
            )
    trainer.ranks.broadcast(trainer.parameters.values())


def _go_on_from(checkpoint: Checkpoint, trainer: Trainer) -> None:
    state, steps = checkpoint.state, trainer.config.train.steps
    check_compatible(state["compatible"], trainer.compatible)
    for name, parameter in trainer.parameters.items():
        paddle.assign(checkpoint.tensors["lora"][name], output=parameter)
    trainer.batches.load_state_dict(state["batches"])
    set_optimizer_tensors(trainer.optimizer, checkpoint.tensors["optimizer"], trainer.parameters)
    trainer.schedule.set_state_dict(state["schedule"])
    if trainer.ema is not None:
        trainer.ema.load(checkpoint.tensors["ema"])
    trainer.skipped, trainer.skipped_in_a_row = state["skipped"]["steps"], state["skipped"]["in_a_row"]
    trainer.bins.load_state_dict(state["bins"])
    trainer.step = checkpoint.step
    if trainer.ranks.is_first:
        left = f"{steps - trainer.step} of {steps} steps are" if trainer.step < steps else "nothing is"
        print(f"resuming from {checkpoint.path}: {left} left")
