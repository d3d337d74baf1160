"""Files that come from anywhere, read with limits, so that every reader of them ends: only regular files, at
most so many bytes, nested at most so deep.

What they mean is known where they are read. `regular_bytes` and `json_value` leave the words of an error to
their callers; `read_bytes`, `read_json` and `json_object` have those for a file of a model. What its values
may be is in models/limits.py.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from ppcoat.errors import ConfigError, printable

MAX_LEVELS = 64  # of brackets in each other
MAX_DIGITS = 40  # transformers writes 10^30, rounded, for "no limit"
TOO_DEEP = f"nested deeper than {MAX_LEVELS} levels"
# Of a model's files.
CONFIG_BYTES = 1 << 20
TABLE_BYTES = 20 << 20  # indices, headers, tokenizers' settings: FLUX.1's have 0.2 MB, Gemma 3's 1.2 MB
VOCABULARY_BYTES = 100 << 20  # Gemma 3's tokenizer.json has 33 MB
_LONGEST = 80  # letters of a value or a name in a message
_YOUNG = 2 * 10**9  # nanoseconds in which a file may change again without a change of its times


def regular_bytes(path: str | Path, most: int) -> bytes:
    """What a regular file, links followed, holds. Raises OSError with its reason in words: also for a folder,
    a pipe or a device, which may never end, for a name that no file can have, and for more than `most`
    bytes."""
    try:
        with open(path, "rb", opener=only_regular) as file:
            content = file.read(most + 1)
    except ValueError:  # a zero byte, or half of a character
        raise FileNotFoundError(errno.ENOENT, "no file has such a name", str(path)) from None
    if len(content) > most:
        raise OSError(errno.EFBIG, f"more than {most} bytes", str(path))
    return content


def only_regular(path: str, flags: int) -> int:
    """`opener` of open(): raises OSError for all but regular files, and waits for none."""
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file but a folder, a pipe or a device", path)
    return descriptor


def followed(path: str | Path) -> Path:
    """The absolute path with all links followed; one in a circle of links stands for itself, where
    Path.resolve raises RuntimeError."""
    return Path(os.path.realpath(path))


class FileState(NamedTuple):
    """What changes when a file does: times in nanoseconds, and the number of its inode. Its path does not
    count, for a folder may be moved."""

    size: int
    written: int
    changed: int
    number: int

    @staticmethod
    def of(path: str | Path) -> FileState:
        """Of a file now. Raises OSError."""
        found = os.stat(path)
        return FileState(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)

    def is_settled(self, now: int) -> bool:
        """Whether the file was left alone so long before `now`, in nanoseconds, that its times tell of the
        next change."""
        return max(self.written, self.changed) < now - _YOUNG


def json_value(text: str | bytes, strict: bool = False) -> Any:
    """What a text of JSON says. Raises ValueError for one that is none, nested deeper than MAX_LEVELS, or
    with a whole number of more than 4,300 digits; strict: of more than MAX_DIGITS, and for a key that stands
    twice in an object."""
    hooks = {"parse_int": _integer, "object_pairs_hook": _once} if strict else {}
    try:
        found = json.loads(text, **hooks)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    leaves(found)
    return found


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a whole number of {len(digits)} digits")
    return int(digits)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {name!r} stands twice")
    return found


def leaves(value: Any) -> list[Any]:
    """The plain values inside of lists and dicts. Raises ValueError for more than MAX_LEVELS of these inside
    each other."""
    found, level = [], [value]
    for _ in range(MAX_LEVELS + 1):
        nested = [each for each in level if isinstance(each, dict | list)]
        found += [each for each in level if not isinstance(each, dict | list)]
        if not nested:
            return found
        level = [inner for each in nested for inner in (each.values() if isinstance(each, dict) else each)]
    raise ValueError(TOO_DEEP)


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
