"""A NewBie-image folder written from its four parts, as the original converter does: names and layout stay.
One tensor is in memory at a time.

transformer/ text_encoder/ clip_model/ vae/ model_index.json

The released checkpoint may be a .pth, a file of torch, which is read without running anything that is in it.
Such a file is a zip of `data.pkl`, a pickle that says which tensors there are, and of their bytes. A pickle
is a program; the unpickler here gives it nothing to call but stand-ins for torch's tensors, as Python's
documentation of pickle advises ("Restricting Globals"), and refuses programs that use other opcodes than
plain tensors need or that claim more than they hold. Its weights are not read then: the result says where
they lie. Source of the format: torch's serialization.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import paddle

from ppcoat.atomic import whole_folder
from ppcoat.errors import ConfigError
from ppcoat.models.newbie.files import check_newbie_folder, check_newbie_vae
from ppcoat.models.tensor_files import (
    FLOATS,
    TensorInfo,
    in_file_order,
    map_tensor,
    read_header,
    tensor_infos,
)
from ppcoat.models.writing import STEM, Layout, check_room, layout_bytes, write_file, write_json
from ppcoat.reading import read_json

# Name on the command line -> Paddle's, safetensors'.
WEIGHT_DTYPES = {"bf16": ("bfloat16", "BF16"), "fp16": ("float16", "F16"), "fp32": ("float32", "F32")}
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
MAX_PICKLE_BYTES, MAX_OPCODES = 16_000_000, 600_000  # a tensor takes 150 bytes and 40 opcodes
# Opcodes of a dict of tensors, in protocols 2 to 5.
_OPCODES = {"PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2",
            "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "EMPTY_TUPLE", "TUPLE",
            "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM",
            "SETITEMS", "BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET", "GLOBAL", "STACK_GLOBAL",
            "BINPERSID", "REDUCE", "BUILD"}  # fmt: skip
# What zipfile raises for damaged records: of a compression, flag or version that it does not know, too.
_NO_ZIP = (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError, ValueError, struct.error, EOFError,
           zlib.error)  # fmt: skip
MAX_TUPLES = 50_000  # a tensor takes four; hashing tuples nested deeper than 100,000 ends the process
_MODELS = ("model", "state_dict")  # keys under which a checkpoint may hold its weights


def write_newbie_folder(
    output: Path,
    transformer: dict[str, TensorInfo],
    parts: dict[str, Path],
    dtype: str,
    config: dict | None = None,
) -> None:
    """transformer: where its tensors lie; parts: "text_encoder", "clip_model" and "vae" -> folder. dtype: one
    of WEIGHT_DTYPES, for all weights. config: transformer/config.json (None: CONFIG_3B and Gemma's width).

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
        name: (WEIGHT_DTYPES[dtype][1] if info.dtype in FLOATS else info.dtype, info.shape)
        for name, info in in_file_order(infos)
    }


def _values(infos: dict[str, TensorInfo], dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """What `_layout` says, in its order."""
    for name, info in in_file_order(infos):
        values = map_tensor(info)
        if info.dtype in FLOATS and info.dtype != WEIGHT_DTYPES[dtype][1]:
            values = paddle.to_tensor(values).astype(WEIGHT_DTYPES[dtype][0]).numpy()
        yield name, values


def tensor_infos_of_pth(file: str | Path) -> dict[str, TensorInfo]:
    """Name -> TensorInfo of all tensors, as `tensor_infos` gives them, for `read_tensors`.

    A dict of weights, or one that has it as "model" or "state_dict". Raises ConfigError for another kind of
    file, for a pickle that wants anything but tensors, and for tensors that are not laid out row by row.
    """
    file = Path(file)
    try:
        with zipfile.ZipFile(file) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            pickles = [name for name in entries if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise ConfigError(f"{file} is no checkpoint of torch: it has {len(pickles)} data.pkl")
            _check_plain(entries[pickles[0]], file)
            content = _unpickled(archive.read(pickles[0]), file)
    except ConfigError:
        raise
    except _NO_ZIP as error:
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


def _check_plain(entry: zipfile.ZipInfo, file: Path) -> None:
    """Raise ConfigError for a data.pkl that is not stored as torch stores it, before it is unpacked."""
    size, packed = entry.file_size, entry.compress_size
    if entry.compress_type != zipfile.ZIP_STORED or size != packed or size > MAX_PICKLE_BYTES:
        raise ConfigError(
            f"{file} is no checkpoint of torch: its data.pkl of {size} bytes is packed or longer than "
            f"{MAX_PICKLE_BYTES}; save the state_dict alone"
        )


class _Number(NamedTuple):
    """A kind of storage: safetensors' name of its dtype, and the bytes of a number."""

    dtype: str
    itemsize: int


class _Storage(NamedTuple):
    """Bytes of the archive: entry data/<key>, numbers of one kind."""

    key: str
    number: _Number


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def info(self, stream, file: Path, entries: dict[str, zipfile.ZipInfo], root: str) -> TensorInfo:
        """Where it lies. Raises ConfigError if it is not laid out row by row, or its bytes are not there."""
        dtype, itemsize = self.storage.number
        entry = entries.get(f"{root}data/{self.storage.key}")
        rows = [math.prod(self.shape[i + 1 :]) for i in range(len(self.shape))]
        sides = zip(self.shape, self.strides, rows, strict=True)
        if any(side > 1 and stride != row for side, stride, row in sides):
            raise ConfigError(f"{file} has a tensor with strides {self.strides}: save it contiguous")
        start, size = self.offset * itemsize, math.prod(self.shape) * itemsize
        if entry is None or entry.compress_type != zipfile.ZIP_STORED or start + size > entry.file_size:
            raise ConfigError(f"{file} lacks the bytes of a tensor {list(self.shape)}: fetch it again")
        stream.seek(entry.header_offset + 26)  # the lengths of name and extra field before the bytes
        name_length, extra_length = struct.unpack("<HH", stream.read(4))
        begin = entry.header_offset + 30 + name_length + extra_length
        return TensorInfo(file, list(self.shape), True, dtype, begin + start)


def _unpickled(program: bytes, file: Path) -> Any:
    """What a pickle builds of dicts, lists, tuples, numbers, texts and `_Tensor`s. Raises ConfigError for one
    that wants anything else."""
    try:
        _check_program(program, file)
        return _TensorUnpickler(program, file).load()
    except ConfigError:
        raise
    except (pickle.UnpicklingError, EOFError, ValueError, LookupError, TypeError, AttributeError,
            ArithmeticError, MemoryError) as error:  # fmt: skip
        raise ConfigError(f"{file} has a damaged data.pkl ({error}): fetch it again") from None


def _check_program(program: bytes, file: Path) -> None:
    """Raise ConfigError for an opcode outside _OPCODES, and for what would exhaust the unpickler: a place in
    its memo, which is a list, beyond the end, and tuples without end. genops raises ValueError for a length
    beyond the end of the program."""
    tuples = 0
    for count, (opcode, argument, place) in enumerate(pickletools.genops(program)):
        if opcode.name not in _OPCODES:
            raise ConfigError(f"{file}: its pickle wants {opcode.name}, which plain tensors do not: not read")
        tuples += opcode.name.startswith("TUPLE")
        many = tuples > MAX_TUPLES or count > MAX_OPCODES
        if many or (opcode.name == "LONG_BINPUT" and argument > count):
            raise ConfigError(f"{file}: its pickle at byte {place} is not of plain tensors; not read")


class _TensorUnpickler(pickle.Unpickler):
    """Knows the names in _ALLOWED. None of these, nor what they make, can be changed by the pickle."""

    def __init__(self, program: bytes, file: Path) -> None:
        super().__init__(io.BytesIO(program))
        self._file = file

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module} {name}"
        if path not in _ALLOWED:
            raise ConfigError(
                f"{self._file}: its pickle names {path!r}, which is no tensor; nothing was run. Save the "
                "state_dict alone, or as .safetensors"
            )
        return _ALLOWED[path]

    def persistent_load(self, identity: Any) -> _Storage:
        kind, number, key = identity[:3]
        if kind != "storage" or not isinstance(number, _Number) or not isinstance(key, str):
            raise ConfigError(f"{self._file}: its pickle has a storage of another kind; not read")
        return _Storage(key, number)


class _Call(NamedTuple):
    """A function that a pickle may call."""

    function: Callable

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)


class _Dict(dict):
    """Drops attributes that a pickle gives it (torch's _metadata)."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    """torch._utils._rebuild_tensor_v2; what follows are gradients and hooks."""
    numbers = (offset, *shape, *strides)
    counts = all(type(n) is int and n >= 0 for n in numbers) and len(shape) == len(strides)
    if not isinstance(storage, _Storage) or not counts:
        raise ValueError("a tensor is not a storage with offset, shape and strides")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


_ALLOWED = {
    "torch._utils _rebuild_tensor_v2": _Call(_tensor),
    "torch._utils _rebuild_parameter": _Call(lambda tensor, *_: tensor),
    "collections OrderedDict": _Call(_Dict),
    "torch FloatStorage": _Number("F32", 4),
    "torch HalfStorage": _Number("F16", 2),
    "torch BFloat16Storage": _Number("BF16", 2),
    "torch DoubleStorage": _Number("F64", 8),
    "torch LongStorage": _Number("I64", 8),
    "torch IntStorage": _Number("I32", 4),
}
