"""Lists of pictures: what each line says, in every form, and what is refused with its line."""

import json
import re

import pytest

import ppcoat.infer.prompts as prompts_module
from ppcoat.errors import ConfigError
from ppcoat.infer.drawing import Drawing, check_numbers
from ppcoat.infer.prompts import read_pictures

FLAGS = Drawing("m", prompts="list", seed=9, steps=4, width=64, path_to_lora=["a", "b"], lora_scale=[1.0])


def check(drawing):
    """What the command checks of each line, for any model."""
    check_numbers(drawing)


def read(tmp_path, ending, content, flags=FLAGS):
    file = tmp_path / f"list.{ending}"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_pictures(file, flags, check)


def said(pictures, *names):
    return [tuple(getattr(picture.drawing, name) for name in names) for picture in pictures]


SAME = {
    "jsonl": '{"prompt": "a red dress", "seed": 7, "size": "1024x768", "lora_strength": [0.8, 0.5]}\n'
    '\n{"text": "a \\"blue\\", hat", "negative": "dots", "guidance": 2.5, "steps": null, "m": 2}\n',
    "csv": "Prompt,seed,W,h,Negative Prompt,guidance_scale,lora-scale\n"
    'a red dress,7,1024,768,,,"0.8, 0.5"\n\n"a ""blue"", hat",,,,dots,2.5,2\n',
    "tsv": "prompt\tseed\tsize\tneg\tg\tm\na red dress\t7\t1024 x 768\t\t\t0.8;0.5\n"
    '"a ""blue"", hat"\t\t\tdots\t2.5\t2',
    "txt": "# two\na red dress --w 1024 --h=768 --d 7 --am 0.8,0.5\n\n"
    '  a "blue", hat --n "dots" --g 2.5 --m 2\n',
}


@pytest.mark.parametrize("ending", SAME)
@pytest.mark.parametrize("as_bytes", [
    lambda text: text.encode(),
    lambda text: b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode(),
    lambda text: text.encode("utf-16"),
], ids=["plain", "BOM and CRLF", "UTF-16"])  # fmt: skip
def test_every_form_says_the_same(tmp_path, ending, as_bytes):
    found = read(tmp_path, ending, as_bytes(SAME[ending]))
    names = ("prompt", "seed", "width", "height", "steps", "negative_prompt", "guidance_scale")
    assert said(found, *names) == [
        (["a red dress"], 7, 1024, 768, 4, "", None),
        (['a "blue", hat'], 9, 64, None, 4, "dots", 2.5),
    ]
    assert [[by for _, by in each.drawing.loras] for each in found] == [[0.8, 0.5], [2, 2]]
    assert [each.name for each in found] == ["000_a-red-dress_7", "001_a-blue-hat_9"]


def test_num_images_of_each_line_have_seeds_and_names_of_their_own(tmp_path):
    flags = Drawing("m", prompts="list", num_images=2)
    found = read(tmp_path, "csv", "prompt,name,d\na,dress.PNG,\nb,,7\n", flags)
    assert [each.name for each in found] == ["dress_42", "dress_43", "002_b_7", "003_b_8"]
    assert said(found, "seed", "num_images") == [(42, 1), (43, 1), (7, 1), (8, 1)]


def test_a_name_keeps_the_letters_of_every_language(tmp_path):
    pictures = read(tmp_path, "txt", "E\u0301té_à la plage!\n../../a\\b:c\n…\n")
    names = ["000_été-à-la-plage_9", "001_a-b-c_9", "002_picture_9"]
    assert [picture.name for picture in pictures] == names


def test_excels_first_line_and_other_encodings(tmp_path, capsys):
    found = read(tmp_path, "csv", "sep=;\r\nprompt;w\r\n一件红色的裙子,长的;32\r\n".encode("gb18030"))
    assert said(found, "prompt", "width") == [(["一件红色的裙子,长的"], 32)]
    assert "read as gb18030, a guess" in capsys.readouterr().out
    assert found[0].name == "000_一件红色的裙子-长的_9"


def test_empty_cells_of_a_table_name_no_picture(tmp_path):
    found = read(tmp_path, "csv", "prompt,image,ctrl_img\na,,\nb,b.png,\nc,,c.png\n")
    assert said(found, "image", "reference") == [(None, None), ("b.png", None), (None, ["c.png"])]


def test_dashes_that_are_no_flag_stay_text(tmp_path):
    found = read(tmp_path, "txt", "a well-made -- dress --- with --dots-- on it\n")
    assert found[0].drawing.prompt == ["a well-made -- dress --- with --dots-- on it"]


WRONG = [
    ("csv", "prompt,sede\na,1\n", "line 2: unknown column or flag 'sede', the nearest is 'seed'"),
    ("csv", "prompt,seed\na,1,2\n", "line 2: more cells than the header has"),
    ("csv", 'prompt,seed\n"a\nb",1\nc,x\n', "line 4: seed: came 'x', wanted a number"),
    ("csv", "seed\n1\n", "line 2: no prompt"),
    ("csv", "prompt,h,height\na,32,32\n", "line 2: height is given twice"),
    ("txt", "a --ar 16:9", "line 1: unknown column or flag 'ar'"),
    ("txt", "a --l 3", "line 1: 'l' is guidance in ai-toolkit and classifier-free guidance in kohya's"),
    ("txt", "a --ss euler", "line 1: 'ss' names a sampler"),
    ("txt", "--w 64", "line 1: no prompt"),
    ("txt", "a --w 40\nb --h 3", "line 1: width: came 40, wanted a multiple of 16 (so many lines with"),
    ("txt", "# nothing\n\n", "has no prompts"),
    ("txt", b"\0\1\2\3\xff\xfe\xfd", "is damaged or in no known encoding"),
    ("md", "a", "wanted a .jsonl, .csv, .tsv, .txt file"),
    ("jsonl", '{"prompt": "a"}\n{"prompt": "b"', "line 2: no JSON"),
    ("jsonl", '["a"]', 'line 1: came ["a"], wanted an object'),
    ("jsonl", '{"prompt": "a", "prompt": "b"}', "line 1: prompt is given twice"),
    ("jsonl", '{"prompt": {"a": 1}}', "line 1: prompt: came (('a', 1),), wanted a text"),
    ("jsonl", '{"prompt": "\\ud800"}', "line 1: prompt: \\ud800 holds half of a"),
    ("jsonl", '{"prompt": "a\\u0000b"}', "line 1: prompt: wanted at most 65536 bytes without control"),
    ("jsonl", '{"prompt": "a", "seed": 1.5}', "line 1: seed: came 1.5, wanted a whole number"),
    ("jsonl", '{"prompt": "a", "seed": true}', "line 1: seed: came True, wanted a number"),
    ("jsonl", '{"prompt": "a", "seed": -1}', "line 1: seed: came -1, wanted 0 to"),
    ("jsonl", '{"prompt": "a", "seed": 99999999999999999999}', "line 1: seed: came 99999"),
    ("jsonl", '{"prompt": "a", "guidance": NaN}', "line 1: guidance_scale: came nan, wanted a number"),
    ("jsonl", '{"prompt": "a", "size": "big"}', "line 1: size: came 'big', wanted width x height"),
    ("jsonl", '{"prompt": "a", "size": "64x64", "w": 32}', "line 1: size is given beside width"),
    ("jsonl", '{"prompt": "a", "m": [1, 2, 3]}', "line 1: lora_scale: came 3 strengths for 2 LoRAs"),
    ("jsonl", '{"prompt": "a", "m": "1,2", "m": 1}', "line 1: lora_scale is given twice"),
    ("txt", "a --ctrl_img", "line 1: reference names no file; write its path, or leave reference out"),
    ("txt", "a --image  --mask m.png", "line 1: image names no file"),
    ("jsonl", '{"prompt": "a", "mask": ""}', "line 1: mask names no file"),
    ("jsonl", '{"prompt": "a", "reference": ["b.png", " "]}', "line 1: reference names no file"),
    ("csv", "prompt,name\na,x\nb,X.png\n", "line 3: the name 'X' is that of line 2, too"),
    ("csv", "prompt,name\na,001_b_9\nb,\n", "line 3: the name '001_b_9' is that of line 2, too"),
]  # fmt: skip


@pytest.mark.parametrize(("ending", "content", "message"), WRONG)
def test_a_mistake_is_told_with_its_line(tmp_path, ending, content, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as refused:
        read(tmp_path, ending, content)
    assert f"list.{ending}" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("name", [
    "../x", "/x", "a/b", "..\\x", "c:x", ".", "..", ".hidden", " x", "x.", "con", "NUL.png", "a\tb",
    "x" * 200, "x?", "contact", "Contact_2.png", ".png",
])  # fmt: skip
def test_a_name_is_a_file_in_the_output_folder_and_nothing_else(tmp_path, name):
    if name == " x":  # blanks around it are not part of it
        assert read(tmp_path, "jsonl", json.dumps({"prompt": "a", "name": name}))[0].name == "x"
        return
    with pytest.raises(ConfigError, match="line 1: name:"):
        read(tmp_path, "jsonl", json.dumps({"prompt": "a", "name": name}))


def test_a_strength_without_a_lora_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="line 1: lora_scale is given, and no LoRA"):
        read(tmp_path, "txt", "a --m 0.5", Drawing("m", prompts="list"))


def test_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(prompts_module, "MAX_PICTURES", 3)
    with pytest.raises(ConfigError, match="more than 3 pictures; split"):
        read(tmp_path, "txt", "a\nb\n", Drawing("m", prompts="list", num_images=2))
    monkeypatch.setattr(prompts_module, "MAX_LIST_BYTES", 3)
    with pytest.raises(ConfigError, match="list.txt cannot be read .more than 3 bytes.; split the list"):
        read(tmp_path, "txt", "abcd")
