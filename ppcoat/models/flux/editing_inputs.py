"""What FLUX sees of a picture that is edited: reference tokens and their places (Kontext), masks and what
they leave (Fill, inpainting), sizes that fit, and where drawing begins at a strength.

Functions of numbers and tensors only, for drawing and training alike. Sources: diffusers' FLUX pipelines;
places of several references: ComfyUI. Pixels are -1..1, masks 0 or 1, where 1 is drawn anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import paddle
import paddle.nn.functional as F

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
