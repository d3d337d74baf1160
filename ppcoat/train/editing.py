"""What a run on FLUX.1 Kontext or Fill, or with references on any FLUX.1, does otherwise: what does not go
together, what a Fill model is given, how previews are drawn, and what the LoRA's file tells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from PIL import Image

from ppcoat.config.schema import PreviewConfig, RunConfig
from ppcoat.data.cache import EncodeMasked
from ppcoat.data.examples import Example
from ppcoat.data.pairs import found_mask, found_reference
from ppcoat.data.sources import BadFile
from ppcoat.errors import ConfigError, printable
from ppcoat.models.flux.editing import FluxFillPipeline, FluxKontextPipeline
from ppcoat.models.flux.files import INPUTS_OF_CLASS, FluxFiles
from ppcoat.models.flux.picture_inputs import masked_pixels
from ppcoat.models.flux.pipeline import FluxPipeline
from ppcoat.models.tensor_files import component_config

KONTEXT_VERSION = "flux.1_kontext"  # ai-toolkit's name of the model in the header of a LoRA
_MOST_NAMED = 5


def is_fill(files: FluxFiles) -> bool:
    """Whether the transformer is given masked latents and a mask beside the noise, by its config."""
    config = component_config(files["transformer"], "transformer")
    inputs = config.get("in_channels", 64)
    return inputs == INPUTS_OF_CLASS["FluxFillPipeline"] * (config.get("out_channels") or inputs)


def is_kontext(config: RunConfig, files: FluxFiles) -> bool:
    """Whether the model is FLUX.1 Kontext, as model.arch says or the folder itself."""
    return config.model.arch == "flux_kontext" or files.class_name == "FluxKontextPipeline"


def check_fill(config: RunConfig) -> None:
    """Raise ConfigError for settings that do not go with a Fill model, or that it needs and lacks."""
    model = f"{config.model.name_or_path} is a Fill model"
    for number, data in enumerate(config.datasets):
        if not (data.mask_path or data.alpha_mask):
            raise ConfigError(
                f"{model}, which paints masks anew: datasets.{number} has none; give mask_path, a folder of "
                "masks with the pictures' names, white where it paints, or alpha_mask"
            )
        if data.control_path:
            raise ConfigError(
                f"{model}, which is shown no references: leave datasets.{number}.control_path out"
            )
        if data.mask_min_value:
            raise ConfigError(
                f"{model}, whose masks do not weigh the loss: leave datasets.{number}.mask_min_value out"
            )
    if config.model.arch == "flux_kontext":
        raise ConfigError(f"{model}, and model.arch says flux_kontext: leave that out")
    if config.train.validation.wanted:
        raise ConfigError(f"{model}, and pictures of train.validation have no masks: leave that out")


def check_masks(examples: Sequence[Example]) -> None:
    """Raise ConfigError for pictures without a mask, from which a Fill model cannot learn."""
    names = list(dict.fromkeys(each.item.image_path.name for each in examples if each.mask is None))
    if names:
        more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
        raise ConfigError(
            f"a Fill model paints masks anew, and {len(names)} pictures have none: "
            f"{printable(', '.join(names[:_MOST_NAMED]))}{more}; draw their masks or take these pictures away"
        )


def masked_encoder(pipeline: Any) -> EncodeMasked:
    """Of a pipeline with `encode_image`: pixels [N, 3, H, W] in -1..1 and masks uint8 [N, 1, H, W] -> latents
    of the pixels with grey holes."""

    def encode(pixels: paddle.Tensor, masks: paddle.Tensor) -> paddle.Tensor:
        return pipeline.encode_image(masked_pixels(pixels, masks))

    return encode


def drawing_class(config: RunConfig, files: FluxFiles) -> type[FluxPipeline]:
    """What encodes, and draws the run's previews."""
    if is_fill(files):
        return FluxFillPipeline
    shown = any(preview.ctrl_img for preview in config.sample.previews)
    return FluxKontextPipeline if shown else FluxPipeline


def check_previews(config: RunConfig, fill: bool) -> None:
    """Raise ConfigError for previews whose pictures cannot be read, and for those that lack a picture or have
    one too many for the model."""
    for preview in config.sample.previews if config.sample.wanted else ():
        said = f"preview {preview.prompt[:40]!r}"
        if fill and (len(preview.ctrl_img) != 1 or preview.mask_img is None):
            raise ConfigError(
                f"{said}: a Fill model draws in a picture what a mask marks: give it under sample.samples "
                "with ctrl_img, one picture, and mask_img, or set sample_every: 0"
            )
        if not fill and preview.mask_img is not None:
            raise ConfigError(f"{said}: mask_img is for a Fill model, which this one is not: leave it out")
        preview_pictures(config, preview)


def preview_pictures(config: RunConfig, preview: PreviewConfig) -> dict[str, Any]:
    """What the pipeline is given beside the prompt: references, cut as in training, or a Fill model's picture
    and mask; nothing for a preview without."""
    size, fill = (preview.width, preview.height), preview.mask_img is not None
    whole = not fill and not all(data.full_size_control_images for data in config.datasets)
    try:
        found = [
            found_reference(Path(each), config.data.control_transparent_color) for each in preview.ctrl_img
        ]
        mask = found_mask(Path(preview.mask_img)) if fill else None
    except BadFile as error:
        raise ConfigError(f"preview {preview.prompt[:40]!r}: {error}") from None
    area = int((preview.width * preview.height) ** 0.5)
    shown = [_picture(each.picture(each.own_size(area) if whole else size).pixels()) for each in found]
    if mask is not None:
        return {"image": shown[0], "mask_image": Image.fromarray(_bytes(2 * mask.load(size) - 1))}
    if not shown:
        return {}
    return {"image": [shown], "_auto_resize": False, "max_area": preview.width * preview.height}


def fields_of_references(config: RunConfig, files: FluxFiles) -> dict[str, str]:
    """The header fields of a run's LoRA that say what it was shown: the model where that is Kontext, and how
    many references."""
    fields = {"ss_base_model_version": KONTEXT_VERSION} if is_kontext(config, files) else {}
    references = max(len(data.control_path) for data in config.datasets)
    return fields | ({"references": str(references)} if references else {})


def _picture(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(_bytes(pixels.transpose(1, 2, 0)))


def _bytes(values: np.ndarray) -> np.ndarray:
    """-1..1 -> uint8"""
    return ((values + 1) * 127.5).round().astype(np.uint8)
