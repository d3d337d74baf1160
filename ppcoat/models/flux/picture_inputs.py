"""Pictures that are drawn after: from PIL, NumPy or Paddle to pixels, masks and latents; and the control
picture of FLUX.1 Canny and Depth and of control LoRAs on FLUX.1-dev.

A control transformer sees, for each token, the noisy latents and then those of the control picture:
x_embedder takes twice as many inputs. Sources: diffusers' FluxControlPipeline and VaeImageProcessor, and the
model cards of Black Forest Labs. Latents of pictures are the mean of the VAE's distribution, where diffusers
draws a sample: so a seed says the whole picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import paddle
from PIL import Image

from ppcoat.errors import ConfigError
from ppcoat.models.pictures import pack_latents


class PictureInputs:
    """For a pipeline with a FLUX transformer and LatentPictures' `encode_image`."""

    @paddle.no_grad()
    def control_tokens(self, image: Any, height: int, width: int, pictures: int) -> paddle.Tensor | None:
        """What the transformer sees of control pictures: [pictures, tokens, channels] in its dtype; None for
        one that sees none. image: as for `picture_pixels`.

        Raises ConfigError where the transformer wants one and none came, or the other way round, and as
        `image_latents`.
        """
        inputs, channels = self.transformer.config.in_channels, self.transformer.out_channels
        if inputs not in (channels, 2 * channels):
            raise ConfigError(
                f"this transformer takes {inputs} inputs a token, and {type(self).__name__} draws with "
                f"{channels} or {2 * channels}: draw with FluxFillPipeline if it is FLUX.1 Fill's"
            )
        if (image is not None) != (inputs > channels):
            raise ConfigError(
                "this model draws after a picture: give control_image"
                if image is None
                else "control_image: this model sees no picture; load a control LoRA or FLUX.1 Canny or Depth"
            )
        if image is None:
            return None
        return pack_latents(self.image_latents(image, height, width, pictures, "control_image"))

    @paddle.no_grad()
    def image_latents(
        self, image: Any, height: int, width: int, pictures: int, what: str = "image"
    ) -> paddle.Tensor:
        """Latents [pictures, 16, height/8, width/8] of pictures, in the transformer's dtype.

        image: as for `picture_pixels`, or latents [B, 16, height/8, width/8]. Raises ConfigError for other
        shapes, and unless there is one for all or as many that each serves equally many, those of one prompt
        side by side.
        """
        side = self.vae_scale_factor
        shape = [self.transformer.out_channels // 4, height // side, width // side]
        if isinstance(image, paddle.Tensor) and list(image.shape[-3:]) == shape:
            latents = image if image.ndim == 4 else image.unsqueeze(0)
        else:
            latents = self.encode_image(picture_pixels(image, height, width, what))
        return for_all(latents.astype(self.transformer.dtype), pictures, what)


def for_all(tensor: paddle.Tensor, pictures: int, what: str) -> paddle.Tensor:
    """[B, ...] -> [pictures, ...] of the same dtype, each repeated for the pictures it serves. Raises
    ConfigError where they cannot be shared out."""
    if pictures % len(tensor):
        raise ConfigError(
            f"{what}: came {len(tensor)} pictures for {pictures} to draw, wanted one, or one a prompt"
        )
    return tensor.repeat_interleave(pictures // len(tensor), axis=0)


def picture_pixels(image: Any, height: int, width: int, what: str = "image") -> paddle.Tensor:
    """-> float32 [B, 3, height, width] in -1..1.

    image: a PIL picture or a list of them, brought to height x width (Lanczos), or float numbers in 0..1 of
    that size: [B, height, width, 3] of NumPy, [B, 3, height, width] of Paddle. Raises ConfigError, in which
    `what` names the argument, for anything else.
    """
    pixels = _numbers(image, height, width, "RGB")
    if pixels is not None and list(pixels.shape[1:]) == [3, height, width]:
        return 2 * pixels - 1
    raise ConfigError(
        f"{what}: came {_came(image)}, wanted PIL pictures, or float numbers in 0..1: [B, {height}, {width}, "
        f"3] of NumPy or [B, 3, {height}, {width}] of Paddle"
    )


def picture_mask(mask: Any, height: int, width: int) -> paddle.Tensor:
    """-> float32 [B, 1, height, width] of 0 and 1: 1, from half of white on, is drawn anew.

    mask: a PIL picture or a list of them, made grey and brought to height x width (Lanczos), or float numbers
    in 0..1 of that size: [B, height, width, 1] of NumPy, [B, 1, height, width] of Paddle; B and the 1 may be
    left out. Raises ConfigError for anything else.
    """
    if isinstance(mask, np.ndarray | paddle.Tensor) and 2 <= mask.ndim <= 3 and 1 not in mask.shape[-1:]:
        mask = mask[..., None] if isinstance(mask, np.ndarray) else mask.reshape([-1, 1, *mask.shape[-2:]])
    grey = _numbers(mask, height, width, "L")
    if grey is not None and list(grey.shape[1:]) == [1, height, width]:
        return (grey >= 0.5).astype("float32")
    raise ConfigError(
        f"mask_image: came {_came(mask)}, wanted PIL pictures, or float numbers in 0..1: [B, {height}, "
        f"{width}, 1] of NumPy or [B, 1, {height}, {width}] of Paddle"
    )


def _numbers(image: Any, height: int, width: int, mode: str) -> paddle.Tensor | None:
    """-> float32 [B, channels, rows, columns] in 0..1; None for what is no picture."""
    if isinstance(image, Image.Image) or (
        isinstance(image, Sequence) and image and all(isinstance(each, Image.Image) for each in image)
    ):
        several = [image] if isinstance(image, Image.Image) else image
        sized = [each.convert(mode).resize((width, height), Image.Resampling.LANCZOS) for each in several]
        image = (
            np.stack([np.asarray(each, dtype="float32").reshape([height, width, -1]) for each in sized]) / 255
        )
    if isinstance(image, np.ndarray) and image.dtype.kind == "f" and image.ndim in (3, 4):
        image = image if image.ndim == 4 else image[None]
        image = paddle.to_tensor(np.ascontiguousarray(image.transpose(0, 3, 1, 2), dtype="float32"))
    if isinstance(image, paddle.Tensor) and image.is_floating_point() and image.ndim in (3, 4):
        image = (image if image.ndim == 4 else image.unsqueeze(0)).astype("float32")
        if image.size and image.min() >= 0 and image.max() <= 1:
            return image
    return None


def _came(image: Any) -> str:
    return str(list(image.shape)) if hasattr(image, "shape") else type(image).__name__
