"""Files that come from anywhere, read with limits, so that every reader of them ends: only regular files, at
most so many bytes, nested at most so deep.

What they mean, and what is done about an error, is known where they are read.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any

MAX_LEVELS = 64  # of brackets in each other
MAX_DIGITS = 40  # transformers writes 10^30, rounded, for "no limit"
TOO_DEEP = f"nested deeper than {MAX_LEVELS} levels"


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
