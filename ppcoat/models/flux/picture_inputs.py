"""What FLUX sees of pictures. For drawing and training alike, functions of numbers and tensors: reference
tokens and their places (Kontext), masks and what they leave (Fill, inpainting), sizes that fit, and where
drawing begins at a strength. For pipelines: pictures of PIL, NumPy or Paddle as pixels, masks and latents,
and the control picture of FLUX.1 Canny and Depth and of control LoRAs on FLUX.1-dev.

A control transformer sees, for each token, the noisy latents and then those of the control picture:
x_embedder takes twice as many inputs. Latents of pictures are the mean of the VAE's distribution, where
diffusers draws a sample: so a seed says the whole picture. Pixels are -1..1, masks 0 or 1, where 1 is drawn
anew. Sources: diffusers' FLUX pipelines and VaeImageProcessor, and the model cards of Black Forest Labs;
places of several references: ComfyUI.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from PIL import Image

from ppcoat.errors import ConfigError
from ppcoat.models.pictures import TOKEN_SIDE, latent_image_ids, pack_latents

LATENT_SIDE = 8  # pixels that a latent of FLUX.1's VAE stands for, each way
# Sizes (width, height) that FLUX.1 Kontext was trained with, beside those with the sides exchanged.
_KONTEXT_TALL = ((672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184),
                 (944, 1104), (1024, 1024))  # fmt: skip
KONTEXT_SIZES = tuple(sorted({*_KONTEXT_TALL, *((height, width) for width, height in _KONTEXT_TALL)}))


def pack_references(references: Sequence[paddle.Tensor]) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Latents of references, each [B, 16, h, w] with even sides of its own -> tokens [B, tokens, 64], which
    follow those of the picture that is drawn, in the dtype of the latents, and their ids float32 [tokens, 3]
    (`reference_ids`)."""
    grids = [(each.shape[2] // 2, each.shape[3] // 2) for each in references]
    return paddle.concat([pack_latents(each) for each in references], axis=1), reference_ids(grids)


def reference_ids(grids: Sequence[tuple[int, int]]) -> paddle.Tensor:
    """Position ids (1, row, column), float32 [tokens, 3], of references with so many (rows, columns) of
    tokens.

    The first counts from 0. Each further one stands to the right of those before it or below them, where the
    longer side of the whole stays shorter, so that no two tokens have one place.
    """
    ids, bottom, right = [], 0, 0
    for rows, columns in grids:
        beside = rows + bottom > columns + right
        row, column = (0, right) if beside else (bottom, 0)
        ids.append(latent_image_ids(rows, columns) + paddle.to_tensor([1.0, row, column]))
        bottom, right = max(bottom, row + rows), max(right, column + columns)
    return paddle.concat(ids)


def fill_latents(masked: paddle.Tensor, mask: paddle.Tensor) -> paddle.Tensor:
    """What FLUX.1 Fill sees beside the noisy latents: [B, 80, h, w], whose packed form is [B, tokens, 320].

    masked: latents [B, 16, h, w] of the pixels with the hole (`masked_pixels`). mask: that of the pixels, [B
    or 1, 1, 8 h, 8 w]. In the dtype of the latents.
    """
    channels = mask_channels(mask, mask.shape[2] // masked.shape[2]).astype(masked.dtype)
    return paddle.concat([masked, channels.expand([masked.shape[0], -1, -1, -1])], axis=1)


def masked_pixels(pixels: paddle.Tensor, mask: paddle.Tensor) -> paddle.Tensor:
    """Pixels [B, 3, H, W] with mid grey where the mask [B or 1, 1, H, W] is 1; in the dtype of the pixels."""
    return pixels * (1 - mask.astype(pixels.dtype))


def mask_channels(mask: paddle.Tensor, side: int = LATENT_SIDE) -> paddle.Tensor:
    """Mask [B, 1, 8 h, 8 w] -> [B, 64, h, w], any dtype: channel 8 y + x is the pixel (y, x) of each cell of
    8 x 8. side: of the cells, for another VAE than FLUX.1's."""
    return F.pixel_unshuffle(mask.astype("float32"), side).astype(mask.dtype)


def latent_mask(mask: paddle.Tensor, side: int = LATENT_SIDE) -> paddle.Tensor:
    """Mask [B, 1, 8 h, 8 w] -> [B, 1, h, w], any dtype: the first pixel of each cell of 8 x 8, as diffusers'
    inpainting shrinks it. side: as above."""
    return mask[:, :, ::side, ::side]


def first_step(steps: int, strength: float) -> int:
    """Index of the first of `steps` noise levels that is drawn at a strength in (0, 1]: 1 draws all.

    In floating point, as diffusers: 10 steps at 0.7 begin at 3, and 50 at 0.95 at 2; at least one is drawn.
    Raises ConfigError for another strength.
    """
    if not 0 < strength <= 1:
        raise ConfigError(f"strength: came {strength}, wanted above 0 and at most 1; 1 draws all anew")
    return min(int(steps - steps * strength), steps - 1)


def output_size(height: int, width: int, max_area: int | None) -> tuple[int, int]:
    """(height, width) that Kontext draws: of about max_area pixels at the same ratio, in multiples of 16.
    max_area None: the sides as they are, rounded down."""
    if max_area is not None:
        ratio = width / height
        height, width = round(math.sqrt(max_area / ratio)), round(math.sqrt(max_area * ratio))
    return height // TOKEN_SIDE * TOKEN_SIDE, width // TOKEN_SIDE * TOKEN_SIDE


def reference_size(height: int, width: int, trained: bool = True) -> tuple[int, int]:
    """(height, width) at which a reference of this size is seen: the sides rounded down to 16; trained: the
    one of KONTEXT_SIZES that is nearest to their ratio. Raises ConfigError for a side below 16."""
    if min(height, width) < TOKEN_SIDE:
        raise ConfigError(
            f"a reference of {width}x{height}: wanted at least {TOKEN_SIDE} pixels each way; enlarge it"
        )
    height, width = output_size(height, width, None)
    if not trained:
        return height, width
    ratios = np.array([w / h for w, h in KONTEXT_SIZES])
    best_width, best_height = KONTEXT_SIZES[int(np.abs(ratios - width / height).argmin())]
    return best_height, best_width


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
