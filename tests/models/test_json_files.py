"""JSON of a model's files: what is refused, in one line and at once."""

import json
import os

import pytest

from ppcoat.errors import ConfigError
from ppcoat.models.json_files import json_object, read_bytes, read_json, shown


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
def test_other_content_is_refused(content, said):
    with pytest.raises(ConfigError, match=said):
        json_object(content, "x")


def test_64_levels_are_read():
    assert json_object(b'{"a":' * 64 + b"1" + b"}" * 64, "x")


def test_only_a_regular_file_is_read(tmp_path):
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
