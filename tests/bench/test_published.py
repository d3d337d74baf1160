"""The emulated codecs of others, against the facts published about them."""

import numpy as np
import pytest

from ppcoat.bench import published


@pytest.mark.parametrize(("codec", "bits"), [(published.plain_e4m3, 3), (published.plain_e5m2, 2)])
def test_plain_codecs_round_to_their_mantissa(codec, bits):
    x = np.float32([[448.0, 1.0, 1.0 + 0.6 * 2.0**-bits, -3.0, 0.0]])
    scale = 1.0 if bits == 3 else 448 / 57344  # a power of two, so the values keep their mantissas
    assert scale in (1.0, 2.0**-7)
    np.testing.assert_array_equal(codec(x), np.float32([[448.0, 1.0, 1.0 + 2.0**-bits, -3.0, 0.0]]))


def test_coat_decodes_to_448_codes_of_the_expanded_range():
    """x = M 2^-j: k from the formula by hand, codes 448 * 2^(-j k) rounded to E4M3."""
    x = np.float32([[1.0, 0.5, 0.25, -0.125, *[2.0**-8] * 28]])
    k = np.floor(16 * np.log2(448**2 / 2) / 8) / 16
    assert k == 2.0625
    for j, got in enumerate(published.published_coat(x)[0, :4]):
        code = 448 * 2 ** (-j * k)
        step = 2.0 ** (np.floor(np.log2(code)) - 3)
        want = (np.round(code / step) * step / 448) ** (1 / k)
        assert abs(got) == pytest.approx(want, rel=1e-5)


def emulated_lane_0(values: np.ndarray) -> float:
    """The shuffles thread by thread: thread i takes thread i + step's value of before, if that is not 0."""
    lanes = list(values)
    for step in (16, 8, 4, 2, 1):
        old = list(lanes)
        for i in range(len(lanes) - step):
            if old[i + step] > 0:
                lanes[i] = min(old[i], old[i + step])
    return lanes[0]


@pytest.mark.parametrize("zeros", [0, 1, 5, 20])
def test_the_published_minimum_follows_the_shuffles(zeros):
    rng = np.random.default_rng(zeros)
    for _ in range(20):
        row = rng.random(128).astype(np.float32) + np.float32(0.01)
        row[rng.choice(128, zeros, replace=False)] = 0
        warps = [emulated_lane_0(row[i : i + 32]) for i in range(0, 128, 32)]
        assert published.kernel_minimum(row[None])[0, 0] == np.float32(emulated_lane_0([*warps, *[1e9] * 28]))


def test_coat_shows_its_known_faults():
    """A zero in element 0 makes k collapse to 3/16; about half of all constant groups lose their sign."""
    x = np.random.default_rng(0).standard_normal([64, 128]).astype(np.float32)
    good = np.sqrt(np.mean((published.published_coat(x) - x) ** 2) / np.mean(x**2))
    x[:, 0] = 0
    bad = np.sqrt(np.mean((published.published_coat(x) - x) ** 2) / np.mean(x**2))
    assert good < 0.02 and bad > 0.1
    constant = np.repeat(-np.random.default_rng(1).random([500, 1], dtype=np.float32) - 0.01, 128, axis=1)
    assert 0.3 < (published.published_coat(constant)[:, 0] > 0).mean() < 0.7
    np.testing.assert_allclose(published.published_coat(np.zeros([1, 128], np.float32)), 1e-30, rtol=1e-5)


def test_dynamic_codes_have_256_values_and_the_published_density():
    """Table of bitsandbytes: signed 0.1-1 holds 64 values a sign, 0.01-0.1 32; unsigned twice as many."""
    for signed, top in ((True, 64), (False, 128)):
        book = published._dynamic_book(signed)
        assert len(np.unique(book)) == 256 and book.max() == 1 and 0 in book
        for decade in range(7):
            inside = (book > 0.1 * 10.0**-decade) & (book < 0.9999 * 10.0**-decade)
            assert inside.sum() == top >> decade
    x = np.linspace(-1, 1, 128, dtype=np.float32)[None]
    np.testing.assert_allclose(published.dynamic_exponent_signed(x), x, atol=0.5 * 0.9 / 64 + 1e-6)
    np.testing.assert_allclose(
        published.dynamic_exponent_unsigned(abs(x)), abs(x), atol=0.5 * 0.9 / 128 + 1e-6
    )
