"""Sizes, ids and masks of edited pictures against diffusers, number for number."""

from pathlib import Path

import numpy as np
import paddle
import pytest

from ppcoat.errors import ConfigError
from ppcoat.models.flux.picture_inputs import (
    fill_latents,
    first_step,
    latent_mask,
    mask_channels,
    masked_pixels,
    output_size,
    pack_references,
    reference_ids,
    reference_size,
)
from ppcoat.models.pictures import latent_image_ids, pack_latents

FIXTURES = Path(__file__).parents[2] / "fixtures"


def arrays(name):
    with np.load(FIXTURES / name) as found:
        return dict(found)


def test_sizes_of_pictures_and_references_are_those_of_diffusers():
    refs = arrays("kontext/sampling.npz")
    for (height, width, area), want in zip(refs["rule_out_in"].tolist(), refs["rule_out"], strict=True):
        assert output_size(height, width, area) == tuple(want)
    for (height, width), want in zip(refs["rule_ref_in"].tolist(), refs["rule_ref"], strict=True):
        assert (*reference_size(height, width), *reference_size(height, width, False)) == tuple(want)
    with pytest.raises(ConfigError, match="a reference of 40x15: wanted at least 16 pixels"):
        reference_size(15, 40)


@pytest.mark.parametrize("case", ["square", "nonsquare", "resized", "true_cfg"])
def test_ids_of_a_reference_are_those_of_diffusers(case):
    refs = arrays("kontext/sampling.npz")
    height, width = refs[f"{case}/size"] // 16
    rows, columns = (side // 16 for side in refs[f"{case}/ref_resized"].shape[:2])
    ids = paddle.concat([latent_image_ids(height, width), reference_ids([(rows, columns)])])
    np.testing.assert_array_equal(ids.numpy(), refs[f"{case}/img_ids"])


def test_several_references_stand_where_comfyui_puts_them():
    """Worked out by hand from its rule: right of the first, below both, below all."""
    corners, ids = [], reference_ids([(4, 2), (2, 3), (5, 9), (1, 1)]).numpy()
    for count in (8, 6, 45, 1):
        corners.append(tuple(ids[0]))
        ids = ids[count:]
    assert corners == [(1, 0, 0), (1, 0, 2), (1, 4, 0), (1, 9, 0)]


def test_no_two_tokens_of_references_share_a_place():
    latents = [paddle.rand([2, 16, 2 * rows, 2 * columns]) for rows, columns in [(4, 6), (3, 5), (6, 2)]]
    tokens, ids = pack_references(latents)
    assert len(np.unique(ids.numpy(), axis=0)) == len(ids) == tokens.shape[1] == 24 + 15 + 12
    np.testing.assert_array_equal(tokens[:, 24:39].numpy(), pack_latents(latents[1]).numpy())


def test_masks_are_packed_and_shrunk_as_by_diffusers():
    fill, inpaint = arrays("fill/sampling.npz"), arrays("img2img/refs.npz")
    for case in ("square", "nonsquare", "strength"):
        packed = pack_latents(mask_channels(paddle.to_tensor(fill[f"{case}/mask"])))
        np.testing.assert_array_equal(packed.numpy(), fill[f"{case}/mask_packed"][:1])
    for case in ("plain", "resized", "short"):
        shrunk = latent_mask(paddle.to_tensor(inpaint[f"inpaint/{case}/mask"])).expand([1, 16, -1, -1])
        np.testing.assert_array_equal(pack_latents(shrunk).numpy(), inpaint[f"inpaint/{case}/mask_packed"])


def test_what_fill_sees_is_the_hole_and_the_mask():
    mask = paddle.zeros([1, 1, 16, 32])
    mask[:, :, 3, 17] = 1
    seen = fill_latents(paddle.full([2, 16, 2, 4], 0.5), mask).numpy()
    assert seen.shape == (2, 80, 2, 4)
    assert (seen[:, :16] == 0.5).all() and seen[:, 16:].sum() == 2 and seen[1, 16 + 8 * 3 + 1, 0, 2] == 1
    holed = masked_pixels(paddle.full([2, 3, 16, 32], -1.0), mask).numpy()
    assert holed[:, :, 3, 17].max() == 0 and holed.sum() == -2 * 3 * (16 * 32 - 1)


def test_a_strength_begins_where_diffusers_does():
    refs = arrays("img2img/refs.npz")
    for (steps, strength), want in zip(refs["strength_in"].tolist(), refs["strength_begin"], strict=True):
        assert first_step(int(steps), strength) == want, (steps, strength)
    for wrong in (0, -0.1, 1.01, float("nan")):
        with pytest.raises(ConfigError, match=f"strength: came {wrong}, wanted above 0 and at most 1"):
            first_step(4, wrong)
    assert first_step(4, 1e-20) == 3
