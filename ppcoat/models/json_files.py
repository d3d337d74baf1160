"""JSON of a model's files, read with limits: they come from the world, and a reader of them must end.

A file is read only if it is a regular one, up to a limit of bytes; nesting, long integers and keys that stand
twice are refused. What the values may be is in limits.py.
"""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any

from ppcoat.errors import ConfigError

CONFIG_BYTES = 1 << 20
TABLE_BYTES = 20 << 20  # indices, headers, tokenizers' settings: FLUX.1's have 0.2 MB, Gemma 3's 1.2 MB
VOCABULARY_BYTES = 100 << 20  # Gemma 3's tokenizer.json has 33 MB
_DEEPEST = 64
_MOST_DIGITS = 40  # transformers writes 10^30, rounded, for "no limit"
_LONGEST = 80  # letters of a value or a name in a message


def read_json(file: Path, why: str = "the folder is not complete", limit: int = CONFIG_BYTES) -> dict:
    """The object in a JSON file. Raises ConfigError if the file is missing, is none that holds bytes, is
    larger than `limit` bytes, or holds no object."""
    return json_object(read_bytes(file, why, limit), str(file))


def read_bytes(file: Path, why: str = "the folder is not complete", limit: int = CONFIG_BYTES) -> bytes:
    """What a regular file holds. Raises ConfigError for one that is missing or larger than `limit` bytes, and
    for a folder, a pipe, a device or a link to itself."""
    try:
        with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK), "rb") as stream:  # a pipe without a writer
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise ConfigError(f"{file} is a folder, a pipe or a device: put the model's file there")
            content = stream.read(limit + 1)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{file} is missing: {why}") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{file} is a folder: put the model's file there") from error
    if len(content) > limit:
        raise ConfigError(f"{file} has more than {limit} bytes: take the file of the model")
    return content


def json_object(content: bytes, what: str) -> dict:
    """The object in the bytes of a JSON text. what: the file, for the message. Raises ConfigError for other
    bytes."""
    try:
        found = json.loads(content.decode("utf-8-sig"), parse_int=_integer, object_pairs_hook=_once)
        _check_depth(found)
    except RecursionError as error:
        raise ConfigError(f"{what} is nested too deeply: take that of the model") from error
    except ValueError as error:
        raise ConfigError(f"{what} is not valid JSON: {shown(error)}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{what} holds no JSON object: take that of the model")
    return found


def shown(value: object) -> str:
    """A value or name of a file as it stands in a message: short, in one line."""
    text = str(value) if isinstance(value, str | Exception) else repr(value)
    text = text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
    return "".join(mark if mark.isprintable() else repr(mark)[1:-1] for mark in text)


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {shown(name)} stands twice")
    return found


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_DEEPEST + 1):
        containers = [each for each in level if isinstance(each, dict | list)]
        if not containers:
            return
        level = [
            inner for each in containers for inner in (each.values() if isinstance(each, dict) else each)
        ]
    raise ValueError(f"nested more than {_DEEPEST} levels deep")
