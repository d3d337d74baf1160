"""Flags of the commands here whose own modules take seconds to import, and the way to them: help is quick."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from ppcoat.config.flags import CONFIGS, TINY_FLUX, add_flags, flag, set_flag

CONFIG = CONFIGS / "quickstart.yaml"
TEACHER = "/".join(Path(TINY_FLUX).parts[-3:])  # as the repository sees it: students' settings name it
DEMOS = {  # name -> module and class
    "edit": ("ppcoat.bench.demo_editing", "Edit"),
    "try_on": ("ppcoat.bench.demo_editing", "TryOn"),
    "inpaint": ("ppcoat.bench.demo_pictures", "Inpaint"),
    "style": ("ppcoat.bench.demo_pictures", "Style"),
    "preserve": ("ppcoat.bench.demo_preserve", "Preserve"),
}


@dataclass(frozen=True)
class QuickstartFlags:
    """Settings of `quickstart`."""

    config: str = flag(
        "config of the run (default: configs/quickstart.yaml)", str(CONFIG), shows_default=False
    )
    samples: int = flag("pictures drawn for each rate", 100)
    overrides: list[str] = set_flag()


@dataclass(frozen=True)
class DemoFlags:
    """Settings of `demo`."""

    name: str = flag(f"what to show: {', '.join(DEMOS)}", positional=True, choices=DEMOS, metavar="name")
    samples: int = flag("pictures per measured rate", 100)
    output_dir: str = flag("folder for data, run and sheets of all demonstrations", "output/demo")
    overrides: list[str] = set_flag()


@dataclass(frozen=True)
class ParityFlags:
    """Settings of `parity`. config: the file; what the runs differ in is set on top of it."""

    config: str = flag(
        "config of the runs (default: configs/quickstart.yaml)", str(CONFIG), shows_default=False
    )
    steps: int = flag("steps of each run", 400)
    seeds: list[int] = flag("seeds of the runs", [0, 1, 2])
    samples: int = flag("pictures per motif rate", 600)
    output_dir: str = flag("folder for runs and results", "output/parity")
    overrides: list[str] = set_flag()


@dataclass(frozen=True)
class AblationFlags:
    """Settings of `ablation`."""

    data_path: str = flag("folder of pictures with captions")
    model: str = flag("teacher: a FLUX folder", TEACHER)
    output_dir: str = flag("folder for runs and results", "output/ablation")
    lora_steps: int = flag("steps of each LoRA", 250)
    samples: int = flag("pictures per score", 1000)
    seed: int = flag("seed of the trainings", 0)


@dataclass(frozen=True)
class FirstlightFlags:
    """Settings of `firstlight`."""

    output: str = flag("JSON file to write", "firstlight.json")
    small: bool = flag("tiny sizes, to try the command itself; always so on a CPU", False)


def add_quickstart_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, QuickstartFlags)


def run_quickstart(arguments: argparse.Namespace) -> None:
    from ppcoat.bench.quickstart import run_command

    run_command(arguments)


def add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, DemoFlags)


def run_demo(arguments: argparse.Namespace) -> None:
    from ppcoat.bench.demo import run_command

    run_command(arguments)


def add_parity_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, ParityFlags)


def run_parity(arguments: argparse.Namespace) -> None:
    from ppcoat.bench.parity import run_command

    run_command(arguments)


def add_ablation_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, AblationFlags)


def run_ablation(arguments: argparse.Namespace) -> None:
    from ppcoat.bench.ablation import run_command

    run_command(arguments)


def add_firstlight_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, FirstlightFlags)


def run_firstlight(arguments: argparse.Namespace) -> None:
    from ppcoat.bench.firstlight import run_command

    run_command(arguments)
