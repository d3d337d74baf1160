"""Draw pictures with a FLUX folder and, if wanted, a LoRA, and save them as PNG."""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import dataclass
from pathlib import Path

from PIL.PngImagePlugin import PngInfo

from ppcoat.errors import ConfigError
from ppcoat.host import compute_dtype, set_device, tune_host
from ppcoat.lora.formats import read_lora_file
from ppcoat.models.flux_pipeline import FluxPipeline
from ppcoat.models.loading import check_folder


@dataclass(frozen=True)
class Drawing:
    """Settings of one call. Picture i of a prompt is drawn from seed + i, so it can be drawn again alone."""

    model: str
    prompt: list[str]
    output_dir: str = "output/pictures"
    path_to_lora: str | None = None
    lora_scale: float = 1.0
    seed: int = 42
    steps: int = 28
    guidance_scale: float = 3.5
    height: int | None = None
    width: int | None = None
    num_images: int = 1
    max_sequence_length: int | None = None
    device: str = "auto"
    dtype: str = "auto"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `inference/generate.py`; their names are Drawing's fields."""
    add = parser.add_argument
    add("--model", required=True, help="folder of a FLUX pipeline in the diffusers layout")
    add("--prompt", required=True, nargs="+", help="what to draw; several prompts give several pictures")
    add("--output_dir", default=Drawing.output_dir, help="folder for the PNG files (default: %(default)s)")
    add("--path_to_lora", default=None, help="LoRA file with diffusers keys (.safetensors)")
    add(
        "--lora_scale",
        type=float,
        default=Drawing.lora_scale,
        help="strength of the LoRA (default: %(default)s)",
    )
    add("--seed", type=int, default=Drawing.seed, help="seed of the first picture (default: %(default)s)")
    add("--steps", type=int, default=Drawing.steps, help="denoising steps (default: %(default)s)")
    add(
        "--guidance_scale", type=float, default=Drawing.guidance_scale, help="guidance (default: %(default)s)"
    )
    add("--height", type=int, default=None, help="pixels, a multiple of 16 (default: the model's own size)")
    add("--width", type=int, default=None, help="pixels, a multiple of 16 (default: the model's own size)")
    add(
        "--num_images",
        type=int,
        default=Drawing.num_images,
        help="pictures per prompt (default: %(default)s)",
    )
    add(
        "--max_sequence_length", type=int, default=None, help="T5 tokens (default: what the tokenizer allows)"
    )
    add("--device", default=Drawing.device, help="auto, cpu, gpu or gpu:N (default: %(default)s)")
    add(
        "--dtype",
        default=Drawing.dtype,
        choices=["auto", "float32", "bfloat16"],
        help="(default: %(default)s)",
    )


def run_command(arguments: argparse.Namespace) -> None:
    tune_host()
    generate(Drawing(**vars(arguments)))


def generate(drawing: Drawing) -> list[Path]:
    """Draw and save; returns the files. Raises ConfigError before any model is loaded for what it can
    check."""
    _check(drawing)
    check_folder(drawing.model)
    if drawing.path_to_lora is not None:
        read_lora_file(drawing.path_to_lora)
    set_device(drawing.device)
    dtype = compute_dtype(drawing.dtype)
    folder = Path(drawing.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir {folder} is a file, wanted a folder")
    pipeline = FluxPipeline.from_pretrained(drawing.model, dtype)
    if drawing.path_to_lora is not None:
        info = pipeline.load_lora_weights(drawing.path_to_lora)
        print(
            f"LoRA on {len(info.ranks)} layers"
            + (f", trigger word {info.trigger_word}" if info.trigger_word else "")
        )
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, prompt in enumerate(drawing.prompt):
        pictures = pipeline(
            prompt,
            height=drawing.height,
            width=drawing.width,
            num_inference_steps=drawing.steps,
            guidance_scale=drawing.guidance_scale,
            num_images_per_prompt=drawing.num_images,
            seed=drawing.seed,
            max_sequence_length=drawing.max_sequence_length,
            joint_attention_kwargs={"scale": drawing.lora_scale} if drawing.path_to_lora else None,
        ).images
        for i, picture in enumerate(pictures):
            files.append(folder / f"{number:03d}_{_slug(prompt)}_{drawing.seed + i}.png")
            note = PngInfo()
            note.add_itxt("prompt", prompt)
            picture.save(files[-1], pnginfo=note)
            print(files[-1])
    return files


def _check(drawing: Drawing) -> None:
    for name, least in (("num_images", 1), ("steps", 1), ("seed", 0)):
        if getattr(drawing, name) < least:
            raise ConfigError(f"{name}: came {getattr(drawing, name)}, wanted at least {least}")
    for name in ("height", "width"):
        side = getattr(drawing, name)
        if side is not None and (side < 16 or side % 16):
            raise ConfigError(f"{name}: came {side}, wanted a multiple of 16")
    for name in ("lora_scale", "guidance_scale"):
        if not math.isfinite(getattr(drawing, name)):
            raise ConfigError(f"{name}: came {getattr(drawing, name)}, wanted a finite number")


def _slug(prompt: str) -> str:
    """A short, harmless piece of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40] or "picture"
