"""The Euler steps of a teacher and the phases in which a student jumps over them.

    noise level   1 ............ .9 ............ .76 ........... .51 ............ 0      (4096 image tokens)
    phase         |    last      |               |               |     first      |
    Euler steps   ||||||||||||||||||||||||||||||||||||||||||||||||||||||||||||||||||

Step n leads from sigmas[n] to sigmas_next[n]. Levels rise with n, as the public code counts them. A phase is
a run of consecutive steps that the student takes at once; the edges of 4 phases are the noise levels of
FluxPipeline's 4 steps for the same number of image tokens. Source: phased consistency models
(arXiv 2405.18407), the SD3 solver of its public code, and FLUX's dynamic shift.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import paddle

from ppcoat.errors import ConfigError

RAW_LEVELS = 1000  # FLUX's noise levels before the shift: i / 1000


@dataclass(frozen=True)
class EulerPhases:
    """sigmas, sigmas_next: noise levels before and after each Euler step, float32 [steps], rising.
    starts: number of the first step of each phase, rising from 0."""

    sigmas: np.ndarray
    sigmas_next: np.ndarray
    starts: np.ndarray

    @staticmethod
    def of(mu: float, steps: int = 100, phases: int = 4, last_sigma: str = "fixed") -> EulerPhases:
        """mu: the dynamic shift (models.scheduler.calculate_shift, from the number of image tokens).

        steps: Euler steps, a divisor of 1000. last_sigma: the level that the last Euler step leads to,
        "fixed" is 0, where sampling ends; "published" the smallest raw one, 1 / 1000 shifted (0.00315 at mu
        1.15).
        Raises ConfigError for numbers that do not fit.
        """
        if steps < 1 or RAW_LEVELS % steps:
            raise ConfigError(f"num_euler_timesteps: came {steps}, wanted a divisor of {RAW_LEVELS}")
        if not 1 <= phases <= steps:
            raise ConfigError(f"multiphase: came {phases}, wanted 1 to num_euler_timesteps, which is {steps}")
        raw = np.arange(1, RAW_LEVELS + 1) / RAW_LEVELS
        levels = math.exp(mu) / (math.exp(mu) + (1 / raw - 1))
        sigmas = levels[RAW_LEVELS // steps - 1 :: RAW_LEVELS // steps]
        last = levels[0] if last_sigma == "published" else 0.0
        sigmas_next = np.append(last, sigmas[:-1])
        starts = np.floor(np.linspace(0, steps, phases, endpoint=False)).astype(np.int64)
        return EulerPhases(sigmas.astype(np.float32), sigmas_next.astype(np.float32), starts)

    def start_of(self, index: np.ndarray) -> np.ndarray:
        """Steps [B] -> the first step of their phase [B], where the student's jump ends."""
        return self.starts[np.searchsorted(self.starts, index, side="right") - 1]

    def length_of(self, start: np.ndarray) -> np.ndarray:
        """First steps of phases [B] -> the number of steps in each [B]."""
        ends = np.append(self.starts[1:], len(self.sigmas))
        return ends[np.searchsorted(self.starts, start)] - start


def jump(
    x: paddle.Tensor, velocity: paddle.Tensor, sigma: np.ndarray, sigma_end: np.ndarray
) -> paddle.Tensor:
    """x, velocity [B, tokens, C] and levels [B] -> x + (sigma_end - sigma) * velocity, float32.

    Where the two levels are equal this is x itself, whatever the velocity: the boundary condition of
    consistency models.
    """
    return x.astype("float32") + per_picture(sigma_end - sigma) * velocity.astype("float32")


def noised(
    x: paddle.Tensor, noise: paddle.Tensor, sigma: np.ndarray, sigma_to: np.ndarray, rule: str = "fixed"
) -> paddle.Tensor:
    """Carry x [B, tokens, C] from noise levels sigma [B] forward to sigma_to >= sigma with fresh noise;
    float32.

    (1 - sigma) x0 + sigma e  becomes  (1 - sigma_to) x0 + sigma_to e', so x is multiplied by
    r = (1 - sigma_to) / (1 - sigma) and the noise that is already in it, of deviation r sigma, is filled up:
    sqrt(sigma_to^2 - (r sigma)^2). rule "published": the fresh noise has the weight
    (sigma_to - sigma) / (1 - sigma), which is right only for the noise that is already there; with fresh
    noise the sum has too little of it (a deviation of .48 where the level says .68).
    """
    ratio = (1.0 - sigma_to) / (1.0 - sigma)
    if rule == "published":
        fresh = (sigma_to - sigma) / (1.0 - sigma)
    else:
        fresh = np.sqrt(np.maximum(sigma_to**2 - (ratio * sigma) ** 2, 0.0))
    return per_picture(ratio) * x.astype("float32") + per_picture(fresh) * noise.astype("float32")


def per_picture(values: np.ndarray) -> paddle.Tensor:
    """Numbers [B] -> float32 [B, 1, 1], to be multiplied with tokens."""
    return paddle.to_tensor(np.asarray(values, dtype=np.float32)).reshape([-1, 1, 1])
