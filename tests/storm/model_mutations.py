"""Damages to a model's folder or file, each with a name, for the tests of reading.

`mutations(folder)` looks at a whole folder and yields what may be wrong with a copy of it: each value of each
JSON file by each of VALUES, each file by each of FILES, the headers of the weights by each of HEADERS, and
what is particular to an index and to tokenizers. A damage replaces files and never writes into one, so that
the copy may be made of links. `damaged_file` yields those of a single file.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

MISSING = object()
DEEP = "[" * 100_000 + "]" * 100_000
VALUES = {
    "text": "abc",
    "number as text": "2",
    "null": None,
    "empty text": "",
    "true": True,
    "-1": -1,
    "0": 0,
    "half": 0.5,
    "10^9": 10**9,
    "10^30": 10**30,
    "NaN": float("nan"),
    "-Infinity": float("-inf"),
    "list": [1],
    "empty list": [],
    "object": {"a": 1},
    "missing": MISSING,
    "10^6 letters": "x" * 10**6,
}
# Of a model's folder; fixtures lie beside them.
_PARTS = ("model_index.json", "transformer", "vae", "text_encoder", "tokenizer", "scheduler", "clip_model")
_MOST = 8  # entries of a list or object that are damaged one by one


class Mutation(NamedTuple):
    """name: part, kind and what is done. mutate: does it to a copy of the folder (or of the file)."""

    name: str
    mutate: Callable[[Path], None]


def mutations(folder: Path) -> Iterator[Mutation]:
    """All damages of a model's folder, in a fixed order."""
    for file in sorted(each for each in folder.rglob("*") if each.is_file()):
        name = file.relative_to(folder).as_posix()
        if not name.startswith(_PARTS) or file.suffix == ".md":
            continue
        for kind, change in FILES.items():
            yield Mutation(f"{name}: {kind}", _on(name, change))
        if file.suffix == ".safetensors":
            for kind, change in HEADERS.items():
                yield Mutation(f"{name}: header, {kind}", _on(name, _header_changed(change)))
        elif file.name.endswith(".index.json"):
            for kind, change in INDEX.items():
                yield Mutation(f"{name}: {kind}", _on(name, _json_changed(change)))
        elif file.name in ("tokenizer.json", "vocab.json"):
            yield from _of_vocabulary(name, json.loads(file.read_text("utf-8")))
        elif file.suffix == ".json":
            yield from _of_values(name, json.loads(file.read_text("utf-8")))
    for part in sorted(each.name for each in folder.iterdir() if (each / "tokenizer_config.json").is_file()):
        for kind, text in ADDED.items():
            yield Mutation(f"{part}/added_tokens.json: {kind}", _written(f"{part}/added_tokens.json", text))
    for part in sorted(each.name for each in folder.iterdir() if (each / "spiece.model").is_file()):
        yield Mutation(f"{part}/spiece.model: removed, tokenizer.json damaged", _without_spiece(part))


def damaged_file(file: Path) -> Iterator[Mutation]:
    """All damages of a model in a single file; `mutate` takes the file's copy."""
    for kind, change in FILES.items():
        yield Mutation(f"{file.name}: {kind}", change)
    if file.suffix == ".safetensors":
        for kind, change in HEADERS.items():
            yield Mutation(f"{file.name}: header, {kind}", _header_changed(change))
    if file.suffix == ".gguf":
        for kind, change in GGUF.items():
            yield Mutation(f"{file.name}: {kind}", _bytes_changed(change))


def replace(file: Path, content: bytes | str) -> None:
    """A new file in the place of what is there."""
    file.unlink(missing_ok=True)
    file.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)


def _on(name: str, change: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda folder: change(folder / name)


def _written(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: replace(folder / name, text)


def _bytes_changed(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda file: replace(file, change(file.read_bytes()))


def _other(file: Path, make: Callable[[Path], object]) -> None:
    file.unlink()
    make(file)


# Whole files of any kind.
FILES: dict[str, Callable[[Path], None]] = {
    "empty": _bytes_changed(lambda data: b""),
    "half": _bytes_changed(lambda data: data[: len(data) // 2]),
    "one byte less": _bytes_changed(lambda data: data[:-1]),
    "zeros": _bytes_changed(lambda data: b"\0" * min(len(data), 4096)),
    "no UTF-8": _bytes_changed(lambda data: b'{"a": "\xff\xfe"}'),
    "a web page": _bytes_changed(lambda data: b"<!DOCTYPE html><html>log in</html>"),
    "a list": _bytes_changed(lambda data: b"[1, 2]"),
    "null": _bytes_changed(lambda data: b"null"),
    "nested 100000 deep": _bytes_changed(lambda data: DEEP.encode()),
    "objects 100 deep": _bytes_changed(lambda data: b'{"a":' * 100 + b"1" + b"}" * 100),
    "an integer of 5000 digits": _bytes_changed(lambda data: b'{"hidden_size": ' + b"9" * 5000 + b"}"),
    "bytes 0..255": _bytes_changed(lambda data: bytes(range(256)) * 8),
    "a folder": lambda file: _other(file, Path.mkdir),
    "a pipe": lambda file: _other(file, os.mkfifo),
    "a link to itself": lambda file: _other(file, lambda path: path.symlink_to(path.name)),
    "/dev/zero": lambda file: _other(file, lambda path: path.symlink_to("/dev/zero")),
    "removed": Path.unlink,
}


def _json_changed(change: Callable[[Any], None]) -> Callable[[Path], None]:
    def mutate(file: Path) -> None:
        content = json.loads(file.read_text("utf-8"))
        replace(file, json.dumps(change(content) or content))

    return mutate


def _of_values(name: str, content: Any) -> Iterator[Mutation]:
    """Each value of a JSON file, by each of VALUES."""
    for path in _paths(content):
        for kind, value in VALUES.items():
            change = _json_changed(lambda content, path=path, value=value: _put(content, path, value))
            yield Mutation(f"{name}: {'.'.join(map(str, path))} {kind}", _on(name, change))


def _paths(content: Any, before: tuple = ()) -> Iterator[tuple]:
    inside = list(content.items() if isinstance(content, dict) else enumerate(content))
    for key, value in inside[:_MOST] if before else inside:
        yield (*before, key)
        if isinstance(value, dict | list):
            yield from _paths(value, (*before, key))


def _put(content: Any, path: tuple, value: Any) -> None:
    for key in path[:-1]:
        content = content[key]
    if value is MISSING:
        del content[path[-1]]
    else:
        content[path[-1]] = value


def _first_of(mapping: dict, value: Any) -> None:
    mapping[next(iter(mapping))] = value


def _in_map(value: Any) -> Callable[[dict], None]:
    return lambda index: _first_of(index["weight_map"], value)


# Of *.safetensors.index.json.
INDEX: dict[str, Callable[[dict], Any]] = {
    **{
        f"weight_map {kind}": (lambda index, value=value: _put(index, ("weight_map",), value))
        for kind, value in VALUES.items()
    },
    **{f"a shard is {kind}": _in_map(value) for kind, value in VALUES.items() if value is not MISSING},
    **{
        f"metadata {kind}": (lambda index, value=value: _put(index, ("metadata",), value))
        for kind, value in VALUES.items()
    },
    "a shard outside": _in_map("../vae/diffusion_pytorch_model.safetensors"),
    "a shard at the root": _in_map("/etc/passwd"),
    "a shard with NUL": _in_map("a\0b.safetensors"),
    "a shard with a surrogate": _in_map("\ud800.safetensors"),
    "a shard that is the folder": _in_map("."),
    "a name of no tensor": lambda index: index["weight_map"].update(nothing="nothing.safetensors"),
    "a tensor too few": lambda index: _put(index, ("weight_map", next(iter(index["weight_map"]))), MISSING),
    "10^5 names more": lambda index: index["weight_map"].update(
        {f"more.{i}": next(iter(index["weight_map"].values())) for i in range(10**5)}
    ),
}

# Of tokenizers.
ADDED = {
    "an id of 10^9": '{"<more>": 1000000000}',
    "a negative id": '{"<more>": -5}',
    "an id as text": '{"<more>": "a"}',
    "a list": "[1]",
    "no JSON": "{",
    "an id twice": '{"<more>": 1, "<less>": 1}',
}


def _of_vocabulary(name: str, content: dict) -> Iterator[Mutation]:
    """The keys of tokenizer.json and a few entries of a vocabulary."""
    paths = [(key,) for key in list(content)[:3]]
    if name.endswith("tokenizer.json"):
        paths = [(key,) for key in content]
        paths += [("model", key) for key in content["model"]]
        paths += [("added_tokens", 0), ("added_tokens", 0, "id"), ("model", "vocab", 0)]
        paths += [("normalizer", "type"), ("pre_tokenizer", "type"), ("post_processor", "type")]
    for path in paths:
        try:
            _put(json.loads(json.dumps(content)), path, 0)
        except (KeyError, TypeError, IndexError):
            continue
        for kind, value in VALUES.items():
            change = _json_changed(lambda content, path=path, value=value: _put(content, path, value))
            mutate = _on(name, change)
            if name.endswith("tokenizer.json"):
                mutate = _used(name, mutate)
            yield Mutation(f"{name}: {'.'.join(map(str, path))[:40]} {kind}", mutate)


def _used(name: str, mutate: Callable[[Path], None]) -> Callable[[Path], None]:
    """With the files that would be read in its place removed."""

    def both(folder: Path) -> None:
        for other in ("spiece.model", "vocab.json", "merges.txt"):
            (folder / name).with_name(other).unlink(missing_ok=True)
        mutate(folder)

    return both


def _without_spiece(part: str) -> Callable[[Path], None]:
    def mutate(folder: Path) -> None:
        (folder / part / "spiece.model").unlink()
        replace(folder / part / "tokenizer.json", '{"model": {"type": "Unigram"}}')

    return mutate


def _header_changed(change: Callable[[dict], Any]) -> Callable[[Path], None]:
    """change(header) changes it, or returns the bytes that stand for it, or (header, tail of the file)."""

    def mutate(file: Path) -> None:
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
        made, tail = change(header), b""
        if isinstance(made, tuple):
            made, tail = made
        text = made if isinstance(made, bytes) else json.dumps(header).encode()
        replace(file, len(text).to_bytes(8, "little") + text + body + tail)

    return mutate


def _entries(header: dict) -> list[tuple[str, dict]]:
    """The tensors, in the order of their bytes."""
    named = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
    return sorted(named, key=lambda item: item[1]["data_offsets"])


def _entry(**values: Any) -> Callable[[dict], None]:
    """The first tensor with other values; MISSING takes a key away."""

    def change(header: dict) -> None:
        for key, value in values.items():
            _put(_entries(header)[0][1], (key,), value)

    return change


def _moved(by: int, end_too: bool = True) -> Callable[[dict], None]:
    def change(header: dict) -> None:
        entry = _entries(header)[1][1]
        begin, end = entry["data_offsets"]
        entry["data_offsets"] = [begin + by, end + by * end_too]

    return change


def _on_another(header: dict) -> None:
    """Two tensors of one size on the same bytes."""
    entries = _entries(header)
    for _, entry in entries:
        for _, other in entries:
            if other is not entry and other["shape"] == entry["shape"] and other["dtype"] == entry["dtype"]:
                entry["data_offsets"] = other["data_offsets"]
                return


def _gap(header: dict) -> tuple[None, bytes]:
    """The last tensor lies 64 bytes further, and the file is that much longer."""
    entry = _entries(header)[-1][1]
    entry["data_offsets"] = [each + 64 for each in entry["data_offsets"]]
    return None, b"\0" * 64


def _twice(header: dict) -> bytes:
    """The first name stands twice, with different bytes."""
    name, entry = _entries(header)[0]
    return (json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}").encode()


def _renamed(new: str) -> Callable[[dict], None]:
    def change(header: dict) -> None:
        header[new] = header.pop(_entries(header)[0][0])

    return change


def _other_dtype(old: str, new: str) -> Callable[[dict], None]:
    def change(header: dict) -> None:
        for _, entry in _entries(header):
            if entry["dtype"] == old:
                entry["dtype"] = new

    return change


HEADERS: dict[str, Callable[[dict], Any]] = {
    "no JSON": lambda header: b"{x}",
    "a list": lambda header: b"[1, 2, 3]",
    "empty object": lambda header: b"{}",
    "nested": lambda header: b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "a name twice": _twice,
    "a gap": _gap,
    "bytes at the end": lambda header: (None, b"\0" * 16),
    "two tensors on the same bytes": _on_another,
    "overlapping": _moved(-4),
    "offsets beyond the file": _moved(10**12),
    "a negative begin": _entry(data_offsets=[-4, 0]),
    "end before begin": _entry(data_offsets=[8, 0]),
    "offsets as texts": _entry(data_offsets=["0", "4"]),
    "offsets with fractions": _entry(data_offsets=[0.5, 4.5]),
    "offsets of 10^30": _entry(data_offsets=[0, 10**30]),
    "three offsets": _entry(data_offsets=[0, 4, 8]),
    "one offset": _entry(data_offsets=[0]),
    "offsets null": _entry(data_offsets=None),
    "no offsets": _entry(data_offsets=MISSING),
    "a span too short": _moved(-2, False),
    "a negative shape": _entry(shape=[-1, -4]),
    "a shape with fractions": _entry(shape=[1.5, 2]),
    "a shape of texts": _entry(shape=["4", "4"]),
    "a shape of 10^30": _entry(shape=[10**30]),
    "a shape whose product overflows": _entry(shape=[2**32, 2**32, 2**32]),
    "a shape of nothing": _entry(shape=[0, 10**15]),
    "a shape of true": _entry(shape=[True, 4]),
    "a shape of 1000 axes": _entry(shape=[1] * 1000),
    "a shape as text": _entry(shape="[4]"),
    "a shape null": _entry(shape=None),
    "no shape": _entry(shape=MISSING),
    "another shape of as many": _entry(shape=[1, 1, 1]),
    "dtype unknown": _entry(dtype="F128"),
    "dtype null": _entry(dtype=None),
    "dtype a number": _entry(dtype=32),
    "dtype a list": _entry(dtype=["F32"]),
    "no dtype": _entry(dtype=MISSING),
    "dtype of twice the bytes": _entry(dtype="F64"),
    "floats called integers": _other_dtype("F32", "I32"),
    "half floats called integers": _other_dtype("F16", "I16"),
    "bfloats called U16": _other_dtype("BF16", "U16"),
    "an entry null": lambda header: _put(header, (_entries(header)[0][0],), None),
    "an entry a list": lambda header: _put(header, (_entries(header)[0][0],), [1]),
    "an entry a text": lambda header: _put(header, (_entries(header)[0][0],), "F32"),
    "a tensor too few": lambda header: _put(header, (_entries(header)[0][0],), MISSING),
    "an empty name": _renamed(""),
    "a name of 10^6 letters": _renamed("x" * 10**6),
    "a name with NUL": _renamed("a\0b"),
    "a name with a surrogate": _renamed("\ud800"),
    "a name with a line break": _renamed("a\nb"),
    "metadata null": lambda header: _put(header, ("__metadata__",), None),
    "metadata a list": lambda header: _put(header, ("__metadata__",), ["format", "pt"]),
    "metadata a text": lambda header: _put(header, ("__metadata__",), "pt"),
    "metadata of numbers": lambda header: _put(header, ("__metadata__",), {"format": 1}),
    "metadata nested": lambda header: _put(header, ("__metadata__",), {"format": {"a": "pt"}}),
    "another format": lambda header: _put(header, ("__metadata__",), {"format": "tf"}),
    "10^5 tensors without bytes": lambda header: header.update(
        {f"more.{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(10**5)}
    ),
    "layer 10^9": lambda header: header.update(
        {"transformer_blocks.1000000000.norm1.linear.bias": dict(_entries(header)[-1][1])}
    ),
}


def _at(position: int, new: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data[:position] + new + data[position + len(new) :]


_MANY = (2**62).to_bytes(8, "little")
# A GGUF file begins with its magic, version (4 bytes), number of tensors and of fields (8 bytes each).
GGUF: dict[str, Callable[[bytes], bytes]] = {
    "version 0": _at(4, bytes(4)),
    "version 99": _at(4, b"\x63\0\0\0"),
    "2^62 tensors": _at(8, _MANY),
    "10^9 tensors": _at(8, (10**9).to_bytes(8, "little")),
    "no tensors": _at(8, bytes(8)),
    "2^62 fields": _at(16, _MANY),
    "10^9 fields": _at(16, (10**9).to_bytes(8, "little")),
    "no fields": _at(16, bytes(8)),
    "a field's name of 2^62": _at(24, _MANY),
    "bytes at the end": lambda data: data + bytes(64),
    **{f"eight bytes of ones at {i}": _at(i, b"\xff" * 8) for i in range(24, 400, 24)},
    **{f"eight zeros at {i}": _at(i, bytes(8)) for i in range(32, 400, 24)},
}
