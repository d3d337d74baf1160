"""Stopping a run from outside without losing its last step, and going on exactly where it stopped.

RunState is what a run must remember. Its parts look after tensors: the optimizer's states (how many bytes
they take, and their way into a checkpoint and back), those of several optimizers as one, and a running mean
of the parameters in float32 (exponential moving average). checkpoint.py writes and reads it.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from types import FrameType

import paddle

from ppcoat.data.batches import ResumableBatches
from ppcoat.signals import SIGNALS, expect, was_said
from ppcoat.train.report import SigmaBins

# What a command with a config file needs to go on, and what it calls a strict resume and one with other data.
AGAIN, STRICT_FLAG = "run the same command again", "--strict (save.strict_resume)"
RESTART_FLAG = "--restart_data (save.restart_data)"
_HANGUP = getattr(signal, "SIGHUP", None)
ANEW = "start a new run under another name from this one's LoRA file, with network.pretrained_lora_path"


@dataclass(frozen=True)
class ResumeWords:
    """What a user is told to do after a stop, in the flags of the command that runs.

    again: the start of "... to go on from there"; strict_flag: what made a damaged checkpoint an error;
    restart_flag: what lets a run go on with other pictures, "" where nothing does; anew: what to do where a
    run may not go on.
    """

    again: str = AGAIN
    strict_flag: str = STRICT_FLAG
    restart_flag: str = RESTART_FLAG
    anew: str = ANEW


@dataclass(frozen=True)
class Records:
    """What a checkpoint remembers of what its run was made of, so that a later start can say what changed.

    settings: those that matter, flat. weights: fingerprint of each component of the base. data: as
    `data_record` gives it. Those that are not known are empty.
    """

    settings: dict[str, object] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    data: dict[str, dict[str, str]] = field(default_factory=dict)

    def known(self) -> dict[str, dict]:
        """Those that are, by name."""
        return {name: value for name, value in vars(self).items() if value}


class FinishStepOnSignal:
    """Context manager: the first SIGINT, SIGTERM or SIGHUP is only noted in `signal`.

    A second one acts as usual, unless second_acts is false: one Ctrl+C then counts once, though both the
    terminal and a launcher pass it on.
    """

    def __init__(self, second_acts: bool = True) -> None:
        self.signal = 0
        self._second_acts = second_acts

    def __enter__(self) -> FinishStepOnSignal:
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        if self._before.get(_HANGUP) in (signal.SIG_IGN, None):  # nohup's
            self._before.pop(_HANGUP, None)
        expect(1 if self._second_acts else inf)
        for number in self._before:
            signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self.signal and kind is SystemExit:  # "stopped at step ..."; a launcher repeats its SIGTERM
            was_said()
        self._hand_back()
        expect(0)

    def _hand_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number
        if self._second_acts:
            self._hand_back()


def optimizer_state_bytes(optimizer: paddle.optimizer.Optimizer) -> int:
    """Bytes of the moments that an optimizer keeps, counted from its tensors."""
    if hasattr(optimizer, "state_bytes"):
        return optimizer.state_bytes()
    moments = [t for name, t in optimizer.state_dict().items() if "moment" in name]
    return sum(t.size * t.element_size() for t in moments)


def is_of_parameter(name: str, parameters: Iterable[paddle.Tensor]) -> bool:
    """Whether a name in an optimizer's state begins with that of one of the parameters (any shape)."""
    return any(name.startswith(f"{parameter.name}_") for parameter in parameters)


def optimizer_tensors(
    optimizer: paddle.optimizer.Optimizer, parameters: dict[str, paddle.Tensor]
) -> dict[str, paddle.Tensor]:
    """The optimizer's tensors, any shape, under names that hold in another process.

    Paddle's AdamW names a moment after its parameter's automatic name (linear_7.w_0); here it gets the path.
    """
    state = {
        name: value for name, value in optimizer.state_dict().items() if isinstance(value, paddle.Tensor)
    }
    for path, parameter in parameters.items():
        prefix = f"{parameter.name}_"
        for name in [name for name in state if name.startswith(prefix)]:
            state[f"{path}|{name.removeprefix(prefix)}"] = state.pop(name)
    return state


def set_optimizer_tensors(
    optimizer: paddle.optimizer.Optimizer,
    tensors: dict[str, paddle.Tensor],
    parameters: dict[str, paddle.Tensor],
) -> None:
    """The way back: tensors of any shape, as `optimizer_tensors` gave them."""
    state = dict(tensors)
    for name in [name for name in state if "|" in name]:
        path, _, part = name.partition("|")
        state[f"{parameters[path].name}_{part}"] = state.pop(name)
    optimizer.set_state_dict(state)


class OptimizerGroup:
    """Several optimizers whose states are counted, saved and restored as one.

    parts: {name: (optimizer, its parameters)}. In the joint state an entry that does not begin with a
    parameter's own name gets that of its part in front: "generator.m1.codes".
    """

    def __init__(
        self, parts: Mapping[str, tuple[paddle.optimizer.Optimizer, Iterable[paddle.Tensor]]]
    ) -> None:
        self.parts = {name: (optimizer, list(own)) for name, (optimizer, own) in parts.items()}

    def state_bytes(self) -> int:
        """Bytes of all moments."""
        return sum(optimizer_state_bytes(optimizer) for optimizer, _ in self.parts.values())

    def state_dict(self) -> dict:
        """The states of all."""
        return {
            key if is_of_parameter(key, parameters) else f"{name}.{key}": value
            for name, (optimizer, parameters) in self.parts.items()
            for key, value in optimizer.state_dict().items()
        }

    def set_state_dict(self, state: dict) -> None:
        """Restore what state_dict gave. Raises ConfigError as FP8AdamW does."""
        for name, (optimizer, parameters) in self.parts.items():
            own = {key: value for key, value in state.items() if is_of_parameter(key, parameters)}
            prefix = f"{name}."
            own |= {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            optimizer.set_state_dict(own)


class RunningMean:
    """mean <- mean - (1 - decay) * (mean - parameter), after every update of the parameters.

    parameters: {path: tensor of any shape}; the mean starts from their values. Source: ai-toolkit's
    `ema_config`, which has no warm-up either.
    """

    def __init__(self, parameters: Mapping[str, paddle.Tensor], decay: float) -> None:
        self.parameters = dict(parameters)
        self.decay = decay
        self.tensors = {
            path: parameter.detach().astype("float32").clone() for path, parameter in parameters.items()
        }

    @paddle.no_grad()
    def update(self) -> None:
        """Take in the parameters as they are now."""
        for path, mean in self.tensors.items():
            distance = mean - self.parameters[path].astype("float32")
            mean.subtract_(distance.scale_(1.0 - self.decay))

    @contextmanager
    def in_place_of_parameters(self) -> Iterator[None]:
        """Context manager: the parameters hold the mean; afterwards, in any case, their own bits again."""
        own = {path: parameter.detach().clone() for path, parameter in self.parameters.items()}
        self._assign(self.tensors)
        try:
            yield
        finally:
            self._assign(own)

    def load(self, tensors: Mapping[str, paddle.Tensor]) -> None:
        """Take the mean from a checkpoint's tensors."""
        for path, mean in self.tensors.items():
            paddle.assign(tensors[path].astype(mean.dtype), output=mean)

    @paddle.no_grad()
    def _assign(self, values: Mapping[str, paddle.Tensor]) -> None:
        # into the memory that the parameters have: the optimizer may hold views of it
        for path, parameter in self.parameters.items():
            paddle.assign(values[path].astype(parameter.dtype), output=parameter)


class RecentMean(RunningMean):
    """A mean over about the last third of all updates, however many they are: weights grow with the fourth
    power of the number of the update (polynomial decay, arXiv 1212.1824). parameters as RunningMean has them;
    updates(): those done, with this one."""

    def __init__(self, parameters: Mapping[str, paddle.Tensor], updates: Callable[[], int]) -> None:
        super().__init__(parameters, 0.0)
        self._updates = updates

    def update(self) -> None:
        """After an update of the parameters."""
        done = self._updates()
        self.decay = (done - 1) / (done + 4)
        super().update()


@dataclass
class RunState:
    """What a run must remember to go on exactly where it stopped. The generators need no state: what a step
    draws follows from seed and step.

    parameters: what is trained, by name. batches: the position in the data. bins: losses since the last point
    of the curves. ema: the running mean, if there is one. compatible: facts that a run which goes on from
    here must share; records: what else it compares. step: updates done; skipped: those that changed nothing,
    and how many just now in a row.
    """

    parameters: dict[str, paddle.Tensor]
    optimizer: paddle.optimizer.Optimizer | OptimizerGroup
    schedule: paddle.optimizer.lr.LRScheduler
    batches: ResumableBatches
    bins: SigmaBins
    ema: RunningMean | None = None
    compatible: dict = field(default_factory=dict)
    records: Records = Records()
    step: int = 0
    skipped: int = 0
    skipped_in_a_row: dict[str, int] = field(default_factory=dict)

    def tensors(self) -> dict[str, dict[str, paddle.Tensor]]:
        """Tensors of any shape by group and name: "lora", "optimizer" and, where there is a mean, "ema"."""
        groups = {"lora": self.parameters, "optimizer": optimizer_tensors(self.optimizer, self.parameters)}
        return groups if self.ema is None else groups | {"ema": self.ema.tensors}

    def state_dict(self) -> dict:
        """All else, as JSON can hold it."""
        return {
            "compatible": self.compatible,
            "batches": self.batches.state_dict(),
            "schedule": {"last_epoch": self.schedule.last_epoch, "last_lr": self.schedule.last_lr},
            "skipped": {"steps": self.skipped, "in_a_row": self.skipped_in_a_row},
            "bins": self.bins.state_dict(),
            **self.records.known(),
        }

    def load(
        self, step: int, tensors: dict[str, dict[str, paddle.Tensor]], state: dict, restart_data: bool = False
    ) -> None:
        """Go on from what `tensors` and `state_dict` gave after `step` updates; any shape, as then.

        Learning rate and schedule are this run's, at the place where the other stopped. A mean that the other
        did not have starts from its weights. restart_data: the order of the pictures begins anew.
        """
        for name, parameter in self.parameters.items():
            paddle.assign(tensors["lora"][name], output=parameter)
        if not restart_data:
            self.batches.load_state_dict(state["batches"])
        set_optimizer_tensors(self.optimizer, tensors["optimizer"], self.parameters)
        self.schedule.set_state_dict(state["schedule"])
        self.schedule.last_lr = self.schedule.get_lr()  # of this run's settings: the other's may differ
        if self.ema is not None:
            self.ema.load(tensors.get("ema", tensors["lora"]))
        self.skipped, in_a_row = state["skipped"]["steps"], state["skipped"]["in_a_row"]
        # earlier versions had one number for all sides
        self.skipped_in_a_row = dict(in_a_row) if isinstance(in_a_row, dict) else {}
        self.bins.load_state_dict(state["bins"])
        self.step = step
