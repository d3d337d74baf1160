"""A NewBie-image folder written from its four parts, as the original converter does: names and layout stay.
One tensor is in memory at a time.

transformer/ text_encoder/ clip_model/ vae/ model_index.json

The released checkpoint may be a .pth, a file of torch, which is read without running anything that is in it.
Such a file is a zip of `data.pkl`, a pickle that says which tensors there are, and of their bytes. A pickle
is a program; here its few opcodes that build dicts, tuples and tensors are interpreted by hand, and any other
opcode or name stops the reading. Its weights are not read then: the result says where they lie. Formats:
CPython's pickletools for the opcodes, torch's serialization for the rest.
"""

from __future__ import annotations

import math
import pickletools
import shutil
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from ppcoat.atomic import whole_folder
from ppcoat.errors import ConfigError
from ppcoat.models.loading import TensorInfo, in_file_order, map_tensor, read_header, read_json, tensor_infos
from ppcoat.models.newbie.files import check_newbie_folder, check_newbie_vae
from ppcoat.models.writing import STEM, Layout, check_room, layout_bytes, write_file, write_json

# Name on the command line -> Paddle's, safetensors'.
DTYPES = {"bf16": ("bfloat16", "BF16"), "fp16": ("float16", "F16"), "fp32": ("float32", "F32")}
TRANSFORMER_CLASS = "NextDiT_3B_GQA_patch2_Adaln_Refiner_WHIT_CLIP"
MODEL_INDEX = {
    "_class_name": "NewbiePipeline",
    "_diffusers_version": "0.30.0",
    "transformer": ["transformer", TRANSFORMER_CLASS],
    "text_encoder": ["text_encoder", "Gemma3ForConditionalGeneration"],
    "tokenizer": ["text_encoder", "AutoTokenizer"],
    "clip_model": ["clip_model", "JinaCLIPModel"],
    "clip_tokenizer": ["clip_model", "AutoTokenizer"],
    "vae": ["vae", "AutoencoderKL"],
}
# The 3B model's, in the original converter's keys; a checkpoint does not tell them all.
CONFIG_3B = {
    "model_type": "nextdit_clip",
    "patch_size": 2,
    "dim": 2304,
    "n_layers": 36,
    "n_heads": 24,
    "n_kv_heads": 8,
    "in_channels": 16,
    "axes_dims": [32, 32, 32],
    "axes_lens": [1024, 512, 512],
    "clip_text_dim": 1024,
    "clip_img_dim": 1024,
    "_class_name": TRANSFORMER_CLASS,
}
_TEXT_SUFFIXES = (".json", ".txt", ".model", ".py")  # configs, tokenizers, and code that nothing here runs
_FLOATS = ("F64", "F32", "F16", "BF16")
MAX_PICKLE_BYTES = 64_000_000
_STORAGES = {"FloatStorage": ("F32", 4), "HalfStorage": ("F16", 2), "BFloat16Storage": ("BF16", 2),
             "DoubleStorage": ("F64", 8), "LongStorage": ("I64", 8), "IntStorage": ("I32", 4)}  # fmt: skip
_REBUILD, _ORDERED = "torch._utils _rebuild_tensor_v2", "collections OrderedDict"
_PARAMETER = "torch._utils _rebuild_parameter"
_NAMES = {_REBUILD, _ORDERED, _PARAMETER, *(f"torch {name}" for name in _STORAGES)}
_PUSHED = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
           "BINUNICODE8", "GLOBAL"}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_MARK = object()
_MODELS = ("model", "state_dict")  # keys under which a checkpoint may hold its weights


def write_newbie_folder(
    output: Path,
    transformer: dict[str, TensorInfo],
    parts: dict[str, Path],
    dtype: str,
    config: dict | None = None,
) -> None:
    """transformer: where its tensors lie; parts: "text_encoder", "clip_model" and "vae" -> folder. dtype: one
    of DTYPES, for all weights. config: transformer/config.json (None: CONFIG_3B and Gemma's width).

    Written whole or not at all, and checked as a model that is loaded is. Raises ConfigError for parts that
    do not fit, and, before anything is written, for a disk that has not enough room.
    """
    check_newbie_vae(parts["vae"])
    files = {Path("transformer") / f"{STEM}.safetensors": transformer}
    for name, folder in parts.items():
        tensor_infos(folder)  # raises for a folder without whole weights
        files |= {Path(name) / file.name: read_header(file) for file in sorted(folder.glob("*.safetensors"))}
    wanted = sum(layout_bytes(_layout(infos, dtype)) for infos in files.values())
    check_room(output.parent, wanted, f"{output.name} takes", "make room there, or choose another output")
    with whole_folder(output) as draft:
        for file, infos in files.items():
            (draft / file).parent.mkdir(parents=True, exist_ok=True)
            write_file(draft / file, _layout(infos, dtype), _values(infos, dtype), {"format": "pt"})
        if config is None:
            gemma = read_json(parts["text_encoder"] / "config.json")
            config = CONFIG_3B | {"cap_feat_dim": gemma.get("text_config", gemma).get("hidden_size", 2560)}
        write_json(draft / "transformer" / "config.json", config)
        for name, folder in parts.items():
            for file in folder.iterdir():
                if file.suffix in _TEXT_SUFFIXES and file.is_file():
                    shutil.copyfile(file, draft / name / file.name)
        write_json(draft / "model_index.json", MODEL_INDEX)
        check_newbie_folder(draft)


def checkpoint_infos(file: Path) -> dict[str, TensorInfo]:
    """Where the tensors of a .safetensors or .pth checkpoint lie. Raises ConfigError for other files."""
    if not file.is_file():
        raise ConfigError(f"no checkpoint at {file}; check the path")
    if file.suffix == ".safetensors":
        return read_header(file)
    if file.suffix in (".pth", ".pt"):
        return tensor_infos_of_pth(file)
    raise ConfigError(f"checkpoint {file}: came the ending '{file.suffix}', wanted .safetensors or .pth")


def _layout(infos: dict[str, TensorInfo], dtype: str) -> Layout:
    """Floats in another dtype, all else as it lies."""
    return {
        name: (DTYPES[dtype][1] if info.dtype in _FLOATS else info.dtype, info.shape)
        for name, info in in_file_order(infos)
    }


def _values(infos: dict[str, TensorInfo], dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """What `_layout` says, in its order."""
    for name, info in in_file_order(infos):
        values = map_tensor(info)
        if info.dtype in _FLOATS and info.dtype != DTYPES[dtype][1]:
            values = paddle.to_tensor(values).astype(DTYPES[dtype][0]).numpy()
        yield name, values


def tensor_infos_of_pth(file: str | Path) -> dict[str, TensorInfo]:
    """Name -> TensorInfo of all tensors, as `loading.tensor_infos` gives them, for `loading.read_tensors`.

    A dict of weights, or one that has it as "model" or "state_dict". Raises ConfigError for another kind of
    file, for a pickle that wants anything but tensors, and for tensors that are not laid out row by row.
    """
    file = Path(file)
    try:
        with zipfile.ZipFile(file) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            pickles = [name for name in entries if name.endswith("/data.pkl")]
            if len(pickles) != 1 or entries[pickles[0]].file_size > MAX_PICKLE_BYTES:
                raise ConfigError(f"{file} is no checkpoint of torch: it has {len(pickles)} data.pkl")
            content = _Interpreter(file).run(archive.read(pickles[0]))
    except (zipfile.BadZipFile, OSError) as error:
        raise ConfigError(
            f"{file} cannot be read ({error}): wanted .safetensors, or a .pth of torch 1.6 or later"
        ) from None
    for key in _MODELS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not any(isinstance(value, _Tensor) for value in content.values()):
        raise ConfigError(f"{file} holds no dict of tensors, nor one under {' or '.join(_MODELS)}")
    root = pickles[0].removesuffix("data.pkl")
    tensors = {name: value for name, value in content.items() if isinstance(value, _Tensor)}
    with file.open("rb") as stream:
        return {name: tensor.info(stream, file, entries, root) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class _Storage:
    """Bytes of the archive: entry data/<key>, `count` numbers of a dtype."""

    key: str
    dtype: str
    itemsize: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def info(self, stream, file: Path, entries: dict[str, zipfile.ZipInfo], root: str) -> TensorInfo:
        entry = entries.get(f"{root}data/{self.storage.key}")
        rows = [math.prod(self.shape[i + 1 :]) for i in range(len(self.shape))]
        sides = zip(self.shape, self.strides, rows, strict=True)
        if any(side > 1 and stride != row for side, stride, row in sides):
            raise ConfigError(f"{file} has a tensor with strides {self.strides}: save it contiguous")
        start, size = self.offset * self.storage.itemsize, math.prod(self.shape) * self.storage.itemsize
        if entry is None or entry.compress_type != zipfile.ZIP_STORED or start + size > entry.file_size:
            raise ConfigError(f"{file} lacks the bytes of a tensor {list(self.shape)}: fetch it again")
        stream.seek(entry.header_offset + 26)  # the lengths of name and extra field before the bytes
        name_length, extra_length = struct.unpack("<HH", stream.read(4))
        begin = entry.header_offset + 30 + name_length + extra_length
        return TensorInfo(file, list(self.shape), True, self.storage.dtype, begin + start)


class _Interpreter:
    """The part of pickle's machine that a dict of tensors needs: a stack, a memo, no calls."""

    def __init__(self, file: Path) -> None:
        self._file, self._stack, self._memo = file, [], {}

    def run(self, program: bytes) -> Any:
        try:
            for opcode, argument, _ in pickletools.genops(program):
                if opcode.name == "STOP":
                    return self._stack.pop()
                self._step(opcode.name, argument)
        except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{self._file} has a damaged data.pkl ({error}): fetch it again") from None
        raise ConfigError(f"{self._file} has a data.pkl that does not end: fetch it again")

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in ("PROTO", "FRAME"):
            return
        if name in _PUSHED:
            stack.append(self._global(argument) if name == "GLOBAL" else argument)
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(self._global(f"{module} {attribute}"))
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(self._to_mark() if name == "TUPLE" else self._last(int(name[-1]))))
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._memo[len(self._memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name in ("SETITEMS", "SETITEM"):
            flat = self._to_mark() if name == "SETITEMS" else self._last(2)
            stack[-1].update(zip(flat[::2], flat[1::2], strict=True))
        elif name in ("APPENDS", "APPEND"):
            stack[-1].extend(self._to_mark() if name == "APPENDS" else self._last(1))
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif name == "REDUCE":
            arguments, what = stack.pop(), stack.pop()
            stack.append(self._built(what, arguments))
        elif name == "BUILD":
            stack.pop()  # attributes of a dict (torch's _metadata): of no use here
        else:
            raise ConfigError(f"{self._file}: its pickle wants {name}, which plain tensors do not: not read")

    def _global(self, name: str) -> str:
        if name not in _NAMES:
            raise ConfigError(
                f"{self._file}: its pickle names {name!r}, which is no tensor; nothing was run. Save the "
                "state_dict alone, or as .safetensors"
            )
        return name

    def _built(self, what: str, arguments: tuple) -> Any:
        if what == _ORDERED:
            return {}
        if what == _PARAMETER:
            return arguments[0]
        if what != _REBUILD or not isinstance(arguments[0], _Storage):
            raise ConfigError(f"{self._file}: its pickle calls {what!r}; not read")
        storage, offset, shape, strides = arguments[:4]
        return _Tensor(storage, offset, shape, strides)

    def _storage(self, identity: tuple) -> _Storage:
        kind, storage, key = identity[:3]
        name = str(storage).removeprefix("torch ")
        if kind != "storage" or name not in _STORAGES:
            raise ConfigError(f"{self._file}: {storage!r} is no storage of a tensor; not read")
        return _Storage(str(key), *_STORAGES[name])

    def _to_mark(self) -> list:
        place = max(i for i, value in enumerate(self._stack) if value is _MARK)
        values = self._stack[place + 1 :]
        del self._stack[place:]
        return values

    def _last(self, count: int) -> list:
        values = self._stack[-count:]
        del self._stack[-count:]
        return values
