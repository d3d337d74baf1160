"""Encodings on disk: one small safetensors file per key, shared by processes and by later runs.

    <folder>/3f/3fa4...e1.safetensors               named by its key; two letters keep the folders small

A key is made of everything that decides the content (content_key), so an entry never goes out of date, and
two writers of one key write the same. This file knows nothing of what an entry means.
"""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path

import paddle
import safetensors.paddle
from safetensors import SafetensorError

from ppcoat.atomic import check_writable, remove_dead_drafts, whole_file
from ppcoat.data.content_keys import FORMAT
from ppcoat.errors import ConfigError
from ppcoat.finite import first_not_finite
from ppcoat.reading import json_value, regular_bytes

MAX_ENTRY_BYTES = 1 << 30  # a picture of 4096 x 4096 has 8 MB, a caption's embeddings have 4
_KEY = re.compile(r"^[0-9a-f]{64}$")

_log = logging.getLogger(__name__)


class EmbeddingStore:
    """Named tensors by key under `folder`, every dtype bit for bit (bfloat16 and float8 too).

    Any number of processes and machines may read and write at once. Raises ConfigError where `folder` cannot
    be made or written to. Removes drafts that killed writers left: of this machine at once, of others after a
    day.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            check_writable(self.folder)
            for folder in (self.folder, *self.folder.glob("[0-9a-f][0-9a-f]")):
                remove_dead_drafts(folder)
        except OSError as error:
            raise ConfigError(
                f"cache folder {self.folder}: cannot be written to ({error.strerror}); "
                "choose another folder or make it writable"
            ) from None

    def get(self, key: str) -> dict[str, paddle.Tensor] | None:
        """The tensors put under `key`, of any shape and dtype, on the CPU; None if there is no entry.

        A damaged file or one of another program also gives None, with a warning; the next put replaces it.
        """
        path = self._path(key)
        try:
            return _decode(key, regular_bytes(path, MAX_ENTRY_BYTES))
        except FileNotFoundError:
            return None
        except OSError as error:
            reason = error.strerror
        except _Damaged as damage:
            reason = str(damage)
        _log.warning("cache entry %s is of no use (%s); it will be made anew", path, reason)
        return None

    def put(self, key: str, tensors: dict[str, paddle.Tensor]) -> None:
        """Write `tensors`, of any shape and dtype, under `key`: completely, or not at all if the process is
        killed.

        Raises OSError (such as a full disk); an earlier entry of that key then stays as it was.
        """
        path = self._path(key)
        with whole_file(path) as draft:
            draft.write_bytes(_encode(key, tensors))

    def _path(self, key: str) -> Path:
        assert _KEY.match(key), f"{key!r} is not from content_key"
        return self.folder / key[:2] / f"{key}.safetensors"


class _Damaged(Exception):
    """An entry cannot be used; the text is the reason."""


def _encode(key: str, tensors: dict[str, paddle.Tensor]) -> bytes:
    """safetensors bytes whose header also contains the key and the sha256 of the tensor bytes."""
    dense = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    digest = _split(safetensors.paddle.save(dense))[1]
    metadata = {"format": FORMAT, "key": key, "sha256": hashlib.sha256(digest).hexdigest()}
    return safetensors.paddle.save(dense, metadata)


def _decode(key: str, content: bytes) -> dict[str, paddle.Tensor]:
    try:
        header, data = _split(content)
        metadata = json_value(header)["__metadata__"]
        named = (metadata["format"], metadata["key"])
        digest = metadata["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise _Damaged(f"cut off, or not of ppcoat: {type(error).__name__}") from None
    if named != (FORMAT, key):
        raise _Damaged("holds another entry")
    if hashlib.sha256(data).hexdigest() != digest:
        raise _Damaged("cut off, or its bytes have changed")
    try:
        tensors = safetensors.paddle.load(content)
    except SafetensorError as error:
        raise _Damaged(str(error)) from None
    if (name := first_not_finite(tensors)) is not None:
        raise _Damaged(f"its {name} holds NaN or infinity")
    return tensors


def _split(content: bytes) -> tuple[bytes, memoryview]:
    """Header (JSON) and tensor bytes: the format begins with the header's length, 8 bytes, little-endian."""
    start = 8 + int.from_bytes(content[:8], "little")
    return content[8:start], memoryview(content)[start:]
