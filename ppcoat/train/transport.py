"""What a NewBie-image step minimises: flow matching with time running from noise to picture.

    x_t = t * latents + (1 - t) * noise          the model predicts latents - noise

FLUX's objective (objective.py) has sigma = 1 - t and the opposite sign. Times are logit-normal, then shifted
by the number of image tokens of the batch (not of the configured resolution: buckets differ).
Source: the transport of the public NewBie-image trainer (Linear path, velocity prediction).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
import paddle

from ppcoat.errors import ConfigError
from ppcoat.models.scheduler import calculate_shift
from ppcoat.train.objective import FlowLoss, Objective

_PATCH = 2  # latent pixels of a side per image token


@dataclass(frozen=True)
class Transport(Objective):
    """Draws times and noise, runs NextDiT_CLIP, returns the loss; the same methods as FlowMatching.

    time_type: "lognorm" (sigmoid of a normal number), "uniform", or "uniform_a_b" (between a and b). shift:
    whether times are then moved towards noise, the more the larger the picture. Raises ConfigError for
    another time_type.
    """

    time_type: str = "lognorm"
    shift: bool = True

    def __post_init__(self) -> None:
        self._range()

    def draw(self, batch: dict, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """-> times [B] and noise [B, C, h, w], float32; all randomness is `rng`'s, on the host."""
        count, _, height, width = shape = batch["latents"].shape
        raw = rng.standard_normal(count) if self.time_type == "lognorm" else rng.uniform(size=count)
        times = self.times(raw, (height // _PATCH) * (width // _PATCH))
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
        """Raw draws [B] (normal for "lognorm", else uniform in 0..1) -> times, float32 [B] in 0..1.

        tokens: image tokens of a picture. The shift is sigma' = e^mu sigma / (1 + (e^mu - 1) sigma) of sigma
        = 1 - t, with mu of `calculate_shift`, not clamped.
        """
        if self.time_type == "lognorm":
            times = 1 / (1 + np.exp(-np.asarray(raw, dtype="float64")))
        else:
            low, high = self._range()
            times = low + (high - low) * np.asarray(raw, dtype="float64")
        if self.shift:
            factor, sigma = math.exp(calculate_shift(tokens)), 1 - times
            times = 1 - factor * sigma / (1 + (factor - 1) * sigma)
        return times.astype(np.float32)

    def _range(self) -> tuple[float, float]:
        if self.time_type in ("lognorm", "uniform"):
            return 0.0, 1.0
        found = re.fullmatch(r"uniform_(\d*\.?\d+)_(\d*\.?\d+)", self.time_type)
        low, high = (float(part) for part in found.groups()) if found else (1.0, 0.0)
        if not 0 <= low < high <= 1:
            raise ConfigError(
                f"time_type is {self.time_type!r}: wanted lognorm, uniform or uniform_a_b, 0 <= a < b <= 1"
            )
        return low, high


def interpolate(
    latents: paddle.Tensor, noise: paddle.Tensor, times: paddle.Tensor
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """(x_t, target), float32: t * latents + (1 - t) * noise and latents - noise. Both [B, ...], times [B]."""
    clean = latents.astype("float32")
    t = times.reshape([-1] + [1] * (clean.ndim - 1))
    return t * clean + (1 - t) * noise, clean - noise
