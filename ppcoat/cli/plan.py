"""The memory a run will need, before anything is allocated.

python -m ppcoat plan config.yaml [--vram 24]
python -m ppcoat plan config.yaml --cards 8 12 16 --pictures 512 1024
python -m ppcoat plan newbie_config.toml [--vram 16]
python -m ppcoat plan lightning [--vram 48] [--resolution 1024]
python -m ppcoat plan generate [--model FOLDER] [--vram 12] [--height 1024 --width 1024]

The memory models are imported, with Paddle and its models, only for a config without mistakes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import yaml

from ppcoat.config.flags import add_flags, flag, from_flags, set_flag
from ppcoat.config.lightning import LightningConfig, lightning_config
from ppcoat.config.newbie import load_run_config
from ppcoat.config.schema import RunConfig
from ppcoat.errors import ConfigError
from ppcoat.plan import COMPONENTS, GB, check_budget

if TYPE_CHECKING:
    from ppcoat.plan.phases import Phase, Settings
    from ppcoat.plan.settings import Plan

LIGHTNING, GENERATE = "lightning", "generate"
RESOLUTION = 1024


@dataclass(frozen=True)
class PlanFlags:
    """Settings of the command."""

    config: str = flag(
        "file of a training run, e.g. configs/flux_lora_24gb.yaml, or TOML for NewBie-image; or the word "
        "lightning, for the distillation of FLUX.1-dev with all losses and gradient checkpointing, or "
        "generate, for drawing",
        positional=True,
    )
    vram: float | None = flag("choose the fastest settings that fit into so many GB", None, metavar="GB")
    cards: list[float] | None = flag(
        "print a Markdown table of what fits on cards with so many GB", None, metavar="GB"
    )
    pictures: list[int] | None = flag(
        "with --cards: sides of pictures, in training and previews (default: the config's)",
        None,
        metavar="PIXELS",
    )
    resolution: int | None = flag(
        f"lightning: side of the pictures (default: {RESOLUTION})", None, metavar="PIXELS"
    )
    overrides: list[str] = set_flag()


@dataclass(frozen=True)
class DrawingFlags:
    """Settings of plan generate; they mean what generate's do."""

    model: str | None = flag("generate: a FLUX or NewBie folder, or a FLUX file (default: FLUX.1-dev)", None)
    family: Literal["flux", "newbie"] | None = flag(
        "generate: kind of a model whose folder is not here", None
    )
    height: int | None = flag(f"generate: pixels (default: {RESOLUTION})", None)
    width: int | None = flag(f"generate: pixels (default: {RESOLUTION})", None)
    num_images: int | None = flag("generate: pictures drawn at once (default: 1)", None)
    quantize: Literal["fp8", "int8", "nf4", "fp4"] | None = flag(
        "generate: format of the transformer's weights", None
    )
    offload: bool = flag("generate: text encoders, transformer and VAE on the card in turns", False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, PlanFlags)
    add_flags(parser, DrawingFlags)


def run_command(arguments: argparse.Namespace) -> None:
    flags, drawn = from_flags(PlanFlags, arguments), from_flags(DrawingFlags, arguments)
    if flags.config == GENERATE:
        if flags.overrides or flags.cards or flags.pictures or flags.resolution is not None:
            raise ConfigError(
                "plan generate takes --model, --vram, --height, --width and their like: no --set, --cards, "
                "--pictures and --resolution"
            )
        print(drawing_plan(drawn, check_budget(flags.vram)))
        return
    if drawn != DrawingFlags():
        raise ConfigError("--model, --height, --quantize and their like are for plan generate")
    if flags.config == LIGHTNING:
        if flags.overrides or flags.cards or flags.pictures:
            raise ConfigError(
                "--set, --cards and --pictures are for a config file; plan lightning takes --vram and "
                "--resolution"
            )
        print(lightning_plans(flags.resolution or RESOLUTION, check_budget(flags.vram)))
        return
    if flags.resolution is not None:
        raise ConfigError("--resolution is for plan lightning; a config file says it in its datasets")
    if flags.cards is None and flags.pictures is not None:
        raise ConfigError("--pictures is for the table of --cards; a config file says it in its datasets")
    config = load_run_config(flags.config, flags.overrides)
    if flags.cards is None:
        print_plan(config, check_budget(flags.vram))
        return
    if flags.vram is not None:
        raise ConfigError("--vram and --cards both say how much memory there is: leave out one of the two")
    for gigabytes in flags.cards:
        check_budget(gigabytes)
    for side in flags.pictures or []:
        if side < 16 or side % 16:
            raise ConfigError(f"--pictures: came {side}, wanted multiples of 16")
    print("\n".join(cards_table(config, flags.cards, flags.pictures or [])))


def print_plan(config: RunConfig, vram_gb: float | None) -> None:
    """The plan of a run, with a budget that of the fastest settings and the lines for its config."""
    from ppcoat.plan.settings import plan
    from ppcoat.train.run import MODEL_SPECS

    spec = MODEL_SPECS[config.model.family]
    planned = plan(config, spec.memory_model, vram_gb)
    print(plan_table(planned))
    if vram_gb is not None:
        print(advice(config, planned, spec.config_format))


def plan_table(planned: Plan) -> str:
    """What a plan says, as text of at most 108 columns: facts, settings, GB by component and phase."""
    return "\n".join([*planned.facts, str(planned.settings), *phase_table(planned.phases)])


def cards_table(config: RunConfig, cards: Sequence[float], sides: Sequence[int]) -> list[str]:
    """The fastest settings of a run for each card (GB) and side of its pictures (none: the config's own), as
    the lines of a table in Markdown; sent: GB of base weights that go to the card in an update. Where an
    update sees several pictures, their batch is a column, too."""
    from ppcoat.plan.settings import best_that_fits
    from ppcoat.train.run import MODEL_SPECS

    model = MODEL_SPECS[config.model.family].memory_model
    memories = {side: model(with_side(config, side), on_gpu=True) for side in sides or [None]}
    heads = ["card", "picture", "base", "policy", "checkpointed", "swapped", "sent", "planned peak"]
    has_batches = config.train.batch_size * config.train.gradient_accumulation > 1
    rows = [(*heads, *["batch"] * has_batches)]
    for gigabytes in cards:
        for side, memory in memories.items():
            pixels = side or max(data.resolution for data in config.datasets)
            row = f"{gigabytes:g} GB", f"{pixels} px"
            try:
                planned = best_that_fits(memory, gigabytes)
            except ConfigError as error:
                rows.append(
                    (*row, *[""] * (len(rows[0]) - 3), str(error).partition(", in ")[0].rpartition(": ")[2])
                )
                continue
            taken, sent = planned.settings, memory.sent_bytes(planned.settings)
            base = taken.quantize.upper() if taken.quantize else memory.float_name
            numbers = (
                taken.checkpoint_blocks,
                taken.blocks_to_swap,
                f"{_gb(sent)} GB",
                f"{_gb(planned.total)} GB",
            )
            batch = f"{taken.batch_size} x {taken.gradient_accumulation}"
            rows.append((*row, base, taken.policy, *map(str, numbers), *[batch] * has_batches))
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return [head, "|" + "---|" * len(rows[0]), *body]


def with_side(config: RunConfig, side: int | None) -> RunConfig:
    """The config with squares of this side in training and previews; None: as it is."""
    if side is None:
        return config
    datasets = tuple(data.model_copy(update={"resolution": side}) for data in config.datasets)
    sample = config.sample.model_copy(update={"width": side, "height": side})
    return config.model_copy(update={"datasets": datasets, "sample": sample})


def phase_table(phases: Sequence[Phase]) -> list[str]:
    """GB by component and phase, a total for each phase, and the peak: all of it planned."""
    rows = [["GB, planned", *(phase.name for phase in phases)]]
    for name, title in COMPONENTS.items():
        if any(name in phase.parts for phase in phases):
            rows.append([title, *(_gb(phase.parts.get(name)) for phase in phases)])
    rows.append(["total", *(_gb(phase.total) for phase in phases)])
    lines = [
        f"{first:22s}"
        + "".join(f"{cell:>{len(head) + 3}s}" for cell, head in zip(rest, rows[0][1:], strict=True))
        for first, *rest in rows
    ]
    return [*lines, f"planned peak: {_gb(max(phase.total for phase in phases))} GB"]


def lightning_plans(resolution: int, vram_gb: float | None = None) -> str:
    """A table each for a base in bfloat16, FP8 and FP4."""
    cases = [lightning_case(resolution, base) for base in (False, "fp8", "fp4")]

    from ppcoat.plan.lightning import LightningMemoryModel

    lines = []
    for case in cases:
        memory = LightningMemoryModel(case, on_gpu=True)
        settings, heads = memory.settings, memory.heads
        phases = memory.phases(settings)
        if not lines:
            lines += [*memory.facts, f"{heads.count} heads of {heads.bytes_of_one // 4:,} parameters"]
        lines += ["", str(settings), *phase_table(phases)]
        if vram_gb is not None:
            fits = max(phase.total for phase in phases) <= vram_gb * GB
            lines.append(f"fits into {vram_gb:g} GB: {'yes' if fits else 'no'}")
    return "\n".join(lines)


def drawing_plan(flags: DrawingFlags, vram_gb: float | None = None) -> str:
    """GB by component and phase of drawing, and with a budget what is chosen for it. Raises ConfigError for
    sizes that are no multiples of 16, and if nothing fits."""
    from ppcoat.models.offload import Placement
    from ppcoat.models.tensor_files import pipeline_class
    from ppcoat.plan.drawing import FORMATS, Drawn, drawing_memory, plan_drawing

    height, width, pictures = (
        default if given is None else given
        for given, default in ((flags.height, RESOLUTION), (flags.width, RESOLUTION), (flags.num_images, 1))
    )
    for name, value, step in (("height", height, 16), ("width", width, 16), ("num_images", pictures, 1)):
        if value < step or value % step:
            raise ConfigError(f"{name}: came {value}, wanted a multiple of {step} from {step} on")
    model = flags.model or "models/FLUX.1-dev"
    is_newbie = pipeline_class(Path(model)) == "NewbiePipeline"
    drawn = Drawn(model, height, width, pictures, flags.family or ("newbie" if is_newbie else "flux"))
    memory = drawing_memory(drawn, on_gpu=True)
    asked, formats = Placement(flags.quantize or False, flags.offload), (flags.quantize,)
    planned = plan_drawing(memory, vram_gb, asked, formats if flags.quantize else FORMATS)
    lines = [*planned.facts, str(planned.placement), *phase_table(planned.phases)]
    if planned.sent:
        lines.append(f"PCIe: {planned.sent / GB:.2f} GB a step")
    if vram_gb is not None:
        lines.append(f"generate --vram {vram_gb:g} chooses this")
    return "\n".join(lines)


def lightning_case(resolution: int, quantize: str | bool) -> LightningConfig:
    """The published recipe at a resolution, on FLUX.1-dev. Raises ConfigError for a wrong resolution."""
    return lightning_config(
        {
            "data_path": "pictures",
            "pretrained_teacher_model": "models/FLUX.1-dev",
            "device": "gpu",
            "resolution": resolution,
            "gradient_checkpointing": True,
            "use_dmd_loss": True,
            "apply_reflow_loss": True,
            "quantize": quantize,
        }
    )


def settings_yaml(settings: Settings) -> str:
    """The lines to put into a config."""
    return yaml.safe_dump(_sections(settings), sort_keys=False).rstrip()


def settings_toml(settings: Settings) -> str:
    """The same for NewBie-image, as tables beside [Model] and [Optimization]."""
    sections = _sections(settings)
    tables = {"model": sections["model"], "train": sections["train"]}
    tables |= {f"coat.{name}": values for name, values in sections["coat"].items()}
    lines = []
    for name, values in tables.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    return "\n".join(lines)


def _sections(settings: Settings) -> dict[str, dict]:
    blocks = settings.checkpoint_blocks
    memory = {"memory": {"checkpoint_blocks": blocks}} if blocks else {}
    streamed = {"stream_encoders": True} if settings.stream_encoders else {}
    return {
        "model": {"quantize": settings.quantize, "blocks_to_swap": settings.blocks_to_swap} | streamed,
        "train": {
            "batch_size": settings.batch_size,
            "gradient_accumulation": settings.gradient_accumulation,
            "gradient_checkpointing": settings.checkpoint_blocks > 0,
        },
        "coat": {"activation": {"policy": settings.policy}} | memory,
    }


def advice(config: RunConfig, planned: Plan, config_format: Literal["yaml", "toml"]) -> str:
    """The chosen settings as lines of a config in that format, and what they rest on."""
    from ppcoat.plan.phases import FLOPS, PCIE_RATE, base_name
    from ppcoat.plan.settings import NO_FASTER, allowed_bases

    considered = ", ".join(base_name(each) for each in allowed_bases(config))
    lines = {"yaml": settings_yaml, "toml": settings_toml}[config_format](planned.settings)
    return (
        f"\nThe fastest that fits into {planned.vram_gb:g} GB: about {planned.seconds:.1f} s an update by a "
        f"model of the time\n({FLOPS / 1e12:.0f} TFLOP/s, PCIe {PCIE_RATE / GB:.0f} GB/s), not a "
        f"measurement.\nConsidered: {considered}; within {100 * NO_FASTER:.0f} % of the time the most exact "
        f"one.\nmodel.quantize names the least exact one to take. In the config:\n\n{lines}"
    )


def _gb(count: int | None) -> str:
    return "-" if count is None else f"{count / GB:.2f}"
