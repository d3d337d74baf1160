"""Peak memory of a run before anything is allocated, and the fastest settings that fit into a budget.

    plan(config, memory_model).total                    what the config as it is will hold at most, in bytes
    plan(config, memory_model, vram_gb=24).settings     the settings to take with 24 GB

How bytes are counted: phases.py. How settings that fit are ranked: `best_that_fits`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import paddle

from ppcoat.config.schema import RunConfig
from ppcoat.device import GpuMeter, HostMeter, on_gpu
from ppcoat.errors import ConfigError
from ppcoat.plan import GB, check_budget
from ppcoat.plan.phases import MemoryModel, Phase, Settings, base_name

# Formats of the base by the error of a weight: 0, 0.6, 2.7, 6.8 and 9.2 % (docs/accuracy.md).
MOST_EXACT_FIRST = (False, "int8", "fp8", "fp4", "nf4")
LEAST_UNASKED = "fp4"  # nf4 is less exact and hardly smaller: only where a config names it
# Pictures of a pass in pixels, and a rank, that are planned before any run.
USUAL_PIXELS, USUAL_RANK = 64 * 1024**2, 1024
MOST_AT_ONCE = 4096  # pictures of a pass that a plan chooses
NO_FASTER = 0.10  # by so much two times of the time model may differ and count as one


@dataclass(frozen=True)
class Plan:
    """settings: planned for. phases: in the order of a run. seconds: of an update on a GPU, by
    `MemoryModel.seconds`. facts: what was planned, a line each. vram_gb: the budget, if there was one.
    """

    settings: Settings
    phases: tuple[Phase, ...]
    seconds: float
    facts: tuple[str, ...]
    vram_gb: float | None = None

    @property
    def peak(self) -> Phase:
        """The fullest phase."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def total(self) -> int:
        """Bytes at the fullest moment of the run."""
        return self.peak.total


def plan(config: RunConfig, memory_model: type[MemoryModel], vram_gb: float | None = None) -> Plan:
    """Without vram_gb the plan of the config as it is; with it, of the fastest settings that fit.

    Chosen are the saving policy (FP8 only where coat.enabled), checkpointed blocks, swapped blocks, the
    base's format among `allowed_bases`, and the batch size with gradient_accumulation such that an update
    sees the same number of pictures. Raises ConfigError if nothing fits, naming the smallest need, and for
    what the config asks of a model that lacks it.
    """
    check_budget(vram_gb)
    memory = memory_model(config, planned_for_gpu(config, vram_gb))
    if vram_gb is None:
        return _plan(memory, as_given(config, len(memory.model.blocks)))
    return best_that_fits(memory, vram_gb)


def plan_for_card(config: RunConfig, memory_model: type[MemoryModel], vram_gb: float) -> Plan:
    """The plan of a config as it is, on the device that a budget means, whether it fits or not. Raises
    ConfigError for what the config asks of a model that lacks it."""
    check_budget(vram_gb)
    memory = memory_model(config, planned_for_gpu(config, vram_gb))
    return replace(_plan(memory, as_given(config, len(memory.model.blocks))), vram_gb=vram_gb)


def check_fits(config: RunConfig, memory_model: type[MemoryModel]) -> None:
    """Raises ConfigError, with the planned peak, for a batch or a rank far beyond what is usual that the
    device cannot hold. Others are not planned here, because that takes seconds."""
    train, network = config.train, config.network
    pixels = train.batch_size * max(side for data in config.datasets for side in data.resolutions) ** 2
    if pixels <= USUAL_PIXELS and network.linear <= USUAL_RANK:
        return
    there = (GpuMeter() if on_gpu() else HostMeter()).total_memory()
    peak = plan(config, memory_model).peak
    if there is not None and peak.total > there:
        raise ConfigError(
            f"train.batch_size {train.batch_size} at this resolution with network.linear {network.linear} "
            f"would take {peak.total / GB:.0f} GB ({peak.name}), and the device has {there / GB:.0f}: lower "
            "them; python -m ppcoat plan tells what fits"
        )


def best_that_fits(memory: MemoryModel, vram_gb: float) -> Plan:
    """The fastest settings by `MemoryModel.seconds`, but of those that are at most NO_FASTER slower the ones
    with the most exact base, and of these rather without swapped blocks: PCIe is what differs most from
    machine to machine. So 4 bits are taken where 8 would make a step slower, and INT8 before FP8, which is as
    large and four times less exact. Raises ConfigError if nothing fits."""
    plans = [_plan(memory, settings) for settings in _candidates(memory, vram_gb * GB)]
    fitting = [each for each in plans if each.total <= vram_gb * GB]
    if not fitting:
        raise ConfigError(_nothing_fits(memory.config, min(plans, key=lambda each: each.total), vram_gb))
    enough = (1 + NO_FASTER) * min(each.seconds for each in fitting)
    return replace(min((each for each in fitting if each.seconds <= enough), key=_rank), vram_gb=vram_gb)


def _rank(planned: Plan) -> tuple:
    settings = planned.settings
    exactness = MOST_EXACT_FIRST.index(settings.quantize)
    return exactness, settings.blocks_to_swap > 0, planned.seconds, planned.total


def allowed_bases(config: RunConfig) -> tuple[str | bool, ...]:
    """Formats of the base between which a plan may choose: those at least as exact as model.quantize; where a
    config does not say it, all to LEAST_UNASKED. quantize_matmul multiplies FP8 and leaves no choice."""
    if config.model.quantize_matmul:
        return ("fp8",)
    said = "quantize" in config.model.model_fields_set
    least = config.model.quantize if said else LEAST_UNASKED
    return MOST_EXACT_FIRST[: MOST_EXACT_FIRST.index(least) + 1]


def planned_for_gpu(config: RunConfig, vram_gb: float | None) -> bool:
    """Whether a run is planned for a GPU: as config.device says; "auto" with a budget means one."""
    if config.device != "auto":
        return config.device.startswith("gpu")
    return vram_gb is not None or (paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0)


def as_given(config: RunConfig, blocks: int) -> Settings:
    """The settings of a config, for a model of so many blocks."""
    train, activation = config.train, config.coat.activation
    checkpointed = config.coat.memory.checkpoint_blocks or blocks
    return Settings(
        policy=activation.policy if config.coat.enabled and activation.use_fp8 else "none",
        checkpoint_blocks=min(blocks, checkpointed) if train.gradient_checkpointing else 0,
        quantize=config.model.quantize,
        blocks_to_swap=config.model.blocks_to_swap,
        batch_size=train.batch_size,
        gradient_accumulation=train.gradient_accumulation,
        stream_encoders=config.model.stream_encoders,
    )


def with_settings(config: RunConfig, settings: Settings) -> RunConfig:
    """The config with these settings in it."""
    model = {
        "quantize": settings.quantize,
        "blocks_to_swap": settings.blocks_to_swap,
        "stream_encoders": settings.stream_encoders,
    }
    train = {
        "batch_size": settings.batch_size,
        "gradient_accumulation": settings.gradient_accumulation,
        "gradient_checkpointing": settings.checkpoint_blocks > 0,
    }
    memory = {"checkpoint_blocks": settings.checkpoint_blocks or None}
    coat = {
        "activation": config.coat.activation.model_copy(update={"policy": settings.policy}),
        "memory": config.coat.memory.model_copy(update=memory),
    }
    return config.model_copy(
        update={
            "model": config.model.model_copy(update=model),
            "train": config.train.model_copy(update=train),
            "coat": config.coat.model_copy(update=coat),
        }
    )


def with_memory_plan(
    config: RunConfig, memory_model: type[MemoryModel], free: int | None = None
) -> RunConfig:
    """What `memory: auto` asks for: the config with the settings that fit vram_gb, or else the free bytes of
    the current device. A config with `memory: as_given` comes back as it is. Raises ConfigError if nothing
    fits, or if there is neither of the two.
    """
    if config.memory == "as_given":
        return config
    if config.vram_gb is not None:
        return with_settings(config, plan(config, memory_model, config.vram_gb).settings)
    if free is None:
        raise ConfigError("memory: auto cannot see how much memory there is: give vram_gb")
    here = config.model_copy(update={"device": paddle.get_device()})
    return with_settings(config, plan(here, memory_model, free / GB).settings)


def with_earlier_plan(config: RunConfig, earlier: RunConfig) -> RunConfig:
    """The config with the memory settings of an earlier run of it."""
    return with_settings(config, _as_planned(earlier))


def line_of_plan(config: RunConfig, planned: RunConfig) -> str:
    """What `with_memory_plan` made of a config, in one line, and whether that is less exact than it was."""
    settings = _as_planned(planned)
    before, after = (MOST_EXACT_FIRST.index(each.model.quantize) for each in (config, planned))
    if after <= before:
        return str(settings)
    return (
        f"{settings}; to fit, the {base_name(settings.quantize)} rounds weights more than the config did "
        f"({base_name(config.model.quantize)}): model.quantize names the least exact one to take"
    )


def _as_planned(config: RunConfig) -> Settings:
    return as_given(config, config.coat.memory.checkpoint_blocks or 0)  # a plan says how many, or none


def _plan(memory: MemoryModel, settings: Settings) -> Plan:
    return Plan(settings, memory.phases(settings), memory.seconds(settings), memory.facts)


def _candidates(memory: MemoryModel, budget: float) -> Iterator[Settings]:
    """Every base, batch, policy and number of checkpointed blocks, each with the fewest swapped blocks that
    fit; with all, where none do. Text encoders are streamed where they do not fit whole.
    """
    config = memory.config
    pictures = config.train.batch_size * config.train.gradient_accumulation
    whole = replace(as_given(config, 0), blocks_to_swap=0, stream_encoders=False)
    stream = max(phase.total for phase in memory.phases(whole)[:2]) > budget
    for batch in (n for n in range(1, min(pictures, MOST_AT_ONCE) + 1) if pictures % n == 0):
        for quantize in allowed_bases(config):
            for policy in memory.policies:
                for checkpointed in memory.checkpoint_counts:
                    bare = Settings(policy, checkpointed, quantize, 0, batch, pictures // batch, stream)
                    yield _with_fewest_swapped(memory, bare, budget)


def _with_fewest_swapped(memory: MemoryModel, bare: Settings, budget: float) -> Settings:
    phases = [phase for phase in memory.phases(bare) if "base" in phase.parts]
    beside_base = max(phase.total - phase.parts["base"] for phase in phases)
    for swapped, base in enumerate(memory.base_by_swapped(bare.quantize)):
        if beside_base + base <= budget:
            return replace(bare, blocks_to_swap=swapped)
    return replace(bare, blocks_to_swap=len(memory.model.blocks))


def _nothing_fits(config: RunConfig, smallest: Plan, vram_gb: float) -> str:
    settings = smallest.settings
    smaller = LEAST_UNASKED not in allowed_bases(config)
    hint = f"; model.quantize: {LEAST_UNASKED} would allow a smaller base" if smaller else ""
    return (
        f"nothing fits into {vram_gb:g} GB: the smallest possible need is {smallest.total / GB:.1f} GB, in "
        f"the phase {smallest.peak.name!r}, with {settings}{hint}"
    )
