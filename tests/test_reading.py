"""Files of the world read with limits, and what is said of a model's."""

import json
import os

import pytest

from ppcoat.errors import LONGEST_LINE, ConfigError, one_line
from ppcoat.reading import (
    MAX_LEVELS,
    json_object,
    json_value,
    leaves,
    read_bytes,
    read_json,
    regular_bytes,
    shown,
)


def test_a_regular_file_up_to_a_limit(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("a")
    assert regular_bytes(tmp_path / "a", 5) == regular_bytes(tmp_path / "link", 9) == b"12345"
    with pytest.raises(OSError, match="more than 4 bytes"):
        regular_bytes(tmp_path / "a", 4)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_no_file_ends_at_once(tmp_path, make):
    make(tmp_path / "a")
    with pytest.raises(OSError, match="no regular file but a folder, a pipe or a device") as caught:
        regular_bytes(tmp_path / "a", 5)
    assert caught.value.filename == str(tmp_path / "a")


@pytest.mark.parametrize("name", ["a\0b", "a" * 300, "nothing", "loop"])
def test_names_without_a_file(tmp_path, name):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError) as caught:
        regular_bytes(f"{tmp_path}/{name}", 5)
    assert caught.value.strerror


@pytest.mark.parametrize(
    "text", ["[" * 10**5, "[" * 70 + "]" * 70, '{"a":' * 70 + "1" + "}" * 70, "9" * 5000, "{", ""]
)
def test_json_beyond_its_limits(text):
    with pytest.raises(ValueError):
        json_value(text)


def test_json_within_its_limits():
    deep = "[" * MAX_LEVELS + "]" * MAX_LEVELS
    assert json_value(deep) is not None and json_value(b'{"a": [1, "x"]}') == {"a": [1, "x"]}
    assert sorted(map(str, leaves({"a": [1, "x"], "b": {"c": None}}))) == ["1", "None", "x"]


def test_a_line_of_a_message():
    assert one_line("a\nb\x1b\ud800") == "a\\nb\\x1b\\ud800"
    long = one_line("start" + "\n" * 10**6 + "advice")
    assert (
        long.startswith("start")
        and long.endswith("advice")
        and len(long) < LONGEST_LINE
        and long.isprintable()
    )


def test_what_transformers_writes_is_read():
    """A mark at the start, and its 10^30 for no limit."""
    content = (
        b'\xef\xbb\xbf{"model_max_length": 1000000000000000019884624838656, "a": [1.5, null, "\\u00fc"]}'
    )
    assert json_object(content, "x") == {"model_max_length": int(1e30), "a": [1.5, None, "ü"]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not valid JSON"),
        (b"{", "is not valid JSON"),
        (b"[1]", "holds no JSON object"),
        (b"null", "holds no JSON object"),
        (b'{"a": "\xff"}', "not valid JSON: 'utf-8' codec"),
        ("{}".encode("utf-16"), "not valid JSON"),
        (b'{"a": ' + b"9" * 41 + b"}", "a whole number of 41 digits"),
        (b'{"a": -' + b"9" * 5000 + b"}", "a whole number of 5001 digits"),
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' stands twice"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "nested deeper than 64 levels"),
        (b'{"a":' * 10**5 + b"1" + b"}" * 10**5, "nested deeper than 64 levels"),
    ],
)
def test_what_is_no_json_object_is_refused(content, said):
    with pytest.raises(ConfigError, match=said):
        json_object(content, "x")


def test_64_levels_are_read():
    assert json_object(b'{"a":' * 64 + b"1" + b"}" * 64, "x")


def test_only_a_regular_file_of_a_model_is_read(tmp_path):
    file = tmp_path / "config.json"
    with pytest.raises(ConfigError, match="config.json is missing: why"):
        read_json(file, "why")
    with pytest.raises(ConfigError, match="is missing"):
        read_bytes(tmp_path / "a\0b")
    file.mkdir()
    with pytest.raises(ConfigError, match="no regular file but a folder"):
        read_json(file)
    file.rmdir()
    os.mkfifo(file)
    with pytest.raises(ConfigError, match="a pipe or a device"):
        read_json(file)
    file.unlink()
    file.symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match="a pipe or a device"):
        read_json(file)
    file.unlink()
    (tmp_path / "there.json").write_text(json.dumps({"a": 1}))
    file.symlink_to("there.json")
    assert read_json(file, limit=8) == {"a": 1}
    with pytest.raises(ConfigError, match="more than 7 bytes"):
        read_json(file, limit=7)


@pytest.mark.parametrize(
    ("value", "said"),
    [("a\nb", "a\\nb"), ("x" * 100, "x" * 77 + "..."), ("\ud800", "\\ud800"), (None, "None"), (1.5, "1.5")],
)
def test_a_value_in_a_message_is_short_and_in_one_line(value, said):
    assert shown(value) == said
