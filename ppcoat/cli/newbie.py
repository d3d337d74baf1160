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

from ppcoat.config.flags import from_flags
from ppcoat.device import tune_host
from ppcoat.errors import ConfigError
from ppcoat.lora import info_of, merge_lora, put_adapters, read_fitting, tell
from ppcoat.models.loading import parameter_shapes
from ppcoat.models.newbie.convert import checkpoint_infos, write_newbie_folder
from ppcoat.models.newbie.files import check_newbie_folder, load_nextdit
from ppcoat.reading import read_json

from .flags import ConvertNewbieFlags, MergeNewbieFlags
from .merge import base_dtype, changed_modules, check_output, strengths, write_merged


def run_convert_newbie(arguments: argparse.Namespace) -> None:
    flags = from_flags(ConvertNewbieFlags, arguments)
    tune_host()
    paddle.set_device("cpu")  # only bytes are moved
    checkpoint = Path(flags.checkpoint)
    output = Path(flags.folder) if flags.folder else checkpoint.parent / "diffusers"
    if output.exists():
        raise ConfigError(f"--output {output} exists: remove it, or choose another name")
    vae = Path(flags.vae)
    parts = {
        "text_encoder": folder_of("--gemma3", Path(flags.gemma3)),
        "clip_model": folder_of("--jina", Path(flags.jina)),
        "vae": folder_of("--vae", vae / "vae" if (vae / "vae").is_dir() else vae),
    }
    config = read_json(Path(flags.transformer_config)) if flags.transformer_config else None
    infos = checkpoint_infos(checkpoint)
    write_newbie_folder(output, infos, parts, flags.dtype, config)
    print(f"{checkpoint}: {len(infos)} tensors, {flags.dtype} -> {output}")


def folder_of(flag: str, folder: Path) -> Path:
    """`folder`, if it is one. Raises ConfigError, also for a name on a hub."""
    if not folder.is_dir():
        raise ConfigError(f"{flag} {folder} is not a folder: download the model first and give its folder")
    return folder


def run_merge_newbie(arguments: argparse.Namespace) -> None:
    flags = from_flags(MergeNewbieFlags, arguments)
    tune_host()
    # A sum of weights: a card would only have to hold the model.
    paddle.set_device("cpu")
    folder, output = Path(flags.base_model_path), Path(flags.output_path)
    check_output(folder, output, "--output_path")
    scales = strengths(flags.lora_path, flags.scale)
    check_newbie_folder(folder, "--base_model_path")
    dtype, _ = base_dtype(folder / "transformer")
    shapes = parameter_shapes(folder, "transformer")
    loras = [(read_fitting(path, shapes, None, flags.ignore_unknown), scale)
             for path, scale in zip(flags.lora_path, scales, strict=True)]  # fmt: skip
    models = {"transformer": load_nextdit(folder / "transformer", dtype)}
    put_adapters(models, loras)
    merge_lora(models["transformer"])
    write_merged(folder, output, models, check_newbie_folder)
    for (file, scale), path in zip(loras, flags.lora_path, strict=True):
        tell(info_of(file, scale), f"{folder} + {path} -> {output}: ")
    print(f"{changed_modules(loras)} modules, {dtype}")
