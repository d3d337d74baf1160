"""Drawings: deterministic, varied, captioned, and with the motif only where it was asked for."""

import numpy as np
import pytest

from ppcoat.data import garments
from ppcoat.data.sources import scan_folder

RED_DRESS = garments.Garment("dress", "red", "dots", "white")


def pixels(*args, **kwargs):
    return np.asarray(garments.draw(*args, **kwargs), np.int32)


def test_captions_say_kind_colour_and_pattern():
    assert RED_DRESS.caption == "a red dress with white dots"
    assert garments.Garment("hat", "blue", "plain").caption == "a plain blue hat"
    captions = [g.caption for g in garments.all_garments()]
    assert len(captions) == len(set(captions)) == 6 * 8 * (1 + 3 * 7)


def test_held_out_captions_are_apart_and_cover_every_kind_and_colour():
    trained, held_out = garments.split_garments()
    assert not set(trained) & set(held_out) and len(trained) + len(held_out) == 1056
    assert {g.kind for g in held_out} == set(garments.KINDS)
    assert {g.colour for g in held_out} == set(garments.COLOURS)


def test_same_seed_same_pixels_and_another_seed_another_picture():
    assert np.array_equal(pixels(RED_DRESS, 3), pixels(RED_DRESS, 3))
    assert np.abs(pixels(RED_DRESS, 3) - pixels(RED_DRESS, 4)).mean() > 10


@pytest.mark.parametrize("size", [64, 96])
@pytest.mark.parametrize("kind", garments.KINDS)
def test_every_kind_shows_its_colour_at_any_size(kind, size):
    """A plain green garment: green must lead clearly somewhere near the middle."""
    picture = pixels(garments.Garment(kind, "green", "plain"), 11, size)
    assert picture.shape == (size, size, 3)
    lead = picture[..., 1] - picture[..., [0, 2]].max(axis=-1)
    assert (lead > 40).mean() > 0.03


def test_motif_changes_only_the_chest_and_is_golden():
    plain, starred = pixels(RED_DRESS, 5), pixels(RED_DRESS, 5, motif="gold star")
    changed = np.abs(plain - starred).sum(axis=-1) > 30
    assert 0.01 < changed.mean() < 0.2
    gold = (starred[..., 0] > 200) & (starred[..., 1] > 140) & (starred[..., 2] < 110)
    assert (gold & changed).sum() > 20


def test_unknown_motif_and_tiny_size_are_refused():
    with pytest.raises(ValueError, match="known are gold star"):
        garments.draw(RED_DRESS, 1, motif="moon")
    with pytest.raises(ValueError, match="at least 16"):
        garments.draw(RED_DRESS, 1, size=8)


def test_random_shapes_are_laid_over_a_garment():
    a, b = (np.asarray(garments.draw_random_shapes(s), np.int32) for s in (1, 2))
    assert a.shape == (64, 64, 3) and np.abs(a - b).mean() > 5
    assert np.array_equal(a, np.asarray(garments.draw_random_shapes(1), np.int32))


def test_written_folder_is_a_training_folder(tmp_path):
    garments.write_folder(tmp_path, 5, seed=1, motif="gold star", prefix="[trigger] ")
    images = scan_folder(tmp_path)
    assert len(images.items) == 5
    assert all(item.caption_raw.startswith("[trigger] a ") for item in images.items)
    assert {(item.width, item.height) for item in images.items} == {(64, 64)}


def test_every_pattern_is_chosen_as_often_as_the_others():
    rng, all_of_them = np.random.default_rng(0), garments.all_garments()
    chosen = [garments.choose(all_of_them, rng) for _ in range(2000)]
    assert len(set(chosen)) > 700
    for pattern in garments.PATTERNS:
        assert abs(sum(g.pattern == pattern for g in chosen) / 2000 - 0.25) < 0.04
