"""generate within a card: pictures are those of the whole model, what the plan chose is done and told."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ppcoat.infer.card as card
import ppcoat.infer.generate as generate_module
from ppcoat.cli.main import run
from ppcoat.errors import ConfigError
from ppcoat.infer.generate import Drawing, generate
from ppcoat.lora import inject_lora, save_lora
from ppcoat.models.fingerprint import folder_identity
from ppcoat.models.loading import load_transformer
from ppcoat.models.offload import Placement
from ppcoat.models.quantized_base import QuantizedCopy
from ppcoat.nn.base_weight import BASES

FIXTURES = Path(__file__).parent.parent / "fixtures"
FLUX, NEWBIE = FIXTURES / "tiny_flux_fp32", FIXTURES / "tiny_newbie"


@pytest.fixture
def drawing(tmp_path):
    return Drawing(str(FLUX), ["a red dress", "a hat"], output_dir=str(tmp_path / "a"), seed=5, steps=1,
                   height=32, width=48, max_sequence_length=16, device="cpu")  # fmt: skip


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """Strong enough to be seen."""
    model = load_transformer(FLUX / "transformer", "float32")
    rng = np.random.default_rng(0)
    for layer in inject_lora(model, 2, 4.0).values():
        layer.lora_B.set_value(rng.standard_normal(layer.lora_B.shape).astype("float32") * 0.1)
    file = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    save_lora(file, model)
    return str(file)


@pytest.fixture
def pipelines(monkeypatch):
    """Those that were loaded, as `_placed` left them."""
    made, placed = [], card._placed

    def placing(pipeline, placement):
        made.append(pipeline)
        return placed(pipeline, placement)

    monkeypatch.setattr(card, "_placed", placing)
    return made


def pixels(files):
    return np.stack([np.asarray(Image.open(file)).astype(int) for file in files])


def redrawn(drawing, folder, **changes):
    output = str(Path(drawing.output_dir).parent / folder)
    return pixels(generate(dataclasses.replace(drawing, output_dir=output, **changes)))


@pytest.mark.parametrize(
    "model", [FLUX, pytest.param(NEWBIE, marks=pytest.mark.slow)], ids=lambda model: model.name
)
def test_offloaded_pictures_are_equal_and_the_encoders_gone(drawing, pipelines, lora, model):
    drawing = dataclasses.replace(drawing, model=str(model), path_to_lora=[lora] if model is FLUX else None)
    whole = redrawn(drawing, "whole")
    np.testing.assert_array_equal(redrawn(drawing, "offloaded", offload=True), whole)
    first, second = pipelines
    assert first.text_encoder is not None and "_offload" not in first.__dict__
    assert second.text_encoder is None and second.__dict__["_offload"].current == "vae"
    assert not {"text_encoder", "text_encoder_2", "clip_model"} & second.__dict__["_offload"]._models.keys()


@pytest.mark.parametrize(
    "model", [FLUX, pytest.param(NEWBIE, marks=pytest.mark.slow)], ids=["flux", "newbie"]
)
def test_a_placement_with_everything_draws_the_pictures_of_its_base(drawing, lora, model, monkeypatch):
    """Quantised, swapped, encoders block by block, slices and tiles of which there is one; with a LoRA."""
    drawing = dataclasses.replace(drawing, model=str(model), path_to_lora=[lora] if model is FLUX else None,
                                  num_images=2, prompt=["a hat"])  # fmt: skip
    plain = redrawn(drawing, "int8", quantize="int8")
    everything = Placement("int8", True, True, 1, True, True)
    monkeypatch.setattr(generate_module, "placement_of", lambda *_: everything)
    placed = redrawn(drawing, "placed")
    assert (
        np.abs(placed - plain).max() <= 1
    )  # one picture at a time through the VAE: its sums round otherwise
    if model is FLUX:
        assert np.abs(placed - redrawn(drawing, "bare", path_to_lora=None)).max() > 1


def test_the_plan_chooses_and_says_so(drawing, pipelines, capsys):
    """On a CPU, of whose process 0.45 GB are libraries' own."""
    redrawn(drawing, "much", vram=2)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "GB" in line]
    assert line.startswith("within 2 GB: base not quantised; planned peak 0.4") and "(decode)" in line
    memory = card.drawing_memory(card._drawn([drawing], drawing.files), False)
    little = card.plan_drawing(memory, placement=Placement(offload=True)).peak.total / 1e9 - 1e-6
    redrawn(drawing, "little", vram=little)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "GB" in line]
    assert f"within {little:g} GB: INT8 base" in line
    assert isinstance(pipelines[1].transformer.proj_out.weight, BASES["int8"])
    with pytest.raises(ConfigError, match="nothing fits into 0.1 GB: the least possible need is 0.5 GB"):
        redrawn(drawing, "none", vram=0.1)
    with pytest.raises(ConfigError, match="vram: came 0"):
        redrawn(drawing, "none", vram=0)


def test_the_copy_is_written_where_asked_and_found_beside_the_model(drawing, tmp_path, monkeypatch):
    drawing = dataclasses.replace(drawing, quantize="int8", prompt=["a hat"])
    first = redrawn(drawing, "first", cache_dir=str(tmp_path / "cache"))
    copy = QuantizedCopy(tmp_path / "cache" / "tiny_flux_fp32-transformer-int8",
                         folder_identity(FLUX / "transformer", times=True), "int8")  # fmt: skip
    assert copy.is_usable()
    monkeypatch.setattr("ppcoat.models.quantized_base.quantised_tensors", None)  # only the copy is read
    np.testing.assert_array_equal(redrawn(drawing, "second", cache_dir=str(tmp_path / "cache")), first)
    beside = tmp_path / "model"
    beside.mkdir()
    for part in FLUX.iterdir():
        (beside / part.name).symlink_to(part)
    copy.folder.rename(beside / "transformer-int8")
    np.testing.assert_array_equal(redrawn(drawing, "third", model=str(beside)), first)


def test_a_list_is_planned_with_its_largest_picture(drawing, tmp_path, monkeypatch):
    rows = [{"prompt": "a hat", "height": 32, "width": 32}, {"prompt": "a cat", "height": 48, "width": 64}]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    planned, drawing_memory = [], card.drawing_memory

    def remembering(drawn, on_gpu):
        planned.append((drawn.height, drawn.width))
        return drawing_memory(drawn, on_gpu)

    monkeypatch.setattr(card, "drawing_memory", remembering)
    with pytest.raises(ConfigError, match="nothing fits"):
        generate(dataclasses.replace(drawing, prompt=None, prompts=str(tmp_path / "list.jsonl"), vram=0.1))
    assert planned == [(48, 64)]


def test_four_step_scripts_take_the_flags(lora, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ppcoat.device.tune_host", lambda: None)
    flags = ["--model", str(FLUX), "--path_to_lora", lora, "--prompt", "dress", "--height", "32", "--width",
             "32", "--step", "1", "--max_sequence_length", "16", "--device", "cpu"]  # fmt: skip
    drawn = {}
    for name, more in (("plain", []), ("offload", ["--offload"])):
        assert run("lightning", [*flags, "--output_dir", str(tmp_path / name), *more]) == 0
        drawn[name] = pixels((tmp_path / name).iterdir())
    np.testing.assert_array_equal(drawn["offload"], drawn["plain"])
    capsys.readouterr()
    assert run("lightning", [*flags, "--inference_optimize", "--vram", "12"]) == 2
    assert "leave out --inference_optimize, or --quantize, --vram and --offload" in capsys.readouterr().err
