"""Headers of safetensors files, checked before anything is mapped: where each tensor lies, what its numbers
are. And what a file is that has no such header.

A header is data of strangers: its tensors must lie one after another, without gap or overlap, from the first
byte after the header to the last of the file, each with the bytes of its shape.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import NamedTuple

from ppcoat.errors import ConfigError
from ppcoat.reading import TABLE_BYTES, json_object, shown

# Bits of a number of each dtype of safetensors.
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **{"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4},
}
_MOST_TENSORS = 20_000  # FLUX.1-dev has 1,160; with a scale or two for each matrix, as many again
_MOST_AXES, _LONGEST_SIDE, _LONGEST_NAME = 64, 1 << 40, 1000
# How a file begins that is no safetensors file (spaces left out, small letters) -> what it is.
_BEGINNINGS = [
    (
        rb"<[!?/a-z]",
        "a web page, saved under this name: the download asked for a login or a click; fetch it again",
    ),
    (
        rb"version https://git-lfs",
        "a Git LFS pointer, not the file itself: run `git lfs pull`, or download it again",
    ),
    (rb"[{\[]", "a text (JSON), not tensors: what a server answered in place of the file; fetch it again"),
    (
        rb"\x80[\x02-\x05]|pk\x03\x04.{26,200}data\.pkl",
        "a pickle under another name, and reading it can run code: convert it to .safetensors",
    ),
    (rb"gguf", "a GGUF file, wanted a .safetensors"),
    (rb"pk\x03\x04|\x1f\x8b|rar!|7z\xbc\xaf|.{257}ustar", "an archive under another name: unpack it"),
    (rb"\x89png|\xff\xd8\xff|gif8|riff.{4}webp", "a picture, saved under this name: fetch the file itself"),
    (rb"\0*$", "all zeros: the download stopped before it began; fetch it again"),
    (rb"[ -~\s]{1,512}$", "a text, what a server answered in place of the file; fetch it again"),
]
_BOM = b"\xef\xbb\xbf"


class Entry(NamedTuple):
    """A tensor. dtype: as safetensors names it, "BF16". start: its first byte in the file."""

    dtype: str
    shape: list[int]
    start: int


def read_entries(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Name -> Entry of one safetensors file, and the texts of its header. Raises ConfigError for a cut-off or
    damaged one, and for one that is something else."""
    if not file.is_file():
        raise ConfigError(f"{file} is missing, or no regular file: fetch it again")
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(size - 8, TABLE_BYTES):
            what = "not a whole safetensors file: it is cut off, or something else"
            raise ConfigError(f"{file} is {what_it_is(file) or f'{what} ({size} bytes): fetch it again'}")
        text = stream.read(length)
    header = json_object(text, f"the header of {file}")
    texts = header.pop("__metadata__", None)
    texts = {} if texts is None else texts
    if not isinstance(texts, dict) or not all(isinstance(value, str) for value in texts.values()):
        raise _damaged(file, f"__metadata__ is {shown(texts)}, wanted texts by name")
    if len(header) > _MOST_TENSORS:
        raise _damaged(file, f"{len(header)} tensors, wanted at most {_MOST_TENSORS}")
    entries, spans = {}, []
    for name, said in header.items():
        entry, end = _entry(file, name, said, 8 + length)
        entries[name] = entry
        spans.append((entry.start, end, name))
    place = 8 + length
    for start, end, name in sorted(spans):
        if start != place:
            raise _damaged(file, f"{name} begins at byte {start}, where the one before ends at {place}")
        place = end
    if size != place:
        raise ConfigError(f"{file} has {size} bytes, its header speaks of {place}: fetch it again")
    return entries, texts


def _entry(file: Path, name: str, said: object, begin: int) -> tuple[Entry, int]:
    """One tensor of a header, and where it ends. begin: where the bytes of tensors begin."""
    if len(name) > _LONGEST_NAME or name.encode(errors="replace").decode() != name:  # half of a character
        raise _damaged(file, f"a tensor is named {shown(name)}")
    dtype, shape, span = (
        said.get(key) if isinstance(said, dict) else None for key in ("dtype", "shape", "data_offsets")
    )
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _damaged(file, f"{name}: dtype came {shown(dtype)}, wanted one of {', '.join(_BITS)}")
    if not _are_sizes(shape) or len(shape) > _MOST_AXES or max(shape, default=0) > _LONGEST_SIDE:
        raise _damaged(file, f"{name}: shape came {shown(shape)}, wanted whole numbers from 0")
    if not _are_sizes(span) or len(span) != 2:
        raise _damaged(file, f"{name}: data_offsets came {shown(span)}, wanted two whole numbers from 0")
    if (span[1] - span[0]) * 8 != math.prod(shape) * _BITS[dtype]:
        raise _damaged(file, f"{name} has {span[1] - span[0]} bytes, which are not those of {dtype} {shape}")
    return Entry(dtype, shape, begin + span[0]), begin + span[1]


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(each) is int and each >= 0 for each in value)


def _damaged(file: Path, why: str) -> ConfigError:
    return ConfigError(f"{file} has a damaged header ({why}): fetch it again")


def what_it_is(file: Path) -> str | None:
    """What a file is that is no safetensors file, by its first bytes, and what to do; None where they say
    nothing."""
    if not file.stat().st_size:
        return "empty: the download failed; fetch it again"
    with file.open("rb") as stream:
        start = stream.read(512).removeprefix(_BOM).lstrip(b" \t\r\n").lower()
    return next((what for beginning, what in _BEGINNINGS if re.match(beginning, start, re.DOTALL)), None)
