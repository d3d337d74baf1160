"""Drawing after a picture of edges or depths: FLUX.1 Canny and Depth, and control LoRAs on FLUX.1-dev.

Such a transformer sees, for each token, the noisy latents and then those of the control picture: x_embedder
takes twice as many inputs. Source: diffusers' FluxControlPipeline and the model cards of Black Forest Labs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from PIL import Image

from ppcoat.errors import ConfigError
from ppcoat.models.loading import FLUX_CLASSES
from ppcoat.models.pictures import pack_latents
from ppcoat.models.tensor_files import read_json


class ControlPictures:
    """For a pipeline with a FLUX transformer and LatentPictures' `encode_image`."""

    @paddle.no_grad()
    def control_tokens(self, image: Any, height: int, width: int, pictures: int) -> paddle.Tensor | None:
        """What the transformer sees of control pictures: [pictures, tokens, channels] in its dtype; None for
        one that sees none.

        image: a PIL picture or a list of them, brought to height x width (Lanczos), or float numbers in 0..1
        of that size: [B, height, width, 3] of NumPy, [B, 3, height, width] of Paddle. One for all pictures,
        or as many that each serves equally many. The mean of the VAE's distribution is taken, where diffusers
        draws a sample. Raises ConfigError where the transformer wants one and none came, or the other way
        round, and for other shapes.
        """
        inputs, channels = self.transformer.config.in_channels, self.transformer.out_channels
        if inputs not in (channels, 2 * channels):
            raise ConfigError(
                f"this transformer takes {inputs} inputs a token (of FLUX.1 Fill, 384), and drawing is for "
                f"{channels} or {2 * channels}: load FLUX.1-dev, -schnell, -Canny or -Depth"
            )
        if (image is not None) != (inputs > channels):
            raise ConfigError(
                "this model draws after a picture: give control_image"
                if image is None
                else "control_image: this model sees no picture; load a control LoRA or FLUX.1 Canny or Depth"
            )
        if image is None:
            return None
        pixels = _pixels(image, height, width)
        if pictures % len(pixels):
            raise ConfigError(
                f"{len(pixels)} control pictures for {pictures} to draw: give one, or one a prompt"
            )
        tokens = pack_latents(self.encode_image(pixels)).astype(self.transformer.dtype)
        return tokens.repeat_interleave(pictures // len(pixels), axis=0)


def check_sees_no_picture(folder: str | Path, setting: str) -> None:
    """Raises ConfigError, which says `setting`, for the folder of a FLUX that sees a control picture: trained
    are those that see the noise alone."""
    index = Path(folder) / "model_index.json"
    if index.is_file() and read_json(index).get("_class_name") == FLUX_CLASSES[1]:
        raise ConfigError(
            f"{setting}: {folder} sees a control picture beside the noise, which can be drawn with but not "
            "trained: give the folder of FLUX.1-dev or -schnell"
        )


def _pixels(image: Any, height: int, width: int) -> paddle.Tensor:
    """-> [B, 3, height, width] float32 in -1..1."""
    if isinstance(image, Image.Image) or (
        isinstance(image, Sequence) and image and all(isinstance(each, Image.Image) for each in image)
    ):
        several = [image] if isinstance(image, Image.Image) else image
        sized = [each.convert("RGB").resize((width, height), Image.Resampling.LANCZOS) for each in several]
        image = np.stack([np.asarray(each, dtype="float32") / 255 for each in sized])
    if isinstance(image, np.ndarray) and image.dtype.kind == "f" and image.ndim in (3, 4):
        image = image if image.ndim == 4 else image[None]
        image = paddle.to_tensor(np.ascontiguousarray(image.transpose(0, 3, 1, 2), dtype="float32"))
    if isinstance(image, paddle.Tensor) and image.is_floating_point() and image.ndim in (3, 4):
        image = (image if image.ndim == 4 else image.unsqueeze(0)).astype("float32")
        if list(image.shape[1:]) == [3, height, width] and image.min() >= 0 and image.max() <= 1:
            return 2 * image - 1
    came = list(image.shape) if hasattr(image, "shape") else type(image).__name__
    raise ConfigError(
        f"control_image: came {came}, wanted PIL pictures, or float numbers in 0..1: [B, {height}, {width}, "
        f"3] of NumPy or [B, 3, {height}, {width}] of Paddle"
    )
