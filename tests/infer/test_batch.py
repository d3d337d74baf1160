"""Drawing a list: each picture is that of its settings alone; what is there stays; sheets, and the list."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from PIL import Image
from safetensors.paddle import save_file

import ppcoat.infer.batch as batch_module
import ppcoat.infer.card as card_module
import ppcoat.infer.drawers as drawers_module
import ppcoat.infer.generate as generate_module
from ppcoat.cli.main import run
from ppcoat.errors import ConfigError
from ppcoat.infer.batch import Batch
from ppcoat.infer.drawers import Drawer
from ppcoat.infer.generate import Drawing, generate
from ppcoat.infer.prompts import read_pictures
from ppcoat.models.flux.pipeline import FluxPipeline
from ppcoat.models.offload import Placement
from ppcoat.plan.drawing import AS_IT_IS

pytestmark = pytest.mark.usefixtures("encoders_read_once")

FIXTURES = Path(__file__).parent.parent / "fixtures"
SMALL = {"steps": 1, "height": 32, "width": 32, "device": "cpu"}


def pixels(file):
    return np.asarray(Image.open(file))


def write_list(folder, *rows):
    file = folder / "list.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture
def counted(monkeypatch):
    """{"read": how many models, "encoded": which texts}."""
    counts, encode = {"read": 0, "encoded": []}, FluxPipeline.encode_prompt

    def from_pretrained(*given, **named):
        counts["read"] += 1
        return FluxPipeline.from_pretrained(*given, **named)

    def encode_prompt(self, prompt=None, *given, **named):
        counts["encoded"] += prompt or []
        return encode(self, prompt, *given, **named)

    monkeypatch.setattr(card_module, "FluxPipeline", SimpleNamespace(from_pretrained=from_pretrained))
    monkeypatch.setattr(FluxPipeline, "encode_prompt", encode_prompt)
    return counts


def test_flux_draws_each_line_as_alone(tmp_path, counted, monkeypatch):
    """With a LoRA that changes CLIP too: its strength decides what the encoders say. Two pictures a round."""
    rng = np.random.default_rng(0)
    width = json.loads((FIXTURES / "tiny_flux_fp32/text_encoder/config.json").read_text())["hidden_size"]
    linears = {
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (width, width),
        "transformer.context_embedder": paddle_shape("context_embedder"),
    }
    tensors = {}
    for name, (inputs, outputs) in linears.items():
        for key, shape in (("lora_A", (2, inputs)), ("lora_B", (outputs, 2))):
            tensors[f"{name}.{key}.weight"] = paddle.to_tensor(rng.normal(size=shape).astype("float32"))
    save_file(tensors, str(tmp_path / "lora.safetensors"), metadata={"format": "pt"})
    rows = [
        {"prompt": "a red dress", "seed": 1},
        {"prompt": "a red dress", "seed": 2, "lora_scale": 0.5},
        {"prompt": "a hat", "size": "48x32", "steps": 2, "true_cfg_scale": 2, "negative_prompt": "dots"},
        {"prompt": "a red dress", "seed": 3},
        {"prompt": "a hat", "lora_scale": 0, "guidance_scale": 1},
    ]
    shared = Drawing(
        str(FIXTURES / "tiny_flux_fp32"),
        path_to_lora=[str(tmp_path / "lora.safetensors")],
        max_sequence_length=16,
        **SMALL,
    )
    monkeypatch.setattr(drawers_module, "AT_ONCE", 3)
    listed = dataclasses.replace(
        shared, prompts=write_list(tmp_path, *rows), output_dir=str(tmp_path / "all")
    )
    files = generate(listed)
    assert counted["read"] == 1
    # round one: the dress at 0.5 and at 1, hat and dots at 1; round two: the hat at 0, the dress at 1
    assert sorted(counted["encoded"]) == ["a hat"] * 2 + ["a red dress"] * 3 + ["dots"]
    pipeline = FluxPipeline.from_pretrained(shared.model)
    pipeline.load_lora_weights(shared.path_to_lora[0])
    for row, file in zip(rows, files, strict=True):
        pipeline.set_adapters(["default_0"], [row.get("lora_scale", 1.0)])
        wide = {"width": 48} if "size" in row else {"width": 32}
        guided = {name: row[name] for name in ("true_cfg_scale", "negative_prompt") if name in row}
        (alone,) = pipeline(
            row["prompt"],
            num_inference_steps=row.get("steps", 1),
            seed=row.get("seed", 42),
            guidance_scale=row.get("guidance_scale", 3.5),
            max_sequence_length=16,
            height=32,
            **wide,
            **guided,
        ).images
        np.testing.assert_array_equal(pixels(file), np.asarray(alone))
    assert (pixels(files[0]) != pixels(files[3])).any()


def paddle_shape(name):
    """(inputs, outputs) of a Linear of the reference transformer."""
    from ppcoat.models.loading import parameter_shapes

    outputs, inputs = parameter_shapes(FIXTURES / "tiny_flux_fp32", "transformer")["transformer"][
        f"{name}.weight"
    ]
    return inputs, outputs


@pytest.mark.slow
def test_newbie_draws_each_line_as_alone(tmp_path):
    shared = Drawing(
        str(FIXTURES / "tiny_newbie"), path_to_lora=[str(FIXTURES / "tiny_newbie/lora")], **SMALL
    )
    rows = [{"prompt": "a long dog"}]
    rows += [rows[0] | {"lora_scale": 0.5, "negative_prompt": each} for each in ("cat", "blurry dogs")]
    files = generate(
        dataclasses.replace(shared, prompts=write_list(tmp_path, *rows), output_dir=str(tmp_path / "all"))
    )
    (alone,) = generate(
        dataclasses.replace(
            shared,
            prompt=["a long dog"],
            lora_scale=[0.5],
            negative_prompt="blurry dogs",
            output_dir=str(tmp_path / "alone"),
        )
    )
    np.testing.assert_array_equal(pixels(files[2]), pixels(alone))
    assert (pixels(files[0]) != pixels(files[1])).any() and (pixels(files[1]) != pixels(files[2])).any()


class Plain(Drawer):
    """Draws one colour, that of its seed."""

    def __init__(self, drawn, stop_at=None):
        nothing = {"set_progress_bar_config": lambda **_: None, "release_encoders": lambda: None}
        super().__init__(SimpleNamespace(**nothing), [])
        self.seeds, self.stop_at = drawn, stop_at

    def texts(self, drawing):
        return [(drawing.prompt[0],)]

    def encode(self, texts, length):
        return {}

    def draw(self, drawing, encoded):
        if drawing.seed == self.stop_at:
            raise KeyboardInterrupt
        self.seeds.append(drawing.seed)
        return [Image.new("RGB", (drawing.width, drawing.height), (drawing.seed, 0, 0))]

    def put(self, strengths):
        pass

    def _set(self, drawing):
        pass


@pytest.fixture
def shop(tmp_path):
    """draw(...) of a list of pictures with seeds 0.. and changed settings -> the seeds that were drawn."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights").write_text("one")
    (tmp_path / "lora.safetensors").write_text("one")
    shared = Drawing(
        str(model),
        path_to_lora=[str(tmp_path / "lora.safetensors")],
        output_dir=str(tmp_path / "out"),
        **SMALL,
    )

    def draw(count=4, stop_at=None, rows=None, placement=AS_IT_IS, **changes):
        rows = rows or [{"prompt": f"dress {i}", "seed": i} for i in range(count)]
        drawing = dataclasses.replace(shared, prompts=write_list(tmp_path, *rows), **changes)
        pictures, seeds = read_pictures(drawing.prompts, drawing, lambda _: None), []
        batch = Batch(drawing, pictures, tmp_path / "out", model, (None, placement))
        batch.draw(lambda: Plain(seeds, stop_at))
        return seeds

    return draw


def test_what_is_there_stays_and_what_changed_is_drawn_again(shop, tmp_path, capsys):
    assert shop() == [0, 1, 2, 3]
    assert "4 pictures: 0 are there as wanted, 4 to draw\n" in capsys.readouterr().out
    assert shop() == []  # and Plain was not made
    assert "4 pictures: 4 are there as wanted, 0 to draw\n" in capsys.readouterr().out
    assert shop(device="gpu", num_images=1) == []  # decide nothing
    assert shop(vram=8, quantize="fp4", placement=Placement(offload=True, blocks_to_swap=2)) == []
    assert shop(count=5) == [4]
    out = sorted((tmp_path / "out").glob("0*.png"))
    content = out[2].read_bytes()
    out[2].write_bytes(content[:-1])  # not whole
    Image.new("RGB", (8, 8)).save(out[3])  # of another program
    out[1].unlink()
    capsys.readouterr()
    assert shop(count=5) == [1, 2, 3]
    said = "5 pictures: 2 are there as wanted, 3 to draw (2 of them again: drawn with other settings)"
    assert said in capsys.readouterr().out
    assert out[2].read_bytes() == content
    for changes in ({"steps": 2}, {"lora_scale": [0.5]}, {"dtype": "float32", "guidance_scale": 1.0},
                    {"placement": Placement("int8")}, {"placement": Placement(vae_tiling=True)}):  # fmt: skip
        assert shop(**changes) == [0, 1, 2, 3]
    (tmp_path / "lora.safetensors").write_text("two")
    assert shop(guidance_scale=1.0) == [0, 1, 2, 3]
    (tmp_path / "model" / "weights").write_text("two")
    assert shop(guidance_scale=1.0) == [0, 1, 2, 3]
    (tmp_path / "model").rename(tmp_path / "moved")  # what counts is what is in it
    (tmp_path / "moved").rename(tmp_path / "model")
    rows = [{"prompt": "hat", "seed": 0, "name": "000_dress-0_0"}, {"prompt": "dress 1", "seed": 1}]
    assert shop(rows=rows, guidance_scale=1.0) == [0]


def test_after_a_stop_the_same_command_goes_on(shop, tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        shop(stop_at=2)
    assert (
        "stopped: 2 of 4 drawn, all of them whole; the same command draws the rest" in capsys.readouterr().err
    )
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "000_dress-0_0.png",
        "001_dress-1_1.png",
    ]
    assert shop() == [2, 3]


def test_the_picture_says_what_it_was_drawn_with_but_not_where_files_are(shop, tmp_path):
    shop(count=1)
    text = Image.open(tmp_path / "out" / "000_dress-0_0.png").text
    assert text["prompt"] == "dress 0"
    settings = json.loads(text["settings"])
    assert not any(str(tmp_path) in each for each in text.values())
    assert json.loads(text["files"]) == {"model": "model", "path_to_lora": ["lora.safetensors"]}
    assert {"seed": 0, "steps": 1, "lora_scale": [1.0], "dtype": "float32"}.items() <= settings.items()
    assert re.fullmatch("[0-9a-f]{16}", settings["model"]) and len(settings["loras"]) == 1


def test_the_written_list_draws_the_same_again(shop, tmp_path):
    shop(rows=[{"prompt": "a", "seed": 1, "size": "48x32"}, {"prompt": "b \u732b", "name": "cat", "m": 0.5}])
    rows = [json.loads(line) for line in (tmp_path / "out/pictures.jsonl").read_text("utf-8").splitlines()]
    assert [row["name"] for row in rows] == ["000_a_1", "cat"]
    assert shop(rows=rows) == []
    assert shop(rows=rows[:1]) == []


def test_a_list_in_the_output_folder_is_not_overwritten(shop, tmp_path):
    shop(count=2)
    mine = tmp_path / "out" / "pictures.jsonl"
    rows = mine.read_text()
    drawing = Drawing(str(tmp_path / "model"), prompts=str(mine), output_dir=str(tmp_path / "out"), **SMALL)
    mine.write_text(
        rows := "".join(json.dumps({"prompt": json.loads(r)["prompt"]}) + "\n" for r in rows.splitlines())
    )
    Batch(
        drawing,
        read_pictures(mine, drawing, lambda _: None),
        tmp_path / "out",
        tmp_path / "model",
        (None, AS_IT_IS),
    ).draw(lambda: Plain([]))
    assert mine.read_text() == rows


def test_contact_sheets_show_every_picture(shop, tmp_path, monkeypatch):
    monkeypatch.setattr(batch_module, "COLUMNS_OF_SHEET", 2)
    monkeypatch.setattr(batch_module, "ROWS_OF_SHEET", 2)
    rows = [{"prompt": "a", "seed": 50 * i, "size": "64x32" if i % 2 else "32x48"} for i in range(1, 6)]
    shop(rows=rows)
    first, second = (Image.open(tmp_path / "out" / name) for name in ("contact.png", "contact_2.png"))
    tile, row = batch_module.TILE, batch_module.TILE + batch_module.CAPTION
    places = [(first, 0, 0), (first, 1, 0), (first, 0, 1), (first, 1, 1), (second, 0, 0)]
    for i, (page, x, y) in enumerate(places, start=1):
        assert page.getpixel((x * tile + tile // 2, y * row + tile // 2)) == (50 * i, 0, 0)
        below = np.asarray(page.crop((x * tile, y * row + tile, (x + 1) * tile, (y + 1) * row)))
        assert below.min() < 50 and below.mean() > 150  # black letters on white
    assert (first.size, second.size) == ((2 * tile, 2 * row), (tile, row))
    shop(rows=rows[:4])
    assert not (tmp_path / "out/contact_2.png").exists()


def test_mistakes_stop_before_a_model_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        generate_module.FluxPipeline, "from_pretrained", lambda *_, **__: pytest.fail("loaded")
    )
    monkeypatch.setattr("ppcoat.device.tune_host", lambda: None)
    file = write_list(tmp_path, {"prompt": "a"}, {"prompt": "b", "negative_prompt": "c"})
    flags = [
        "--model",
        str(FIXTURES / "tiny_flux_fp32"),
        "--prompts",
        file,
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert run("generate", flags) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and f"{file}, line 2: negative_prompt: FLUX sees it only with" in told
    for given in ({}, {"prompt": ["a"], "prompts": file}):
        with pytest.raises(ConfigError, match="either --prompt, what to draw, or --prompts"):
            generate(Drawing(str(FIXTURES / "tiny_flux_fp32"), **given))
    with pytest.raises(ConfigError, match="line 1: true_cfg_scale is for FLUX"):
        listed = write_list(tmp_path, {"prompt": "a", "true_cfg_scale": 3})
        generate(Drawing(str(FIXTURES / "tiny_newbie"), prompts=listed))
    assert not (tmp_path / "out").exists()


def test_a_stop_on_the_command_line_says_what_is_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ppcoat.device.tune_host", lambda: None)
    kind = generate_module._KINDS["FluxPipeline"]._replace(drawer=lambda *_: Plain([], stop_at=42))
    monkeypatch.setitem(generate_module._KINDS, "FluxPipeline", kind)
    flags = ["--model", str(FIXTURES / "tiny_flux_fp32"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(KeyboardInterrupt):  # which the process's entry makes 130
        run("generate", [*flags, "--prompts", write_list(tmp_path, {"prompt": "a"})])
    assert "stopped: 0 of 1 drawn" in capsys.readouterr().err
