"""PSNR, Frechet distance and CLIP score against closed forms."""

import numpy as np
import paddle
import pytest

from ppcoat.infer.scores import clip_score, frechet_distance, psnr


def test_psnr_of_a_known_error():
    """An error of 0.2 everywhere in a range of 2: 20 log10(2 / 0.2) = 20 dB."""
    reference = paddle.zeros([2, 3, 4, 4])
    assert psnr(reference + 0.2, reference) == pytest.approx([20, 20], abs=1e-4)


def test_frechet_distance_of_gaussians_has_its_closed_form():
    """Independent features with deviations s and t, means m apart: |m|^2 + sum (s - t)^2."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4000, 3))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T  # exactly white
    s, t, m = np.array([1.0, 2.0, 0.5]), np.array([1.5, 2.0, 3.0]), np.array([0.3, -1.0, 2.0])
    expected = np.sum(m**2) + np.sum((s - t) ** 2)
    assert frechet_distance(x * s, x * t + m) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_correlated_features_is_symmetric_and_zero_for_equals():
    rng = np.random.default_rng(1)
    a = rng.standard_normal((500, 8)) @ rng.standard_normal((8, 8))
    b = rng.standard_normal((400, 8)) @ rng.standard_normal((8, 8)) + 1
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a, b) > 1


def test_frechet_distance_of_fewer_pictures_than_features():
    """Covariances without full rank: the trace of (S1 S2)^(1/2) from the eigenvalues of S1 S2."""
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((5, 12)), rng.standard_normal((7, 12)) * 2 + 1
    cov1, cov2 = (np.cov(x, rowvar=False) for x in (a, b))
    roots = np.sqrt(np.maximum(np.linalg.eigvals(cov1 @ cov2).real, 0)).sum()
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(cov1) + np.trace(cov2) - 2 * roots
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_clip_score_is_the_mean_cosine_whatever_the_lengths():
    """Angles of 0, 90 and 60 degrees."""
    pictures = np.array([[3.0, 0], [0, 2], [1, 0]], "float32")
    prompts = np.array([[0.5, 0], [7, 0], [0.5, 3**0.5 / 2]], "float32")
    assert clip_score(pictures, prompts) == pytest.approx((1 + 0 + 0.5) / 3, abs=1e-7)
    with pytest.raises(ValueError, match="one row for each"):
        clip_score(pictures, prompts[:2])
