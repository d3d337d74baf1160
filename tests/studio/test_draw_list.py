"""What the page Draw asks for becomes a list that `generate` takes, and a picture tells what it was asked
for."""

import io
import json

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ppcoat.cli.main import COMMANDS
from ppcoat.errors import ConfigError
from ppcoat.infer.drawing import Drawing, check_numbers
from ppcoat.infer.prompts import read_pictures
from ppcoat.studio.draw_list import (
    Asked,
    asked_of_picture,
    numbers_of,
    one_number,
    read_drawing,
    table_of,
    write_drawing,
)

RUN = (("10", "run/a_10.safetensors"), ("end", "run/a.safetensors"))
ASKED = Asked(prompt='a "red" hat\n', seed=7, steps=4, width=64, height=32, loras=(("x.safetensors", 0.5),),
              checkpoints=RUN, strengths=(0.0, 2.0), step_counts=(4, 8))  # fmt: skip


@pytest.mark.parametrize(
    ("compare", "rows", "columns", "scales"),
    [
        ("one", ("",), ("",), [[[0.5]]]),
        ("off", ("",), ("LoRA", "LoRA × 0"), [[[0.5], [0.0]]]),
        ("checkpoints", ("",), ("step 10", "end"), [[[0.5, 1.0, 0.0], [0.5, 0.0, 1.0]]]),
        (
            "grid",
            ("step 10", "end"),
            ("× 0", "× 2"),
            [[[0.5, 0.0, 0.0], [0.5, 2.0, 0.0]], [[0.5, 0.0, 0.0], [0.5, 0.0, 2.0]]],
        ),
        ("steps", ("4 steps", "8 steps"), ("× 0", "× 2"), [[[0.0], [1.0]], [[0.0], [1.0]]]),
    ],
)
def test_a_comparison_is_one_list_for_one_call(tmp_path, compare, rows, columns, scales):
    asked = Asked(**{**ASKED.__dict__, "compare": compare})
    table = table_of(asked)
    assert (table.rows, table.columns) == (rows, columns)
    assert [[line["lora_scale"] for line in row] for row in table.lines] == scales
    argv = write_drawing(asked, tmp_path, "out")
    assert argv[0] in COMMANDS and argv[argv.index("--output_dir") + 1] == "out"
    loras = argv[argv.index("--path_to_lora") + 1 :]
    assert len(loras) == len(scales[0][0])
    drawing = Drawing(model="m", prompts="list", path_to_lora=loras)
    pictures = read_pictures(tmp_path / "list.jsonl", drawing, check_numbers)
    assert [each.name for each in pictures] == [name for row in table.names for name in row]
    assert [list(by for _, by in each.drawing.loras) for each in pictures] == [
        by for row in scales for by in row
    ]
    assert {(each.drawing.seed, each.drawing.width, each.drawing.height) for each in pictures} == {
        (7, 64, 32)
    }
    assert [each.drawing.steps for each in pictures] == (
        [4, 4, 8, 8] if compare == "steps" else [4] * len(pictures)
    )
    assert read_drawing(tmp_path) == (asked, list(rows), list(columns), table.names)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Asked(), "prompt: came nothing"),
        (Asked(prompt="x", compare="off"), "no LoRA to compare"),
        (Asked(prompt="x", compare="grid"), "no LoRA files yet"),
        (Asked(prompt="x", compare="steps", loras=(("a", 1.0),), strengths=(1.0,) * 401, step_counts=(1,)),
         "wanted 1 to 400"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_told(asked, message):
    with pytest.raises(ConfigError, match=message):
        table_of(asked)


def png(**texts):
    note, out = PngInfo(), io.BytesIO()
    for name, text in texts.items():
        note.add_itxt(name, text)
    Image.new("RGB", (64, 32)).save(out, "png", pnginfo=note)
    return out.getvalue()


def test_a_picture_tells_what_it_was_drawn_with():
    settings = {"prompt": "other", "seed": 7, "steps": 4, "lora_scale": [0.5, 0.0, 1.0], "model": "digest"}
    files = {"model": "models/m", "path_to_lora": ["a", "b", "c"], "reference": ["r.png"]}
    asked = asked_of_picture(png(prompt="a hat", settings=json.dumps(settings), files=json.dumps(files)))
    assert asked == Asked(model="models/m", prompt="a hat", seed=7, steps=4, width=64, height=32,
                          loras=(("a", 0.5), ("c", 1.0)), reference=("r.png",))  # fmt: skip
    assert asked_of_picture(png(prompt="of a run's preview")).prompt == "of a run's preview"


@pytest.mark.parametrize(
    "content",
    [b"", b"<svg onload=alert(1)>", png(), png(prompt="x", settings="{"), png(prompt="x", settings="[]"),
     png(prompt="x", files="3"), png(prompt="x", settings="[" * 9000),
     png(prompt="x", files='{"loras": [3]}'), png(prompt="x", settings='{"strengths": [null]}')],
)  # fmt: skip
def test_another_picture_is_refused(content):
    with pytest.raises(ConfigError, match="no PNG that ppcoat drew"):
        asked_of_picture(content)


def test_values_of_another_kind_are_left_out():
    strange = {"seed": "7", "steps": True, "width": 1e9, "guidance_scale": None, "compare": "3", "unknown": 1}
    assert asked_of_picture(png(prompt="x", settings=json.dumps(strange))) == Asked(
        prompt="x", width=64, height=32
    )


def test_lists_of_numbers():
    assert one_number("7", whole=True) == 7
    with pytest.raises(ConfigError, match="wanted one number"):
        one_number("7, 8")
    assert numbers_of("0, 0.5;1") == (0.0, 0.5, 1.0) and numbers_of("8 16", whole=True) == (8, 16)
    for text, whole in (("", False), ("a", False), ("nan", False), ("1.5", True)):
        with pytest.raises(ConfigError, match="with commas between"):
            numbers_of(text, whole)
