"""Keys made of contents: of what is encoded, for the store, and of files."""

from __future__ import annotations

import hashlib
import time
from functools import lru_cache
from pathlib import Path

from ppcoat.errors import ConfigError
from ppcoat.reading import FileState

FORMAT = "ppcoat-embedding-1"  # part of every key, so that entries of another format are never found


def content_key(*parts: str | bytes | int) -> str:
    """sha256 (64 hex digits) of the parts, each with its type and length, so that ("ab", "c") and ("a", "bc")
    have different keys, and so have 1 and "1". The parts must include everything that decides the content:
    file_digest of the picture, size, caption, encoder, dtype."""
    digest = hashlib.sha256(FORMAT.encode())
    for part in parts:
        content = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
        digest.update(f"|{type(part).__name__}:{len(content)}:".encode())
        digest.update(content)
    return digest.hexdigest()


def file_digest(path: str | Path) -> str:
    """sha256 (64 hex digits) of a file's bytes, which are read once in a process while the file stays as it
    is. Raises ConfigError naming a file that cannot be read."""
    try:
        state = FileState.of(path)
        read = _digest if state.is_settled(time.time_ns()) else _digest.__wrapped__
        return read(str(path), state)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); restore the file or remove it"
        ) from None


@lru_cache(maxsize=1 << 17)  # 40 MB
def _digest(path: str, state: FileState) -> str:
    """Of the file while this is its state."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
