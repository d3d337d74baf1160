"""A NewBie-image folder with a LoRA or LoKr added to the weights of its transformer.

    python train_scripts/merge_lora.py --base_model_path newbie-diffusers --lora_path output/my_lora \
        --output_path output/merged_model

The sum is taken in float32 and rounded once to the base's dtype; the other parts are copied.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import paddle

from ppcoat.host import tune_host
from ppcoat.lora import load_adapter, merge_lora
from ppcoat.models.newbie_loading import check_newbie_folder, load_nextdit

from .merge import base_dtype, check_output, check_scale, write_merged


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base_model_path", required=True, help="folder of a NewBie-image pipeline")
    parser.add_argument("--lora_path", required=True, help="adapter directory, or a .safetensors file")
    parser.add_argument("--output_path", required=True, help="folder to write; it may not exist")
    parser.add_argument("--scale", type=float, default=1.0, help="strength (default: %(default)s)")


def run_command(arguments: argparse.Namespace) -> None:
    tune_host()
    # A sum of weights: a card would only have to hold the model.
    paddle.set_device("cpu")
    folder, output = Path(arguments.base_model_path), Path(arguments.output_path)
    check_output(folder, output, "--output_path")
    check_scale(arguments.scale)
    check_newbie_folder(folder, "--base_model_path")
    dtype, _ = base_dtype(folder / "transformer")
    model = load_nextdit(folder / "transformer", dtype)
    modules = load_adapter(model, arguments.lora_path, arguments.scale).ranks
    merge_lora(model)
    write_merged(folder, output, model, check_newbie_folder)
    print(f"{folder} + {arguments.scale:g} x {arguments.lora_path} -> {output}")
    print(f"{len(modules)} modules, {dtype}")
