"""Scores of pictures: PSNR, Frechet distance, CLIP score. Pure functions of arrays; they draw and load
nothing."""

from __future__ import annotations

import numpy as np
import paddle


def psnr(pictures: paddle.Tensor, references: paddle.Tensor) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of each picture -> [N]; both [N, C, H, W] in -1..1 (2 from peak to
    peak)."""
    error = ((pictures - references) ** 2).mean(axis=[1, 2, 3]).numpy()
    return 10 * np.log10(4 / np.maximum(error, 1e-12))


def frechet_distance(features: np.ndarray, references: np.ndarray) -> float:
    """Frechet distance between the Gaussians fitted to two sets of features, [N, D] and [M, D].

    |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), as in FID (arXiv 1706.08500). The trace of the root is
    that of (S1^(1/2) S2 S1^(1/2))^(1/2), which is symmetric, so its eigenvalues are real. All in float64.
    """
    (mean1, cov1), (mean2, cov2) = (
        (x.mean(axis=0), np.cov(x, rowvar=False))
        for x in (features.astype(np.float64), references.astype(np.float64))
    )
    values, vectors = np.linalg.eigh(cov1)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov2 @ root), 0)).sum()
    return float(np.sum((mean1 - mean2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2 * cross)


def clip_score(pictures: np.ndarray, prompts: np.ndarray) -> float:
    """Mean cosine of the CLIP embeddings of pictures and of their prompts, both [N, D], in float64.

    In -1..1, as in FLUX-Lightning's table (about 0.33), without the factors 2.5 or 100 of other programs
    (CLIPScore, arXiv 2104.08718). Raises ValueError for arrays of different shapes.
    """
    if pictures.shape != prompts.shape:
        raise ValueError(f"pictures {pictures.shape} and prompts {prompts.shape}: wanted one row for each")
    a, b = pictures.astype(np.float64), prompts.astype(np.float64)
    cosines = np.sum(a * b, axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return float(cosines.mean())
