"""Muon against the published rule computed in float64, and against what it is for."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import paddle
import pytest

from ppcoat.pretrain.denoiser import Muon, _owners, orthogonalized


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


class TwoRanks:
    """Two threads in place of two processes: `sum` adds what both bring."""

    size, meeting, brought = 2, threading.Barrier(2), {}

    def __init__(self, rank):
        self.rank = rank

    def sum(self, tensor):
        self.brought[self.rank] = tensor
        self.meeting.wait()
        total = self.brought[0] + self.brought[1]
        self.meeting.wait()
        return total


def test_ranks_that_share_the_work_get_what_one_gets():
    """Four shapes, so that each rank has some; every rank must end with the parameters of one alone."""
    shapes = [(6, 10), (10, 6), (8, 8), (4, 12), (8, 16)]
    rng = np.random.default_rng(2)
    values, gradients = ([rng.normal(size=s).astype("float32") for s in shapes] for _ in range(2))

    def trained(ranks):
        parameters = [paddle.create_parameter(s, "float32") for s in shapes]
        for parameter, value in zip(parameters, values, strict=True):
            parameter.set_value(value)
        muon = Muon(parameters, ranks=ranks)
        for _ in range(2):
            sum(
                (p * paddle.to_tensor(g)).sum() for p, g in zip(parameters, gradients, strict=True)
            ).backward()
            muon.step(0.05)
            muon.clear_grad()
        return [p.numpy() for p in parameters], len(muon._moments)

    alone, _ = trained(None)
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(trained, (TwoRanks(0), TwoRanks(1))))
    assert min(count for _, count in both) >= 1 and sum(count for _, count in both) == 4
    for found, _ in both:
        for ours, expected in zip(found, alone, strict=True):
            np.testing.assert_array_equal(ours, expected)


def test_work_is_shared_about_evenly():
    """The shapes of the tiny FLUX; cost of an iteration by its multiplications."""
    groups = {(128, 128): 28, (128, 512): 12, (128, 640): 4, (128, 768): 4, (128, 384): 4}
    owners = _owners(groups, 2)
    cost = [
        sum(n * s[0] ** 2 * (2 * s[1] + s[0]) for s, n in groups.items() if owners[s] == r) for r in (0, 1)
    ]
    assert min(cost) > 0.8 * max(cost)
    assert set(_owners(groups, 1).values()) == {0}
