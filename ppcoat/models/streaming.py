"""Writes safetensors files, alone or as a component folder of shards, tensor by tensor: one is in memory at
a time.

The whole layout is known before the first byte, so that the room on the disk is checked first and every
shard's header can be written before its tensors. The folder takes its name when it is complete; what a killed
process left of one is removed by the next.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ppcoat.errors import ConfigError
from ppcoat.host import is_running
from ppcoat.models.saving import cut_into_shards, write_json

_log = logging.getLogger(__name__)

STEM = "diffusion_pytorch_model"
INDEX = f"{STEM}.safetensors.index.json"
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}
_ALIGNMENT = 64  # of the first byte of data in a shard

Layout = dict[str, tuple[str, list[int]]]  # name -> dtype as safetensors names it, shape


def layout_bytes(layout: Layout) -> int:
    """Bytes of all tensors of a layout. Raises ConfigError for a dtype that cannot be written."""
    return sum(_nbytes(entry) for entry in layout.values())


def check_room(place: Path, wanted: int, what: str, advice: str) -> None:
    """Raise ConfigError with both numbers unless the disk of the folder `place`, which is made, has `wanted`
    bytes free. what: "the copy takes". advice: what to do."""
    place.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(place).free
    if free < wanted:
        raise ConfigError(f"{what} {wanted / 1e9:.2f} GB, and {place} has {free / 1e9:.2f} GB free: {advice}")


def write_component(
    folder: Path,
    config: dict,
    layout: Layout,
    tensors: Iterable[tuple[str, np.ndarray]],
    metadata: dict[str, str],
) -> None:
    """`folder`, replaced if it is there: config.json, shards, and an index with the CRC-32 of each tensor.

    tensors: (name, values) in the order of `layout`, bfloat16 as uint16. metadata goes into the header of
    every shard. Raises OSError (disk full) with an earlier folder untouched.
    """
    _remove_drafts(folder)
    part = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    part.mkdir(parents=True)
    try:
        write_json(part / "config.json", config)
        shards = cut_into_shards({name: _nbytes(entry) for name, entry in layout.items()})
        stream, sums, weight_map = iter(tensors), {}, {}
        for number, names in enumerate(shards, 1):
            file = part / f"{STEM}-{number:05d}-of-{len(shards):05d}.safetensors"
            sums |= write_file(file, {name: layout[name] for name in names}, stream, metadata)
            weight_map |= dict.fromkeys(names, file.name)
        said = {"total_size": layout_bytes(layout), "crc32": sums}
        write_json(part / INDEX, {"metadata": said, "weight_map": weight_map})
        if folder.exists():  # the stale one; a folder cannot be renamed onto another
            shutil.rmtree(folder)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def shard_metadata(file: Path) -> dict[str, str]:
    """What a shard's header says beside its tensors. Raises ValueError for a file without a header."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(min(length, file.stat().st_size)))
    return header.get("__metadata__", {})


def write_file(
    file: Path, layout: Layout, stream: Iterator[tuple[str, np.ndarray]], metadata: dict[str, str]
) -> dict[str, int]:
    """The next tensors of the stream, (name, values) in the order of `layout`, bfloat16 as uint16, as one
    safetensors file -> name -> CRC-32. Raises OSError (disk full)."""
    header: dict = {"__metadata__": metadata}
    end = 0
    for name, entry in layout.items():
        start, end = end, end + _nbytes(entry)
        header[name] = {"dtype": entry[0], "shape": entry[1], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    sums = {}
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for wanted in layout:
            # no name is bound here, or this tensor would still be there while the next one is made
            sums[wanted] = _write_tensor(out, (wanted, _nbytes(layout[wanted])), *next(stream))
        out.flush()
        os.fsync(out.fileno())
    return sums


def _write_tensor(out: BinaryIO, wanted: tuple[str, int], name: str, values: np.ndarray) -> int:
    """-> CRC-32. wanted: the name and number of bytes that the header speaks of."""
    data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    assert (name, data.size) == wanted, (name, data.size, wanted)
    out.write(data)
    return zlib.crc32(data)


def _remove_drafts(folder: Path) -> None:
    """What this process or one that is gone left of `folder`, which may be many gigabytes."""
    for draft in folder.parent.glob(f"{folder.name}.tmp-*"):
        match = re.fullmatch(r".*\.tmp-([0-9]+)", draft.name)
        if match and not is_running(int(match[1])):
            _log.warning("removing %s, which a stopped process left unfinished", draft)
            shutil.rmtree(draft)


def _nbytes(entry: tuple[str, list[int]]) -> int:
    if entry[0] not in _BYTES:
        raise ConfigError(f"{entry[0]} numbers cannot be written; wanted one of {', '.join(_BYTES)}")
    return _BYTES[entry[0]] * int(np.prod(entry[1]))
