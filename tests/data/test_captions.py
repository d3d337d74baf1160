"""Final captions and caption dropout."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppcoat.data.captions import dropped_captions, final_caption


@pytest.mark.parametrize(
    ("raw", "trigger", "final"),
    [
        ("a [trigger] dress", "sks", "a sks dress"),
        ("a [name] dress, [trigger]", "sks", "a sks dress, sks"),
        ("a red dress", "sks", "sks a red dress"),
        ("a sks dress", "sks", "a sks dress"),
        ("three desks", "sks", "sks three desks"),
        ("一件sks裙子", "sks", "一件sks裙子"),
        ("", "sks", "sks"),
        ("a  red\n dress ", "sks dog", "sks dog a red dress"),
        ("a c++ shirt", "c++", "a c++ shirt"),
        ("a [trigger] dress", None, "a dress"),
        ("a [trigger], red", None, "a, red"),
        ("[trigger], red", None, "red"),
        ("a dress , red", None, "a dress , red"),
        ("[trigger]", None, ""),
        ("", None, ""),
    ],
)
def test_final_caption(raw, trigger, final):
    assert final_caption(raw, trigger) == final


@given(st.text(max_size=40), st.sampled_from([None, "sks", "my dog"]))
def test_applying_it_twice_changes_nothing(raw, trigger):
    once = final_caption(raw, trigger)
    assert final_caption(once, trigger) == once
    assert trigger is None or trigger in once


def test_dropout_hits_its_rate_and_always_draws_the_same_count():
    rng = np.random.default_rng(0)
    share = dropped_captions(100_000, 0.05, rng).mean()
    assert abs(share - 0.05) < 4 * np.sqrt(0.05 * 0.95 / 100_000)  # four standard deviations
    states = []
    for rate in (0.0, 0.5, 1.0):
        rng = np.random.default_rng(1)
        dropped = dropped_captions(8, rate, rng)
        states.append(rng.bit_generator.state)
        assert rate == 0.5 or (dropped == bool(rate)).all()
    assert states[0] == states[1] == states[2]
