"""Flags of the commands on models and LoRA files, whose own modules take seconds to import: help is quick."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ppcoat.config.flags import OF_FILE, add_flags, flag
from ppcoat.config.training_sections import LoRAFormat

Dtype = Literal["float32", "bfloat16", "float16"]


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


@dataclass(frozen=True)
class ConvertNewbieFlags:
    """Settings of `convert-newbie`."""

    checkpoint: str = flag("weights of the transformer: .safetensors or .pth")
    gemma3: str = flag("folder of Gemma3 with its tokenizer")
    jina: str = flag("folder of Jina CLIP v2 with its tokenizer")
    vae: str = flag("folder of FLUX.1's VAE, or a FLUX folder with vae/ in it")
    folder: str | None = flag(
        "folder to write; must not exist yet (default: diffusers/ beside the checkpoint)", None, name="output"
    )
    dtype: Literal["bf16", "fp16", "fp32"] = flag("dtype of all weights", "bf16")
    transformer_config: str | None = flag("config.json of a transformer that is not the 3B one", None)


@dataclass(frozen=True)
class InspectFlags:
    """Settings of `inspect`."""

    file: Path = flag("LoRA file (.safetensors) or folder, or a base model in one file", positional=True)
    model: str | None = flag("NewBie folder, for a LoRA of NewBie", None)


@dataclass(frozen=True)
class ConvertFlags:
    """Settings of `convert`."""

    input: Path = flag("LoRA file (.safetensors) or folder", positional=True, metavar="IN")
    output: Path = flag("file to write (.safetensors)", positional=True, metavar="OUT")
    format: LoRAFormat = flag("format of OUT")
    dtype: Dtype | None = flag("dtype of the tensors (default: as in IN)", None)
    ignore_unknown: bool = flag("leave out keys of a LoRA that name nothing in the model", False)


@dataclass(frozen=True, kw_only=True)
class WriteFlags:
    """What is written."""

    format: LoRAFormat | None = flag(
        "format of the file to write (default: as in the first LoRA, else diffusers)", None
    )
    dtype: Dtype | None = flag("dtype of the tensors (default: as in the files)", None)


@dataclass(frozen=True, kw_only=True)
class ReadFlags(WriteFlags):
    """What is read."""

    model: str | None = flag("model of the LoRA, to check names and shapes; needed for NewBie", None)
    ignore_unknown: bool = flag("leave out keys of a LoRA that name nothing in the model", False)


@dataclass(frozen=True, kw_only=True)
class ResizeFlags(ReadFlags):
    """Settings of `lora resize`."""

    input: Path = flag("LoRA file (.safetensors) or folder", positional=True, metavar="IN")
    output: Path = flag("file to write (.safetensors)", positional=True, metavar="OUT")
    rank: int | None = flag("largest rank of any layer", None)
    energy: float | None = flag(
        "share of the squares of a layer's singular values that stays, e.g. 0.95: it decides the rank of the "
        "layer", None
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CombineFlags(ReadFlags):
    """Settings of `lora combine`."""

    files: list[Path] = flag("LoRA files or folders, and as the last the file to write", positional=True,
                             metavar="FILE")  # fmt: skip
    scale: list[str] = flag("strength of the LoRAs: one for all, or one each", ["1"])
    rank: int | None = flag("largest rank of any layer (default: the sum of the ranks, which is exact)", None)


@dataclass(frozen=True, kw_only=True)
class ExtractFlags(WriteFlags):
    """Settings of `lora extract`."""

    base: Path = flag(
        "FLUX or NewBie folder, the folder of its transformer, or a FLUX file",
        positional=True,
        metavar="BASE",
    )
    tuned: Path = flag("the same model after training", positional=True, metavar="TUNED")
    output: Path = flag("file to write (.safetensors)", positional=True, metavar="OUT")
    rank: int = flag("largest rank of any layer")
    text_encoders: bool = flag("take the differences of FLUX's CLIP and T5, too", False)


def add_merge_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, MergeFlags)


def add_merge_newbie_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, MergeNewbieFlags)


def add_convert_newbie_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, ConvertNewbieFlags)


def add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, InspectFlags)


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, ConvertFlags)


def add_resize_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, ResizeFlags, "input", "output", "rank", "energy", *_names(ReadFlags))


def add_combine_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, CombineFlags, "files", "scale", "rank", *_names(ReadFlags))


def add_extract_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(
        parser, ExtractFlags, *("base", "tuned", "output", "rank", "text_encoders", *_names(WriteFlags))
    )


def _names(fields_of: type) -> list[str]:
    return list(fields_of.__dataclass_fields__)
