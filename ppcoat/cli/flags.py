"""Flags of the commands that merge, whose own modules take seconds to import, and the way to them: help is
quick."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from ppcoat.config.flags import OF_FILE, add_flags, flag


@dataclass(frozen=True)
class MergeFlags:
    """Settings of `merge`."""

    model: str = flag("FLUX folder in diffusers' layout, or a FLUX file")
    lora: list[str] = flag("LoRA files (.safetensors) or folders; several add up")
    output_dir: str = flag("folder to write; must not exist yet")
    scale: list[float] = flag("strength of the LoRAs: one for all, or one each", [1.0])
    ignore_unknown: bool = flag("leave out keys of a LoRA that name nothing in the model", False)
    text_encoders: list[str] | None = flag(f"CLIP and T5 {OF_FILE}, or a file for each", None)
    vae: str | None = flag(f"autoencoder {OF_FILE}, or its file", None)
    tokenizers: list[str] | None = flag(f"tokenizers {OF_FILE}, or a folder for each", None)


@dataclass(frozen=True)
class MergeNewbieFlags:
    """Settings of `merge-newbie`."""

    base_model_path: str = flag("NewBie folder")
    lora_path: list[str] = flag("LoRA or LoKr files (.safetensors) or folders; several add up")
    output_path: str = flag("folder to write; must not exist yet")
    scale: list[float] = flag("strength of the LoRAs: one for all, or one each", [1.0])
    ignore_unknown: bool = flag("leave out keys of a LoRA that name nothing in the model", False)


def add_merge_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, MergeFlags)


def run_merge(arguments: argparse.Namespace) -> None:
    from ppcoat.cli import merge

    merge.run_command(arguments)


def add_merge_newbie_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, MergeNewbieFlags)


def call_merge_newbie(arguments: argparse.Namespace) -> None:
    from ppcoat.cli import newbie

    newbie.run_merge_newbie(arguments)
