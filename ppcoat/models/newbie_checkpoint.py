"""Reads the tensors of a torch checkpoint (.pth) without running anything that is in it.

Such a file is a zip of `data.pkl`, a pickle that says which tensors there are, and of their bytes. A pickle
is a program; here its few opcodes that build dicts, tuples and tensors are interpreted by hand, and any
other opcode or name stops the reading. Weights are not read at all: the result says where they lie.
Formats: CPython's pickletools for the opcodes, torch's serialization for the rest.
"""

from __future__ import annotations

import math
import pickletools
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppcoat.errors import ConfigError
from ppcoat.models.loading import TensorInfo

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
