"""Muon against the published rule computed in float64, and against what it is for."""

import numpy as np
import paddle
import pytest

from ppcoat.pretrain.muon import Muon, orthogonalized


def _published(gradient, moment, parameter, rate, momentum=0.95, weight_decay=0.01):
    """One step in float64 on one matrix: Jordan et al. 2024 with the scale of Liu et al. 2025."""
    moment = momentum * moment + (1 - momentum) * gradient
    x = (1 - momentum) * gradient + momentum * moment
    x = x / np.linalg.norm(x)
    for _ in range(5):
        s = x @ x.T
        x = 3.4445 * x + (-4.7750 * s + 2.0315 * s @ s) @ x
    scale = 0.2 * np.sqrt(max(x.shape))
    return parameter * (1 - rate * weight_decay) - rate * scale * x, moment


def test_two_steps_equal_the_published_rule_for_wide_and_tall_matrices():
    rng = np.random.default_rng(0)
    shapes = [(6, 10), (10, 6), (6, 10), (4, 4)]
    values = [rng.normal(size=s) for s in shapes]
    moments = [np.zeros(s) for s in shapes]
    parameters = [paddle.create_parameter(s, "float32") for s in shapes]
    for parameter, value in zip(parameters, values, strict=True):
        parameter.set_value(value.astype("float32"))
    muon = Muon(parameters)
    for _ in range(2):
        gradients = [rng.normal(size=s) for s in shapes]
        given = [paddle.to_tensor(g, "float32") for g in gradients]
        sum((p * g).sum() for p, g in zip(parameters, given, strict=True)).backward()

        muon.step(0.05)
        muon.clear_grad()
        for i, gradient in enumerate(gradients):
            tall = shapes[i][0] > shapes[i][1]
            arrays = [a.T if tall else a for a in (gradient, moments[i], values[i])]
            value, moment = _published(*arrays, 0.05)
            values[i], moments[i] = (value.T, moment.T) if tall else (value, moment)
    for parameter, value in zip(parameters, values, strict=True):
        np.testing.assert_allclose(parameter.numpy(), value, atol=2e-5)


def test_singular_values_become_about_one():
    matrices = np.random.default_rng(1).normal(size=(3, 16, 64)) * 100
    found = np.linalg.svd(orthogonalized(paddle.to_tensor(matrices, "float32")).numpy(), compute_uv=False)
    assert found.min() > 0.6 and found.max() < 1.3


def test_a_vector_is_refused():
    with pytest.raises(ValueError, match="matrices"):
        Muon([paddle.create_parameter([4], "float32")])
