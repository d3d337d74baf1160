"""Peak memory of a run before anything is allocated, and the fastest settings that fit into a budget.

    plan(config).total                          what the config as it is will hold at most, in bytes
    plan(config, vram_gb=24).choice             the settings to take with 24 GB

How bytes are counted: phases.py. GB is 1e9 bytes; a card sold as 24 GB has 25.8 of them, and the rest is
what fragments and the desktop take.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import paddle

from ppcoat.config.schema import RunConfig
from ppcoat.device import GpuMeter, HostMeter
from ppcoat.errors import ConfigError
from ppcoat.plan.newbie import NewbieFootprint
from ppcoat.plan.phases import Choice, Footprint, Phase

GB = 1e9


@dataclass(frozen=True)
class Plan:
    """choice: the settings planned for. phases: in the order of a run. seconds: of an update on a GPU, by the
    model of `Footprint.seconds`. facts: what was planned, a line each. vram_gb: the budget, if there was one.
    """

    choice: Choice
    phases: tuple[Phase, ...]
    seconds: float
    facts: tuple[str, ...]
    vram_gb: float | None = None

    @property
    def peak(self) -> Phase:
        """The fullest phase."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def components(self) -> dict[str, int]:
        """Bytes by component in the fullest phase."""
        return self.peak.parts

    @property
    def total(self) -> int:
        """Bytes at the fullest moment of the run."""
        return self.peak.total


def plan(config: RunConfig, vram_gb: float | None = None) -> Plan:
    """Without vram_gb the plan of the config as it is; with it, of the fastest settings that fit.

    Chosen are the saving policy (FP8 only where coat.enabled), checkpointed blocks, swapped blocks, and the
    batch size with gradient_accumulation such that an update sees the same number of pictures. An FP8 base is
    taken only where model.quantize allows it, and only if it is faster or needed. Raises ConfigError if
    nothing fits, naming the smallest need, and for what the config asks of a model that lacks it.
    """
    check_budget(vram_gb)
    footprint = footprint_of(config, planned_for_gpu(config, vram_gb))
    if vram_gb is None:
        return _plan(footprint, as_given(config, len(footprint.model.blocks)))
    plans = [_plan(footprint, choice) for choice in _candidates(footprint, vram_gb * GB)]
    fitting = [each for each in plans if each.total <= vram_gb * GB]
    if not fitting:
        raise ConfigError(_nothing_fits(config, min(plans, key=lambda each: each.total), vram_gb))
    return replace(min(fitting, key=lambda each: (each.seconds, each.total)), vram_gb=vram_gb)


def footprint_of(config: RunConfig, on_gpu: bool) -> Footprint:
    """That of the config's kind of model."""
    return (NewbieFootprint if config.model.family == "newbie" else Footprint)(config, on_gpu)


def check_budget(vram_gb: float | None) -> float | None:
    """The budget as it came; raises ConfigError unless it is a positive number or None."""
    if vram_gb is not None and not (math.isfinite(vram_gb) and vram_gb > 0):
        raise ConfigError(f"vram: came {vram_gb}, wanted the card's memory in GB, say 24")
    return vram_gb


def planned_for_gpu(config: RunConfig, vram_gb: float | None) -> bool:
    """Whether a run is planned for a GPU: as config.device says; "auto" with a budget means one."""
    if config.device != "auto":
        return config.device.startswith("gpu")
    return vram_gb is not None or (paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0)


def as_given(config: RunConfig, blocks: int) -> Choice:
    """The settings of a config, for a model of so many blocks."""
    train, activation = config.train, config.coat.activation
    checkpointed = config.coat.memory.checkpoint_blocks or blocks
    return Choice(
        policy=activation.policy if config.coat.enabled and activation.use_fp8 else "none",
        checkpoint_blocks=min(blocks, checkpointed) if train.gradient_checkpointing else 0,
        quantize=config.model.quantize,
        blocks_to_swap=config.model.blocks_to_swap,
        batch_size=train.batch_size,
        gradient_accumulation=train.gradient_accumulation,
    )


def with_choice(config: RunConfig, choice: Choice) -> RunConfig:
    """The config with the settings of `choice` in it."""
    model = {"quantize": choice.quantize, "blocks_to_swap": choice.blocks_to_swap}
    train = {
        "batch_size": choice.batch_size,
        "gradient_accumulation": choice.gradient_accumulation,
        "gradient_checkpointing": choice.checkpoint_blocks > 0,
    }
    memory = {"checkpoint_blocks": choice.checkpoint_blocks or None}
    coat = {
        "activation": config.coat.activation.model_copy(update={"policy": choice.policy}),
        "memory": config.coat.memory.model_copy(update=memory),
    }
    return config.model_copy(
        update={
            "model": config.model.model_copy(update=model),
            "train": config.train.model_copy(update=train),
            "coat": config.coat.model_copy(update=coat),
        }
    )


def with_memory_plan(config: RunConfig) -> RunConfig:
    """What `memory: auto` asks for: the config with the settings that fit vram_gb, or else the whole device.
    A config with `memory: as_given` comes back as it is.
    """
    if config.memory == "as_given":
        return config
    vram_gb = config.vram_gb
    if vram_gb is None:
        total = (GpuMeter() if planned_for_gpu(config, None) else HostMeter()).total_memory()
        if total is None:
            raise ConfigError("memory: auto cannot see how much memory there is: give vram_gb")
        vram_gb = total / GB
    return with_choice(config, plan(config, vram_gb).choice)


def _plan(footprint: Footprint, choice: Choice) -> Plan:
    return Plan(choice, footprint.phases(choice), footprint.seconds(choice), footprint.facts)


def _candidates(footprint: Footprint, budget: float) -> Iterator[Choice]:
    """Every base, batch, policy and number of checkpointed blocks, each with the fewest swapped blocks that
    fit; with all, where none do.
    """
    config = footprint.config
    pictures = config.train.batch_size * config.train.gradient_accumulation
    for batch in (n for n in range(1, pictures + 1) if pictures % n == 0):
        for quantize in (False, True) if config.model.quantize else (False,):
            for policy in footprint.policies:
                for checkpointed in footprint.checkpoint_counts:
                    bare = Choice(policy, checkpointed, quantize, 0, batch, pictures // batch)
                    yield _with_fewest_swapped(footprint, bare, budget)


def _with_fewest_swapped(footprint: Footprint, bare: Choice, budget: float) -> Choice:
    phases = [phase for phase in footprint.phases(bare) if "base" in phase.parts]
    beside_base = max(phase.total - phase.parts["base"] for phase in phases)
    for swapped, base in enumerate(footprint.base_by_swapped(bare.quantize)):
        if beside_base + base <= budget:
            return replace(bare, blocks_to_swap=swapped)
    return replace(bare, blocks_to_swap=len(footprint.model.blocks))


def _nothing_fits(config: RunConfig, smallest: Plan, vram_gb: float) -> str:
    hint = "" if config.model.quantize else "; model.quantize: true would allow an FP8 base"
    choice = smallest.choice
    return (
        f"nothing fits into {vram_gb:g} GB: the smallest possible need is {smallest.total / GB:.1f} GB, in "
        f"the phase {smallest.peak.name!r}, with policy {choice.policy}, {choice.checkpoint_blocks} blocks "
        f"checkpointed and {choice.blocks_to_swap} swapped{hint}"
    )
