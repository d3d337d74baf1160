"""Files of the world read with limits."""

import os

import pytest

from ppcoat.errors import LONGEST_LINE, one_line
from ppcoat.reading import MAX_LEVELS, json_value, leaves, regular_bytes


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
