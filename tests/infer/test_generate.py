"""Drawing to files: names, seeds, LoRA strength, and refusals, on the random reference FLUX in two steps."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import paddle
import pytest
from PIL import Image
from safetensors.paddle import load_file, save_file

import ppcoat.infer.generate as generate_module
from ppcoat.config.load import load_config
from ppcoat.data import garments
from ppcoat.errors import ConfigError
from ppcoat.infer.generate import Drawing, generate
from ppcoat.models.newbie.pipeline import NewbiePipeline
from ppcoat.train.run import train_lora

pytestmark = pytest.mark.usefixtures("encoders_read_once")
FIXTURE = Path(__file__).parent.parent / "fixtures" / "tiny_flux_fp32"
PROMPT = "a red dress"


@pytest.fixture
def drawing(tmp_path):
    return Drawing(
        model=str(FIXTURE),
        prompt=[PROMPT],
        output_dir=str(tmp_path / "pictures"),
        seed=5,
        steps=2,
        height=32,
        width=32,
        max_sequence_length=16,
        device="cpu",
    )


@pytest.fixture(scope="module")
def trained_lora(tmp_path_factory, write_run):
    """The LoRA of a run of six steps at a high rate."""
    folder = tmp_path_factory.mktemp("lora")
    garments.write_folder(folder / "data", 2, seed=1, prefix="[trigger] ")
    config = write_run(folder, folder / "data", train={"steps": 6, "lr": 5e-2})
    return train_lora(load_config(config)).lora_file


def pixels(file):
    """int [height, width, 3], so that differences do not wrap."""
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


def test_files_carry_number_prompt_and_seed(drawing, capsys):
    prompts = ["a red dress", "Ein Hut! / ..\\x"]
    files = generate(dataclasses.replace(drawing, prompt=prompts, num_images=2))
    assert [file.name for file in files] == [
        "000_a-red-dress_5.png",
        "000_a-red-dress_6.png",
        "001_ein-hut-x_5.png",
        "001_ein-hut-x_6.png",
    ]
    assert all(file.parent == Path(drawing.output_dir) for file in files)
    assert [str(file) for file in files] == capsys.readouterr().out.split()
    pictures = [Image.open(file) for file in files]
    assert {picture.size for picture in pictures} == {(32, 32)}
    assert [picture.text["prompt"] for picture in pictures] == [prompts[0]] * 2 + [prompts[1]] * 2


def test_a_prompt_gives_the_name_in_any_language(drawing):
    (file,) = generate(dataclasses.replace(drawing, prompt=["猫 !"]))
    assert file.name == "000_猫_5.png" and Image.open(file).text["prompt"] == "猫 !"


def test_width_and_height_are_not_exchanged_and_default_to_the_models_own(drawing):
    (wide,) = generate(dataclasses.replace(drawing, width=48, height=32))
    assert Image.open(wide).size == (48, 32)
    (own,) = generate(dataclasses.replace(drawing, width=None, height=None))
    assert Image.open(own).size == (64, 64)  # sample_size in the VAE's config.json


def test_picture_i_is_the_picture_of_seed_plus_i_alone(drawing, tmp_path):
    _, second = generate(dataclasses.replace(drawing, num_images=2))
    (alone,) = generate(dataclasses.replace(drawing, seed=6, output_dir=str(tmp_path / "alone")))
    (first,) = generate(drawing)
    assert np.abs(pixels(second) - pixels(alone)).max() <= 1  # a batch may round the last bit otherwise
    assert np.abs(pixels(first) - pixels(alone)).max() > 10


def test_lora_of_a_run_changes_the_picture_and_scale_0_switches_it_off(drawing, trained_lora, capsys):
    def draw(name, **changes):
        (file,) = generate(dataclasses.replace(drawing, output_dir=drawing.output_dir + name, **changes))
        return pixels(file)

    without = draw("without")
    whole = draw("whole", path_to_lora=str(trained_lora))
    said = capsys.readouterr().out
    half = draw("half", path_to_lora=str(trained_lora), lora_scale=0.5)
    off = draw("off", path_to_lora=str(trained_lora), lora_scale=0.0)
    # 2 double blocks of 12, 3 single blocks of 5
    assert "LoRA on 39 layers at scale 1, trigger word sks" in said
    np.testing.assert_array_equal(off, without)
    assert np.abs(whole - without).max() > 2
    assert 0 < np.abs(half - without).mean() < np.abs(whole - without).mean()


def test_lora_scale_is_linear_in_the_weights(drawing, trained_lora, tmp_path):
    """Strength 0.5 draws what a file with B halved draws."""
    halved = {
        name: tensor * 0.5 if ".lora_B." in name else tensor
        for name, tensor in load_file(str(trained_lora)).items()
    }
    save_file(halved, str(tmp_path / "half.safetensors"), metadata={"format": "pt"})
    (ours,) = generate(dataclasses.replace(drawing, path_to_lora=str(trained_lora), lora_scale=0.5))
    found = pixels(ours)
    (theirs,) = generate(dataclasses.replace(drawing, path_to_lora=str(tmp_path / "half.safetensors")))
    assert np.abs(found - pixels(theirs)).max() <= 1


@pytest.fixture
def no_model_is_loaded(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("a model was loaded before the input was checked")

    monkeypatch.setattr(generate_module.FluxPipeline, "from_pretrained", fail)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_images": 0}, "num_images: came 0"),
        ({"steps": 0}, "steps: came 0"),
        ({"steps": 10**12}, "steps: came 1000000000000"),
        ({"num_images": 10**12}, "num_images: came 1000000000000"),
        ({"seed": -1}, "seed: came -1"),
        ({"prompt": ["robe \udce9l\udce9gante"]}, "holds half of a character"),  # of a terminal in Latin-1
        ({"negative_prompt": "\udce9"}, "negative_prompt: "),
        ({"width": 50}, "width: came 50, wanted a multiple of 16"),
        ({"lora_scale": float("nan")}, "lora_scale: came nan"),
        ({"device": "tpu"}, "device: came 'tpu'"),
        ({"dtype": "bfloat16"}, "float32 only"),
        (
            {"model": "nowhere"},
            "no model folder nowhere: models are not downloaded; download it there, or set --model",
        ),
        ({"path_to_lora": "nowhere.safetensors"}, "no LoRA file at nowhere.safetensors"),
        ({"path_to_lora": "lora.ckpt"}, "lora.ckpt is a pickle"),
        ({"path_to_lora": __file__}, "a LoRA file is a .safetensors"),
        ({"device": "gpu:99"}, "Paddle sees"),
    ],
)
def test_wrong_settings_stop_before_a_model_is_loaded(drawing, no_model_is_loaded, changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as refused:
        generate(dataclasses.replace(drawing, **changes))
    assert "\n" not in str(refused.value)
    assert not Path(drawing.output_dir).exists()


def test_damaged_files_stop_before_a_model_is_loaded(drawing, no_model_is_loaded, tmp_path):
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(ConfigError, match="torn.safetensors is not a whole safetensors file"):
        generate(dataclasses.replace(drawing, path_to_lora=str(torn)))
    index = tmp_path / "other" / "model_index.json"
    index.parent.mkdir()
    index.write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(ConfigError, match="of a StableDiffusionPipeline, not of a FluxPipeline: give"):
        generate(dataclasses.replace(drawing, model=str(index.parent)))


def test_a_lora_of_another_model_is_refused_by_its_keys(drawing, tmp_path):
    tensors = {f"unet.down.0.attn.lora_{name}.weight": paddle.ones([2, 2]) for name in "AB"}
    save_file(tensors, str(tmp_path / "other.safetensors"), metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="fits no layer of the model: its keys are like unet.down"):
        generate(dataclasses.replace(drawing, path_to_lora=str(tmp_path / "other.safetensors")))
    assert not Path(drawing.output_dir).exists()


def test_what_does_not_fit_is_refused_or_left_out_and_told(drawing, tmp_path, capsys):
    """A key of no module, and CLIP's part of a model with another CLIP; several LoRAs at once."""
    stem = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    tensors = {f"{stem}.lora_down.weight": paddle.ones([2, 3]), f"{stem}.lora_up.weight": paddle.ones([3, 2])}
    tensors |= {"strange": paddle.ones([2])}
    tensors |= load_file(str(FIXTURE.parent / "adapters" / "split_kohya.safetensors"))
    save_file(tensors, str(tmp_path / "mixed.safetensors"))
    mixed, other = (str(tmp_path / "mixed.safetensors"), str(FIXTURE.parent / "adapters" / "split_peft"))
    with pytest.raises(ConfigError, match="1 keys of .*mixed.safetensors name nothing .*: strange"):
        generate(dataclasses.replace(drawing, path_to_lora=[mixed]))
    both = dataclasses.replace(
        drawing, path_to_lora=[mixed, other], lora_scale=[0.5, 0.5], ignore_unknown=True
    )
    (file,) = generate(both)
    said = capsys.readouterr().out
    assert "LoRA on 14 layers at scale 0.5, 2 keys left out, e.g. strange\n" in said
    once = dataclasses.replace(drawing, path_to_lora=[other], output_dir=str(tmp_path / "once"))
    assert np.abs(pixels(file) - pixels(generate(once)[0])).max() <= 1  # two halves of one LoRA
    with pytest.raises(ConfigError, match="came 2 strengths for 1 LoRAs"):
        generate(dataclasses.replace(drawing, path_to_lora=[other], lora_scale=[1.0, 2.0]))


def test_a_size_that_is_no_multiple_of_16_is_refused(drawing):
    with pytest.raises(ConfigError, match="width: came 40, wanted a multiple of 16"):
        generate(dataclasses.replace(drawing, width=40))


NEWBIE = Path(__file__).parent.parent / "fixtures" / "tiny_newbie"


@pytest.fixture
def newbie_drawing(drawing):
    return dataclasses.replace(drawing, model=str(NEWBIE), max_sequence_length=None)


def test_newbie_draws_what_its_pipeline_draws_with_guidance_5_and_shift_6(newbie_drawing):
    (file,) = generate(newbie_drawing)
    pipeline = NewbiePipeline.from_pretrained(NEWBIE)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "seed": 5, "height": 32, "width": 32, "solver": "euler"}
    (want,) = pipeline(PROMPT, guidance_scale=5.0, shift=6.0, **options).images
    assert Drawing.steps == 28
    assert np.abs(pixels(file) - np.asarray(want).astype(int)).max() <= 1
    away = generate(
        dataclasses.replace(newbie_drawing, negative_prompt="stars", output_dir=str(file.parent / "b"))
    )
    assert (pixels(away[0]) != pixels(file)).any()


@pytest.mark.parametrize(
    ("kind", "name"), [pytest.param("lora", "LoRA", marks=pytest.mark.slow), ("lokr_full", "LoKr")]
)
def test_newbie_takes_adapter_directories_at_any_strength(newbie_drawing, tmp_path, capsys, kind, name):
    def draw(name, **changes):
        folder = str(tmp_path / name)
        return pixels(generate(dataclasses.replace(newbie_drawing, output_dir=folder, **changes))[0])

    plain, lora = draw("plain"), draw("lora", path_to_lora=str(NEWBIE / kind))
    assert f"{name} on 20 layers" in capsys.readouterr().out
    assert (plain != lora).any()
    assert (draw("off", path_to_lora=str(NEWBIE / kind), lora_scale=0.0) == plain).all()


def test_mistakes_with_newbie_are_named_before_loading(drawing, newbie_drawing, monkeypatch, tmp_path):
    monkeypatch.setattr(NewbiePipeline, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match="no LoRA file at"):
        generate(dataclasses.replace(newbie_drawing, path_to_lora=str(tmp_path / "none")))
    with pytest.raises(ConfigError, match="true_cfg_scale is for FLUX"):
        generate(dataclasses.replace(newbie_drawing, true_cfg_scale=3.0))
    with pytest.raises(ConfigError, match="only with a true_cfg_scale above 1"):
        generate(dataclasses.replace(drawing, negative_prompt="stars"))
