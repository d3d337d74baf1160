"""Terms against numpy in float64."""

import numpy as np
import paddle
import pytest

from ppcoat.distill.discriminator import discriminator_hinge, generator_hinge
from ppcoat.distill.objective import distance, matching_target


def values(*shape, seed):
    return np.random.default_rng(seed).normal(size=shape)


def tensor(array):
    return paddle.to_tensor(array, "float32")


def test_distances():
    a, b = values(2, 3, 4, seed=0), values(2, 3, 4, seed=1)
    found = distance(tensor(a), tensor(b), "huber", 0.5).numpy()
    np.testing.assert_allclose(found, np.sqrt((a - b) ** 2 + 0.25) - 0.5, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        distance(tensor(a), tensor(b), "l2").numpy(), (a - b) ** 2, rtol=1e-4, atol=1e-6
    )


def test_hinges():
    scores = tensor([-2.0, 0.0, 2.0])
    assert float(discriminator_hinge(scores, is_real=True)) == pytest.approx((3 + 1 + 0) / 3)
    assert float(discriminator_hinge(scores, is_real=False)) == pytest.approx((0 + 1 + 3) / 3)
    assert float(generator_hinge(scores)) == pytest.approx((3 + 1 + 0) / 3)


def test_matching_moves_by_the_difference_of_the_clean_pictures_over_the_distance_to_the_teachers():
    x, noisy, real, fake = (values(2, 3, 4, seed=s) for s in range(4))
    sigma = np.array([0.25, 0.75])
    level = sigma.reshape(2, 1, 1)
    clean_real, clean_fake = noisy - level * real, noisy - level * fake
    size = np.abs(x - clean_real).mean((1, 2), keepdims=True) + 1e-5
    arguments = tensor(x), tensor(noisy), (tensor(real), tensor(fake)), sigma
    found = matching_target(*arguments)
    np.testing.assert_allclose(found.numpy(), x + (clean_real - clean_fake) / size, rtol=1e-4, atol=1e-5)
    assert found.stop_gradient
    published = x - (real - fake) / (np.abs(x - real).mean((1, 2), keepdims=True) + 1e-5)
    np.testing.assert_allclose(
        matching_target(*arguments, "published").numpy(), published, rtol=1e-4, atol=1e-5
    )


def test_the_published_normaliser_depends_on_the_unit_of_velocity_and_the_fixed_one_does_not():
    """A teacher whose clean picture is x itself, seen at a low level: the fixed rule has nothing to divide
    by but the tiny distance; the published one divides by the size of a velocity."""
    x = values(1, 8, 4, seed=0)
    sigma = np.array([0.1])
    velocity = values(1, 8, 4, seed=1)
    noisy = x + 0.1 * velocity + 1e-3
    arguments = tensor(x), tensor(noisy), (tensor(velocity), tensor(velocity + 0.01)), sigma
    fixed, published = (
        np.abs(matching_target(*arguments, rule).numpy() - x).mean() for rule in ("fixed", "published")
    )
    assert fixed == pytest.approx(0.1 * 0.01 / (1e-3 + 1e-5), rel=0.05)
    assert published == pytest.approx(0.01 / np.abs(x - velocity).mean(), rel=0.05)
