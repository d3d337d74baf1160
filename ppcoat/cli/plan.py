"""python -m ppcoat plan config.yaml [--vram 24]: the memory a run will need, before anything is allocated."""

from __future__ import annotations

import argparse

import yaml

from ppcoat.cli.train import add_set_flag
from ppcoat.config.load import load_config
from ppcoat.config.schema import RunConfig
from ppcoat.train.plan import GB, Plan, plan
from ppcoat.train.plan_phases import FLOPS, PCIE_RATE, Choice

NAMES = {  # component -> its row in the table
    "context": "context and libraries",
    "encoders": "text encoders, VAE",
    "base": "base weights",
    "LoRA": "LoRA",
    "EMA": "its running mean",
    "optimizer": "optimizer states",
    "gradients": "gradients",
    "kept": "kept for backward",
    "working": "working memory",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file of a training run, e.g. configs/flux_lora_24gb.yaml")
    parser.add_argument(
        "--vram", type=float, metavar="GB", help="choose the fastest settings that fit into so many GB"
    )
    add_set_flag(parser)


def run_command(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.config, arguments.overrides)
    planned = plan(config, arguments.vram)
    print(table(planned))
    if arguments.vram is not None:
        print(advice(config, planned))


def table(planned: Plan) -> str:
    """What a plan says, as text of at most 108 columns: facts, settings, GB by component and phase."""
    phases = planned.phases
    rows = [["GB", *(phase.name for phase in phases)]]
    for name, title in NAMES.items():
        if any(name in phase.parts for phase in phases):
            rows.append([title, *(_gb(phase.parts.get(name)) for phase in phases)])
    rows.append(["total", *(_gb(phase.total) for phase in phases)])
    lines = [
        f"{first:22s}"
        + "".join(f"{cell:>{len(head) + 3}s}" for cell, head in zip(rest, rows[0][1:], strict=True))
        for first, *rest in rows
    ]
    return "\n".join([*planned.facts, _settings(planned.choice), *lines, f"peak: {_gb(planned.total)} GB"])


def settings_yaml(choice: Choice) -> str:
    """The lines to put into a config."""
    sections = {
        "model": {"quantize": choice.quantize, "blocks_to_swap": choice.blocks_to_swap},
        "train": {
            "batch_size": choice.batch_size,
            "gradient_accumulation": choice.gradient_accumulation,
            "gradient_checkpointing": choice.checkpoint_blocks > 0,
        },
        "coat": {"activation": {"policy": choice.policy}},
    }
    if choice.checkpoint_blocks:
        sections["coat"]["memory"] = {"checkpoint_blocks": choice.checkpoint_blocks}
    return yaml.safe_dump(sections, sort_keys=False).rstrip()


def advice(config: RunConfig, planned: Plan) -> str:
    """The choice as config lines, and what it rests on."""
    allowed = (
        "An FP8 base is allowed by model.quantize: true."
        if config.model.quantize
        else "An FP8 base was not considered: model.quantize: true would allow it."
    )
    return (
        f"\nThe fastest that fits into {planned.vram_gb:g} GB: about {planned.seconds:.1f} s an update by a "
        f"model of the time\n({FLOPS / 1e12:.0f} TFLOP/s, PCIe {PCIE_RATE / GB:.0f} GB/s), not a "
        f"measurement. {allowed}\nIn the config:\n\n{settings_yaml(planned.choice)}"
    )


def _settings(choice: Choice) -> str:
    return (
        f"policy {choice.policy}, {choice.checkpoint_blocks} blocks checkpointed, {choice.blocks_to_swap} "
        f"swapped, {'FP8 base' if choice.quantize else 'base not quantised'}, batch {choice.batch_size} x "
        f"{choice.gradient_accumulation}"
    )


def _gb(count: int | None) -> str:
    return "-" if count is None else f"{count / GB:.2f}"
