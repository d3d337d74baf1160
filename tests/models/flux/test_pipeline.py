import json

import numpy as np
import paddle
import PIL.Image
import ppdiffusers
import pytest
from safetensors import safe_open

from ppcoat.errors import ConfigError
from ppcoat.models import writing
from ppcoat.models.flux.pipeline import FluxPipeline
from ppcoat.models.flux.registration import register
from ppcoat.models.flux.scheduler import FlowMatchEulerDiscreteScheduler
from ppcoat.models.loading import load_transformer
from ppcoat.models.pictures import latent_image_ids, pack_latents, unpack_latents
from ppcoat.nn.convert import replace_linear_with_fp8

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


def test_generators_of_numpy_and_paddle_are_followed(pipeline):
    def numpy_generator():
        return np.random.default_rng(3)

    def paddle_generator():
        return paddle.framework.core.Generator().manual_seed(3)

    for make in (numpy_generator, paddle_generator):
        generator = make()
        first, second = small(pipeline, generator=generator), small(pipeline, generator=generator)
        np.testing.assert_array_equal(small(pipeline, generator=make()), first)
        assert np.abs(second - first).max() > 1e-3


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


def test_a_scheduler_without_dynamic_shift_is_replaced(pipeline):
    foreign = ppdiffusers.FlowMatchEulerDiscreteScheduler.from_config(dict(pipeline.scheduler.config))
    replaced = FluxPipeline(**{**pipeline.components, "scheduler": foreign}).scheduler
    assert isinstance(replaced, FlowMatchEulerDiscreteScheduler)
    assert replaced.config.use_dynamic_shifting is True


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
