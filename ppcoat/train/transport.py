"""What a NewBie-image step minimises: flow matching with time running from noise to picture.

    x_t = t * latents + (1 - t) * noise          the model predicts latents - noise

FLUX's objective (objective.py) has sigma = 1 - t and the opposite sign. Times are logit-normal, then shifted
by the number of image tokens of the batch (not of the configured resolution: buckets differ).
Source: the transport of the public NewBie-image trainer (Linear path, velocity prediction).
"""

from __future__ import annotations

import math

import numpy as np
import paddle

from ppcoat.models.scheduler import calculate_shift
from ppcoat.train.objective import FlowLoss, Objective

_PATCH = 2  # latent pixels of a side per image token


class Transport(Objective):
    """Draws times and noise, runs NextDiT_CLIP, returns the loss; the same methods as FlowMatching."""

    def draw(self, batch: dict, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """-> times [B] and noise [B, C, h, w], float32; all randomness is `rng`'s, on the host."""
        count, _, height, width = shape = batch["latents"].shape
        times = self.times(rng.standard_normal(count), (height // _PATCH) * (width // _PATCH))
        return times, rng.standard_normal(shape, dtype=np.float32)

    def noise_levels(self, levels: np.ndarray) -> np.ndarray:
        """Times -> share of noise; and back."""
        return 1 - levels

    def losses_at(self, transformer, batch: dict, times: np.ndarray, noise: np.ndarray) -> FlowLoss:
        """batch: latents [B, C, h, w], cap_feats [B, L, D], cap_mask [B, L], clip_text_pooled [B, P] and, if
        wanted, loss_weight (a number that multiplies the mean); times [B] in 0..1 and noise [B, C, h, w].
        """
        latents = batch["latents"]
        times = paddle.to_tensor(times, dtype="float32")
        noisy, target = interpolate(latents, paddle.to_tensor(noise, dtype="float32"), times)
        velocity = transformer(
            noisy.astype(batch["cap_feats"].dtype),  # the weights'; latents may be more exact
            times,
            batch["cap_feats"],
            batch["cap_mask"],
            batch["clip_text_pooled"],
        )
        of_pictures = (velocity.astype("float32") - target).square().mean([1, 2, 3])
        mean, weight = of_pictures.mean(), batch.get("loss_weight", 1.0)
        return FlowLoss(mean if weight == 1.0 else mean * weight, of_pictures.detach())

    def times(self, raw: np.ndarray, tokens: int) -> np.ndarray:
        """Normal draws [B] -> times, float32 [B] in 0..1: their sigmoid, moved towards noise, the more the
        larger the picture.

        tokens: image tokens of a picture. The shift is sigma' = e^mu sigma / (1 + (e^mu - 1) sigma) of sigma
        = 1 - t, with mu of `calculate_shift`, not clamped.
        """
        sigma = 1 / (1 + np.exp(np.asarray(raw, dtype="float64")))
        factor = math.exp(calculate_shift(tokens))
        return (1 - factor * sigma / (1 + (factor - 1) * sigma)).astype(np.float32)


def interpolate(
    latents: paddle.Tensor, noise: paddle.Tensor, times: paddle.Tensor
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """(x_t, target), float32: t * latents + (1 - t) * noise and latents - noise. Both [B, ...], times [B]."""
    clean = latents.astype("float32")
    t = times.reshape([-1] + [1] * (clean.ndim - 1))
    return t * clean + (1 - t) * noise, clean - noise
