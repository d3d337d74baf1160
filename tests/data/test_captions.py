"""Final captions, their variants, and caption dropout."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppcoat.data.captions import (
    CaptionRules,
    caption_variants,
    class_caption,
    dropped_captions,
    final_caption,
    trigger_parts,
)


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


TAGS = "[trigger], red, long, silk, on a hanger"


def variants(raw=TAGS, seed=0, **rules):
    return caption_variants(raw, CaptionRules(trigger_word="sks", **rules), seed)


def tokens(caption):
    return caption.split(", ")


def test_there_is_one_variant_unless_tokens_are_shuffled_or_left_out():
    assert variants() == ("sks, red, long, silk, on a hanger",)
    assert variants(keep_tokens=2, caption_variants=5) == variants()
    assert len(variants(shuffle_tokens=True)) == 8
    assert len(variants(token_dropout_rate=0.1, caption_variants=3)) == 3


def test_variants_are_a_function_of_seed_and_caption_alone():
    first = variants(shuffle_tokens=True)
    assert first == variants(shuffle_tokens=True) != variants(shuffle_tokens=True, seed=1)
    swapped = variants("[trigger], red, long, silk, on a chair", shuffle_tokens=True)
    assert [each.replace("hanger", "chair") for each in first] != list(swapped)


def test_shuffling_keeps_all_tokens_and_the_first_ones_in_place():
    for caption in variants(shuffle_tokens=True, keep_tokens=2, caption_variants=50):
        assert tokens(caption)[:2] == ["sks", "red"]
        assert sorted(tokens(caption)[2:]) == ["long", "on a hanger", "silk"]
    orders = {caption for caption in variants(shuffle_tokens=True, keep_tokens=2, caption_variants=50)}
    assert len(orders) == 6  # 3 tokens


def test_left_out_tokens_hit_their_rate_keep_their_order_and_spare_the_first_ones():
    raw = ", ".join(f"t{i:03d}" for i in range(100))
    for caption in variants("sks, " + raw, token_dropout_rate=0.3, keep_tokens=1):
        rest = tokens(caption)[1:]
        assert tokens(caption)[0] == "sks" and rest == sorted(rest)
        assert abs(len(rest) - 70) < 4 * np.sqrt(100 * 0.3 * 0.7)  # four standard deviations
    assert set(variants("red, silk", token_dropout_rate=1.0)) == {"sks"}


def test_a_trigger_that_falls_away_with_its_token_comes_back_in_front():
    for caption in variants("red, [trigger], silk", token_dropout_rate=0.7, caption_variants=50):
        assert "sks" in caption


def test_regularisation_captions_get_no_trigger_in_front_but_keep_their_placeholder():
    rules = CaptionRules(trigger_word="sks", put_in_front=False)
    assert caption_variants("a dress", rules, 0) == ("a dress",)
    assert caption_variants("a [trigger] dress", rules, 0) == ("a sks dress",)


def test_a_rate_per_caption():
    dropped = dropped_captions(4, np.array([0.0, 1.0, 0.0, 1.0]), np.random.default_rng(0))
    assert dropped.tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    ("caption", "word", "wanted"),
    [
        ("sks a red dress", "", "a red dress"),
        ("a sks, red", "person", "a person, red"),
        ("desks and sks", "a person", "desks and a person"),
        ("a dog", "person", "a dog"),
        ("red, sks", "", "red,"),
    ],
)
def test_class_captions(caption, word, wanted):
    assert class_caption(caption, "sks", word) == wanted
    assert class_caption(caption, None, word) == caption


@pytest.mark.parametrize(
    ("caption", "parts"),
    [
        ("a sks dress", [("a ", ""), ("sks", "word"), (" dress", "")]),
        ("[trigger], three desks, [name]", [("sks", "word"), (", three desks, ", ""), ("sks", "word")]),
        ("a red dress", [("sks ", "added"), ("a red dress", "")]),
        ("", [("sks ", "added")]),
        ("一件sks裙子\nred", [("一件", ""), ("sks", "word"), ("裙子\nred", "")]),
        ("<b>sks</b>", [("<b>", ""), ("sks", "word"), ("</b>", "")]),
    ],
)
def test_the_parts_of_a_caption_are_what_is_trained(caption, parts):
    assert trigger_parts(caption, "sks") == parts
    assert " ".join("".join(text for text, _ in parts).split()) == final_caption(caption, "sks")
    assert trigger_parts(caption, None) == [(final_caption(caption), "")]
