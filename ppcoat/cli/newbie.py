"""Two commands that write a NewBie-image folder: from the released parts, or from a folder and an adapter.

    python train_scripts/convert_newbie_to_diffusers.py --checkpoint consolidated.00-of-01.pth \
        --gemma3 models/gemma-3-4b-it --jina models/jina-clip-v2 --vae models/FLUX.1-dev \
        --output models/newbie-diffusers
    python train_scripts/merge_lora.py --base_model_path newbie-diffusers --lora_path output/my_lora \
        --output_path output/merged_model

Converting: a .pth is read by an unpickler that knows tensors only (models/newbie/convert.py). Folders must
be on this machine; nothing is downloaded. Merging: a LoRA or LoKr is added to the weights of the transformer;
the sum is taken in float32 and rounded once to the base's dtype, the other parts are copied.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import paddle

from ppcoat.device import tune_host
from ppcoat.errors import ConfigError
from ppcoat.lora import load_adapter, merge_lora
from ppcoat.models.newbie.convert import WEIGHT_DTYPES, checkpoint_infos, write_newbie_folder
from ppcoat.models.newbie.files import check_newbie_folder, load_nextdit
from ppcoat.models.tensor_files import read_json

from .merge import base_dtype, check_output, check_scale, write_merged


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--checkpoint", required=True, help="weights of the transformer: .safetensors or .pth")
    add("--gemma3", required=True, help="folder of Gemma3 with its tokenizer")
    add("--jina", required=True, help="folder of Jina CLIP v2 with its tokenizer")
    add("--vae", required=True, help="folder of FLUX.1's VAE, or a FLUX folder with vae/ in it")
    add("--output", default=None, help="folder to write; it may not exist (default: diffusers/ beside it)")
    add("--dtype", default="bf16", choices=list(WEIGHT_DTYPES), help="of all weights (default: %(default)s)")
    add("--transformer_config", default=None, help="config.json of a transformer that is not the 3B one")


def run_convert(arguments: argparse.Namespace) -> None:
    tune_host()
    paddle.set_device("cpu")  # only bytes are moved
    checkpoint = Path(arguments.checkpoint)
    output = Path(arguments.output) if arguments.output else checkpoint.parent / "diffusers"
    if output.exists():
        raise ConfigError(f"--output {output} exists: remove it, or choose another name")
    vae = Path(arguments.vae)
    parts = {
        "text_encoder": folder_of("--gemma3", Path(arguments.gemma3)),
        "clip_model": folder_of("--jina", Path(arguments.jina)),
        "vae": folder_of("--vae", vae / "vae" if (vae / "vae").is_dir() else vae),
    }
    config = read_json(Path(arguments.transformer_config)) if arguments.transformer_config else None
    infos = checkpoint_infos(checkpoint)
    write_newbie_folder(output, infos, parts, arguments.dtype, config)
    print(f"{checkpoint}: {len(infos)} tensors, {arguments.dtype} -> {output}")


def folder_of(flag: str, folder: Path) -> Path:
    """`folder`, if it is one. Raises ConfigError, also for a name on a hub."""
    if not folder.is_dir():
        raise ConfigError(f"{flag} {folder} is not a folder: download the model first and give its folder")
    return folder


def add_merge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base_model_path", required=True, help="folder of a NewBie-image pipeline")
    parser.add_argument("--lora_path", required=True, help="adapter directory, or a .safetensors file")
    parser.add_argument("--output_path", required=True, help="folder to write; it may not exist")
    parser.add_argument("--scale", type=float, default=1.0, help="strength (default: %(default)s)")


def run_merge(arguments: argparse.Namespace) -> None:
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
