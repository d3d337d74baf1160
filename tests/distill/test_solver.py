"""Noise levels, phases and jumps of the solver, against published numbers and Monte-Carlo."""

import numpy as np
import paddle
import pytest

from ppcoat.distill.solver import EulerPhases, jump, noised
from ppcoat.errors import ConfigError
from ppcoat.models.flux.scheduler import FlowMatchEulerDiscreteScheduler, calculate_shift

MU_1024 = 1.15


def test_levels_are_the_raw_ones_9_19_to_999_shifted_as_flux_shifts():
    solver = EulerPhases.of(MU_1024)
    raw = (np.arange(100) * 10 + 10) / 1000
    shift = np.exp(np.float64(MU_1024))
    np.testing.assert_allclose(solver.sigmas, shift * raw / (1 + (shift - 1) * raw), rtol=1e-6)
    np.testing.assert_array_equal(solver.sigmas_next[1:], solver.sigmas[:-1])
    assert solver.sigmas[-1] == 1


@pytest.mark.parametrize("size", [512, 768, 1024])
def test_phases_end_where_the_pipeline_steps(size):
    """Phase edges at 1024 are the published .0032 (or 0), .5128, .7595, .9045."""
    mu = calculate_shift((size // 16) ** 2)
    solver = EulerPhases.of(mu)
    assert solver.starts.tolist() == [0, 25, 50, 75]
    edges = solver.sigmas_next[solver.starts]
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 4, 4), mu=mu)
    np.testing.assert_allclose(edges[::-1], scheduler.sigmas.numpy()[1:], atol=1e-6)
    if size == 1024:
        np.testing.assert_allclose(edges, [0, 0.5128, 0.7595, 0.9045], atol=5e-5)


def test_published_last_level_is_the_smallest_raw_one():
    assert EulerPhases.of(MU_1024).sigmas_next[0] == 0
    published = EulerPhases.of(MU_1024, last_sigma="published").sigmas_next
    assert published[0] == pytest.approx(0.00315, abs=1e-5)
    np.testing.assert_array_equal(published[1:], EulerPhases.of(MU_1024).sigmas_next[1:])


def test_phase_of_a_step_and_its_length():
    solver = EulerPhases.of(MU_1024, steps=10, phases=4)
    assert solver.starts.tolist() == [0, 2, 5, 7]
    start = solver.start_of(np.arange(10))
    assert start.tolist() == [0, 0, 2, 2, 2, 5, 5, 7, 7, 7]
    assert solver.length_of(start).tolist() == [2, 2, 3, 3, 3, 2, 2, 3, 3, 3]


@pytest.mark.parametrize(("steps", "phases"), [(7, 4), (0, 1), (100, 101), (100, 0)])
def test_numbers_that_do_not_fit_are_refused(steps, phases):
    with pytest.raises(ConfigError, match="wanted"):
        EulerPhases.of(MU_1024, steps, phases)


def test_a_jump_moves_each_picture_by_its_own_levels_and_not_at_all_where_they_are_equal():
    x, velocity = (
        paddle.to_tensor(np.random.default_rng(s).normal(size=(2, 3, 4)), "float32") for s in (0, 1)
    )
    there = jump(x, velocity, np.array([0.9, 0.5]), np.array([0.4, 0.5])).numpy()
    np.testing.assert_allclose(there[0], x.numpy()[0] - 0.5 * velocity.numpy()[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(there[1], x.numpy()[1])


@pytest.mark.parametrize(
    ("end", "level", "published"), [(0.5128, 0.678, 0.479), (0.7595, 0.881, 0.629), (0.9045, 0.984, 0.843)]
)
def test_forward_noising_restores_the_deviation_that_the_level_says(end, level, published):
    """Of the noise in a sample of a picture that is 0 everywhere; 200,000 draws: 3 errors are 0.5 %."""
    rng, count = np.random.default_rng(0), 200_000
    x = paddle.to_tensor(end * rng.standard_normal([1, count, 1]), "float32")
    fresh = paddle.to_tensor(rng.standard_normal([1, count, 1]), "float32")
    levels = np.array([end]), np.array([level])
    assert float(noised(x, fresh, *levels).std()) == pytest.approx(level, rel=5e-3)
    assert float(noised(x, fresh, *levels, "published").std()) == pytest.approx(published, rel=8e-3)


def test_forward_noising_keeps_the_picture_and_does_nothing_at_the_edge():
    picture = np.full([1, 1000, 1], 3.0)
    rng = np.random.default_rng(0)
    x = paddle.to_tensor(0.5 * picture, "float32")
    fresh = paddle.to_tensor(rng.standard_normal(picture.shape), "float32")
    for rule in ("fixed", "published"):
        mean = float(noised(x, fresh, np.array([0.5]), np.array([0.75]), rule).mean())
        assert mean == pytest.approx(0.25 * 3, abs=0.1)
        still = noised(x, fresh, np.array([0.5]), np.array([0.5]), rule)
        np.testing.assert_array_equal(still.numpy(), x.numpy())
