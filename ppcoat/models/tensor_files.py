"""Safetensors and JSON of a component folder, on disk: which tensors lie where, and their values.

Headers are read and checked (missing shards, cut-off files); no Paddle and no model. loading.py puts the
tensors into models, single_file.py finds the components that one file holds.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ppcoat.errors import ConfigError
from ppcoat.models import gguf_files
from ppcoat.progress import Progress

# File stems in the order tried: diffusers, transformers, ppdiffusers.
_STEMS = ("diffusion_pytorch_model", "model", "diffusion_paddle_model")
# File names of a stem. diffusers and transformers end the name of an index with the variant, others do not.
_INDEX, _SINGLE = r"{}(?:\.(\w+))?\.safetensors\.index(?:\.(\w+))?\.json", r"{}(?:\.(\w+))?\.safetensors"
_NOT_READ = (".bin", ".pdparams", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx")
# What NumPy reads for a dtype of safetensors; Paddle takes uint16 for the bits of bfloat16.
_NUMPY = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16},
    **{"I64": np.int64, "I32": np.int32, "U8": np.uint8, "BOOL": np.bool_},
}
FP8 = ("F8_E4M3", "F8_E5M2")  # as safetensors names them
_AT_ONCE = 2**18  # FP8 codes: NumPy makes eight bytes of each to look up its value
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pdparams")
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
# Ends of names beside weights in formats that are not read, and whose they are. Our own nf4 copies have an
# absmax, too, but no quant_map and quant_state beside it.
_QUANTISED = [
    (r"\.(?:quant_state\.\w+|nested_absmax|quant_map|SCB)$", "bitsandbytes"),
    (r"\._(?:data|scale)$", "optimum-quanto"),
    (r"\.(?:qweight|qzeros|wscales)$", "GPTQ, AWQ or nunchaku"),
]

PATIENCE = 3.0  # seconds
_log = logging.getLogger(__name__)


class TensorInfo(NamedTuple):
    """Where a tensor lies and its shape on disk; `torch_layout` says that Linear weights are [out, in].

    dtype: of its values, as safetensors names it, "BF16". start: the first byte in the file. stored: how the
    values are written if not as `dtype`: in FP8 or in blocks of GGUF; they are then decoded to F32. scale:
    factor of values in FP8. first_row: row in the file with which the tensor begins; the rows before it are
    its last.
    """

    file: Path
    shape: list[int]
    torch_layout: bool
    dtype: str
    start: int
    stored: str = ""
    scale: float = 1.0
    first_row: int = 0

    def rows(self, start: int, stop: int) -> TensorInfo:
        """Some of its rows, as a tensor of their own."""
        begin = self.start + start * _row_bytes(self)
        return self._replace(shape=[stop - start, *self.shape[1:]], start=begin)


@dataclass(frozen=True, eq=False)
class FilePart:
    """What a component folder is, found in one file: the config (of its config.json) and where the tensors
    lie, under the names that they have in a folder. part: the component's name. Path() of it is the file."""

    file: Path
    part: str
    config: dict
    tensors: Mapping[str, TensorInfo]

    def __fspath__(self) -> str:
        return str(self.file)

    def __str__(self) -> str:
        return f"{self.file} ({self.part})"


# A component folder, the weights of one that `chosen_weights` gave, or what stands for one in another file.
Component = str | Path | FilePart


def component_config(component: Component) -> dict:
    """The config.json of a component. Raises ConfigError for a folder without one, and for one of weights
    that are quantised already."""
    if isinstance(component, FilePart):
        return dict(component.config)
    component = Path(component)
    file = (component.parent if component.is_file() else component) / "config.json"
    config = read_json(file)
    if said := config.get("quantization_config"):
        method = said.get("quant_method") if isinstance(said, dict) else None
        raise _already_quantised(file, method or "as its quantization_config says")
    return config


def check_not_quantised(file: str | Path, names: Iterable[str]) -> None:
    """Raises ConfigError where tensors of these names are weights in a format that is not read."""
    for name in names:
        for end, whose in _QUANTISED:
            if re.search(end, name):
                raise _already_quantised(file, whose)


def _already_quantised(file: str | Path, method: str) -> ConfigError:
    return ConfigError(
        f"{file}: its weights are quantised already ({method}): take the model in bfloat16, FP8 or GGUF, and "
        "model.quantize or --quantize makes it small"
    )


def tensor_infos(component: Component) -> dict[str, TensorInfo]:
    """Name -> TensorInfo of all tensors of a component, from the headers of its safetensors files.

    Raises ConfigError: no weights, a shard of the index that is missing, a tensor that is not in the shard
    the index names, a file that is cut off or is not safetensors, weights that are quantised already.
    """
    if isinstance(component, FilePart):
        return dict(component.tensors)
    file = Path(component) if Path(component).is_file() else chosen_weights(component)[1]
    infos = _sharded(file) if file.suffix == ".json" else read_header(file)
    check_not_quantised(file, infos)
    return infos


def chosen_weights(folder: str | Path, variant: str | None = None) -> tuple[str | None, Path]:
    """Which weights of a component folder are read: their variant (None: plain files), and the safetensors
    file or the index of its shards.

    variant: "fp16" takes model.fp16.safetensors before model.safetensors. Without plain files, those of the
    only variant that is there are taken. Raises ConfigError where that leaves none, or several.
    """
    folder = Path(folder)
    found = _variants(folder)
    if not found:
        others = sorted(file.name for file in folder.glob("*") if file.suffix in _NOT_READ)
        tried = ", ".join(f"{stem}.safetensors[.index.json]" for stem in _STEMS)
        seen = f"; {others[0]} is not read: save the model as safetensors" if others else ""
        raise ConfigError(f"{folder} has no weights: one of {tried} is wanted{seen}")
    for each in (variant, None, *(found if variant is None and len(found) == 1 else ())):
        if each in found:
            return each, found[each]
    came = f"but none of {variant!r}" if variant else "but no plain ones"
    raise ConfigError(f"{folder} has weights of variant {', '.join(found)}, {came}: give variant='...'")


def check_variants(
    found: Mapping[str, tuple[str | None, Component]], variant: str | None, base: Path
) -> None:
    """found: what `chosen_weights` gave for each part of a model in folders. Raises ConfigError where none is
    of `variant`; warns of those that are not."""
    variants = {each for each, _ in found.values()}
    if variant and found and variant not in variants:
        raise ConfigError(f"variant: came {variant!r}, but {base} has no such files; leave it out")
    for other in sorted(variants - {variant}, key=str):
        named = ", ".join(part for part, (each, _) in found.items() if each == other)
        warn_once(
            f"{base}: the {other or 'plain'} files of {named} are read, for there are no "
            f"{variant or 'plain'} ones"
        )


@cache
def warn_once(text: str) -> None:
    """A warning of a model's files, which are looked at several times, the first time."""
    _log.warning(text)


def _variants(folder: Path) -> dict[str | None, Path]:
    """{variant, None for plain files: safetensors file or index of shards} of a component folder."""
    found: dict[str | None, Path] = {}
    names = sorted(file.name for file in folder.glob("*.safetensors*") if file.is_file())
    for stem in _STEMS:
        for shape in _INDEX, _SINGLE:
            for name in names:
                match = re.fullmatch(shape.format(stem), name)
                if match:
                    found.setdefault(next(filter(None, match.groups()), None), folder / name)
    return found


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Name -> TensorInfo of one safetensors file. Raises ConfigError for a cut-off or damaged one, and for
    one that is something else."""
    return read_header_and_metadata(file)[0]


def read_header_and_metadata(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """What `read_header` gives, and the texts of the header."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
            what = what_it_is(file) or f"not a safetensors file or is cut off ({size} bytes): fetch it again"
            raise ConfigError(f"{file} is {what}")
        try:
            header = json.loads(stream.read(length))
            metadata = dict(header.pop("__metadata__", None) or {})
            torch_layout, begin = metadata.get("format", "pt") != "pd", 8 + length
            shapes = {name: [int(side) for side in entry["shape"]] for name, entry in header.items()}
            spans = {name: [int(end) for end in entry["data_offsets"]] for name, entry in header.items()}
            infos = {
                name: TensorInfo(
                    file, shape, torch_layout, str(header[name]["dtype"]), begin + spans[name][0]
                )
                for name, shape in shapes.items()
            }
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
            raise ConfigError(f"{file} has a damaged header ({error}): fetch it again") from error
    end = begin + max((span[-1] for span in spans.values()), default=0)
    if size != end:
        raise ConfigError(f"{file} has {size} bytes, its header speaks of {end}: fetch it again")
    for name, info in infos.items():
        if info.dtype in FP8:
            infos[name] = info = info._replace(dtype="F32", stored=info.dtype)
        if info.dtype in _NUMPY and spans[name][-1] - spans[name][0] != _bytes(info):
            raise ConfigError(f"{file}: {name} has not the bytes of its shape {info.shape}: fetch it again")
    return infos, metadata


def what_it_is(file: Path) -> str | None:
    """What a file is that is no safetensors file, by its first bytes, and what to do; None where they say
    nothing."""
    if not file.stat().st_size:
        return "empty: the download failed; fetch it again"
    with file.open("rb") as stream:
        start = stream.read(512).removeprefix(_BOM).lstrip(b" \t\r\n").lower()
    return next((what for beginning, what in _BEGINNINGS if re.match(beginning, start, re.DOTALL)), None)


def check_there(folder: Path, setting: str) -> None:
    """Raises ConfigError where there is no such folder, as for the name of a model on a hub. setting: what
    the user would give another one with."""
    if not folder.is_dir():
        raise ConfigError(
            f"no model folder {folder}: models are not downloaded; download it there, or set {setting} to a "
            "local folder"
        )


def check_index(folder: Path, *classes: str) -> None:
    """Raise ConfigError unless the model_index.json of `folder` says that it is of one of these pipeline
    classes; the message names the first."""
    index = read_json(folder / "model_index.json", f"the folder of a {classes[0]} has one")
    if index.get("_class_name") not in classes:
        raise ConfigError(
            f"{folder}/model_index.json is of a {index.get('_class_name')}, not of a {classes[0]}: "
            "give the folder of one"
        )


def read_json(file: Path, why: str = "the folder is not complete") -> dict:
    """The object in a JSON file. Raises ConfigError if the file is missing or holds none."""
    if not file.is_file():
        raise ConfigError(f"{file} is missing: {why}")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{file} holds no JSON object: take that of the model")
    return found


def pipeline_class(folder: Path) -> str | None:
    """What model_index.json of a folder says that it is; None without one. Raises ConfigError as
    `read_json`."""
    index = folder / "model_index.json"
    said = read_json(index).get("_class_name") if index.is_file() else None
    return None if said is None else str(said)


def in_file_order(infos: dict[str, TensorInfo]) -> list[tuple[str, TensorInfo]]:
    """(name, TensorInfo), so that disks are read from front to back."""
    return sorted(infos.items(), key=lambda item: (item[1].file, item[1].start))


def with_progress(infos: dict[str, TensorInfo], doing: str = "reading") -> Iterable[tuple[str, TensorInfo]]:
    """As `in_file_order`, with the progress shown of what takes longer than PATIENCE seconds."""
    what = " ".join([doing, *sorted({info.file.parent.name for info in infos.values()})])
    return Progress(in_file_order(infos), desc=what, unit="tensor", delay=PATIENCE)


def map_tensor(info: TensorInfo) -> np.ndarray:
    """The values of a tensor in its shape and dtype (bfloat16 as uint16). Those that lie on disk as they are
    are read when used; others are decoded.

    Only this tensor is mapped, and only while the array lives: pages of a mapped file count as memory of the
    process. Raises ConfigError for a dtype that no model here has.
    """
    return rows_of(info, 0, info.shape[0]) if info.shape else rows_of(info._replace(shape=[1]), 0, 1)[0]


def rows_of(info: TensorInfo, start: int, stop: int) -> np.ndarray:
    """Some rows of a tensor, as `map_tensor` gives all; fewer where it ends before `stop`."""
    if info.dtype not in _NUMPY:
        raise ConfigError(f"{info.file} holds {info.dtype} numbers; wanted one of {', '.join(_NUMPY)}")
    count = info.shape[0]
    first, last = info.first_row + start, info.first_row + min(stop, count)
    pieces = [(first, min(last, count)), (max(first, count) - count, last - count)]
    read = [_read(info.rows(begin, end)) for begin, end in pieces if begin < end]
    if not read:
        return np.zeros([0, *info.shape[1:]], _NUMPY[info.dtype])
    return read[0] if len(read) == 1 else np.concatenate(read)


def _read(info: TensorInfo) -> np.ndarray:
    """The values of a tensor whose rows lie in order."""
    if not info.stored:
        if 0 in info.shape:
            return np.zeros(info.shape, _NUMPY[info.dtype])
        return np.asarray(np.memmap(info.file, _NUMPY[info.dtype], "r", info.start, tuple(info.shape)))
    codes = np.memmap(info.file, np.uint8, "r", info.start, (info.shape[0], _row_bytes(info)))
    if info.stored in FP8:
        table = _fp8_values(info.stored)
        table = table if info.scale == 1 else table * np.float32(info.scale)
        values = np.empty(codes.shape, np.float32)
        some = max(1, _AT_ONCE // codes.shape[1])
        for i in range(0, len(codes), some):
            np.take(table, codes[i : i + some], out=values[i : i + some], mode="clip")
        return values.reshape(info.shape)
    return gguf_files.decoded(np.asarray(codes), info.stored).reshape(info.shape)


def _bytes(info: TensorInfo) -> int:
    return _row_bytes(info) * (info.shape[0] if info.shape else 1)


def _row_bytes(info: TensorInfo) -> int:
    values = math.prod(info.shape[1:])
    if info.stored in FP8:
        return values
    if info.stored:
        return gguf_files.row_bytes(values, info.stored)
    return values * np.dtype(_NUMPY[info.dtype]).itemsize


def _fp8_values(dtype: str) -> np.ndarray:
    """float32 [256]: the value of each code. E5M2 is the upper half of a float16; E4M3 has a bias of 7, no
    infinity, and NaN where all other bits are set."""
    codes = np.arange(256)
    if dtype == "F8_E5M2":
        return (codes << 8).astype(np.uint16).view(np.float16).astype(np.float32)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    values = np.ldexp(np.where(exponent > 0, 8 + mantissa, mantissa) / 8, np.maximum(exponent, 1) - 7)
    values[codes & 127 == 127] = np.nan
    return np.where(codes < 128, values, -values).astype(np.float32)


def _sharded(index: Path) -> dict[str, TensorInfo]:
    weight_map = read_json(index).get("weight_map", {})
    headers = {}
    for shard in sorted(set(weight_map.values())):
        # A name in the index is data: it may not lead out of the folder.
        if Path(shard).name != shard or not (index.parent / shard).is_file():
            raise ConfigError(
                f"shard {index.parent / shard} is missing, but {index.name} names it: fetch it again"
            )
        headers[shard] = read_header(index.parent / shard)
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise ConfigError(
                f"tensor {name} is missing in {index.parent / shard}, where {index.name} puts it"
            )
    return {name: headers[shard][name] for name, shard in weight_map.items()}
