"""Dropout by a hash: as often as asked, independent between places and seeds, the same bits in the kernel."""

import numpy as np
import paddle
import pytest

from ppcoat.fp8 import backend
from ppcoat.fp8.formats import HASH_SEED
from ppcoat.fp8.pointwise import dropout, random_bits
from ppcoat.fp8.truth import hashed

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl, kernels = (pytest.importorskip(name) for name in ("triton.language", "ppcoat.fp8.formats_triton"))
in_kernel = kernels.random_bits

COUNT = 1 << 18
SEEDS = (0, 1, 12345, 2**32, 2**62 - 1)


def bits(seed: int, count: int = COUNT, start: int = 0) -> np.ndarray:
    """0 to 2^32 - 1, in the order of int32."""
    places = paddle.arange(start, start + count, dtype="int64")
    return random_bits(places, seed).numpy().astype(np.int64) + 2**31


def agreement(first: np.ndarray, second: np.ndarray, rate: float = 0.5) -> float:
    """How often both keep or both drop, in standard deviations from what chance gives."""
    first, second = (part >= rate * 2**32 for part in (first, second))
    chance = rate**2 + (1 - rate) ** 2
    return ((first == second).mean() - chance) / np.sqrt(chance * (1 - chance) / first.size)


@triton.jit
def hash_kernel(p_place, p_bits, seed):
    each = tl.arange(0, 64)
    tl.store(p_bits + each, in_kernel(tl.load(p_place + each), seed.to(tl.int64)))


@pytest.mark.parametrize("seed", SEEDS)
def test_all_numbers_are_as_likely(seed):
    """Chi-square of the upper and of the lower 8 bits has 255 degrees of freedom: 255 +- 23."""
    found = bits(seed)
    for byte in (found >> 24, found & 255):
        counts = np.bincount(byte, minlength=256)
        assert 130 < ((counts - COUNT / 256) ** 2 / (COUNT / 256)).sum() < 380


@pytest.mark.parametrize("seed", SEEDS)
def test_places_are_independent(seed):
    found = bits(seed, COUNT + 4096)
    for distance in (1, 2, 3, 16, 64, 128, 3072, 4096):
        assert abs(agreement(found[:COUNT], found[distance : distance + COUNT])) < 5, distance


@pytest.mark.parametrize("other", [1, 2, 2**16, 2**31, 2**32, 2**40, 2**61])
def test_seeds_are_independent(other):
    for seed in (0, 987654321987654321):
        for rate in (0.1, 0.5):
            assert abs(agreement(bits(seed), bits(seed ^ other), rate)) < 5


def test_seeds_are_no_shifted_copies():
    """By its lower half a seed moves along the same row of numbers; the upper half makes it another row."""
    moved = 5 * pow(HASH_SEED, -1, 2**32) % 2**32  # five places further
    found = bits(7 << 32)
    assert (bits((7 << 32) + moved)[:-5] == found[5:]).all()  # this is what the upper half is for
    assert abs(agreement(bits((9 << 32) + moved)[:-5], found[5:])) < 5


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.5, 0.9])
def test_the_rate_and_the_mean_are_kept(rate):
    y = dropout.reference(paddle.ones([COUNT]), rate, 11).numpy()
    assert set(np.unique(y)) <= {np.float32(0), np.float32(1 / (1 - rate))}
    assert abs((y == 0).mean() - rate) <= 5 * np.sqrt(rate * (1 - rate) / COUNT)


def test_a_rate_just_below_one_drops(run):
    y = run("dropout")(paddle.ones([1024]), 1 - 1e-12, 3).numpy()
    assert (y == 0).all()


def test_the_same_call_is_its_own_transpose_and_says_what_is_not_finite(run):
    x, seed = np.random.default_rng(0).standard_normal([3, 5, 50]).astype(np.float32), 2**50 + 3
    x[0, 0, :2], x[1, 1, 1] = np.nan, np.inf
    op = run("dropout")
    y, mask = (op(paddle.to_tensor(each), 0.3, seed).numpy() for each in (x, np.ones_like(x)))
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(y, x * mask)
    assert np.isnan(y[0, 0, :2]).all() and 0.6 < (mask > 0).mean() < 0.8


def test_places_beyond_32_bits_in_reference_and_kernel(on_triton):
    places = np.concatenate([np.arange(32), 2**31 + np.arange(8) - 4, 2**32 * np.arange(1, 25) + 5])

    def launch(place, found):
        hash_kernel[(1,)](place, found, 2**61 + 2**33 + 9)
        return found

    want = hashed(places, 2**61 + 2**33 + 9)
    assert np.unique(want).size == 64
    on_paddle = random_bits(paddle.to_tensor(places), 2**61 + 2**33 + 9).numpy()
    on_kernel = on_triton(launch)(paddle.to_tensor(places), paddle.zeros([64], "int32")).numpy()
    for found in (on_paddle, on_kernel):
        np.testing.assert_array_equal(found.astype(np.int64) + 2**31, want)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_reference_and_kernel_agree_bit_for_bit(dtype, on_triton):
    kernel = on_triton(backend.OPS["dropout"].version("triton"))
    x = paddle.to_tensor(np.random.default_rng(1).standard_normal([7, 513]).astype("float32")).astype(dtype)
    for seed in SEEDS:
        got, want = kernel(x, 0.1, seed), dropout.reference(x, 0.1, seed)
        assert got.dtype == want.dtype == x.dtype
        np.testing.assert_array_equal(got.astype("float32").numpy(), want.astype("float32").numpy())
