"""What drawing is for FLUX and NewBie alike: noise from seeds, and the way between pixels and the latents
that a transformer sees, through FLUX's autoencoder, which NewBie shares. FLUX's transformer sees latents as
tokens, each a patch of 2 x 2: packing them, and where they stand.
"""

from __future__ import annotations

import numpy as np
import paddle

from ppcoat.errors import ConfigError

TOKEN_SIDE = 16  # pixels that a token stands for, each way: the VAE's 8 times the transformers' patches of 2


def check_drawing(height: int, width: int, step: int, output_type: str) -> None:
    """Raise ConfigError for a size in pixels that is not a multiple of `step`, and an unknown output type."""
    if height < step or width < step or height % step or width % step:
        raise ConfigError(f"picture size {width}x{height}: width and height must be multiples of {step}")
    if output_type not in ("pil", "np", "latent"):
        raise ConfigError(f"output_type is {output_type!r}: choose pil, np or latent")


def noise_of_seeds(batch: int, shape: tuple[int, ...], seed: int) -> paddle.Tensor:
    """Normal noise float32 [batch, *shape], drawn on the host: row i is of seed + i, whatever the others."""
    generators = [np.random.default_rng(seed + i) for i in range(batch)]
    return paddle.to_tensor(np.stack([g.standard_normal(shape, dtype="float32") for g in generators]))


class LatentPictures:
    """For a DiffusionPipeline with a `vae`: latents are shifted and scaled as its config says."""

    @paddle.no_grad()
    def encode_image(self, pixels: paddle.Tensor) -> paddle.Tensor:
        """Pixels [B, 3, height, width] in -1..1 -> latents [B, 16, height/8, width/8].

        As the transformer sees them: shifted and scaled, the mean of the VAE's distribution. In its dtype.
        """
        latents = self.vae.encode(pixels.astype(self.vae.dtype)).latent_dist.mode()
        return (latents - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    @paddle.no_grad()
    def decode_latents(self, latents: paddle.Tensor) -> paddle.Tensor:
        """The way back: latents [B, 16, h, w] -> pixels [B, 3, 8h, 8w], about -1..1, not clipped,
        in the VAE's dtype."""
        config = self.vae.config
        latents = latents.astype(self.vae.dtype) / config.scaling_factor + config.shift_factor
        return self.vae.decode(latents).sample

    def pictures(self, latents: paddle.Tensor, output_type: str):
        """Latents [B, 16, h, w] -> "pil": a list of pictures; "np": float32 [B, 8h, 8w, 3] in 0..1."""
        pixels = self.decode_latents(latents).astype("float32")
        pixels = (pixels / 2 + 0.5).clip(0, 1).numpy().transpose(0, 2, 3, 1)
        return self.numpy_to_pil(pixels) if output_type == "pil" else pixels


def pack_latents(latents: paddle.Tensor) -> paddle.Tensor:
    """[B, channels, 2 * rows, 2 * columns] -> tokens [B, rows * columns, 4 * channels], each a 2x2 patch;
    any dtype."""
    b, c, h, w = latents.shape
    patches = latents.reshape([b, c, h // 2, 2, w // 2, 2]).transpose([0, 2, 4, 1, 3, 5])
    return patches.reshape([b, (h // 2) * (w // 2), c * 4])


def unpack_latents(tokens: paddle.Tensor, rows: int, columns: int) -> paddle.Tensor:
    """The way back: [B, rows * columns, 4 * channels] -> [B, channels, 2 * rows, 2 * columns], in any
    dtype."""
    b, _, c = tokens.shape
    patches = tokens.reshape([b, rows, columns, c // 4, 2, 2]).transpose([0, 3, 1, 4, 2, 5])
    return patches.reshape([b, c // 4, 2 * rows, 2 * columns])


def latent_image_ids(rows: int, columns: int) -> paddle.Tensor:
    """Position ids of image tokens, float32 [rows * columns, 3]: (0, row, column), rows first."""
    row, column = np.divmod(np.arange(rows * columns), columns)
    return paddle.to_tensor(np.stack([np.zeros_like(row), row, column], axis=1).astype("float32"))
