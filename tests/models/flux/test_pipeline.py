import json
from pathlib import Path

import numpy as np
import paddle
import PIL.Image
import ppdiffusers
import pytest
from safetensors import safe_open

from ppcoat.errors import ConfigError
from ppcoat.models import writing
from ppcoat.models.flux.pipeline import FluxPipeline
from ppcoat.models.flux.prompt_encoding import LETTERS_OF_A_TOKEN, _token_ids
from ppcoat.models.flux.registration import register
from ppcoat.models.flux.scheduler import FlowMatchEulerDiscreteScheduler
from ppcoat.models.flux.transformer import FluxTransformer2DModel
from ppcoat.models.loading import load_transformer
from ppcoat.models.pictures import latent_image_ids, pack_latents, unpack_latents
from ppcoat.nn.convert import quantize_linears, replace_linear_with_fp8

TOLERANCE = 2e-5


def draw(pipeline, refs, steps, output_type):
    return pipeline(
        [str(prompt) for prompt in refs["prompts"]],
        height=64,
        width=64,
        num_inference_steps=steps,
        guidance_scale=3.5,
        max_sequence_length=64,
        latents=paddle.to_tensor(refs["pipe_lat"]),
        output_type=output_type,
    ).images


def test_prompt_embeddings_are_those_of_diffusers(pipeline, torch_refs):
    prompts = [str(prompt) for prompt in torch_refs["prompts"]]
    embeds, pooled, ids = pipeline.encode_prompt(prompts, max_sequence_length=64)
    np.testing.assert_allclose(embeds.numpy(), torch_refs["pipe_prompt_embeds"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(pooled.numpy(), torch_refs["pipe_pooled"], rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(ids.numpy(), torch_refs["pipe_text_ids"])


@pytest.mark.parametrize("prompt", ["a hat, " * 9000, " " * 60_000 + "a hat", "hats" * 9000])
def test_a_long_prompt_gives_its_own_first_tokens_for_little_work(pipeline, prompt):
    given = []

    def tokenizer(texts, **settings):
        given.extend(texts)
        return pipeline.tokenizer_2(texts, **settings)

    wanted = pipeline.tokenizer_2(prompt, padding="max_length", max_length=8, truncation=True)["input_ids"]
    assert _token_ids(tokenizer, [prompt], 8).tolist() == [wanted]
    assert len("".join(given[0].split())) <= 2 * 8 * LETTERS_OF_A_TOKEN


@pytest.mark.parametrize("limit", ["argument", "tokenizer"])
def test_a_prompt_that_is_cut_is_told(pipeline, recwarn, monkeypatch, limit):
    long = "a cat in the hat on a mat"
    wanted = len(pipeline.tokenizer_2(long)["input_ids"])

    def encode(prompts, length):
        if limit == "tokenizer":
            monkeypatch.setattr(pipeline.tokenizer_2, "model_max_length", length)
        pipeline.encode_prompt(prompts, max_sequence_length=length if limit == "argument" else None)
        return [str(warning.message) for warning in recwarn if "T5 tokens" in str(warning.message)]

    assert encode(long, wanted) == []
    assert encode(["a cat", long], 6) == [f"a prompt of {wanted} T5 tokens is cut to 6"]


@pytest.mark.parametrize("steps", [1, 4])
def test_latents_are_those_of_diffusers(pipeline, torch_refs, steps):
    latents = draw(pipeline, torch_refs, steps, "latent").numpy()
    np.testing.assert_allclose(latents, torch_refs[f"pipe_latent_{steps}"], rtol=0, atol=TOLERANCE)


def test_picture_is_that_of_diffusers(pipeline, torch_refs):
    picture = draw(pipeline, torch_refs, 4, "np")
    np.testing.assert_allclose(picture, torch_refs["pipe_img_4"], rtol=0, atol=TOLERANCE)


def test_bf16_folder_draws_the_picture_within_rounding(bf16_folder, torch_refs):
    pipeline = FluxPipeline.from_pretrained(bf16_folder)
    pipeline.set_progress_bar_config(disable=True)
    difference = np.abs(draw(pipeline, torch_refs, 4, "np") - torch_refs["pipe_img_4"]).max()
    assert 1e-5 < difference < 0.02  # pictures are 0..1, a bfloat16 weight is exact to 2^-9


def small(pipeline, **kwargs):
    options = dict(num_inference_steps=2, height=32, width=48, max_sequence_length=16, output_type="np")
    return pipeline(**{"prompt": "a cat", **options, **kwargs}).images


def test_seed_decides_the_picture_alone_and_in_a_batch(pipeline):
    three = small(pipeline, seed=7, num_images_per_prompt=3)
    assert three.shape == (3, 32, 48, 3)
    np.testing.assert_array_equal(small(pipeline, seed=7, num_images_per_prompt=3), three)
    np.testing.assert_allclose(small(pipeline, seed=8)[0], three[1], atol=1e-5)
    assert np.abs(three[0] - three[1]).max() > 1e-3


def noise(pipeline, batch=1, **kwargs):
    """The latents after one step, which differ where the noise does: [batch, tokens, channels]."""
    kwargs = {"num_inference_steps": 1, "output_type": "latent", "num_images_per_prompt": batch, **kwargs}
    return small(pipeline, **kwargs).numpy()


MADE = {  # how users of NumPy, Paddle, ppdiffusers and diffusers say a seed
    "numpy": lambda: np.random.default_rng(3),
    "paddle": lambda: paddle.framework.core.Generator().manual_seed(3),
    "ppdiffusers": lambda: paddle.Generator().manual_seed(3),
    "list of one": lambda: [np.random.default_rng(3)],
    "paddle.seed": lambda: paddle.seed(3) and None,
}


@pytest.mark.parametrize("make", MADE.values(), ids=list(MADE))
def test_a_generator_is_followed(pipeline, make):
    generator = make()
    first, second = noise(pipeline, generator=generator), noise(pipeline, generator=generator)
    np.testing.assert_array_equal(noise(pipeline, generator=make()), first)
    assert np.abs(second - first).max() > 1e-3


def test_an_int_is_a_seed_and_of_a_list_each_is_a_pictures(pipeline):
    one, other = noise(pipeline, seed=4), noise(pipeline, seed=9)
    for given in ({"generator": 4}, {"generator": np.int64(4)}, {"seed": np.int64(4)}):
        np.testing.assert_array_equal(noise(pipeline, **given), one)
    both = noise(pipeline, 2, generator=[4, 9])
    np.testing.assert_allclose(both, np.concatenate([one, other]), atol=1e-5)
    drawn = [np.random.default_rng(i).integers(2**63) for i in (1, 2)]
    apart = noise(pipeline, 2, generator=[np.random.default_rng(i) for i in (1, 2)])
    np.testing.assert_allclose(apart, noise(pipeline, 2, generator=drawn), atol=1e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seed": -1}, "seed: came -1, wanted a whole number from 0, or None for any"),
        ({"generator": [1, 2, 3]}, "generator: came 3 for 1 pictures, wanted one or one each"),
        ({"generator": "1700000000.5"}, "generator: came '1700000000.5', wanted an int"),
        ({"generator": object()}, "generator: came <object object"),
    ],
)
def test_a_seed_that_is_none_is_refused(pipeline, given, message):
    with pytest.raises(ConfigError, match=message):
        noise(pipeline, **given)


def test_pictures_of_one_prompt_stand_side_by_side(pipeline):
    both = small(pipeline, prompt=["a cat", "fox"], num_images_per_prompt=2, seed=1)
    fox = small(pipeline, prompt="fox", seed=3)
    np.testing.assert_allclose(both[2], fox[0], atol=1e-5)


@pytest.mark.parametrize("negative", ["stars", ["stars", "noise"]])
def test_true_guidance_leads_away_from_the_negative_prompt(pipeline, negative):
    """One Euler step is a line in the velocity, so the guided latents lie on the line through the two others:
    negative + scale * (positive - negative)."""
    prompts = ["a red hat", "a blue hat"]
    settings = {"num_inference_steps": 1, "seed": 5, "output_type": "latent", "max_sequence_length": 16,
                "height": 64, "width": 64}  # fmt: skip
    away = [negative, negative] if isinstance(negative, str) else negative
    one, other = (pipeline(text, **settings).images.numpy() for text in (prompts, away))
    guided = pipeline(prompts, negative_prompt=negative, true_cfg_scale=3.0, **settings).images.numpy()
    np.testing.assert_allclose(guided, other + 3.0 * (one - other), rtol=0, atol=TOLERANCE)
    assert np.abs(one - other).max() > 1e-3
    unguided = pipeline(prompts, negative_prompt=negative, true_cfg_scale=1.0, **settings).images.numpy()
    np.testing.assert_array_equal(unguided, one)


def test_without_a_negative_prompt_there_is_no_guidance_as_in_diffusers(pipeline):
    plain = noise(pipeline, seed=1)
    with pytest.warns(UserWarning, match="true_cfg_scale: no effect without a negative_prompt"):
        unguided = noise(pipeline, seed=1, negative_prompt=None, true_cfg_scale=3.0)
    np.testing.assert_array_equal(unguided, plain)
    assert np.abs(noise(pipeline, seed=1, negative_prompt="", true_cfg_scale=3.0) - plain).max() > 1e-3


def test_negative_embeddings_and_a_second_negative_prompt(pipeline):
    embeds, pooled, _ = pipeline.encode_prompt("stars", "noise", max_sequence_length=16)
    given = {"negative_prompt_embeds": embeds, "negative_pooled_prompt_embeds": pooled}
    wanted = noise(
        pipeline, 2, seed=1, negative_prompt="stars", negative_prompt_2="noise", true_cfg_scale=3.0
    )
    np.testing.assert_array_equal(noise(pipeline, 2, seed=1, **given, true_cfg_scale=3.0), wanted)
    assert (
        np.abs(noise(pipeline, 2, seed=1, negative_prompt="stars", true_cfg_scale=3.0) - wanted).max() > 1e-4
    )


def test_pil_output_and_default_size(pipeline):
    (picture,) = pipeline("a cat", num_inference_steps=1, seed=0, max_sequence_length=16).images
    assert isinstance(picture, PIL.Image.Image)
    assert picture.size == (64, 64)


def test_given_embeddings_replace_the_prompt(pipeline):
    embeds, pooled, _ = pipeline.encode_prompt("a cat", max_sequence_length=16)
    given = small(pipeline, prompt=None, prompt_embeds=embeds, pooled_prompt_embeds=pooled, seed=1)
    np.testing.assert_array_equal(given, small(pipeline, seed=1))


def test_callback_sees_and_changes_latents(pipeline):
    seen = []

    def callback(pipe, step, t, tensors):
        seen.append((step, t, list(tensors)))
        return {"latents": paddle.zeros_like(tensors["latents"])}

    latents = small(pipeline, seed=1, output_type="latent", callback_on_step_end=callback)
    assert [step for step, _, _ in seen] == [0, 1]
    assert seen[0][1] == 1000 and seen[1][1] < 1000 and seen[0][2] == ["latents"]
    assert float(latents.abs().max()) == 0


def test_a_callback_ends_the_drawing(pipeline):
    seen = []

    def interrupt(pipe, step, t, tensors):
        seen.append(tensors["latents"].numpy())
        pipe._interrupt = step == 1

    two = small(pipeline, seed=1, num_inference_steps=4, output_type="latent", callback_on_step_end=interrupt)
    assert len(seen) == 2
    np.testing.assert_array_equal(two.numpy(), seen[1])
    seen.clear()
    small(pipeline, seed=1, callback_on_step_end=lambda *given: seen.append(given))
    assert len(seen) == 2  # the next drawing is whole again


def test_the_older_name_of_joint_attention_kwargs(pipeline):
    with pytest.raises(ConfigError, match="gligen"):
        noise(pipeline, cross_attention_kwargs={"gligen": 1})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"height": 40}, "48x40.*multiples of 16"),
        ({"output_type": "pt"}, "'pt'"),
        ({"prompt": None}, "no prompt"),
        ({"prompt_2": ["a", "b"]}, "1 prompts, 2"),
        ({"max_sequence_length": 513}, "513"),
        ({"num_inference_steps": 0}, "at least 1"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "noise"),
        ({"joint_attention_kwargs": {"gligen": 1}}, "gligen"),
        ({"prompt": None, "prompt_embeds": paddle.zeros([1, 4, 48])}, "belong together"),
    ],
)
def test_mistakes_are_named(pipeline, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        small(pipeline, **kwargs)


def test_packing_is_that_of_flux():
    latents = paddle.arange(2 * 3 * 4 * 6, dtype="float32").reshape([2, 3, 4, 6])
    tokens = pack_latents(latents).numpy()
    # Token (row 1, column 2) holds the 2x2 patch there, channel by channel.
    wanted = latents.numpy()[1, :, 2:4, 4:6].reshape(-1)
    np.testing.assert_array_equal(tokens[1, 1 * 3 + 2], wanted)
    np.testing.assert_array_equal(unpack_latents(paddle.to_tensor(tokens), 2, 3).numpy(), latents.numpy())


def test_image_ids_count_rows_and_columns(torch_refs):
    np.testing.assert_array_equal(latent_image_ids(4, 4).numpy(), torch_refs["tr_img_ids"])
    np.testing.assert_array_equal(latent_image_ids(2, 3).numpy()[4], [0, 1, 1])


def test_encode_image_shifts_and_scales(pipeline, torch_refs):
    latents = pipeline.encode_image(paddle.to_tensor(torch_refs["vae_in"])).numpy()
    np.testing.assert_allclose(latents, (torch_refs["vae_mean"] - 0.1159) * 0.3611, rtol=0, atol=TOLERANCE)
    pixels = pipeline.decode_latents(paddle.to_tensor((torch_refs["vae_z"] - 0.1159) * 0.3611)).numpy()
    np.testing.assert_allclose(pixels, torch_refs["vae_dec"], rtol=0, atol=TOLERANCE)


@pytest.fixture
def exchanged(pipeline):
    """The shared pipeline, whose scheduler a test may exchange."""
    before = pipeline.scheduler
    yield pipeline
    pipeline.scheduler = before


@pytest.mark.parametrize(
    "program", [ppdiffusers.FlowMatchEulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler]
)
def test_an_exchanged_scheduler_draws_as_its_config_says(exchanged, program):
    wanted = small(exchanged, seed=1, output_type="latent").numpy()
    exchanged.scheduler = program.from_config(exchanged.scheduler.config)
    assert exchanged.scheduler.config.use_dynamic_shifting is True
    np.testing.assert_array_equal(small(exchanged, seed=1, output_type="latent").numpy(), wanted)
    exchanged.scheduler = program(shift=9.0)
    assert np.abs(small(exchanged, seed=1, output_type="latent").numpy() - wanted).max() > 1e-3


def test_a_pipeline_takes_the_same_schedulers(pipeline):
    foreign = ppdiffusers.FlowMatchEulerDiscreteScheduler.from_config(dict(pipeline.scheduler.config))
    replaced = FluxPipeline(**{**pipeline.components, "scheduler": foreign}).scheduler
    assert isinstance(replaced, FlowMatchEulerDiscreteScheduler)
    assert replaced.config.use_dynamic_shifting is True


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "DDIMScheduler"])
def test_a_scheduler_of_another_kind_is_refused_and_nothing_changes(exchanged, name):
    before = exchanged.scheduler
    with pytest.raises(
        ConfigError, match=f"came {name}, which is not of flow matching; FLUX is drawn with Flow"
    ):
        exchanged.scheduler = getattr(ppdiffusers, name)()
    assert exchanged.scheduler is before


@pytest.mark.parametrize(
    "options",
    [
        {
            "map_location": "cpu",
            "low_cpu_mem_usage": True,
            "use_safetensors": True,
            "paddle_dtype": "float32",
        },
        {"local_files_only": True, "cache_dir": "x", "torch_dtype": "torch.float32", "revision": "main"},
        {"device_map": None, "image_encoder": None, "from_diffusers": True, "variant": None},
    ],
)
def test_options_of_diffusers_and_ppdiffusers_that_ask_for_nothing_more(fp32_folder, options):
    parts = {name: None for name in ("vae", "text_encoder", "text_encoder_2", "transformer")}
    pipeline = FluxPipeline.from_pretrained(fp32_folder, **options, **parts)
    assert pipeline.tokenizer is not None and pipeline.transformer is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_safetensors": False}, "only safetensors are read; leave it out"),
        ({"device_map": "balanced"}, r"device_map=...\) is not done here: call paddle.set_device"),
        ({"quantization_config": object()}, "give quantize='fp4'"),
        (
            {"map_locaton": "cpu"},
            "unknown option of from_pretrained 'map_locaton', the nearest is 'map_location'",
        ),
        ({"torch_dtype": "bf16"}, "dtype: came 'bf16'"),
    ],
)
def test_options_that_ask_for_something_else_are_refused(options, message):
    for load in (FluxPipeline.from_pretrained, FluxTransformer2DModel.from_pretrained):
        with pytest.raises(ConfigError, match=message):
            load("nowhere", **options)


def test_encoding_and_drawing_in_two_pipelines(fp32_folder, pipeline):
    """The way of diffusers' page to need less memory: None leaves a part out."""
    encoders = FluxPipeline.from_pretrained(fp32_folder, transformer=None, vae=None)
    encoded = encoders.encode_prompt(prompt="a cat", prompt_2=None, device="cpu", max_sequence_length=16)
    names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae")
    drawer = FluxPipeline.from_pretrained(fp32_folder, **dict.fromkeys(names))
    embeds = dict(zip(("prompt_embeds", "pooled_prompt_embeds"), encoded, strict=False))
    np.testing.assert_array_equal(noise(drawer, prompt=None, seed=1, **embeds), noise(pipeline, seed=1))
    assert drawer.vae_scale_factor == pipeline.vae_scale_factor == 8
    for pipe, options, absent in (
        (encoders, {}, "without transformer cannot draw"),
        (drawer, {"output_type": "np"}, "without vae cannot draw"),
        (drawer, {}, "without text_encoder cannot encode a prompt"),
    ):
        with pytest.raises(ConfigError, match=absent):
            noise(pipe, seed=1, **options)


def test_a_part_that_is_given_need_not_be_in_the_folder(pipeline, fp32_folder, tmp_path):
    for part in ("tokenizer", "tokenizer_2", "scheduler", "vae"):
        (tmp_path / part).symlink_to(fp32_folder / part)
    (tmp_path / "model_index.json").symlink_to(fp32_folder / "model_index.json")
    given = {name: getattr(pipeline, name) for name in ("transformer", "text_encoder", "text_encoder_2")}
    again = FluxPipeline.from_pretrained(tmp_path, **given)
    assert again.transformer is pipeline.transformer and again.vae is not pipeline.vae


def test_a_pipeline_is_moved_and_cast(pipeline, fp32_folder):
    assert pipeline.to("cpu") is pipeline.to(paddle.float32) is pipeline.to(device="cpu", dtype="float32")
    assert (pipeline.dtype, str(pipeline.device)) == (paddle.float32, "Place(cpu)")
    refused = {
        "cuda": "came gpu, but Paddle sees 0 GPUs",
        paddle.bfloat16: "bfloat16: Paddle",
        "tpu": "came 'tpu'",
    }
    for where, message in refused.items():
        with pytest.raises(ConfigError, match=message):
            pipeline.to(where)


def test_fp8_weights_are_not_cast(fp32_folder, pipeline, monkeypatch):
    transformer = load_transformer(fp32_folder / "transformer", "float32")
    quantize_linears(transformer)
    fp8 = FluxPipeline(**{**pipeline.components, "transformer": transformer})
    assert fp8.to("cpu") is fp8
    with pytest.raises(
        ConfigError, match="quantised weights are not cast to float32; load the model in that dtype"
    ):
        fp8.to("float32")


def test_sliced_decoding_gives_the_same_pictures(pipeline):
    whole = small(pipeline, seed=1, num_images_per_prompt=2)
    pipeline.enable_vae_slicing()
    seen = []
    hook = pipeline.vae.decoder.register_forward_pre_hook(lambda layer, given: seen.append(given[0].shape[0]))
    sliced = small(pipeline, seed=1, num_images_per_prompt=2)
    hook.remove()
    pipeline.disable_vae_slicing()
    assert seen == [1, 1]
    np.testing.assert_allclose(sliced, whole, atol=1e-5)


def json_of(file):
    return json.loads(file.read_text())


def tensors_of(file):
    with safe_open(str(file), framework="np") as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}, tensors.metadata()  # noqa: SIM118


WEIGHT_FILES = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
}


def test_saved_folder_is_the_one_that_diffusers_wrote(pipeline, fp32_folder, tmp_path):
    pipeline.save_pretrained(tmp_path)
    for part, name in WEIGHT_FILES.items():
        saved, metadata = tensors_of(tmp_path / part / name)
        original, _ = tensors_of(fp32_folder / part / name)
        assert metadata == {"format": "pt"}
        assert saved.keys() == original.keys()
        for key, tensor in original.items():
            np.testing.assert_array_equal(saved[key], tensor, err_msg=key)
        assert json_of(tmp_path / part / "config.json") == json_of(fp32_folder / part / "config.json")
    assert json_of(tmp_path / "model_index.json") == json_of(fp32_folder / "model_index.json")
    for part in ("tokenizer", "tokenizer_2"):
        assert {f.name: f.read_bytes() for f in (tmp_path / part).iterdir()} == {
            f.name: f.read_bytes() for f in (fp32_folder / part).iterdir()
        }
    scheduler = json.loads((tmp_path / "scheduler/scheduler_config.json").read_text())
    assert (
        scheduler.items() >= json.loads((fp32_folder / "scheduler/scheduler_config.json").read_text()).items()
    )


def test_half_precision_shards_load_again(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "SHARD_BYTES", 300_000)
    pipeline.save_pretrained(tmp_path, dtype="bfloat16")
    assert len(list((tmp_path / "transformer").glob("*-of-*.safetensors"))) > 2
    assert json.loads((tmp_path / "text_encoder/config.json").read_text())["torch_dtype"] == "bfloat16"
    again = FluxPipeline.from_pretrained(tmp_path).transformer.state_dict()
    for name, tensor in pipeline.transformer.state_dict().items():
        rounded = tensor.astype("bfloat16").astype("float32").numpy()
        np.testing.assert_array_equal(again[name].numpy(), rounded, err_msg=name)


@pytest.mark.parametrize("kind", ["of a pipeline", "of other things", "where we stand"])
def test_a_folder_of_an_earlier_pipeline_is_replaced_and_what_is_beside_stays(
    pipeline, tmp_path, monkeypatch, kind
):
    folder = tmp_path / "model"
    for part in ("transformer", "tokenizer"):
        (folder / part).mkdir(parents=True)
    for name in ("README.md", "transformer/diffusion_pytorch_model-00001-of-00002.safetensors"):
        (folder / name).write_text("of an earlier model")
    words = Path(pipeline.tokenizer.init_kwargs["name_or_path"])
    for file in words.iterdir():
        (folder / "tokenizer" / file.name).write_bytes(file.read_bytes())
    monkeypatch.setitem(pipeline.tokenizer.init_kwargs, "name_or_path", str(folder / "tokenizer"))
    if kind != "of other things":
        (folder / "model_index.json").write_text("{}")
    if kind == "where we stand":
        monkeypatch.chdir(folder)
    before = folder.stat().st_ino
    pipeline.save_pretrained("." if kind == "where we stand" else folder)
    assert (folder.stat().st_ino != before) is (kind == "of a pipeline")
    assert (folder / "README.md").read_text() == "of an earlier model"
    found = [file.name for file in (folder / "transformer").iterdir()]
    assert sorted(found) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert {file.name for file in (folder / "tokenizer").iterdir()} == {file.name for file in words.iterdir()}


def test_a_new_folder_is_there_whole_or_not_at_all(pipeline, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "write_json", full)
    with pytest.raises(OSError, match="No space"):
        pipeline.save_pretrained(tmp_path / "a" / "model")
    assert list((tmp_path / "a").iterdir()) == []


def test_a_folder_where_a_disk_is_mounted_is_filled_in_place(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr("os.path.ismount", lambda path: True)
    before = tmp_path.stat().st_ino
    pipeline.save_pretrained(tmp_path)
    assert tmp_path.stat().st_ino == before and (tmp_path / "model_index.json").exists()


def test_encoders_made_in_memory_get_transformers_keys(pipeline, fp32_folder, tmp_path, monkeypatch):
    for part in ("text_encoder", "text_encoder_2"):
        encoder = getattr(pipeline, part)
        monkeypatch.delattr(encoder, "source_config")
        writing.save_text_encoder(encoder, tmp_path / part)
        wanted, saved = json_of(fp32_folder / part / "config.json"), json_of(tmp_path / part / "config.json")
        assert saved.items() <= wanted.items()
        assert {"architectures", "model_type", "vocab_size", "torch_dtype"} <= saved.keys()


def test_a_model_with_an_adapter_is_not_saved(pipeline, tmp_path):
    layer = pipeline.transformer.proj_out
    layer.scale_multiplier = 1.0
    with pytest.raises(ConfigError, match="proj_out carries an adapter"):
        pipeline.save_pretrained(tmp_path)
    del layer.scale_multiplier


def test_diffusion_pipeline_loads_a_flux_folder(fp32_folder, torch_refs):
    register()
    once = ppdiffusers.DiffusionPipeline.from_pretrained.__func__
    register()
    assert ppdiffusers.DiffusionPipeline.from_pretrained.__func__ is once
    assert hasattr(ppdiffusers, "FluxPipeline") and hasattr(ppdiffusers, "FluxTransformer2DModel")
    pipeline = ppdiffusers.DiffusionPipeline.from_pretrained(str(fp32_folder))
    assert isinstance(pipeline, FluxPipeline)
    with pytest.raises(ConfigError, match="custom_pipeline"):
        ppdiffusers.DiffusionPipeline.from_pretrained(fp32_folder, custom_pipeline="x")


def test_diffusion_pipeline_still_loads_others(tmp_path):
    register()
    (tmp_path / "model_index.json").write_text('{"_class_name": "NoSuchPipeline"}')
    with pytest.raises(AttributeError, match="NoSuchPipeline"):
        ppdiffusers.DiffusionPipeline.from_pretrained(tmp_path)


def test_frozen_layers_of_training_are_saved_like_linears(fp32_folder, tmp_path):
    model = load_transformer(fp32_folder / "transformer", "float32")
    for parameter in model.parameters():
        parameter.stop_gradient = True
    writing.save_diffusers_model(replace_linear_with_fp8(model), tmp_path)
    saved, _ = tensors_of(tmp_path / WEIGHT_FILES["transformer"])
    original, _ = tensors_of(fp32_folder / "transformer" / WEIGHT_FILES["transformer"])
    for key, tensor in original.items():
        np.testing.assert_array_equal(saved[key], tensor, err_msg=key)


@pytest.mark.parametrize("dtype", ["bfloat16", paddle.float16])
def test_half_precision_on_a_cpu_is_refused_before_anything_is_read(dtype):
    with pytest.raises(
        ConfigError, match="float32 only on a CPU; use float32 or auto, or leave it out"
    ) as said:
        FluxPipeline.from_pretrained("nowhere", dtype)
    assert "\n" not in str(said.value)


def test_an_unknown_dtype_is_named(fp32_folder):
    with pytest.raises(
        ConfigError, match="^dtype: came 'bf16', wanted one of auto, float32, bfloat16, float16$"
    ):
        FluxPipeline.from_pretrained(fp32_folder, "bf16")
