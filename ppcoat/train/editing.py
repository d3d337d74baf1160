"""What a run on FLUX.1 Kontext or Fill, or with references on any FLUX.1, does otherwise: what does not go
together, what a Fill model is given, and what the LoRA's file tells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import paddle

from ppcoat.config.explain import printable
from ppcoat.config.schema import RunConfig
from ppcoat.data.cache import EncodeMasked
from ppcoat.data.examples import Example
from ppcoat.errors import ConfigError
from ppcoat.models.flux.editing_inputs import masked_pixels
from ppcoat.models.flux.files import FluxFiles
from ppcoat.models.loading import FILL_INPUTS
from ppcoat.models.tensor_files import component_config, read_json

KONTEXT_VERSION = "flux.1_kontext"  # ai-toolkit's name of the model in the header of a LoRA
_MOST_NAMED = 5


def is_fill(files: FluxFiles) -> bool:
    """Whether the transformer is given masked latents and a mask beside the noise, by its config."""
    config = component_config(files["transformer"])
    inputs = config.get("in_channels", 64)
    return inputs == FILL_INPUTS * (config.get("out_channels") or inputs)


def is_kontext(config: RunConfig, files: FluxFiles) -> bool:
    """Whether the model is FLUX.1 Kontext, as model.arch says or the folder itself."""
    index = files.base / "model_index.json"
    if config.model.arch != "auto" or not index.is_file():
        return config.model.arch == "flux_kontext"
    return read_json(index).get("_class_name") == "FluxKontextPipeline"


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


def fields_of_references(config: RunConfig, files: FluxFiles) -> dict[str, str]:
    """The header fields of a run's LoRA that say what it was shown: the model where that is Kontext, and how
    many references."""
    fields = {"ss_base_model_version": KONTEXT_VERSION} if is_kontext(config, files) else {}
    references = max(len(data.control_path) for data in config.datasets)
    return fields | ({"references": str(references)} if references else {})
