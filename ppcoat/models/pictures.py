"""Between pixels and the latents that a transformer sees, through FLUX's autoencoder, which NewBie shares."""

from __future__ import annotations

import paddle


class LatentPictures:
    """For a DiffusionPipeline with a `vae`: latents are shifted and scaled as its config says."""

    @paddle.no_grad()
    def encode_image(self, pixels: paddle.Tensor) -> paddle.Tensor:
        """Pixels [B, 3, height, width] in -1..1 -> latents [B, 16, height/8, width/8].

        As the transformer sees them: shifted and scaled, the mean of the VAE's distribution.
        """
        latents = self.vae.encode(pixels.astype(self.vae.dtype)).latent_dist.mode()
        return (latents - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    @paddle.no_grad()
    def decode_latents(self, latents: paddle.Tensor) -> paddle.Tensor:
        """The way back: latents [B, 16, h, w] -> pixels [B, 3, 8h, 8w], about -1..1, not clipped."""
        config = self.vae.config
        latents = latents.astype(self.vae.dtype) / config.scaling_factor + config.shift_factor
        return self.vae.decode(latents).sample

    def pictures(self, latents: paddle.Tensor, output_type: str):
        """Latents [B, 16, h, w] -> "pil": a list of pictures; "np": float32 [B, 8h, 8w, 3] in 0..1."""
        pixels = self.decode_latents(latents).astype("float32")
        pixels = (pixels / 2 + 0.5).clip(0, 1).numpy().transpose(0, 2, 3, 1)
        return self.numpy_to_pil(pixels) if output_type == "pil" else pixels
