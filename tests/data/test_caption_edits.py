"""Captions are changed where they are read from, together or not at all, and taken back byte for byte."""

import json
import os

import pytest

from ppcoat import atomic
from ppcoat.data.caption_edits import CaptionEditor, CaptionFlags
from ppcoat.data.sources import scan_folder
from ppcoat.errors import ConfigError


def editor(folder, ext="txt"):
    return CaptionEditor(scan_folder(folder, ext, default_caption="").items, ext)


def change(**fields):
    return CaptionFlags(folder="", **fields)


@pytest.mark.parametrize(
    ("fields", "caption"),
    [
        ({"prepend": "sks, "}, "sks, a red dress"),
        ({"prepend": "a red"}, "a red dress"),
        ({"append": ", worn"}, "a red dress, worn"),
        ({"append": "dress"}, "a red dress"),
        ({"replace": "red", "by": "blue"}, "a blue dress"),
        ({"replace": "red "}, "a dress"),
        ({"replace": "a red", "by": "the", "prepend": "sks ", "append": " here "}, "sks the dress here"),
        ({"text": "  new "}, "new"),
        ({"replace": ".*"}, "a red dress"),
    ],
)
def test_what_becomes_of_a_caption(fields, caption):
    assert change(**fields).changed("a red dress") == caption


def test_many_captions_are_one_step(draw, tmp_path):
    paths = [
        draw(f"{number}.png", caption=f"a {color} dress") for number, color in enumerate(("red", "blue"))
    ]
    captions = editor(tmp_path)
    new = captions.would_change(change(prepend="sks, ", search="RED"))
    assert new == {paths[0]: "sks, a red dress"}
    captions.write(captions.would_change(change(prepend="sks, ")))
    captions.write({paths[0]: "third"})
    assert [path.with_suffix(".txt").read_text() for path in paths] == ["third", "sks, a blue dress"]
    assert captions.undo() == [tmp_path / "0.txt"]
    assert captions.captions[paths[0]] == "sks, a red dress"
    captions.undo()
    assert [path.with_suffix(".txt").read_text() for path in paths] == ["a red dress", "a blue dress"]
    assert captions.captions == {paths[0]: "a red dress", paths[1]: "a blue dress"} and captions.steps == []


def test_what_was_there_comes_back_byte_for_byte(draw, tmp_path):
    gbk = "一条裙子\r\n".encode("gb18030")
    first, second = draw("a.png", caption=None), draw("b.png", caption=None)
    (tmp_path / "b.TXT").write_bytes(gbk)
    captions = editor(tmp_path)
    assert captions.captions == {first: "", second: "一条裙子"}
    captions.write({first: "new", second: "红色 裙子"})
    assert (tmp_path / "a.txt").read_text() == "new"
    assert (tmp_path / "b.TXT").read_text("utf-8") == "红色 裙子" and not (tmp_path / "b.txt").exists()
    captions.undo()
    assert not (tmp_path / "a.txt").exists() and (tmp_path / "b.TXT").read_bytes() == gbk


def test_tables_and_defaults_stay_and_the_caption_beside_counts(draw, tmp_path):
    first, second = draw("a.png", caption=None), draw("b.png", caption=None)
    table = json.dumps({"file_name": "a.png", "text": "of a table"})
    (tmp_path / "metadata.jsonl").write_text(table)
    (tmp_path / "default.txt").write_text("for all")
    captions = editor(tmp_path)
    assert captions.captions == {first: "of a table", second: "for all"}
    captions.write({first: "own", second: "own too"})
    assert (tmp_path / "metadata.jsonl").read_text() == table
    assert (tmp_path / "default.txt").read_text() == "for all"
    assert list(editor(tmp_path).captions.values()) == ["own", "own too"]


def test_pictures_that_share_a_file_share_the_caption(draw, tmp_path):
    first, second = draw("a.png"), draw("a.jpg", caption=None)
    captions = editor(tmp_path)
    captions.write({first: "both"})
    assert captions.captions == {first: "both", second: "both"}


def test_what_somebody_else_wrote_is_not_written_over(draw, tmp_path):
    first, second = draw("a.png", caption="one"), draw("b.png", caption="two")
    captions = editor(tmp_path)
    (tmp_path / "b.txt").write_text("by another")
    with pytest.raises(ConfigError, match="b.txt was changed since it was read"):
        captions.write({first: "1", second: "2"})
    assert (tmp_path / "a.txt").read_text() == "one" and captions.steps == []
    assert captions.captions[second] == "by another"
    captions.write({second: "2"})  # now it is known
    (tmp_path / "b.txt").write_text("again")
    with pytest.raises(ConfigError, match="b.txt was changed since; nothing was taken back"):
        captions.undo()
    assert (tmp_path / "b.txt").read_text() == "again" and len(captions.steps) == 1


@pytest.mark.parametrize("ext", ["json", "txt"])
def test_json_is_not_written_over(draw, tmp_path, ext):
    picture = draw("a.png", caption=None)
    content = json.dumps({"caption": "a dress", "seed": 3})
    (tmp_path / f"a.{ext}").write_text(content)
    captions = editor(tmp_path, ext)
    assert captions.captions[picture] == "a dress"
    with pytest.raises(ConfigError, match="holds more than a caption"):
        captions.write({picture: "new"})
    assert (tmp_path / f"a.{ext}").read_text() == content


def test_a_caption_that_is_too_long_is_refused_before_anything_is_written(draw, tmp_path):
    first, second = draw("a.png", caption="one"), draw("b.png", caption="two")
    captions = editor(tmp_path)
    with pytest.raises(ConfigError, match="b.txt has 65537 bytes, wanted at most 65536"):
        captions.write({first: "1", second: "x" * 65537})
    assert (tmp_path / "a.txt").read_text() == "one"
    captions.write({first: "half \ud83d"})  # as a browser may cut an emoji
    assert (tmp_path / "a.txt").read_text() == "half ?"


def test_a_full_disk_leaves_whole_captions_and_a_step_to_take_back(draw, tmp_path, monkeypatch):
    first, second = draw("a.png", caption="one"), draw("b.png", caption="two")
    captions = editor(tmp_path)
    replace, calls = os.replace, []

    def full(*paths):
        calls.append(paths)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        replace(*paths)

    monkeypatch.setattr(atomic.os, "replace", full)
    with pytest.raises(ConfigError, match="b.txt cannot be written .No space left"):
        captions.write({first: "1", second: "2"})
    assert ((tmp_path / "a.txt").read_text(), (tmp_path / "b.txt").read_text()) == ("1", "two")
    captions.undo()
    assert (tmp_path / "a.txt").read_text() == "one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a.txt", "b.png", "b.txt"]
