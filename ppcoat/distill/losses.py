"""Distances and terms of the distillation, each a function of tensors: no model, no randomness.

Sources: consistency models' pseudo-Huber (arXiv 2310.14189), hinge GAN as phased consistency models have it
(arXiv 2405.18407), distribution matching (DMD, arXiv 2311.18828), reflow as in self-corrected flow
distillation (arXiv 2412.16906).
"""

from __future__ import annotations

import numpy as np
import paddle
import paddle.nn.functional as F

from ppcoat.distill.solver import per_picture

TINY = 1e-5  # keeps the normaliser of distribution matching away from 0


def distance(
    found: paddle.Tensor, wanted: paddle.Tensor, loss_type: str, huber_c: float = 1e-3
) -> paddle.Tensor:
    """Per value, float32: "l2" d^2, "huber" sqrt(d^2 + c^2) - c (|d| far away, smooth near 0)."""
    d = found.astype("float32") - wanted.astype("float32")
    return d.square() if loss_type == "l2" else (d.square() + huber_c**2).sqrt() - huber_c


def discriminator_hinge(scores: paddle.Tensor, is_real: bool) -> paddle.Tensor:
    """Scores of one head [B, tokens, 1] -> scalar float32: real ones should be above 1, fakes below -1."""
    scores = scores.astype("float32")
    return F.relu(1.0 - scores if is_real else 1.0 + scores).mean()


def generator_hinge(scores: paddle.Tensor) -> paddle.Tensor:
    """Scores that one head gives to fakes [B, tokens, 1] -> scalar float32: they should be above 1."""
    return F.relu(1.0 - scores.astype("float32")).mean()


def matching_target(
    x: paddle.Tensor,
    noisy: paddle.Tensor,
    velocities: tuple[paddle.Tensor, paddle.Tensor],
    sigma: np.ndarray,
    rule: str = "fixed",
) -> paddle.Tensor:
    """Where distribution matching wants x to be: [B, tokens, C] float32, a constant.

    x: the student's sample; noisy: it, noised to levels sigma [B]; velocities: of the teacher ("real") and of
    the student ("fake") at noisy. Both predict the clean picture as noisy - sigma * velocity; x is moved by
    the difference of the two, divided by the mean distance from x to the teacher's clean picture.

    rule "published": the difference is that of the velocities (its factor sigma is missing) and the distance
    is from x to the teacher's *velocity*, a quantity of another kind.
    """
    x, real, fake = (each.detach().astype("float32") for each in (x, *velocities))
    if rule == "published":
        change, reference = real - fake, real
    else:
        level = per_picture(sigma)
        change, reference = level * (real - fake), noisy.detach().astype("float32") - level * real
    size = (x - reference).abs().mean([1, 2], keepdim=True) + TINY
    return x - change / size
