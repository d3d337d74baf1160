"""A NewBie-image folder from the released checkpoint, Gemma3, Jina CLIP and FLUX's VAE.

    python train_scripts/convert_newbie_to_diffusers.py --checkpoint consolidated.00-of-01.pth \
        --gemma3 models/gemma-3-4b-it --jina models/jina-clip-v2 --vae models/FLUX.1-dev \
        --output models/newbie-diffusers

A .pth is read by an interpreter that knows tensors only (models/newbie_checkpoint.py). Folders must be on
this machine; nothing is downloaded.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import paddle

from ppcoat.errors import ConfigError
from ppcoat.host import tune_host
from ppcoat.models.loading import read_json
from ppcoat.models.newbie_saving import DTYPES, checkpoint_infos, write_newbie_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--checkpoint", required=True, help="weights of the transformer: .safetensors or .pth")
    add("--gemma3", required=True, help="folder of Gemma3 with its tokenizer")
    add("--jina", required=True, help="folder of Jina CLIP v2 with its tokenizer")
    add("--vae", required=True, help="folder of FLUX.1's VAE, or a FLUX folder with vae/ in it")
    add("--output", default=None, help="folder to write; it may not exist (default: diffusers/ beside it)")
    add("--dtype", default="bf16", choices=list(DTYPES), help="of all weights (default: %(default)s)")
    add("--transformer_config", default=None, help="config.json of a transformer that is not the 3B one")


def run_command(arguments: argparse.Namespace) -> None:
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
