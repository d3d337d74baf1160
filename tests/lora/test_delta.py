"""Norms of delta-W that never build it, against the dense matrix in float64."""

import numpy as np
import pytest

from ppcoat.lora.delta import LoRAModule, relative_difference, summarize, worst


def module(rng, rank=5, alpha=3.0, rows=40, width=30):
    a, b = (rng.standard_normal(shape).astype("float32") for shape in ([rank, width], [rows, rank]))
    return LoRAModule(a, b, alpha)


def dense(module):
    return module.alpha / len(module.a) * (np.float64(module.b) @ np.float64(module.a))


def test_norm_is_the_frobenius_norm(rng):
    modules = {"one": module(rng), "two": module(rng, rank=2, alpha=8.0)}
    summary = summarize(modules)
    for path, norm in summary.norms.items():
        assert norm == pytest.approx(np.linalg.norm(dense(modules[path])), rel=1e-12)
    assert summary.norm == pytest.approx(
        np.sqrt(sum(np.sum(dense(m) ** 2) for m in modules.values())), rel=1e-12
    )


@pytest.mark.parametrize("size", [0.3, 1e-4, 1e-6])
def test_differences_of_one_rank_are_seen_however_small(rng, size):
    first = module(rng)
    second = LoRAModule(
        first.a * np.float32(1 + size), first.b + np.float32(size) * np.ones_like(first.b), first.alpha
    )
    want = np.linalg.norm(dense(second) - dense(first)) / np.linalg.norm(dense(first))
    assert relative_difference(second, first) == pytest.approx(want, rel=1e-6)


def test_differences_of_two_ranks(rng):
    first, other = module(rng), module(rng, rank=3)
    padded = LoRAModule(
        np.concatenate([first.a, np.zeros([2, 30], "float32")]),
        np.concatenate([first.b, np.ones([40, 2], "float32")], axis=1),
        first.alpha * 7 / 5,
    )
    assert relative_difference(padded, first) < 3e-8
    want = np.linalg.norm(dense(other) - dense(first)) / np.linalg.norm(dense(first))
    assert relative_difference(other, first) == pytest.approx(want, rel=1e-6)


def test_edges(rng):
    good = module(rng)
    zero = LoRAModule(good.a, 0 * good.b, good.alpha)
    broken = LoRAModule(good.a, np.where(good.b > 2, np.float32(np.nan), good.b), good.alpha)
    assert relative_difference(good, good) == 0.0 == relative_difference(broken, broken)
    assert np.isnan(relative_difference(broken, good)) and np.isnan(worst([0.5, np.nan, 0.1]))
    assert relative_difference(None, zero) == 0.0 and relative_difference(None, good) == 1.0
    assert relative_difference(good, zero) == np.inf
    summary = summarize({"good": good, "zero": zero})
    assert summary.zero == ["zero"] and "2 modules, 1 of them zero" in summary.line()
    assert np.isnan(summarize({"good": good, "broken": broken}).norm)
