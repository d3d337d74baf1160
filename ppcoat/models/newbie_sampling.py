"""From noise (t = 0) to latents (t = 1) along NewBie-image's velocity: time grid, guidance, two solvers.

Source: the public NewBie-image sampler (ODE of a linear path, after Lumina-Image 2.0's). Classifier-free
guidance is arXiv 2207.12598.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import paddle

from ppcoat.errors import ConfigError

SOLVERS = ("euler", "midpoint")


@dataclass(frozen=True)
class Guidance:
    """v = v_uncond + scale * (v_cond - v_uncond) while t < until, then v_cond alone.

    until: 1 or more is always; noise is at t = 0, so guidance goes off late in the drawing. renorm r: if not
    0, the guided velocity of a picture is at most r times as long as v_cond.
    """

    scale: float = 5.0
    until: float = 1.0
    renorm: float = 0.0

    def __post_init__(self) -> None:
        if not (np.isfinite(self.scale) and self.until >= 0 and self.renorm >= 0):
            raise ConfigError(f"guidance {self}: scale must be finite, until and renorm 0 or more")


def time_grid(points: int, shift: float = 6.0) -> np.ndarray:
    """float32 [points] from 0 to 1: t / (t + shift - shift * t) of evenly spaced t, denser near noise."""
    if points < 2 or not shift > 0:
        raise ConfigError(f"{points} time points, shift {shift}: wanted at least 2 and a positive shift")
    t = np.linspace(0, 1, points)
    return (t / (t + shift - shift * t)).astype("float32")


def guided_velocity(
    transformer: paddle.nn.Layer, x: paddle.Tensor, t: float, conditions: dict, guidance: Guidance
) -> paddle.Tensor:
    """Velocity float32 [B, C, h, w] of latents x at time t.

    conditions: cap_feats, cap_mask and clip_text_pooled of 2B rows, first those of the prompts, then of the
    negative prompts.
    """
    batch, dtype = x.shape[0], conditions["cap_feats"].dtype
    on = t < guidance.until and guidance.scale != 1
    if on:
        x = paddle.concat([x, x])
    else:
        conditions = {name: rows[:batch] for name, rows in conditions.items()}
    time = paddle.full([x.shape[0]], t, dtype="float32")
    velocity = transformer(x.astype(dtype), time, **conditions).astype("float32")
    if not on:
        return velocity
    wanted, unwanted = velocity.chunk(2)
    guided = unwanted + guidance.scale * (wanted - unwanted)
    if guidance.renorm:
        length, limit = _length(guided), guidance.renorm * _length(wanted)
        guided = paddle.where(length >= limit, guided * (limit / length), guided)
    return guided


def integrate(
    velocity: Callable[[paddle.Tensor, float], paddle.Tensor],
    x: paddle.Tensor,
    grid: np.ndarray,
    solver: str = "euler",
) -> Iterator[paddle.Tensor]:
    """Yields x after each of the len(grid) - 1 steps; "midpoint" takes two evaluations for each."""
    if solver not in SOLVERS:
        raise ConfigError(f"solver is {solver!r}: choose {' or '.join(SOLVERS)}")
    for t, following in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):
        step = following - t
        slope = velocity(x, t)
        if solver == "midpoint":
            slope = velocity(x + step / 2 * slope, t + step / 2)
        x = x + step * slope
        yield x


def _length(x: paddle.Tensor) -> paddle.Tensor:
    """Euclidean length of each sample, [B, 1, 1, 1]."""
    return x.square().sum(axis=[1, 2, 3], keepdim=True).sqrt()
