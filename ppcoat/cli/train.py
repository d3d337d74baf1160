"""Train an adapter from a config file.

    python train_scripts/train_flux_lora.py config.yaml [--set train.steps=50] [--strict] [--dry_run]
    python train_scripts/train_newbie_lora.py --config_file my.toml [--set a.b=c] [--strict] [--dry_run]

The NewBie command also takes the config.yaml that a run leaves in its folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ppcoat.config.load import dump_config, load_config
from ppcoat.config.newbie import load_newbie_config
from ppcoat.config.schema import RunConfig
from ppcoat.device import tune_host

if TYPE_CHECKING:
    from ppcoat.train.trainer import StepResult


def add_flux_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file, e.g. configs/quickstart.yaml")
    add_run_flags(parser)


def add_set_flag(parser: argparse.ArgumentParser) -> None:
    """--set a.b=c, as every command with a config has it."""
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="a.b=c",
        help="override one key, e.g. --set train.steps=50; may be repeated",
    )


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """--set, --strict and --dry_run, as every command that trains from a config file has them."""
    add_set_flag(parser)
    parser.add_argument(
        "--strict",
        dest="overrides",
        action="append_const",
        const="save.strict_resume=true",
        help="stop where the latest checkpoint is damaged, instead of going on from the one before it; "
        "the same as --set save.strict_resume=true",
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="check everything, show settings and data, time two steps, and leave nothing on the disk",
    )


def run_flux(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.config, arguments.overrides)
    from ppcoat.train.flux import dry_run, train_flux_lora

    tune_host()
    if arguments.dry_run:
        show_dry_run(config, dry_run(config))
    else:
        train_flux_lora(config)


def show_dry_run(config: RunConfig, steps: Iterator[tuple[StepResult, float]]) -> None:
    """Print the complete settings, the data report and what two steps give. steps: train.run.dry_run's, each
    step with its seconds."""
    print(dump_config(config))
    for number, (result, seconds) in enumerate(steps, start=1):
        kept = "not counted" if result.saved is None else f"{result.saved.bytes_kept / 1e6:.2f} MB"
        note = " (not finite: nothing was updated)" if result.skipped else ""
        print(f"step {number}: loss {result.loss:.4f}{note}, activations kept {kept}, {seconds * 1e3:.0f} ms")
    print("dry run: two steps done, nothing written")


def add_newbie_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config_file", required=True, help="TOML file, e.g. configs/newbie_lora.toml")
    add_run_flags(parser)


def run_newbie(arguments: argparse.Namespace) -> None:
    load = load_config if Path(arguments.config_file).suffix in (".yaml", ".yml") else load_newbie_config
    config = load(arguments.config_file, arguments.overrides)
    from ppcoat.train.newbie import dry_run, train_newbie_lora

    tune_host()
    if arguments.dry_run:
        show_dry_run(config, dry_run(config))
    else:
        train_newbie_lora(config)
