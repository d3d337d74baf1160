import logging
from pathlib import Path

import numpy as np
import paddle
import PIL.Image
import pytest

from ppcoat.errors import ConfigError
from ppcoat.models.newbie.pipeline import PROMPT_PREFIX, NewbiePipeline

FOLDER = Path(__file__).parents[2] / "fixtures" / "tiny_newbie"
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def pipeline():
    pipeline = NewbiePipeline.from_pretrained(FOLDER, "float32")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def close(tensor, reference, tolerance=TOLERANCE):
    np.testing.assert_allclose(tensor.numpy(), reference, rtol=0, atol=tolerance)


def small(pipeline, prompt="1girl, solo", **options):
    options = {"num_inference_steps": 2, "height": 32, "width": 48, "output_type": "np", **options}
    return pipeline(prompt, **options).images


def test_prompt_prefix_is_that_of_the_base_model(texts):
    assert texts["prefix"] == PROMPT_PREFIX


def test_conditions_are_those_of_the_original_also_without_a_prompt(pipeline, refs, texts):
    conditions = pipeline.encode_prompt([texts["captions"][1], ""])  # "" gets no prefix
    np.testing.assert_array_equal(conditions["cap_mask"].numpy(), refs["sample_cap_mask"])
    mask = refs["sample_cap_mask"] == 1
    np.testing.assert_allclose(
        conditions["cap_feats"].numpy()[mask], refs["sample_cap_feats"][mask], rtol=0, atol=TOLERANCE
    )
    close(conditions["clip_text_pooled"], refs["sample_clip"])


@pytest.mark.parametrize(("solver", "name"), [("euler", "sample_euler"), ("midpoint", "sample_midpoint")])
def test_drawing_ends_where_the_original_ends(pipeline, refs, texts, solver, name):
    seen = []
    latents = pipeline(
        texts["captions"][1],
        num_inference_steps=len(refs[name]) - 1,
        guidance_scale=4.0,
        solver=solver,
        latents=paddle.to_tensor(refs["sample_z"]),
        output_type="latent",
        height=96,
        width=64,
        callback=lambda step, x: seen.append((step, x)),
    ).images
    close(latents, refs[name][-1:])
    assert [step for step, _ in seen] == list(range(len(refs[name]) - 1))
    close(seen[0][1], refs[name][1:2])


def test_latents_are_shifted_and_scaled_as_the_vae_says(pipeline, refs):
    close(pipeline.encode_image(paddle.to_tensor(refs["vae_pixels"])), refs["vae_latents"])
    close(pipeline.decode_latents(paddle.to_tensor(refs["vae_latents"])), refs["vae_decoded"])


def test_seed_decides_the_picture_alone_and_in_a_batch(pipeline):
    two = small(pipeline, seed=7, num_images_per_prompt=2)
    assert two.shape == (2, 32, 48, 3)
    np.testing.assert_allclose(small(pipeline, seed=8)[0], two[1], atol=1e-5)
    assert np.abs(two[0] - two[1]).max() > 1e-3


def test_pictures_of_one_prompt_stand_side_by_side(pipeline, texts):
    four = small(pipeline, texts["captions"][:2], num_images_per_prompt=2, seed=1)
    alone = small(pipeline, texts["captions"][1], seed=3)
    np.testing.assert_allclose(four[2], alone[0], atol=1e-5)


def test_pil_output(pipeline):
    (picture,) = small(pipeline, seed=0, output_type="pil")
    assert isinstance(picture, PIL.Image.Image) and picture.size == (48, 32)


def test_the_negative_prompt_counts(pipeline):
    plain, away = small(pipeline, seed=1), small(pipeline, seed=1, negative_prompt="stars")
    assert np.abs(plain - away).max() > 1e-4


def test_cut_captions_are_counted_in_a_warning(pipeline, texts, caplog):
    with caplog.at_level(logging.WARNING):
        pipeline.encode_prompt([texts["captions"][0], texts["trunc_caption"]])
        assert "1 of 2 captions are longer than 512 tokens" in caplog.text
        caplog.clear()
        pipeline.encode_prompt(texts["captions"])
        assert not caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 40}, "48x40: .* multiples of 16"),
        ({"output_type": "jpg"}, "'jpg'"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"solver": "heun"}, "'heun'"),
    ],
)
def test_mistakes_are_named(pipeline, options, message):
    with pytest.raises(ConfigError, match=message):
        small(pipeline, **options)


def test_half_precision_on_a_cpu_is_refused_before_anything_is_read():
    with pytest.raises(ConfigError, match="dtype bfloat16: Paddle computes in float32 only on a CPU"):
        NewbiePipeline.from_pretrained("nowhere", "bfloat16")
