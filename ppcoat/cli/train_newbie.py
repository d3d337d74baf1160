"""python train_scripts/train_newbie_lora.py --config_file my_config.toml [--set a.b=c] [--strict] [--dry_run]

The config.yaml that a run leaves in its folder may be given, too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ppcoat.config.load import load_config
from ppcoat.config.newbie import load_newbie_config
from ppcoat.host import tune_host

from .train import add_run_flags, show_dry_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config_file", required=True, help="TOML file, e.g. configs/newbie_lora.toml")
    add_run_flags(parser)


def run_command(arguments: argparse.Namespace) -> None:
    load = load_config if Path(arguments.config_file).suffix in (".yaml", ".yml") else load_newbie_config
    config = load(arguments.config_file, arguments.overrides)
    from ppcoat.train.newbie_lora import dry_run, train_newbie_lora

    tune_host()
    if arguments.dry_run:
        show_dry_run(config, dry_run(config))
    else:
        train_newbie_lora(config)
