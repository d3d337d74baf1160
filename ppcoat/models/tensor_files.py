"""Safetensors and JSON of a component folder, on disk: which tensors lie where, and their values.

Headers are read (headers.py), configs checked (limits.py); no Paddle and no model. loading.py puts the
tensors into models, single_file.py finds the components that one file holds.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ppcoat.errors import ConfigError
from ppcoat.models import gguf_files
from ppcoat.models.headers import read_entries
from ppcoat.models.limits import PipelineIndex, WeightIndex, limits_of, within
from ppcoat.progress import Progress
from ppcoat.reading import TABLE_BYTES, read_json, shown

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
FLOATS = ("F64", "F32", "F16", "BF16")  # of the weights of a model, those in FP8 and GGUF decoded
FP8 = ("F8_E4M3", "F8_E5M2")  # as safetensors names them
_AT_ONCE = 2**18  # FP8 codes: NumPy makes eight bytes of each to look up its value
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pdparams")
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


def component_config(component: Component, part: str) -> dict:
    """The config of a component as it was found, its values checked; part: see `limits_of`. Raises
    ConfigError for a folder without its config, for a value beyond its limits, and for weights that are
    quantised already."""
    file = config_file(component, part)
    config = dict(component.config) if isinstance(component, FilePart) else read_json(file)
    if said := config.get("quantization_config"):
        method = said.get("quant_method") if isinstance(said, dict) else None
        raise _already_quantised(file, shown(method or "as its quantization_config says"))
    within(limits_of(part, config), config, file)
    return config


def config_file(component: Component, part: str) -> Path:
    """The JSON file, or the model in one file, that says how a component is built."""
    if isinstance(component, FilePart):
        return component.file
    component = Path(component)
    folder = component.parent if component.is_file() else component
    return folder / ("scheduler_config.json" if part == "scheduler" else "config.json")


def known_config(component: Component, part: str) -> dict:
    """The keys of `component_config` that are read here: what the classes that are built are given."""
    return sizes_of(component, part).model_dump(exclude_unset=True, by_alias=True)


def sizes_of(component: Component, part: str) -> Any:
    """`component_config` as an object of its limits, with the defaults of what is not said."""
    config = component_config(component, part)
    return within(limits_of(part, config), config, config_file(component, part))


@contextmanager
def read_by_library(place: object) -> Iterator[None]:
    """Context manager: what a library raises while it reads a part of a model, whose settings were found
    within their limits, becomes a ConfigError that names the part.

    Caught broadly, for it is data that they stumble over: the package tokenizers raises Exception itself, and
    a panic of its Rust code is not even one.
    """
    try:
        yield
    except (ConfigError, MemoryError):
        raise
    except BaseException as error:
        of_the_disk = isinstance(error, OSError) and error.filename is not None
        if of_the_disk or not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        what = f"{type(error).__name__}: {shown(error)}"
        raise ConfigError(f"{place} cannot be read ({what}): take it from the original model") from error


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
    entries, metadata = read_entries(file)
    torch_layout = metadata.get("format", "pt") != "pd"
    infos = {
        name: TensorInfo(file, entry.shape, torch_layout, "F32", entry.start, entry.dtype)
        if entry.dtype in FP8
        else TensorInfo(file, entry.shape, torch_layout, entry.dtype, entry.start)
        for name, entry in entries.items()
    }
    return infos, metadata


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
    file = folder / "model_index.json"
    said = pipeline_class(folder) if file.is_file() else None
    if said not in classes:
        read_json(file, f"the folder of a {classes[0]} has one")
        raise ConfigError(f"{file} is of a {said}, not of a {classes[0]}: give the folder of one")


def pipeline_class(folder: Path) -> str | None:
    """What model_index.json of a folder says that it is; None without one. Raises ConfigError as
    `read_json`, and for a name that is no text."""
    index = folder / "model_index.json"
    return within(PipelineIndex, read_json(index), index).class_name if index.is_file() else None


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
    numbers = _numbers(info)
    count = info.shape[0]
    first, last = info.first_row + start, info.first_row + min(stop, count)
    pieces = [(first, min(last, count)), (max(first, count) - count, last - count)]
    read = [_read(info.rows(begin, end)) for begin, end in pieces if begin < end]
    if not read:
        return np.zeros([0, *info.shape[1:]], numbers)
    return read[0] if len(read) == 1 else np.concatenate(read)


def _read(info: TensorInfo) -> np.ndarray:
    """The values of a tensor whose rows lie in order."""
    if not info.stored:
        if 0 in info.shape:
            return np.zeros(info.shape, _numbers(info))
        return np.asarray(np.memmap(info.file, _numbers(info), "r", info.start, tuple(info.shape)))
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


def _row_bytes(info: TensorInfo) -> int:
    values = math.prod(info.shape[1:])
    if info.stored in FP8:
        return values
    if info.stored:
        return gguf_files.row_bytes(values, info.stored)
    return values * np.dtype(_numbers(info)).itemsize


def _numbers(info: TensorInfo) -> type:
    if info.dtype not in _NUMPY:
        raise ConfigError(f"{info.file} holds {info.dtype} numbers; wanted one of {', '.join(_NUMPY)}")
    return _NUMPY[info.dtype]


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
    weight_map = weight_index(index).weight_map
    headers = {}
    for shard in sorted(set(weight_map.values())):
        if not (index.parent / shard).is_file():
            raise ConfigError(
                f"shard {index.parent / shard} is missing, but {index.name} names it: fetch it again"
            )
        headers[shard] = read_header(index.parent / shard)
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise ConfigError(
                f"tensor {shown(name)} is missing in {index.parent / shard}, where {index.name} puts it"
            )
    return {name: headers[shard][name] for name, shard in weight_map.items()}


def weight_index(file: Path) -> WeightIndex:
    """An index of shards. Raises ConfigError for a damaged one, and for a name that may lead elsewhere."""
    return within(WeightIndex, read_json(file, limit=TABLE_BYTES), file)
