"""Checkpoints of torch, damaged: what their pickles and zip files say."""

import struct
import zipfile
from pathlib import Path

import numpy as np
from inputs import EITHER, REFUSED, RIGHT, Input, damaged, no_file, of_kind


def number(n: int) -> bytes:
    """A whole number as a pickle writes it."""
    raw = n.to_bytes(n.bit_length() // 8 + 1, "little", signed=True)
    return (
        b"\x8a" + bytes([len(raw)]) + raw if len(raw) < 256 else b"\x8b" + struct.pack("<i", len(raw)) + raw
    )


def tensor_program(
    storage=b"FloatStorage", key=b"0", offset=b"K\0", shape=(4, 2), strides=(2, 1), before=b"", after=b""
) -> bytes:
    """The pickle of {"a": a tensor}, as torch.save writes it."""

    def text(raw):
        return b"X" + struct.pack("<I", len(raw)) + raw

    listed = [b"(" + b"".join(map(number, each)) + b"t" for each in (shape, strides)]
    return (b"\x80\x02" + before + b"}" + text(b"a") + b"ctorch._utils\n_rebuild_tensor_v2\n(("
        + text(b"storage") + b"ctorch\n" + storage + b"\n" + text(key) + text(b"cpu")
        + number(8) + b"tQ" + offset + listed[0] + listed[1]
        + b"\x89ccollections\nOrderedDict\n)RtRs" + after + b".")  # fmt: skip


def pth(
    file: Path, program: bytes, entries: dict[str, bytes] | None = None, method=zipfile.ZIP_STORED
) -> None:
    entries = {"data/0": np.arange(8, dtype="float32").tobytes()} if entries is None else entries
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in {"data.pkl": program, "version": b"3\n", **entries}.items():
            archive.writestr(f"x/{name}", content)


def pth_input(folder: Path, told: str, statuses=EITHER, outputs=None) -> Input:
    return Input(told, "weights", [str(folder / "x.pth")], statuses, None, outputs)


GOOD_PTH = "a [4, 2] 28"  # what the stand-in prints of `tensor_program`


@of_kind("pickles")
def pth_tensor(rng, folder):
    """Offsets, shapes and strides that are not those of the bytes."""
    odd = [-1, 0, 1, 2, 8, 9, 2**31, 2**63, 2**64, 10**30, 256**200]

    def numbers():
        return tuple(rng.choice(odd) for _ in range(rng.choice([0, 1, 2, 2, 2, 3, 3000])))

    more = rng.choice([{"offset": number(rng.choice(odd))}, {"shape": numbers()},
        {"strides": numbers()}, {"shape": numbers(), "strides": numbers()},
        {"offset": rng.choice([b"N", b"G" + struct.pack(">d", 0.5), b"\x88", b"}", b")",
        b"X\x01\0\0\x000"])}, {"key": rng.choice([b"1", b"../0", b"", b"x" * 9999, b"\0"])},
        {"storage": rng.choice([b"ByteStorage", b"ComplexFloatStorage", b"QInt8Storage",
        b"HalfStorage", b"DoubleStorage", b"load"])},])  # fmt: skip
    pth(folder / "x.pth", tensor_program(**more))
    return pth_input(folder, f"{ {key: str(value)[:40] for key, value in more.items()} }")


@of_kind("pickles")
def pth_program(rng, folder):
    """Pickles that want to run something, or never to end."""
    code = [
        b"cos\nsystem\n(X\x04\0\0\0true\x85R",
        b"cbuiltins\neval\n",
        b"ios\nsystem\n",
        b"\x8c\x02os\x8c\x06system\x93",
        b"c__builtin__\nexec\n",
        b"c\n\n",
        b"ctorch\nload\n",
        b"r\xff\xff\xff\x7f",
        b"X\xff\xff\xff\xff",
        b"\x8e" + b"\xff" * 7 + b"\x7f",
        b"\x8b\xff\xff\xff\x7f",
        b"\x82\x01",
        b"NQ",
        b"}Q",
        b"X\x01\0\0\0aQ",
        b"NN\x86Q",
        b"P1\n",
        b"N0",
    ]
    odd = [b"ccollections\nOrderedDict\n)R}b", b"(" * 100_000, b")" * 100_000, b"]" * 100_000,
        b"(" * 50_000 + b"t" * 50_000, b"\x95" + b"\xff" * 8, b"}" + b"\x94h\0" * 9999, b"N"
        + b"\x85" * 200_000, b"]" + b"\x94h\0a" * 1000, b"\x80\xff", b"I" + b"9" * 9999 + b"\n",
        b"L" + b"9" * 9999 + b"L\n", b"V\\ud800\n", b"F1e9999\n", b"(tQ", b"((((l(ld(t" * 999,
        b"N" + b"\x85" * 40_000, b"N" * 500_000, b"N" * 700_000]  # fmt: skip
    before = rng.choice([*code, *odd])
    pth(folder / "x.pth", tensor_program(before=before))
    return pth_input(folder, f"pickle {before[:20]} of {len(before)}", REFUSED if before in code else EITHER)


@of_kind("pickles")
def pth_bytes(rng, folder):
    pth(folder / "x.pth", tensor_program())
    content, told = damaged(rng, (folder / "x.pth").read_bytes())
    (folder / "x.pth").write_bytes(content)
    return pth_input(folder, told, EITHER)


@of_kind("pickles")
def pth_flags(rng, folder):
    """The zip's own records: flags, methods, sizes, offsets."""
    pth(folder / "x.pth", tensor_program())
    content = bytearray((folder / "x.pth").read_bytes())
    starts = [
        i
        for mark in (b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06")
        for i in range(len(content))
        if content.startswith(mark, i)
    ]
    place = rng.choice(starts) + rng.randrange(4, 42)
    content[min(place, len(content) - 1)] = rng.choice([0, 1, 8, 12, 14, 93, 99, 255])
    (folder / "x.pth").write_bytes(bytes(content))
    return pth_input(folder, f"byte {place} is {content[min(place, len(content) - 1)]}", outputs=None)


@of_kind("pickles")
def pth_bomb(rng, folder):
    what = rng.randrange(6)
    method, program, entries, statuses = zipfile.ZIP_DEFLATED, tensor_program(), None, REFUSED
    if what == 0:  # 64 MB, just below the cap, of one opcode
        program = b"\x80\x02" + b"]" * 60_000_000
    elif what == 1:
        program = b"\x80\x02" + b"N0" * 40_000_000
    elif what == 2:
        entries = {"data/0": bytes(100_000_000)}
    elif what == 3:
        entries, method = {f"data/{i}": b"" for i in range(20_000)}, zipfile.ZIP_STORED
    elif what == 4:  # a string of 60 MB, again and again
        program = b"\x80\x02X" + struct.pack("<I", 50_000_000) + b"a" * 50_000_000 + b"."
    else:
        program = b"\x80\x02" + b"(" + b"K\x01" * 20_000_000 + b"l."
    pth(folder / "x.pth", program, entries, method)
    return pth_input(folder, f"bomb {what}", statuses)


@of_kind("pickles")
def pth_harmless(rng, folder):
    more = {f"data/{i}": rng.randbytes(9) for i in range(1, rng.randrange(2, 99))}
    pth(
        folder / "x.pth",
        tensor_program(before=b"N" * rng.randrange(99)),
        {"data/0": np.arange(8, dtype="float32").tobytes(), **more},
    )
    return pth_input(folder, "whole", RIGHT, [GOOD_PTH])


@of_kind("pickles")
def pth_no_file(rng, folder):
    return pth_input(folder, no_file(rng, folder / "x.pth"), REFUSED)
