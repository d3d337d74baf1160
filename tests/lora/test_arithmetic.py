"""Sums and cuts of LoRAs against numpy's whole SVD in float64."""

import math
import tracemalloc

import numpy as np
import pytest

from ppcoat.lora.arithmetic import Loss, combined, fitted_lokr, of_matrix, rank_of, told
from ppcoat.lora.delta import LoRAModule
from ppcoat.lora.kinds import IA3, Difference, LoHa, LoKr

OUT, IN = 40, 90


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def random(rng, *shape):
    return rng.standard_normal(shape).astype("float32")


def lora(rng, rank, alpha, out=OUT, width=IN):
    return LoRAModule(random(rng, rank, width), random(rng, out, rank), alpha)


def product(module):
    return module.scale * module.b.astype("float64") @ module.a


def dense(terms):
    """Their sum, written out in float64."""
    return sum(by * kind.delta(np.zeros(kind.shape), 1.0) for kind, by in terms)


@pytest.mark.parametrize("rank", [1, 5, 11])
@pytest.mark.parametrize("ranks", [(12,), (4, 9), (30, 35)])  # the last are no longer calculated as factors
def test_a_cut_is_the_best_one_of_its_rank_and_tells_its_error(rng, ranks, rank):
    terms = [(lora(rng, own, own / 2), by) for own, by in zip(ranks, (0.7, -2.0), strict=False)]
    whole = dense(terms)
    u, s, v = np.linalg.svd(whole, full_matrices=False)
    module, loss = combined(terms, rank)
    assert module.rank == rank and module.scale == 1 and module.a.dtype == module.b.dtype == np.float32
    np.testing.assert_allclose(product(module), (u[:, :rank] * s[:rank]) @ v[:rank], atol=1e-5 * s[0])
    assert loss.norm == pytest.approx(np.linalg.norm(whole), rel=1e-9)
    assert loss.error == pytest.approx(np.linalg.norm(s[rank:]), rel=1e-5)
    assert np.linalg.norm(module.a) == pytest.approx(np.linalg.norm(module.b))  # the two train alike


def test_without_a_cut_a_sum_is_exact_and_factors_stay_as_they_are(rng):
    first, second = lora(rng, 3, 6.0), lora(rng, 5, 1.0)
    module, loss = combined([(first, 0.5), (second, -2.0)])
    assert module.rank == 8 and loss.relative < 1e-7
    np.testing.assert_allclose(product(module), dense([(first, 0.5), (second, -2.0)]), rtol=1e-5, atol=1e-5)
    same, loss = combined([(first, 1.0)], rank=3)
    np.testing.assert_array_equal(same.a, first.a)
    np.testing.assert_array_equal(same.b, first.b * np.float32(2))
    assert loss.relative < 1e-7


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
@pytest.mark.parametrize("own", [8, 30])
def test_energy_keeps_as_few_singular_values_as_hold_it(rng, energy, own):
    module = lora(rng, own, own)
    s = np.linalg.svd(product(module), compute_uv=False)
    share = np.cumsum(s**2) / np.sum(s**2)
    kept, loss = combined([(module, 1.0)], energy=energy)
    assert kept.rank == int(np.sum(share < energy)) + 1 < own or energy == 0.999
    assert loss.relative <= math.sqrt(1 - energy) + 1e-6
    assert combined([(module, 1.0)], rank=2, energy=energy)[0].rank == 2


def kinds(rng):
    def whole(*shape):
        return random(rng, *shape).astype("float32")

    w1, w2 = {"lokr_w1": whole(4, 9)}, {"lokr_w2": whole(10, 10)}
    products = {"lokr_w1_a": whole(4, 2), "lokr_w1_b": whole(2, 9)}, \
               {"lokr_w2_a": whole(10, 3), "lokr_w2_b": whole(3, 10)}  # fmt: skip
    pairs = (whole(OUT, 3), whole(3, IN)), (whole(OUT, 2), whole(2, IN))
    return [
        (LoKr(w1 | w2, 1.0), 40),
        (LoKr(w1 | products[1], 0.25), 12),
        (LoKr(products[0] | w2, -0.5), 20),
        (LoKr(products[0] | products[1], 2.0), 6),
        (LoHa(*pairs, scale=0.5), 6),
        (Difference(whole(OUT, IN)), 40),
    ]


@pytest.mark.parametrize("index", range(6))
def test_what_a_kind_adds_is_a_lora_of_its_rank(rng, index):
    kind, rank = kinds(rng)[index]
    want = kind.delta(np.zeros([OUT, IN]), 0.5)
    assert rank_of(kind) == rank
    module, loss = combined([(kind, 0.5)])
    assert module.rank == rank and loss.relative < 1e-7
    np.testing.assert_allclose(product(module), want, atol=1e-6 * np.linalg.norm(want))
    u, s, v = np.linalg.svd(want)
    module, loss = combined([(kind, 0.5)], rank=2)
    assert loss.error == pytest.approx(np.linalg.norm(s[2:]), rel=1e-5)
    np.testing.assert_allclose(product(module), (u[:, :2] * s[:2]) @ v[:2], atol=1e-5 * s[0])


def test_what_depends_on_the_weight_or_is_no_matrix_has_no_rank():
    assert rank_of(Difference(np.ones(4, "float32"))) is None
    assert rank_of(IA3(np.ones(4, "float32"), False)) is None


@pytest.mark.parametrize(("power", "worse"), [(-0.25, 2e-3), (-0.5, 2e-4), (-1.0, 1e-5)])
def test_a_large_matrix_is_cut_nearly_as_well_as_by_its_whole_svd(rng, power, worse):
    """Singular values i ** power: from a slow to a fast decay."""
    u, v = (np.linalg.qr(rng.standard_normal([side, 560]))[0] for side in (560, 640))
    s = np.arange(1.0, 561) ** power
    matrix = (u * s) @ v.T
    module, loss = of_matrix(matrix, 12)
    best = np.linalg.norm(s[12:])
    assert best * (1 - 1e-9) <= loss.error <= best * (1 + worse)
    assert loss.error == pytest.approx(np.linalg.norm(matrix - product(module)), rel=1e-6)


def test_energy_of_a_large_matrix_is_held(rng):
    matrix = rng.standard_normal([530, 24]) @ rng.standard_normal([24, 600])
    module, loss = of_matrix(matrix, None, 0.99999)
    assert 16 < module.rank <= 24 and loss.relative <= math.sqrt(1e-5)


def test_a_cut_of_wide_factors_never_makes_the_matrix(rng):
    """A Linear of 4000 x 4000 would take 128 MB in float64."""
    module = lora(rng, 8, 8.0, 4000, 4000)
    tracemalloc.start()
    combined([(module, 1.0)], 4)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8e6


@pytest.mark.parametrize(("rank", "loses"), [(3, True), (5, False), (7, False)])
@pytest.mark.parametrize("whole", [False, True])
def test_a_lokr_becomes_that_of_other_settings(rng, rank, loses, whole):
    second = {"lokr_w2": random(rng, 10, 12)} if whole else {
        "lokr_w2_a": random(rng, 10, 5), "lokr_w2_b": random(rng, 5, 12)}  # fmt: skip
    kind = LoKr({"lokr_w1": random(rng, 4, 6)} | second, scale=0.5)
    wanted = {"lokr_w1": [4, 6], "lokr_w2_a": [10, rank], "lokr_w2_b": [rank, 12]}
    factors, loss = fitted_lokr(kind, wanted, own_scale=2.0)
    inner = len(factors["lokr_w2_b"])
    assert inner == rank if whole else inner == min(rank, 5)
    new = LoKr(factors, scale=2.0)
    want, got = (each.delta(np.zeros([40, 72]), 1.0) for each in (kind, new))
    assert loss.norm == pytest.approx(np.linalg.norm(want), rel=1e-6)
    assert loss.error == pytest.approx(np.linalg.norm(want - got), rel=1e-4, abs=1e-6 * loss.norm)
    assert (loss.relative > 0.01) == (loses or whole)
    full, loss = fitted_lokr(kind, {"lokr_w1": [4, 6], "lokr_w2": [10, 12]}, own_scale=1.0)
    assert loss.relative < 1e-7
    np.testing.assert_allclose(LoKr(full, 1.0).delta(np.zeros([40, 72]), 1.0), want, rtol=1e-4, atol=1e-5)
    assert fitted_lokr(kind, {"lokr_w1": [5, 6], "lokr_w2": [8, 12]}, 1.0) is None


def test_the_worst_layers_are_told():
    losses = {"a": Loss(3.0, 0.3), "b": Loss(4.0, 0.0), "c": Loss(0.0, 0.0)}
    assert told(losses) == "relative delta-W error 0.06 overall, worst a 0.1"
    assert told({"b": losses["b"]}) == "relative delta-W error 0 overall"


def test_zeros_stay_zeros(rng):
    nothing = LoRAModule(random(rng, 6, IN), np.zeros([OUT, 6], "float32"), 6.0)
    module, loss = combined([(nothing, 1.0)], 2)
    assert module.rank == 2 and not product(module).any() and loss.relative == 0
