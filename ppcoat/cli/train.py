"""Commands that train: adapters from a config file, FLUX-Lightning from flags; and the one that looks for the
best settings first.

    python train_scripts/train_flux_lora.py config.yaml [--set train.steps=50] [--strict] [--dry_run]
    python train_scripts/train_newbie_lora.py --config_file my.toml [--set a.b=c] [--strict] [--dry_run]
    python train_scripts/train_flux_lightning_lora.py --data_path pictures [--max_train_steps 3000 ...]
    python -m ppcoat tune config.yaml --budget 60m [--hold_out 8] [--set a.b=c]

The NewBie command also takes the config.yaml that a run leaves in its folder. The runs themselves are in
train/run.py and distill/flux_lightning.py, the search in train/tune.py, which are imported, with Paddle and
its models, only for settings without mistakes.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from ppcoat.config.flags import RunFlags, add_flags, add_run_flags, add_section_flags, flag, from_flags
from ppcoat.config.lightning import LightningConfig, lightning_config
from ppcoat.config.load import dump_config
from ppcoat.config.newbie import load_run_config
from ppcoat.config.schema import RunConfig
from ppcoat.data.sources import check_data_folder
from ppcoat.errors import ConfigError
from ppcoat.train.search import TuneFlags, seconds_of


@dataclass(frozen=True, kw_only=True)
class FluxRunFlags(RunFlags):
    """Settings of `train`."""

    config: str = flag("YAML or JSON file, e.g. configs/quickstart.yaml", positional=True, named_too=True)


@dataclass(frozen=True, kw_only=True)
class NewbieRunFlags(RunFlags):
    """Settings of `train-newbie`."""

    config: str = flag(
        "TOML file, e.g. configs/newbie_lora.toml", name="config_file", positional=True, named_too=True
    )


FLAGS = {"flux": FluxRunFlags, "newbie": NewbieRunFlags}  # by model.family
COMMANDS = {"flux": "train", "newbie": "train-newbie"}


def add_flux_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `train_scripts/train_flux_lora.py`."""
    parser.set_defaults(family="flux")
    add_run_flags(parser, FluxRunFlags)


def add_newbie_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `train_scripts/train_newbie_lora.py`."""
    parser.set_defaults(family="newbie")
    add_run_flags(parser, NewbieRunFlags)


def add_distill_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `train_scripts/train_flux_lightning_lora.py`: the fields of LightningConfig."""
    add_section_flags(parser, LightningConfig)


def run_distill(arguments: argparse.Namespace) -> None:
    """Distil FLUX to four steps."""
    config = lightning_config(vars(arguments))

    from ppcoat.device import tune_host
    from ppcoat.distill.flux_lightning import train_flux_lightning

    tune_host()
    train_flux_lightning(config)


def add_tune_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `tune`."""
    add_flags(parser, TuneFlags)


def run_tune(arguments: argparse.Namespace) -> None:
    """Look for learning rate, rank and saving policy of a config of any model."""
    flags = from_flags(TuneFlags, arguments)
    seconds_of(flags.budget)
    config = load_run_config(flags.config, flags.overrides)
    _check_data(config)

    from ppcoat.device import tune_host
    from ppcoat.train.tune import tune

    tune_host()
    tune(config, flags)


def run_command(arguments: argparse.Namespace) -> None:
    """Train, or with --dry_run show the complete settings, the data report and two steps. Raises ConfigError
    for a config of another kind of model."""
    family = arguments.family
    flags = from_flags(FLAGS[family], arguments)
    config = load_run_config(flags.config, flags.overrides, family)
    if config.model.family != family:
        command = f"python -m ppcoat {COMMANDS[config.model.family]}"
        raise ConfigError(f"model.family is {config.model.family}: train it with {command}")
    _train(config, flags)


def _check_data(config: RunConfig) -> None:
    """Raises ConfigError for a folder that is not there, before Paddle is imported."""
    for data in config.datasets:
        check_data_folder(data.folder_path)


def _train(config: RunConfig, flags: RunFlags) -> None:
    _check_data(config)

    from ppcoat.device import tune_host
    from ppcoat.train.checkpoint import in_its_folder
    from ppcoat.train.run import dry_run, train_lora

    config = in_its_folder(config, Path(flags.config), flags.overrides)
    tune_host()
    if not flags.dry_run:
        train_lora(config)
        return
    print(dump_config(config))
    skipped = []
    for number, (result, seconds) in enumerate(dry_run(config), start=1):
        skipped.append(result.skipped)
        kept = "not counted" if result.saved is None else f"{result.saved.bytes_kept / 1e6:.2f} MB"
        note = " (not finite: nothing was updated)" if result.skipped else ""
        print(f"step {number}: loss {result.loss:.4f}{note}, activations kept {kept}, {seconds * 1e3:.0f} ms")
    if all(skipped):
        raise FloatingPointError(
            "no loss or gradient was finite: lower network.linear_alpha, or train in float32 or bfloat16"
        )
    print("dry run: two steps done, nothing written")
