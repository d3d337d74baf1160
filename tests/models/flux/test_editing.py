"""The pipelines that edit pictures against diffusers' own: latents step by step, velocities, pictures."""

import inspect
import json
from pathlib import Path

import numpy as np
import paddle
import ppdiffusers
import pytest
from PIL import Image

from ppcoat.errors import ConfigError
from ppcoat.models import writing
from ppcoat.models.flux import drawing, transformer
from ppcoat.models.flux.editing import (
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextPipeline,
)
from ppcoat.models.flux.files import FLUX_CLASSES
from ppcoat.models.flux.picture_inputs import fill_latents, picture_mask, picture_pixels, reference_ids
from ppcoat.models.flux.pipeline import FluxPipeline
from ppcoat.models.flux.registration import FLUX_PIPELINES, register
from ppcoat.models.loading import load_transformer
from ppcoat.models.pictures import latent_image_ids, pack_latents
from ppcoat.models.writing import class_that_draws

FIXTURES = Path(__file__).parents[2] / "fixtures"
LORA = FIXTURES / "adapters" / "split_diffusers.safetensors"
TOLERANCE = 2e-5
slow = pytest.mark.slow


def arrays(name, case):
    with np.load(FIXTURES / name) as found:
        return {key.removeprefix(f"{case}/"): found[key] for key in found.files if key.startswith(f"{case}/")}


@pytest.fixture(scope="module")
def made(pipeline):
    """made(class) -> that pipeline, with the parts of the shared one; FLUX.1 Fill has its own transformer."""
    fill = load_transformer(FIXTURES / "fill" / "transformer", "float32")

    def made(kind):
        own = {"transformer": fill} if kind is FluxFillPipeline else {}
        found = kind(**pipeline.components | own)
        found.set_progress_bar_config(disable=True)
        return found

    return made


@pytest.fixture
def torch_frequencies(monkeypatch):
    """Of the time's and the guidance's sinusoids as torch's exp on a CPU rounds them: number 12 is one digit
    higher than the nearest float32. FLUX.1 Fill's guidance of 30 makes 2e-5 of that in a velocity."""
    exponents = -np.log(10000.0) / 128 * np.arange(128, dtype="float32")
    frequencies = np.exp(exponents.astype("float32").astype("float64")).astype("float32")
    frequencies[12] = np.nextafter(frequencies[12], np.float32(1))

    def sinusoid(t):
        angles = t.astype("float32").unsqueeze(-1) * paddle.to_tensor(frequencies)
        return paddle.concat([angles.cos(), angles.sin()], axis=-1)

    monkeypatch.setattr(transformer, "sinusoid", sinusoid)


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)


def agrees(pipeline, refs, monkeypatch, **call):
    """Draw with diffusers' noise and hold every number that the fixture has to its own -> latents of each
    step."""
    noise = paddle.to_tensor(refs["noise"])
    if noise.ndim == 4:  # that of the random draw; else that of the call
        monkeypatch.setattr(drawing, "noise_of_seeds", lambda seeds, shape: noise.reshape([-1, *shape]))
    latents, velocities, times = [], [], []

    def keep(_, step, t, now):
        latents.append(now["latents"].numpy())
        times.append(t)

    layer = pipeline.transformer
    hook = layer.register_forward_post_hook(lambda _, given, out: velocities.append(out[0].numpy()))
    call = {"num_inference_steps": len(refs["timesteps"]), "guidance_scale": float(refs["guidance"]), **call}
    prompts = [str(prompt) for prompt in refs["prompts"]]
    picture = pipeline(prompt=prompts, output_type="np", callback_on_step_end=keep, **call).images
    hook.remove()
    np.testing.assert_allclose(pipeline.scheduler.sigmas.numpy(), refs["sigmas"], atol=1e-6)
    assert times[0] == pytest.approx(1000 * float(np.ravel(refs.get("first_t", 1.0))[0]), abs=1e-3)
    close(velocities[0][:, : noise.size // len(noise) // 64], refs["velocity_1"])
    close(latents[0], refs["latent_1"])
    close(latents[-1], refs["latent_final"])
    if len(latents) > 1:
        close(latents[1], refs["latent_2"])
    if "picture" in refs:
        close(picture, refs["picture"])
    return latents


@pytest.mark.parametrize("case", ["square", pytest.param("nonsquare", marks=slow), "resized", "true_cfg"])
def test_kontext_draws_after_a_reference_as_diffusers_does(made, monkeypatch, case):
    refs = arrays("kontext/sampling.npz", case)
    height, width = refs["size"].tolist()
    away = {"negative_prompt": "a dog in the rain", "true_cfg_scale": 3.0} if case == "true_cfg" else {}
    agrees(
        made(FluxKontextPipeline), refs, monkeypatch, image=Image.fromarray(refs["ref_picture"]),
        height=height, width=width, max_area=height * width, _auto_resize=False,
        max_sequence_length=int(refs["seq_len"]), latents=paddle.to_tensor(refs["noise"]), **away,
    )  # fmt: skip


@pytest.mark.parametrize("case", ["plain", pytest.param("batch", marks=slow), "full"])
def test_image_to_image_draws_as_diffusers_does(made, monkeypatch, case):
    refs = arrays("img2img/refs.npz", f"img2img/{case}")
    away = {"negative_prompt": "a dog", "true_cfg_scale": 2.0} if case == "full" else {}
    latents = agrees(made(FluxImg2ImgPipeline), refs, monkeypatch, **picture_of(refs, case), **away)
    assert len(latents) == len(refs["timesteps"]) - refs["begin"]


@pytest.mark.parametrize("case", ["plain", pytest.param("resized", marks=slow), "short"])
def test_inpainting_draws_as_diffusers_does(made, monkeypatch, case):
    refs = arrays("img2img/refs.npz", f"inpaint/{case}")
    agrees(made(FluxInpaintPipeline), refs, monkeypatch, **picture_of(refs, case))


@pytest.mark.parametrize("case", [pytest.param("square", marks=slow), "nonsquare", "strength"])
def test_fill_draws_as_diffusers_does(made, monkeypatch, torch_frequencies, case):
    refs, pipeline, seen = arrays("fill/sampling.npz", case), made(FluxFillPipeline), []
    hook = pipeline.transformer.register_forward_pre_hook(lambda _, given: seen.append(given[0].numpy()))
    latents = agrees(pipeline, refs, monkeypatch, **picture_of(refs, "plain" if case == "square" else case))
    hook.remove()
    close(seen[0][..., :64], refs["start"])
    close(seen[0][..., 64:128], refs["masked_latents"])
    np.testing.assert_array_equal(seen[0][..., 128:], refs["mask_packed"])
    assert len(latents) == refs["steps_run"]


def picture_of(refs, case):
    """The arguments of a case: its files, size, strength and tokens."""
    rows, columns = refs["noise"].shape[2:]
    rest = {"mask_image": Image.fromarray(refs["mask_in"])} if "mask_in" in refs else {}
    rest |= {"strength": float(refs["strength"]), "max_sequence_length": 24 if case == "plain" else 16}
    return {"image": Image.fromarray(refs["picture_in"]), "height": 8 * rows, "width": 8 * columns, **rest}


_TEXT = "prompt prompt_2 "
_GUIDED = _TEXT + "negative_prompt negative_prompt_2 true_cfg_scale "
_DRAWN = "num_inference_steps sigmas guidance_scale num_images_per_prompt generator latents prompt_embeds " \
    "pooled_prompt_embeds "  # fmt: skip
_AWAY = "negative_prompt_embeds negative_pooled_prompt_embeds "
_END = "output_type return_dict joint_attention_kwargs callback_on_step_end " \
    "callback_on_step_end_tensor_inputs max_sequence_length "  # fmt: skip
SIGNATURES = {  # of diffusers 0.42, without the pictures of an IP-Adapter
    FluxKontextPipeline: f"image {_GUIDED}height width {_DRAWN}{_AWAY}{_END}max_area _auto_resize",
    FluxImg2ImgPipeline: f"{_GUIDED}image height width strength {_DRAWN}{_AWAY}{_END}",
    FluxInpaintPipeline: f"{_GUIDED}image mask_image masked_image_latents height width padding_mask_crop "
    f"strength {_DRAWN}{_AWAY}{_END}",
    FluxFillPipeline: f"{_TEXT}image mask_image masked_image_latents height width strength {_DRAWN}{_END}",
}
DEFAULTS = {
    FluxKontextPipeline: (28, 3.5, None, True),
    FluxImg2ImgPipeline: (28, 7.0, 0.6, None),
    FluxInpaintPipeline: (28, 7.0, 0.6, None),
    FluxFillPipeline: (50, 30.0, 1.0, None),
}


@pytest.mark.parametrize("kind", SIGNATURES, ids=lambda kind: kind.__name__)
def test_calls_are_those_of_diffusers(kind):
    known = inspect.signature(kind.__call__).parameters
    wanted = SIGNATURES[kind].split()
    assert list(known)[1 : len(wanted) + 1] == wanted
    names = ("num_inference_steps", "guidance_scale", "strength", "_auto_resize")
    assert tuple(known[name].default if name in known else None for name in names) == DEFAULTS[kind]


def small(pipeline, **call):
    """Latents [B, tokens, 64] of a small drawing."""
    settings = {"num_inference_steps": 2, "height": 32, "width": 48, "max_sequence_length": 16, "seed": 3,
                "guidance_scale": 3.5, "output_type": "latent"}  # fmt: skip
    settings |= {"max_area": 32 * 48, "_auto_resize": False} if type(pipeline) is FluxKontextPipeline else {}
    return pipeline(**{"prompt": "a cat", **settings, **call}).images.numpy()


def picture(seed, height=32, width=48):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), "uint8"))


def mask(height=32, width=48):
    """Its right half is white."""
    marked = np.zeros([height, width], "uint8")
    marked[:, width // 2 :] = 255
    return Image.fromarray(marked)


EDITS = {  # what each needs beside the prompt
    FluxKontextPipeline: lambda seed: {"image": picture(seed)},
    FluxImg2ImgPipeline: lambda seed: {"image": picture(seed)},
    FluxInpaintPipeline: lambda seed: {"image": picture(seed), "mask_image": mask()},
    FluxFillPipeline: lambda seed: {"image": picture(seed), "mask_image": mask()},
}
EACH = pytest.mark.parametrize("kind", EDITS, ids=lambda kind: kind.__name__)


@EACH
def test_prompts_and_their_pictures_in_a_batch_are_those_alone(made, kind):
    pipeline = made(kind)
    images = EDITS[kind](1) | {"image": [picture(1), picture(2)]}
    both = small(pipeline, prompt=["a cat", "a dog"], num_images_per_prompt=2, **images)
    alone = small(pipeline, prompt="a dog", seed=5, **EDITS[kind](2))
    np.testing.assert_allclose(both[2:3], alone, atol=1e-5)
    assert np.abs(both[3:] - alone).max() > 1e-2 and both.shape == (4, 6, 64)


@EACH
def test_a_callback_sees_the_steps_and_ends_the_drawing(made, kind):
    seen = []

    def interrupt(pipe, step, t, now):
        seen.append((step, now["latents"].numpy()))
        pipe._interrupt = step == 1

    call = {"num_inference_steps": 4, **EDITS[kind](1)}
    latents = small(made(kind), callback_on_step_end=interrupt, **call)
    assert [step for step, _ in seen] == [0, 1]
    np.testing.assert_array_equal(latents, seen[1][1])


@pytest.mark.parametrize("kind", [FluxKontextPipeline, FluxImg2ImgPipeline, FluxInpaintPipeline])
def test_a_lora_takes_part_at_its_strength(made, kind):
    pipeline = made(kind)
    plain = small(pipeline, **EDITS[kind](1))
    pipeline.load_lora_weights(LORA)
    changed = small(pipeline, **EDITS[kind](1))
    off = small(pipeline, joint_attention_kwargs={"scale": 0.0}, **EDITS[kind](1))
    pipeline.unload_lora_weights()
    np.testing.assert_allclose(off, plain, atol=1e-5)
    assert np.abs(changed - plain).max() > 1e-3


def test_without_a_picture_to_begin_at_it_is_text_to_image(made, pipeline):
    wanted = small(made(FluxPipeline))
    np.testing.assert_array_equal(small(made(FluxKontextPipeline)), wanted)
    np.testing.assert_allclose(
        small(made(FluxImg2ImgPipeline), image=picture(1), strength=1), wanted, atol=1e-6
    )


def test_where_the_mask_is_black_the_picture_stays(made):
    pipeline = made(FluxInpaintPipeline)
    want = pack_latents(pipeline.image_latents(picture(1), 32, 48, 1)).numpy()
    found = small(pipeline, **EDITS[FluxInpaintPipeline](1)).reshape([2, 3, 64])
    np.testing.assert_array_equal(found[:, 0], want.reshape([2, 3, 64])[:, 0])
    assert np.abs(found[:, 2] - want.reshape([2, 3, 64])[:, 2]).max() > 0.1


def test_several_references_are_seen_after_the_noise_each_at_its_place(made):
    pipeline, seen = made(FluxKontextPipeline), []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda _, given, named: seen.append((given[0].numpy(), named["img_ids"].numpy())), with_kwargs=True
    )
    garment, pose = picture(1, 32, 32), picture(2, 50, 20)
    small(pipeline, prompt=["a cat", "a dog"], image=[[garment, pose]], num_inference_steps=1)
    small(
        pipeline, prompt=["a cat", "a dog"], image=[[garment, pose], [pose, garment]], num_inference_steps=1
    )
    hook.remove()
    ids = paddle.concat([latent_image_ids(2, 3), reference_ids([(2, 2), (3, 1)])])
    for tokens, where in seen:
        np.testing.assert_array_equal(where, ids.numpy())
        assert tokens.shape == (2, 6 + 4 + 3, 64)
    alone = [pack_latents(pipeline.image_latents(each, 16 * rows, 16 * columns, 1)).numpy()[0]
             for each, rows, columns in ((garment, 2, 2), (pose, 3, 1))]  # fmt: skip
    for row in seen[0][0]:
        np.testing.assert_allclose(row[6:], np.concatenate(alone), atol=1e-5)
    np.testing.assert_allclose(seen[1][0][0, 6:], np.concatenate(alone), atol=1e-5)
    assert np.abs(seen[1][0][1, 6:] - np.concatenate(alone)).max() > 0.1


def test_a_picture_in_each_of_its_forms(made):
    """Numbers of NumPy and Paddle, latents, masks with and without an axis of channels: as PIL's."""
    numbers, marked = np.asarray(picture(1), "float32") / 255, np.asarray(mask(), "float32") / 255
    pixels = paddle.to_tensor(numbers.transpose(2, 0, 1))[None]
    want = picture_pixels(picture(1), 32, 48).numpy()
    for form in ([picture(1)], numbers, numbers[None], pixels, pixels[0]):
        np.testing.assert_array_equal(picture_pixels(form, 32, 48).numpy(), want)
    tensor = paddle.to_tensor(marked)
    forms = (
        mask(),
        [mask()],
        marked,
        marked[None],
        marked[..., None],
        tensor,
        tensor[None],
        tensor[None, None],
    )
    for form in forms:
        np.testing.assert_array_equal(picture_mask(form, 32, 48).numpy(), marked[None, None])
    latents = made(FluxImg2ImgPipeline).image_latents(picture(1), 32, 48, 1)
    for kind in (FluxKontextPipeline, FluxImg2ImgPipeline):
        one, other = (small(made(kind), num_inference_steps=1, image=each) for each in (picture(1), latents))
        np.testing.assert_array_equal(one, other)
    pipeline = made(FluxFillPipeline)
    want = small(pipeline, num_inference_steps=1, **EDITS[FluxFillPipeline](1))
    holed = pipeline.encode_image((2 * pixels - 1) * (1 - tensor))
    given = pack_latents(fill_latents(holed, tensor[None, None]))
    np.testing.assert_array_equal(small(pipeline, num_inference_steps=1, masked_image_latents=given), want)


def test_begun_latents_are_taken_as_diffusers_takes_them(made):
    """Packed they are where image-to-image begins; unpacked, inpainting's noise and its beginning."""
    latents = paddle.rand([1, 16, 4, 6])
    call = {"num_inference_steps": 4, "strength": 0.5}
    pipeline = made(FluxImg2ImgPipeline)
    one, other = (small(pipeline, image=picture(i), latents=pack_latents(latents), **call) for i in (1, 2))
    np.testing.assert_array_equal(one, other)
    whole = {"mask_image": Image.new("L", (48, 32), 255), "latents": latents}
    found = small(made(FluxInpaintPipeline), image=picture(2), **whole, **call)
    np.testing.assert_array_equal(found, one)


@pytest.mark.parametrize(
    ("kind", "call", "message"),
    [
        (FluxImg2ImgPipeline, {"image": None}, "no image: FluxImg2ImgPipeline begins at one"),
        (FluxImg2ImgPipeline, {"strength": 0}, "strength: came 0, wanted above 0 and at most 1"),
        (FluxImg2ImgPipeline, {"image": "a.png"}, "image: came str, wanted PIL pictures"),
        (FluxImg2ImgPipeline, {"image": [picture(1)] * 3}, "image: came 3 pictures for 1 to draw"),
        (FluxImg2ImgPipeline, {"image": np.zeros([32, 32, 3], "float32")}, r"image: came \[32, 32, 3\]"),
        (FluxInpaintPipeline, {"mask_image": None}, "no mask_image: give one that is white"),
        (FluxInpaintPipeline, {"mask_image": "m.png"}, "mask_image: came str, wanted PIL pictures"),
        (FluxInpaintPipeline, {"padding_mask_crop": 8}, "padding_mask_crop is not done here"),
        (FluxInpaintPipeline, {"masked_image_latents": paddle.ones([1])}, "only FLUX.1 Fill sees them"),
        (FluxFillPipeline, {"image": None}, "FLUX.1 Fill fills a hole in a picture: give image"),
        (FluxFillPipeline, {"mask_image": None}, "FLUX.1 Fill draws what a mask marks: give mask_image"),
        (FluxFillPipeline, {"strength": 1.5}, "strength: came 1.5"),
        (FluxFillPipeline, {"height": 40}, "48x40.*multiples of 16"),
        (FluxKontextPipeline, {"image": picture(1, 12, 99)}, "a reference of 99x12: wanted at least"),
        (FluxKontextPipeline, {"image": [[picture(1)], []]}, "image: a list of lists is wanted"),
        (FluxKontextPipeline, {"image": "a.png"}, "image: came str, wanted a PIL picture"),
        (FluxKontextPipeline, {"callback_on_step_end_tensor_inputs": ["x"]}, r"callback tensors \['x'\]"),
    ],
)  # fmt: skip
def test_mistakes_are_named(made, kind, call, message):
    with pytest.raises(ConfigError, match=message):
        small(made(kind), **{**EDITS[kind](1), **call})


def test_a_transformer_of_another_kind_is_named(made, pipeline):
    fill = made(FluxFillPipeline)
    with pytest.raises(
        ConfigError, match="takes 64 inputs a token, and FluxFillPipeline draws with 384: load"
    ):
        small(FluxFillPipeline(**pipeline.components), **EDITS[FluxFillPipeline](1))
    for kind in (FluxPipeline, FluxKontextPipeline, FluxInpaintPipeline):
        wrong = kind(**pipeline.components | {"transformer": fill.transformer})
        with pytest.raises(ConfigError, match=f"takes 384 inputs a token, and {kind.__name__} draws with 64"):
            small(wrong, **EDITS.get(kind, lambda seed: {})(1))


def test_image_to_image_after_a_control_picture(made):
    pipeline, plain = made(FluxImg2ImgPipeline), made(FluxPipeline)
    pipeline.load_lora_weights(FIXTURES / "adapters" / "control_diffusers.safetensors")
    wanted = small(plain, control_image=picture(2))
    np.testing.assert_allclose(
        small(pipeline, image=picture(1), strength=1, control_image=picture(2)), wanted, atol=1e-5
    )
    pipeline.unload_lora_weights()


def test_a_folder_is_loaded_and_saved_as_the_pipeline_that_it_names(fp32_folder, tmp_path):
    register()
    assert set(FLUX_PIPELINES) == set(FLUX_CLASSES)
    parts = dict.fromkeys(
        ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer")
    )
    for part in fp32_folder.iterdir():
        if part.is_dir():
            (tmp_path / part.name).symlink_to(part)
    index = json.loads((fp32_folder / "model_index.json").read_text())
    for name, (_, kind) in FLUX_PIPELINES.items():
        (tmp_path / "model_index.json").write_text(json.dumps(index | {"_class_name": name}))
        loaded = ppdiffusers.DiffusionPipeline.from_pretrained(tmp_path, **parts)
        assert type(loaded) is getattr(ppdiffusers, kind) and type(loaded).__name__ == kind


def test_what_is_saved_names_the_pipeline_that_draws_with_it(made, pipeline, monkeypatch, tmp_path):
    fill, plain = made(FluxFillPipeline).transformer, pipeline.transformer
    assert {class_that_draws(fill, name) for name in FLUX_CLASSES} == {"FluxFillPipeline"}
    named = {name: class_that_draws(plain, name) for name in (*FLUX_CLASSES, "Other")}
    other = {"FluxFillPipeline", "FluxControlPipeline", "Other"}  # which this transformer is not for
    assert named == {name: "FluxPipeline" if name in other else name for name in named}
    monkeypatch.setattr(writing, "save_component", lambda *_: None)
    made(FluxKontextPipeline).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "FluxKontextPipeline"
