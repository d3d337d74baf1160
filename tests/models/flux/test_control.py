"""Control LoRAs against diffusers' FluxControlPipeline: pictures, taking off, fusing, merging, and what
is said where a control picture is wanted or not."""

import json
from pathlib import Path

import numpy as np
import paddle
import pytest
from PIL import Image
from ppdiffusers import DiffusionPipeline
from safetensors.numpy import save_file

from ppcoat.cli.main import main
from ppcoat.errors import ConfigError
from ppcoat.lora import load_lora, lora_disabled, merge_lora, remove_lora
from ppcoat.lora.layer import values_of
from ppcoat.models.flux.pipeline import FluxPipeline
from ppcoat.models.loading import load_transformer
from ppcoat.nn.convert import quantize_linears

pytestmark = pytest.mark.usefixtures("encoders_read_once")

FIXTURES = Path(__file__).parents[2] / "fixtures"
BASE, FOLDER = FIXTURES / "tiny_flux_fp32", FIXTURES / "adapters"
CAT = "a photo of cat holding a sign that says hello world"
FILES = ("control_diffusers", "control_bfl")
LATENTS = 3e-5  # of numbers up to 4, four steps in float32; a single step is within 4e-6


@pytest.fixture(scope="module")
def truth():
    with np.load(FOLDER / "control.npz") as found:
        return dict(found)


@pytest.fixture(scope="module")
def picture(truth):
    return Image.fromarray(truth["control_picture"])


@pytest.fixture(scope="module")
def loaded():
    found = FluxPipeline.from_pretrained(BASE, "float32")
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture
def pipeline(loaded):
    yield loaded
    loaded.unload_lora_weights()


def file_of(name):
    return FOLDER / f"{name}.safetensors"


def draw(pipeline, truth, steps=1, **options):
    settings = {"height": 48, "width": 64, "guidance_scale": 10.0, "max_sequence_length": 16,
                "latents": paddle.to_tensor(truth["noise"]), "output_type": "latent"}  # fmt: skip
    images = pipeline(CAT, num_inference_steps=steps, **{**settings, **options}).images
    return images if isinstance(images, np.ndarray) else images.numpy()


def embedder(pipeline):
    """What x_embedder computes with, in torch's order."""
    layer = pipeline.transformer.x_embedder
    with paddle.no_grad():
        return (
            (layer(paddle.eye(layer.weight.shape[0])) - layer(paddle.zeros([1, layer.weight.shape[0]])))
            .numpy()
            .T
        )


@pytest.mark.parametrize("name", FILES)
def test_a_control_lora_draws_as_diffusers_does(pipeline, truth, picture, name):
    old = pipeline.transformer.x_embedder
    info = pipeline.load_lora_weights(file_of(name))
    assert "a control LoRA: the model now draws after a picture (control_image)" in info.notes
    assert pipeline.transformer.config.in_channels == 128 and pipeline.transformer.out_channels == 64
    tokens = pipeline.control_tokens(picture, 48, 64, 1)
    np.testing.assert_allclose(tokens.numpy(), truth["control_latents"], atol=2e-6)
    steps = []
    found = draw(pipeline, truth, 4, control_image=picture, output_type="np",
                 callback_on_step_end=lambda *now: steps.append(now[-1]["latents"].numpy()))  # fmt: skip
    np.testing.assert_allclose(steps[0], truth[f"{name}/latent_1"], atol=2e-5)
    np.testing.assert_allclose(steps[-1], truth[f"{name}/latent_final"], atol=LATENTS)
    np.testing.assert_allclose(found[0], truth[f"{name}/picture"], atol=2e-5)
    pipeline.unload_lora_weights()
    assert pipeline.transformer.x_embedder is old and pipeline.transformer.config.in_channels == 64
    with pytest.raises(ConfigError, match="this model sees no picture; load a control LoRA"):
        draw(pipeline, truth, control_image=picture)


def test_each_form_of_a_control_picture_is_the_same(pipeline, truth, picture):
    pipeline.load_lora_weights(file_of("control_diffusers"))
    want = pipeline.control_tokens(picture, 48, 64, 4).numpy()
    numbers = np.asarray(picture, "float32") / 255
    tensor = paddle.to_tensor(numbers.transpose(2, 0, 1))
    for form in ([picture], numbers, numbers[None], tensor, tensor.unsqueeze(0), picture.convert("RGBA")):
        np.testing.assert_array_equal(pipeline.control_tokens(form, 48, 64, 4).numpy(), want)
    mirrored = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    both = pipeline.control_tokens([picture, mirrored], 48, 64, 4).numpy()
    np.testing.assert_array_equal(both[:2], want[:2])
    assert (both[2] == both[3]).all() and (both[2] != both[1]).any()
    whole = np.asarray(picture)
    for wrong in (
        numbers[:32],
        whole,
        255 * numbers,
        "edges.png",
        [],
        [picture, "x"],
        np.full_like(numbers, np.nan),
    ):
        with pytest.raises(ConfigError, match="control_image: came .* wanted PIL pictures"):
            pipeline.control_tokens(wrong, 48, 64, 4)
    with pytest.raises(ConfigError, match="control_image: came 3 pictures for 4 to draw"):
        pipeline.control_tokens([picture] * 3, 48, 64, 4)
    with pytest.raises(ConfigError, match="this model draws after a picture: give control_image"):
        draw(pipeline, truth)


def test_strength_other_adapters_and_switching_between_them(pipeline, truth, picture):
    """Differences weaken, norms are what the file says; a LoRA of 64 inputs stands on the first of 128."""
    base = values_of(pipeline.transformer.x_embedder, "weight")
    pipeline.load_lora_weights(file_of("control_diffusers"), "control")
    delta = embedder(pipeline) - np.pad(base, [(0, 0), (0, 64)])
    assert np.abs(delta[:, 64:]).max() > 0.01
    norm = "transformer_blocks.0.attn.norm_q"
    changed = dict(pipeline.transformer.named_sublayers())[norm]
    pipeline.set_adapters("control", 0.5)
    np.testing.assert_allclose(embedder(pipeline), np.pad(base, [(0, 0), (0, 64)]) + 0.5 * delta, atol=1e-6)
    again = dict(pipeline.transformer.named_sublayers())[norm]
    np.testing.assert_array_equal(again.changed().weight.numpy(), changed.changed().weight.numpy())
    pipeline.load_lora_weights(file_of("outer_diffusers"), "plain")
    assert pipeline.transformer.config.in_channels == 64
    plain = embedder(pipeline) - base
    pipeline.set_adapters(["control", "plain"], [1.0, 0.5])
    both = np.pad(base + 0.5 * plain, [(0, 0), (0, 64)]) + delta
    np.testing.assert_allclose(embedder(pipeline), both, atol=1e-6)
    with lora_disabled(pipeline.transformer):
        np.testing.assert_allclose(embedder(pipeline), np.pad(base, [(0, 0), (0, 64)]), atol=1e-7)
    before = draw(pipeline, truth, control_image=picture)
    pipeline.fuse_lora()
    np.testing.assert_allclose(embedder(pipeline), both, atol=1e-6)
    np.testing.assert_allclose(draw(pipeline, truth, control_image=picture), before, atol=1e-5)
    pipeline.unload_lora_weights()  # what is fused stays
    assert pipeline.transformer.config.in_channels == 128
    pipeline.unfuse_lora()
    assert pipeline.transformer.config.in_channels == 64
    np.testing.assert_array_equal(values_of(pipeline.transformer.x_embedder, "weight"), base)


def test_a_refused_fuse_leaves_x_embedder_as_it_was(picture):
    pipeline = FluxPipeline.from_pretrained(BASE, "float32")
    quantize_linears(pipeline.text_encoder_2)
    old = pipeline.transformer.x_embedder
    pipeline.load_lora_weights(file_of("control_diffusers"), "control")
    pipeline.load_lora_weights(file_of("dense_comfy"), "all")
    with pytest.raises(ConfigError, match="stored in FP8"):
        pipeline.fuse_lora(adapter_names=["control", "all"])
    assert pipeline.transformer.x_embedder is old and pipeline.transformer.config.in_channels == 64
    assert pipeline.get_active_adapters() == ["all"]


def test_a_transformer_alone_is_widened_merged_and_narrowed():
    model = load_transformer(BASE / "transformer", "float32")
    old = model.x_embedder
    load_lora(model, file_of("control_bfl"))
    remove_lora(model)
    assert model.x_embedder is old and model.config.in_channels == 64
    quantize_linears(model)
    load_lora(model, file_of("control_bfl"), 0.5)
    assert model.x_embedder.weight.shape == [128, 64]
    remove_lora(model)
    assert type(model.x_embedder.weight).__name__ == "FP8Weight" and model.config.in_channels == 64
    model = load_transformer(BASE / "transformer", "float32")
    load_lora(model, file_of("control_bfl"))
    merge_lora(model)
    load_lora(model, file_of("outer_diffusers"))
    remove_lora(model)
    assert model.x_embedder.weight.shape == [128, 64] and model.config.in_channels == 128


def test_merging_writes_a_folder_that_draws_after_a_picture(tmp_path, capsys, truth, picture):
    out, again = tmp_path / "merged", tmp_path / "again"
    lora = ["--lora", str(file_of("control_diffusers")), "--output_dir", str(out)]
    assert main(["merge", "--model", str(BASE), *lora]) == 0
    assert "a control LoRA" in capsys.readouterr().out
    config = json.loads((out / "transformer" / "config.json").read_text())
    assert (config["in_channels"], config["out_channels"]) == (128, 64)
    assert json.loads((out / "model_index.json").read_text())["_class_name"] == "FluxControlPipeline"
    pipeline = DiffusionPipeline.from_pretrained(out, paddle_dtype="float32")
    pipeline.set_progress_bar_config(disable=True)
    found = draw(pipeline, truth, 4, control_image=picture)
    np.testing.assert_allclose(found, truth["control_diffusers/latent_final"], atol=LATENTS)
    pipeline.save_pretrained(again)
    assert json.loads((again / "model_index.json").read_text())["_class_name"] == "FluxControlPipeline"
    assert json.loads((again / "transformer" / "config.json").read_text()) == config
    base = values_of(pipeline.transformer.x_embedder, "weight")
    pipeline.load_lora_weights(file_of("outer_diffusers"))  # of 64 inputs
    difference = embedder(pipeline) - base
    assert np.abs(difference[:, :64]).max() > 0.01 and np.abs(difference[:, 64:]).max() < 1e-6
    lora = ["--lora", str(file_of("outer_diffusers")), "--output_dir", str(tmp_path / "third")]
    assert main(["merge", "--model", str(out), *lora]) == 0
    assert main(["generate", "--model", str(out), "--prompt", "x", "--device", "cpu"]) == 2
    assert "is a control model (x_embedder takes 128 inputs): give --control_image" in capsys.readouterr().err
    config_file = tmp_path / "run.yaml"
    config_file.write_text(
        f"name: x\nmodel: {{name_or_path: {out}}}\ndatasets: [{{folder_path: {tmp_path}}}]\n"
    )
    assert main(["train", str(config_file), "--set", "device=cpu"]) == 2
    assert "only generate and merge take such a model" in capsys.readouterr().err
    distill = ["train-flux-lightning", "--pretrained_teacher_model", str(out), "--data_path", str(tmp_path)]
    assert main([*distill, "--output_dir", str(tmp_path / "run")]) == 2
    assert "only generate and merge take such a model" in capsys.readouterr().err


def test_generate_draws_after_a_picture(tmp_path, capsys, pipeline, picture):
    out, image = tmp_path / "out", tmp_path / "edges.png"
    picture.resize((64, 64)).save(image)
    flags = {"model": BASE, "prompt": "x", "steps": 1, "height": 48, "width": 64, "output_dir": out,
             "path_to_lora": file_of("control_bfl"), "control_image": image, "device": "cpu",
             "max_sequence_length": 16}  # fmt: skip
    assert (
        main(["generate", *(part for name, value in flags.items() for part in (f"--{name}", str(value)))])
        == 0
    )
    said = capsys.readouterr().out
    assert said.count("note: a control LoRA") == 1
    assert "edges.png is 64x64 and is stretched to 64x48: --width and --height" in said
    pipeline.load_lora_weights(file_of("control_bfl"))
    want = pipeline("x", height=48, width=64, num_inference_steps=1, seed=42, max_sequence_length=16,
                    control_image=Image.open(image)).images[0]  # fmt: skip
    (drawn,) = out.iterdir()
    np.testing.assert_array_equal(np.asarray(Image.open(drawn)), np.asarray(want))


@pytest.mark.parametrize(
    ("lora", "image", "said", "command"),
    [(*case, command) for command in ("generate", "lightning") for case in [
        ("control_bfl", None, "control_bfl.safetensors is a control LoRA (x_embedder takes 128 inputs, that "
         "of this model 64): give --control_image"),
        ("split_kohya", "edges.png", "sees no picture (x_embedder takes 64 inputs): add a control LoRA"),
        (None, "edges.png", "sees no picture (x_embedder takes 64 inputs): add a control LoRA"),
        ("control_bfl", "none.png", "none.png: the picture cannot be decoded (No such file"),
        ("control_bfl", "text.png", "text.png: the picture cannot be decoded (it is text"),
        ("fill", "edges.png", "is a Fill LoRA: its x_embedder takes 384 inputs, that of this model 64"),
    ] if command == "generate" or case[0]],  # the 4-step script always has a LoRA
)  # fmt: skip
def test_a_control_picture_too_much_or_too_few_is_told_before_a_model_is_loaded(
    tmp_path, capsys, monkeypatch, picture, command, lora, image, said
):
    monkeypatch.setattr("ppcoat.models.loading.load_transformer", lambda *_: pytest.fail("loaded"))
    picture.save(tmp_path / "edges.png")
    (tmp_path / "text.png").write_text("no picture")
    fill = {f"transformer.x_embedder.lora_{role}.weight": np.ones(shape, "float32")
            for role, shape in (("A", [2, 384]), ("B", [64, 2]))}  # fmt: skip
    save_file(fill, tmp_path / "fill.safetensors")
    path = tmp_path / "fill.safetensors" if lora == "fill" else lora and file_of(lora)
    flags = ["--path_to_lora", str(path)] if path else []
    flags += ["--control_image", str(tmp_path / image)] if image else []
    assert main([command, "--model", str(BASE), "--prompt", "x", "--device", "cpu", *flags]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
