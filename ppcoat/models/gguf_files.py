"""GGUF, the format of llama.cpp, which ComfyUI-GGUF writes FLUX and T5 in: where its tensors lie, and the
values of their blocks. The package `gguf` of llama.cpp's authors reads the header and decodes.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ppcoat.errors import ConfigError
from ppcoat.reading import shown

MAGIC = b"GGUF"
PLAIN = ("F64", "F32", "F16", "BF16")  # types that are no blocks, named as safetensors does


class GGUFTensor(NamedTuple):
    """shape: rows first, as in NumPy. type: as GGUF names it, "Q8_0". start: the first byte in the file."""

    shape: list[int]
    type: str
    start: int


def is_gguf(file: Path) -> bool:
    """Whether a file begins as GGUF files do."""
    with file.open("rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC


def read_gguf(file: Path) -> tuple[str, dict[str, GGUFTensor]]:
    """The architecture that a GGUF file names ("" for none), and its tensors by name. Raises ConfigError for
    a damaged or cut-off file, and for types of blocks that cannot be decoded."""
    try:
        import gguf
    except ImportError as error:
        raise ConfigError(f"{file} is read by the package gguf: pip install gguf") from error
    try:
        reader = gguf.GGUFReader(file)
        field = reader.get_field("general.architecture")
        architecture = str(field.contents()) if field else ""
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise ConfigError(
            f"{file} is a damaged or cut-off GGUF file ({shown(error)}): fetch it again"
        ) from error
    size, tensors, place = file.stat().st_size, {}, 0
    for tensor in sorted(reader.tensors, key=lambda each: each.data_offset):
        name, kind, start = shown(tensor.name), tensor.tensor_type.name, int(tensor.data_offset)
        shape = [int(side) for side in reversed(tensor.shape)]
        end = start + math.prod(shape[:-1]) * row_bytes(shape[-1], kind)
        if end > size:
            raise ConfigError(f"{file} is cut off: {size} bytes, and {name} lies beyond: fetch it again")
        if tensors and not 0 <= start - place < reader.alignment:
            raise ConfigError(
                f"{file} is damaged: {name} does not lie where the one before ends: fetch it again"
            )
        place = end
        if kind not in PLAIN and (len(shape) < 2 or not _can_decode(kind)):
            raise ConfigError(f"{file}: {name} {shape} is {kind}, which is not read: take the file in Q8_0")
        tensors[tensor.name] = GGUFTensor(shape, kind, start)
    return architecture, tensors


def row_bytes(values: int, kind: str) -> int:
    """Bytes of a row of so many values in blocks of this type."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return values // block * size


def decoded(rows: np.ndarray, kind: str) -> np.ndarray:
    """uint8 [rows, bytes], blocks of type `kind` -> their values, float32 [rows, columns]."""
    import gguf

    return gguf.dequantize(rows, gguf.GGMLQuantizationType[kind])


def _can_decode(kind: str) -> bool:
    """Whether the package decodes blocks of this type."""
    import gguf

    _, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    try:
        decoded(np.zeros([1, size], np.uint8), kind)
    except NotImplementedError:
        return False
    return True
