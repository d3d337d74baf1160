"""What the commands that draw and `evaluate` are told: their flags, read without Paddle and its models."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ppcoat.config.flags import OF_FILE, add_flags, flag
from ppcoat.errors import ConfigError, check_whole

if TYPE_CHECKING:
    from ppcoat.models.flux.files import FluxFiles

WARM_UPS = 3
MAX_PICTURES, MAX_STEPS, MAX_SEED = 100_000, 10_000, 2**63 - 1  # of a command
OWN_SIZE = "pixels, a multiple of 16 (default: the model's own size, 1024 for FLUX.1)"


@dataclass(frozen=True, kw_only=True)
class EditFlags:
    """What a picture is drawn from, beside its prompt."""

    image: str | None = flag(
        "picture to draw from: FLUX.1 Kontext edits it, FLUX.1 Fill fills its --mask, others draw over it",
        None,
    )
    mask: str | None = flag("picture of the size of --image, white where it is drawn anew", None)
    strength: float | None = flag(
        "how much of --image is drawn anew, above 0 to 1 (default: 0.6, FLUX.1 Fill 1)", None
    )
    reference: list[str] | None = flag(
        "pictures to look at, for FLUX.1 Kontext or with a LoRA that was trained on pairs", None
    )


@dataclass(frozen=True)
class Drawing(EditFlags):
    """Settings of one call. Picture i of a prompt is drawn from seed + i, so it can be drawn again alone."""

    model: str = flag("FLUX or NewBie folder in diffusers' layout, or a FLUX file")
    prompt: list[str] | None = flag("what to draw; several prompts give several pictures", None)
    prompts: str | None = flag(
        "file of a list instead (.jsonl, .csv or .txt): a line has prompt, seed, size, lora_scale, name and "
        "more; a stopped list goes on",
        None,
    )
    output_dir: str = flag("folder for the PNG files", "output/pictures")
    control_image: str | None = flag(
        "picture of edges or depths to draw after, with a control LoRA or FLUX.1 Canny or Depth", None
    )
    path_to_lora: list[str] | None = flag("LoRA files (.safetensors) or folders; several add up", None)
    lora_scale: list[float] = flag("strength of the LoRAs: one for all, or one each", 1.0)
    ignore_unknown: bool = flag("leave out keys of a LoRA that name nothing in the model", False)
    seed: int = flag("seed of the first picture", 42)
    steps: int = flag("denoising steps", 28)
    guidance_scale: float | None = flag(
        "guidance (default: FLUX 3.5, over a picture 7, Fill 30; NewBie 5)", None
    )
    height: int | None = flag("pixels, a multiple of 16 (default: the model's own size)", None)
    width: int | None = flag("pixels, a multiple of 16 (default: the model's own size)", None)
    num_images: int = flag("pictures per prompt", 1)
    max_sequence_length: int | None = flag("T5 or Gemma tokens (default: what the tokenizer allows)", None)
    negative_prompt: str = flag("what to draw away from; for FLUX with --true_cfg_scale", "")
    true_cfg_scale: float = flag("classifier-free guidance of FLUX, twice the time above 1", 1.0)
    text_encoders: list[str] | None = flag(f"CLIP and T5 {OF_FILE}, or a file for each", None)
    vae: str | None = flag(f"autoencoder {OF_FILE}, or its file", None)
    tokenizers: list[str] | None = flag(f"tokenizers {OF_FILE}, or a folder for each", None)
    quantize: Literal["fp8", "int8", "nf4", "fp4"] | None = flag("format of the transformer's weights", None)
    vram: float | None = flag("choose settings that fit into so many GB, by the plan", None, metavar="GB")
    offload: bool = flag("text encoders, transformer and VAE on the card in turns", False)
    cache_dir: str | None = flag(
        "folder that keeps the quantised weights for the next start; those beside the model are found "
        "without it",
        None,
    )
    device: str = flag("auto, cpu, gpu or gpu:N", "auto")
    dtype: Literal["auto", "float32", "bfloat16"] = flag(
        "float32 on a GPU: products of TF32 unless the process starts with NVIDIA_TF32_OVERRIDE=0", "auto"
    )

    @property
    def files(self) -> FluxFiles:
        """Where the components of a FLUX model lie. Raises ConfigError as `FluxFiles.found`."""
        from ppcoat.models.flux.files import FluxFiles

        beside = {"text_encoders": self.text_encoders, "vae": self.vae, "tokenizers": self.tokenizers}
        return FluxFiles.found(self.model, "--model", **beside)

    @property
    def loras(self) -> list[tuple[str, float]]:
        """Each LoRA's path and strength. Raises ConfigError for as many of one as do not fit the other."""
        paths = [self.path_to_lora] if isinstance(self.path_to_lora, str) else list(self.path_to_lora or ())
        scales = list(self.lora_scale) if isinstance(self.lora_scale, list | tuple) else [self.lora_scale]
        scales = scales * len(paths) if len(scales) == 1 else scales
        if len(scales) != len(paths):
            raise ConfigError(
                f"lora_scale: came {len(scales)} strengths for {len(paths)} LoRAs, wanted one each"
            )
        return list(zip(paths, scales, strict=True))


def check_given(drawing: Drawing) -> None:
    """Raises ConfigError for what is wrong whatever the model: no prompt, or a number that cannot be drawn
    with."""
    if bool(drawing.prompt) == (drawing.prompts is not None):
        raise ConfigError("give either --prompt, what to draw, or --prompts, a list of that")
    check_numbers(drawing)


def check_numbers(drawing: Drawing) -> None:
    """Raises ConfigError for a number or a text that cannot be drawn with."""
    check_whole("prompt", *(drawing.prompt or ()))
    check_whole("negative_prompt", drawing.negative_prompt)
    for name, least, most in (
        ("num_images", 1, MAX_PICTURES),
        ("steps", 1, MAX_STEPS),
        ("seed", 0, MAX_SEED),
    ):
        if not least <= getattr(drawing, name) <= most:
            raise ConfigError(f"{name}: came {getattr(drawing, name)}, wanted {least} to {most}")
    for name in ("height", "width"):
        side = getattr(drawing, name)
        if side is not None and (side < 16 or side % 16):
            raise ConfigError(f"{name}: came {side}, wanted a multiple of 16")
    numbers = [(name, getattr(drawing, name)) for name in ("guidance_scale", "true_cfg_scale")]
    given = drawing.lora_scale if isinstance(drawing.lora_scale, list | tuple) else [drawing.lora_scale]
    numbers += [("lora_scale", by) for by in [by for _, by in drawing.loras] or given]
    for name, value in numbers:
        if value is not None and not math.isfinite(value):
            raise ConfigError(f"{name}: came {value}, wanted a finite number")


@dataclass(frozen=True)
class LightningDrawing(Drawing):
    """Drawing's settings with FLUX-Lightning's defaults.

    inference_optimize: merge the LoRA into the weights (in their dtype: bfloat16 rounds it) and draw through
    static graphs. repeat: print the mean time of so many runs after WARM_UPS others; 0 draws once.
    """

    output_dir: str = flag("folder for the PNG file", "./")
    steps: int = flag("denoising steps", 4, name="step")
    guidance_scale: float = flag("distilled guidance", 3.5)
    height: int | None = flag(OWN_SIZE, None)
    width: int | None = flag(OWN_SIZE, None)
    seed: int = flag("seed of the noise", 42)
    max_sequence_length: int | None = flag("T5 tokens (default: what the tokenizer allows)", None)
    inference_optimize: bool = flag(
        "fold the LoRA into the weights and compile the blocks, with CINN where Paddle has it", False
    )
    repeat: int = flag(
        f"draw {WARM_UPS} times to warm up, then so many times, and print the average time; 0 draws once", 0
    )


@dataclass(frozen=True)
class LightningFlags:
    """The flags that are read another way than Drawing's: one prompt, a LoRA that must be given, and whose
    scale its file decides if it is not."""

    path_to_lora: str = flag("LoRA file (.safetensors) or folder")
    prompt: str = flag("what to draw")
    model: str = flag("FLUX folder in diffusers' layout, or a FLUX file", "black-forest-labs/FLUX.1-dev")
    lora_scale: float | None = flag(
        "strength of the LoRA (default: 1.0; PaddleMIX's published file needs 0.25)", None
    )


@dataclass(frozen=True)
class GuidanceScales:
    """distilled: input of the model's guidance embedding. true_cfg: scale of classifier-free guidance, which
    takes a second forward pass; 1: none."""

    distilled: float = 1.5
    true_cfg: float = 1.0


GUIDANCE = GuidanceScales()
SAMPLES = 2000
FEATURES = ("garments", "inception", "clip")


@dataclass(frozen=True)
class EvaluateFlags:
    """Settings of `evaluate`; None where a flag is not given."""

    model: str | None = flag("FLUX folder (of the built-in kind) to draw with and score", None)
    pictures: list[str] | None = flag(
        "folders of pictures to score, a row for each", None, metavar="[NAME=]FOLDER"
    )
    student: str | None = flag(
        "with --model: a distilled LoRA, to compare at 4 steps with its teacher", None, metavar="LORA"
    )
    references: Path | None = flag(
        "with --pictures: folder of the pictures to which the Frechet distance is taken", None
    )
    features: str | None = flag(
        f"with --pictures: features of the distance (default: {FEATURES[0]})", None, choices=FEATURES
    )
    inception: str | None = flag(
        "with --features inception: weights of paddle.vision's Inception v3 (.safetensors)",
        None,
        metavar="FILE",
    )
    clip: str | None = flag("with --pictures: folder of a CLIP, for the CLIP score", None, metavar="FOLDER")
    prompts: Path | None = flag(
        "with --clip: prompts, one a line in the order of the pictures' names (default: beside or in each "
        "picture)",
        None,
    )
    samples: int | None = flag(f"with --model: pictures per score (default: {SAMPLES})", None)
    batch_size: int = flag("pictures drawn at once", 100)
    guidance_scale: float | None = flag(
        f"with --model: distilled guidance of the samples (default: {GUIDANCE.distilled})", None
    )
    true_cfg_scale: float | None = flag(
        "with --model: classifier-free guidance of the samples, twice the time above 1 (default: "
        f"{GUIDANCE.true_cfg})",
        None,
    )
    output: str | None = flag("JSON file to write the scores to", None)
    sheet: str | None = flag("PNG file to write a contact sheet of 28-step samples to", None)


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    chosen = ("model", "pictures")
    add_flags(parser.add_mutually_exclusive_group(required=True), EvaluateFlags, *chosen)
    add_flags(parser, EvaluateFlags, *(f.name for f in fields(EvaluateFlags) if f.name not in chosen))
