"""Safetensors and JSON of a component folder, on disk: which tensors lie where, and their bytes.

Headers are read and checked (missing shards, cut-off files); no Paddle and no model. loading.py puts the
tensors into models.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ppcoat.errors import ConfigError

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
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format


class TensorInfo(NamedTuple):
    """Where a tensor lies and its shape on disk; `torch_layout` says that Linear weights are [out, in].

    dtype: as safetensors names it, "BF16". start: its first byte in the file.
    """

    file: Path
    shape: list[int]
    torch_layout: bool
    dtype: str
    start: int


def component_config(component: str | Path) -> dict:
    """config.json of a component folder, or of the folder of these weights. Raises ConfigError without
    one."""
    component = Path(component)
    return read_json((component.parent if component.is_file() else component) / "config.json")


def tensor_infos(component: str | Path) -> dict[str, TensorInfo]:
    """Name -> TensorInfo of all tensors of a component, from the headers of its safetensors files.

    component: its folder, or a file that `chosen_weights` gave. Raises ConfigError: no weights, a shard of
    the index that is missing, a tensor that is not in the shard the index names, a file that is cut off or is
    not safetensors.
    """
    file = Path(component) if Path(component).is_file() else chosen_weights(component)[1]
    return _sharded(file) if file.suffix == ".json" else read_header(file)


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
    """Name -> TensorInfo of one safetensors file. Raises ConfigError for a cut-off or damaged one."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
            raise ConfigError(
                f"{file} is not a safetensors file or is cut off ({size} bytes): fetch it again"
            )
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise ConfigError(f"{file} has a damaged header ({error}): fetch it again") from error
    torch_layout = header.pop("__metadata__", {}).get("format", "pt") != "pd"
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != 8 + length + end:
        raise ConfigError(f"{file} has {size} bytes, its header speaks of {8 + length + end}: fetch it again")
    return {
        name: TensorInfo(
            file, entry["shape"], torch_layout, entry["dtype"], 8 + length + entry["data_offsets"][0]
        )
        for name, entry in header.items()
    }


def check_there(folder: Path, setting: str) -> None:
    """Raises ConfigError where there is no such folder, as for the name of a model on a hub. setting: what
    the user would give another one with."""
    if not folder.is_dir():
        raise ConfigError(
            f"no model folder {folder}: models are not downloaded; download it there, or set {setting} to a "
            "local folder"
        )


def read_json(file: Path, why: str = "the folder is not complete") -> dict:
    """The object in a JSON file. Raises ConfigError if the file is missing or is not JSON."""
    if not file.is_file():
        raise ConfigError(f"{file} is missing: {why}")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON: {error}") from error


def in_file_order(infos: dict[str, TensorInfo]) -> list[tuple[str, TensorInfo]]:
    """(name, TensorInfo), so that disks are read from front to back."""
    return sorted(infos.items(), key=lambda item: (item[1].file, item[1].start))


def map_tensor(info: TensorInfo) -> np.ndarray:
    """The bytes of a tensor as they lie on disk, in its shape and dtype (bfloat16 as uint16): read when used.

    Only this tensor is mapped, and only while the array lives: pages of a mapped file count as memory of the
    process. Raises ConfigError for a dtype that no model here has.
    """
    if info.dtype not in _NUMPY:
        raise ConfigError(f"{info.file} holds {info.dtype} numbers; wanted one of {', '.join(_NUMPY)}")
    dtype = np.dtype(_NUMPY[info.dtype])
    if 0 in info.shape:
        return np.zeros(info.shape, dtype)
    return np.asarray(np.memmap(info.file, dtype, "r", info.start, tuple(info.shape)))


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
