"""Latents as FLUX's transformer sees them: tokens, each a patch of 2 x 2, and where these stand."""

from __future__ import annotations

import numpy as np
import paddle


def pack_latents(latents: paddle.Tensor) -> paddle.Tensor:
    """[B, channels, 2 * rows, 2 * columns] -> tokens [B, rows * columns, 4 * channels], each a 2x2 patch."""
    b, c, h, w = latents.shape
    patches = latents.reshape([b, c, h // 2, 2, w // 2, 2]).transpose([0, 2, 4, 1, 3, 5])
    return patches.reshape([b, (h // 2) * (w // 2), c * 4])


def unpack_latents(tokens: paddle.Tensor, rows: int, columns: int) -> paddle.Tensor:
    """The way back: [B, rows * columns, 4 * channels] -> [B, channels, 2 * rows, 2 * columns]."""
    b, _, c = tokens.shape
    patches = tokens.reshape([b, rows, columns, c // 4, 2, 2]).transpose([0, 3, 1, 4, 2, 5])
    return patches.reshape([b, c // 4, 2 * rows, 2 * columns])


def latent_image_ids(rows: int, columns: int) -> paddle.Tensor:
    """Position ids of image tokens, float32 [rows * columns, 3]: (0, row, column), rows first."""
    row, column = np.divmod(np.arange(rows * columns), columns)
    return paddle.to_tensor(np.stack([np.zeros_like(row), row, column], axis=1).astype("float32"))
