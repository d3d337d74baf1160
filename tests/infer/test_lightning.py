"""FLUX-Lightning's scripts on the tiny FLUXes: one picture with and without static graphs, what is said of
alpha, the time that is taken, flags in time for Paddle, refusals."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest
from PIL import Image
from safetensors.paddle import load_file, save_file

import ppcoat.infer.lightning as lightning
from ppcoat.cli.main import run
from ppcoat.infer.lightning import LightningDrawing, compile_transformer, draw_lightning, draw_once
from ppcoat.lora import inject_lora, merge_lora, read_lora_file, save_lora
from ppcoat.models.flux.pipeline import FluxPipeline
from ppcoat.models.loading import load_transformer

ROOT = Path(__file__).parents[2]
FIXTURE = ROOT / "tests" / "fixtures" / "tiny_flux_fp32"
pytestmark = pytest.mark.usefixtures("encoders_read_once")
FLAGS = f"--model {FIXTURE} --height 32 --width 32 --max_sequence_length 16 --device cpu --prompt dress"


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A file that says its alpha, of a LoRA strong enough to be seen."""
    model = load_transformer(FIXTURE / "transformer", "float32")
    rng = np.random.default_rng(0)
    for layer in inject_lora(model, 2, 4.0).values():
        layer.lora_B.set_value(rng.standard_normal(layer.lora_B.shape).astype("float32") * 0.1)
    file = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    save_lora(file, model)
    return file


@pytest.fixture(scope="module")
def lora_without_alpha(lora):
    file = lora.with_name("bare.safetensors")
    save_file(load_file(str(lora)), str(file), metadata={"format": "pt"})
    return file


@pytest.fixture(autouse=True)
def untuned(monkeypatch):
    monkeypatch.setattr("ppcoat.device.tune_host", lambda: None)
    monkeypatch.setattr(lightning, "WARM_UPS", 1)


def pixels(file):
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


@pytest.mark.parametrize("model", [None, ROOT / "ppcoat" / "assets" / "tiny_flux"], ids=["small", "built in"])
@pytest.mark.slow
def test_static_graphs_with_a_merged_lora_draw_the_eager_picture(model, small_flux, tmp_path, capsys):
    """In 0..1, within 1e-5; the LoRA moves the picture by a thousand times that. None: of small_flux."""
    model = model or small_flux
    transformer = load_transformer(model / "transformer", "float32")
    rng = np.random.default_rng(0)
    for layer in inject_lora(transformer, 2, 4.0).values():
        layer.lora_B.set_value(rng.standard_normal(layer.lora_B.shape).astype("float32") * 0.05)
    save_lora(tmp_path / "lora.safetensors", transformer)
    drawing = LightningDrawing(
        str(model), ["a red dress"], seed=3, height=32, width=32, max_sequence_length=16
    )
    pipeline = FluxPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    without = draw_once(pipeline, drawing, "np")
    pipeline.load_lora_weights(tmp_path / "lora.safetensors")
    eager = draw_once(pipeline, drawing, "np")
    merge_lora(pipeline.transformer)
    compile_transformer(pipeline.transformer)
    static = draw_once(pipeline, drawing, "np")
    assert np.abs(eager - without).max() > 1e-2
    np.testing.assert_allclose(static, eager, rtol=0, atol=1e-5)


def test_the_command_draws_the_same_file_both_ways_and_takes_the_time(lora, tmp_path, capsys):
    eager = FLAGS.split() + ["--path_to_lora", str(lora), "--output_dir", str(tmp_path / "eager")]
    assert run("lightning", eager) == 0
    said = capsys.readouterr().out
    assert "LoRA on 39 layers at scale 1\n" in said
    assert "CINN" not in said and "alpha" not in said and "average" not in said
    static = [*eager[:-1], str(tmp_path / "static"), "--inference_optimize", "--repeat", "2"]
    assert run("lightning", static) == 0
    said = capsys.readouterr().out
    assert said.count("CINN is not used: this Paddle is built without it") == 1
    assert said.count(" compiled for shapes ") == 2 and " again " not in said
    assert re.search(r"average of 2 runs after 1 to warm up: \d+\.\d ms from prompt to picture\n", said)
    pictures = [pixels(tmp_path / name / "000_dress_42.png") for name in ("eager", "static")]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    assert pictures[0].shape == (32, 32, 3)


def test_a_file_without_alpha_is_drawn_at_scale_1_and_what_the_published_one_needs_is_said(
    lora, lora_without_alpha, tmp_path, capsys, monkeypatch
):
    drawn = []
    monkeypatch.setattr(lightning, "draw_lightning", drawn.append)

    def scale_and_words(file, *flags):
        assert run("lightning", [*FLAGS.split(), "--path_to_lora", str(file), *flags]) == 0
        return drawn[-1].lora_scale, capsys.readouterr().out

    assert scale_and_words(lora) == (1.0, "")
    scale, words = scale_and_words(lora_without_alpha)
    assert scale == 1.0 and "--lora_scale 0.25" in words and "alpha 8 at rank 32" in words
    assert scale_and_words(lora_without_alpha, "--lora_scale", "0.25") == (0.25, "")
    assert drawn[-1].steps == 4 and drawn[-1].guidance_scale == 3.5 and drawn[-1].seed == 42


def test_lora_scale_is_linear_in_the_weights(lora, tmp_path):
    """Scale 0.5 draws what a file with B halved draws."""
    halved = {
        name: tensor * 0.5 if ".lora_B." in name else tensor for name, tensor in load_file(str(lora)).items()
    }
    save_file(halved, str(tmp_path / "half.safetensors"), metadata={"format": "pt"})
    drawing = LightningDrawing(str(FIXTURE), ["dress"], steps=2, height=32, width=32, max_sequence_length=16)
    found = [
        pixels(draw_lightning(dataclasses.replace(
            drawing, path_to_lora=str(file), lora_scale=scale, output_dir=str(tmp_path / name)
        )))
        for name, file, scale in (
            ("ours", lora, 0.5), ("theirs", tmp_path / "half.safetensors", 1.0), ("whole", lora, 1.0)
        )
    ]  # fmt: skip
    assert np.abs(found[0] - found[1]).max() <= 1
    assert np.abs(found[0] - found[2]).max() > 2


def test_several_loras_are_drawn_together(lora, tmp_path, capsys):
    """Two at half their strength are one."""
    drawing = LightningDrawing(str(FIXTURE), ["dress"], steps=1, height=32, width=32, max_sequence_length=16)

    def draw(**settings):
        return pixels(draw_lightning(dataclasses.replace(drawing, output_dir=str(tmp_path), **settings)))

    once, without = draw(path_to_lora=[str(lora)]), draw()
    twice = draw(path_to_lora=[str(lora)] * 2, lora_scale=0.5)
    assert capsys.readouterr().out.count("LoRA on 39 layers at scale 0.5\n") == 2
    assert np.abs(once - twice).max() <= 1 < np.abs(once - without).max()


def test_where_alpha_may_be_said(tmp_path):
    pair = {f"transformer.proj_out.lora_{name}.weight": paddle.ones([2, 2]) for name in "AB"}

    def stated(tensors, header):
        save_file(tensors, str(tmp_path / "lora.safetensors"), metadata={"format": "pt", **header})
        return read_lora_file(tmp_path / "lora.safetensors").states_alpha

    assert not stated(pair, {})
    assert not stated(pair, {"lora_adapter_metadata": '{"transformer.r": 4}'})
    assert stated(pair, {"alpha": "4"})
    assert stated(pair, {"lora_adapter_metadata": '{"transformer.lora_alpha": 4}'})
    assert stated({**pair, "transformer.proj_out.alpha": paddle.ones([1])}, {})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--path_to_lora nowhere.safetensors", "no LoRA file at nowhere.safetensors"),
        ("--path_to_lora LORA --model black-forest-labs/FLUX.1-dev", "no model folder black-forest-labs"),
        ("--path_to_lora LORA --step 0", "steps: came 0"),
        ("--path_to_lora LORA --repeat -1", "repeat: came -1"),
        ("--path_to_lora LORA --height 40", "height: came 40"),
        ("--path_to_lora LORA --lora_scale nan", "lora_scale: came nan"),
        ("--path_to_lora LORA --output_dir LORA", "is a file, wanted a folder"),
        ("--path_to_lora LORA --device tpu", "device: came 'tpu'"),
    ],
)
def test_mistakes_stop_before_a_model_is_loaded(lora, capsys, monkeypatch, flags, message):
    def fail(*_, **__):
        raise AssertionError("a model was loaded before the input was checked")

    monkeypatch.setattr(lightning.FluxPipeline, "from_pretrained", fail)
    assert run("lightning", (FLAGS + " " + flags.replace("LORA", str(lora))).split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [({}, "1 true true"), ({"FLAGS_use_cinn": "0", "FLAGS_prim_all": "false"}, "0 false true")],
)
def test_the_cinn_script_sets_flags_before_paddle_is_imported(environment, wanted):
    """The user's own values stay, and so does a --repeat of the user."""
    script = ROOT / "inference" / "text_to_image_generation_flux_lightning_cinn.py"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FLAGS_")}
    names = ("FLAGS_use_cinn", "FLAGS_prim_all", "FLAGS_prim_enable_dynamic")
    code = f"""
import os, runpy, sys, types
import ppcoat.cli
def run(name):
    print(name, sys.argv[1:], *[os.environ[name] for name in {names}], "paddle" in sys.modules)
main = types.ModuleType("ppcoat.cli.main")
main.run = run
ppcoat.cli.main = sys.modules["ppcoat.cli.main"] = main
sys.argv = [{str(script)!r}, "--repeat", "7"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**clean, **environment}
    )
    assert result.stdout == f"lightning ['--repeat', '3', '--repeat', '7'] {wanted} False\n", result.stderr
