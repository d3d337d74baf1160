"""JSON of a model's files, read with the limits of ppcoat/reading.py, in the words of a model's folder.

What the values may be is in limits.py.
"""

from __future__ import annotations

from pathlib import Path

from ppcoat.errors import ConfigError, printable
from ppcoat.reading import json_value, regular_bytes

CONFIG_BYTES = 1 << 20
TABLE_BYTES = 20 << 20  # indices, headers, tokenizers' settings: FLUX.1's have 0.2 MB, Gemma 3's 1.2 MB
VOCABULARY_BYTES = 100 << 20  # Gemma 3's tokenizer.json has 33 MB
_LONGEST = 80  # letters of a value or a name in a message


def read_json(file: Path, why: str = "the folder is not complete", limit: int = CONFIG_BYTES) -> dict:
    """The object in a JSON file. Raises ConfigError if the file is missing, is none that holds bytes, is
    larger than `limit` bytes, or holds no object."""
    return json_object(read_bytes(file, why, limit), str(file))


def read_bytes(file: Path, why: str = "the folder is not complete", limit: int = CONFIG_BYTES) -> bytes:
    """What a regular file holds. Raises ConfigError for one that cannot be read, with the reason, and for
    one that is missing: `why` that matters."""
    try:
        return regular_bytes(file, limit)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(f"{file} is missing: {why}") from error
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror}): take it from the model") from error


def json_object(content: bytes, what: str) -> dict:
    """The object in the bytes of a JSON text. what: the file, for the message. Raises ConfigError for other
    bytes."""
    try:
        found = json_value(content.decode("utf-8-sig"), strict=True)
    except ValueError as error:
        raise ConfigError(f"{what} is not valid JSON: {shown(error)}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{what} holds no JSON object: take that of the model")
    return found


def shown(value: object) -> str:
    """A value or name of a file as it stands in a message: short, in one line."""
    text = str(value) if isinstance(value, str | Exception) else repr(value)
    text = text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
    return printable(text)
