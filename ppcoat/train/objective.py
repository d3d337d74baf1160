"""What a step minimises: flow matching, the objective that FLUX was trained with.

    x_t = (1 - sigma) * latents + sigma * noise          the model predicts noise - latents

Source: rectified flow (arXiv 2209.03003) as in the FLUX training scripts of diffusers and ai-toolkit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import paddle

from ppcoat.models.flux_pipeline import latent_image_ids, pack_latents
from ppcoat.models.scheduler import calculate_shift


@dataclass(frozen=True)
class FlowMatching:
    """Draws noise levels and noise, runs the transformer, returns the loss.

    timestep_type: "sigmoid" (sigmoid of a normal number), "linear" (uniform), "shift" (uniform, then
    shifted by the number of image tokens as in sampling). guidance: the value fed to the guidance embedding.
    """

    timestep_type: str = "sigmoid"
    guidance: float = 1.0

    def loss(self, transformer: paddle.nn.Layer, batch: dict, rng: np.random.Generator) -> paddle.Tensor:
        """batch: latents [B, C, h, w], prompt_embeds [B, T, D], pooled [B, P] -> scalar float32 mean square
        error.

        All randomness comes from `rng` on the host, so that a step is the same on every device.
        """
        latents = pack_latents(batch["latents"])
        count, tokens, _ = latents.shape
        sigma = self.draw_sigma(rng, count, tokens)
        noise = rng.standard_normal(tuple(latents.shape), dtype=np.float32)
        return self.loss_at(transformer, batch, sigma, noise)

    def loss_at(self, transformer, batch: dict, sigma: np.ndarray, noise: np.ndarray) -> paddle.Tensor:
        """The loss at given noise levels [B] in 0..1 and noise [B, tokens, C * 4]; for validation on fixed
        ones."""
        latents = pack_latents(batch["latents"])
        count = latents.shape[0]
        sigma = paddle.to_tensor(sigma, dtype="float32")
        noise = paddle.to_tensor(noise, dtype="float32")
        mix = sigma.reshape([-1, 1, 1])
        clean = latents.astype("float32")
        noisy = ((1 - mix) * clean + mix * noise).astype(latents.dtype)
        height, width = (side // 2 for side in batch["latents"].shape[-2:])
        embeds = batch["prompt_embeds"]
        guidance = None
        if transformer.config.guidance_embeds:
            guidance = paddle.full([count], self.guidance, dtype="float32")
        velocity = transformer(
            hidden_states=noisy,
            encoder_hidden_states=embeds,
            pooled_projections=batch["pooled"],
            timestep=sigma,
            img_ids=latent_image_ids(height, width),
            txt_ids=paddle.zeros([embeds.shape[1], 3]),
            guidance=guidance,
            return_dict=False,
        )[0]
        return (velocity.astype("float32") - (noise - clean)).square().mean()

    def draw_sigma(self, rng: np.random.Generator, count: int, tokens: int) -> np.ndarray:
        """Noise levels, float32 [count] in 0..1."""
        if self.timestep_type == "sigmoid":
            return (1 / (1 + np.exp(-rng.standard_normal(count)))).astype(np.float32)
        sigma = rng.uniform(size=count)
        if self.timestep_type == "shift":
            shift = math.exp(calculate_shift(tokens))
            sigma = shift * sigma / (1 + (shift - 1) * sigma)
        return sigma.astype(np.float32)
