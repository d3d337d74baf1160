"""Commands that draw.

    python inference/generate.py --model ppcoat/assets/tiny_flux --prompt "a red dress with white dots"
    python inference/text_to_image_generation_flux_lightning.py --path_to_lora a.safetensors --prompt "a hat"

The drawing itself is in infer/generate.py and infer/lightning.py, which are imported, with Paddle and its
models, only when the flags have been read.
"""

from __future__ import annotations

import argparse

from ppcoat.config.flags import add_flags, from_flags
from ppcoat.infer.drawing import Drawing, EditFlags, LightningDrawing, LightningFlags, check_given


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `inference/generate.py`: the fields of Drawing, those of editing last."""
    add_flags(parser, Drawing, *(name for name in Drawing.__annotations__))
    add_flags(parser, EditFlags)


def run_generate(arguments: argparse.Namespace) -> None:
    drawing = from_flags(Drawing, arguments)
    check_given(drawing)

    from ppcoat.device import tune_host
    from ppcoat.infer.generate import generate

    tune_host()
    generate(drawing)


def add_lightning_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of PaddleMIX's example: fields of LightningDrawing, and those of LightningFlags."""
    add_flags(parser, LightningFlags, "model", "path_to_lora", "prompt")
    add_flags(parser, LightningDrawing, "output_dir", "guidance_scale", "height", "width")
    add_flags(parser, LightningFlags, "lora_scale")
    rest = (
        "steps",
        "seed",
        "max_sequence_length",
        "text_encoders",
        "vae",
        "tokenizers",
        "quantize",
        "vram",
        "offload",
        "cache_dir",
        "device",
        "ignore_unknown",
        "control_image",
        "inference_optimize",
        "repeat",
    )
    add_flags(parser, LightningDrawing, *rest)


def run_lightning(arguments: argparse.Namespace) -> None:
    from ppcoat.device import tune_host
    from ppcoat.infer.lightning import default_scale, draw_lightning

    flags = from_flags(LightningFlags, arguments)
    tune_host()
    scale = default_scale(flags.path_to_lora) if flags.lora_scale is None else flags.lora_scale
    draw_lightning(from_flags(LightningDrawing, arguments, prompt=[flags.prompt], lora_scale=scale))
