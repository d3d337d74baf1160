"""python train_scripts/train_flux_lora.py config.yaml [--set train.steps=50]"""

from __future__ import annotations

import argparse

from ppcoat.config.load import load_config
from ppcoat.host import tune_host


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file, e.g. configs/quickstart.yaml")
    add_set_flag(parser)


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


def run_command(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.config, arguments.overrides)
    from ppcoat.train.flux_lora import train_flux_lora

    tune_host()
    train_flux_lora(config)
