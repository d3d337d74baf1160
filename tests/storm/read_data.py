"""Folders of pictures and captions, and LAION's lists, damaged."""

import base64
import io
import os
import random
import struct
import zlib
from collections.abc import Collection
from functools import cache
from pathlib import Path

import numpy as np
from inputs import EITHER, ODD, REFUSED, RIGHT, Input, as_json, damaged, no_file, of_kind, replaced
from PIL import Image, PngImagePlugin


# --- folders of pictures and captions -----------------------------------------------------------------------
def picture(rng, mode="RGB", size=(48, 40), format="PNG", **more) -> bytes:
    stream = io.BytesIO()
    values = np.frombuffer(rng.randbytes(size[0] * size[1] * 3), "uint8").reshape([size[1], size[0], 3])
    Image.fromarray(values).convert(mode).save(stream, format, **more)
    return stream.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def data_folder(rng, folder: Path) -> Path:
    data = folder / "data"
    data.mkdir()
    for i in range(3):
        (data / f"{i}.png").write_bytes(picture(random.Random(i)))
        (data / f"{i}.txt").write_text(f"a red dress {i}, on a hanger")
    return data


def data_input(rng, folder: Path, told: str, statuses=EITHER) -> Input:
    more = rng.choice(
        [
            [],
            [],
            ["--trigger_word", "sks"],
            ["--mask_path", str(folder / "data")],
            ["--control_path", str(folder / "data")],
        ]
    )
    command = rng.choice([["data report"], ["data report"], ["data captions", "--append", "x"]])
    more = [] if len(command) > 1 else [*more, "--resolution", "64"]
    return Input(told, command[0], [str(folder / "data"), *command[1:], *more], statuses)


@of_kind("data")
def data_picture_bytes(rng, folder):
    data = data_folder(rng, folder)
    name, options = rng.choice(
        [
            ("1.png", {}),
            ("1.jpg", {"format": "JPEG"}),
            ("1.webp", {"format": "WEBP"}),
            ("1.jpg", {"format": "JPEG", "mode": "CMYK"}),
            ("1.png", {"mode": "P"}),
            ("1.png", {"mode": "LA"}),
        ]
    )
    content, told = damaged(rng, picture(rng, **options))
    (data / "1.png").unlink()
    (data / name).write_bytes(content)
    return data_input(rng, folder, f"{name} {options}: {told}")


@cache
def bombs() -> dict[str, bytes]:
    """Pictures that say or hold more than they should."""
    rng = random.Random(0)

    def header(width, height, depth=8, colour=2):
        return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))

    mark, end = b"\x89PNG\r\n\x1a\n", chunk(b"IEND", b"")
    rows = zlib.compress(bytes(50_000_000), 9)
    small, pixels = header(48, 40), chunk(b"IDAT", zlib.compress(b"\0" * (48 * 3 + 1) * 40))
    info = PngImagePlugin.PngInfo()
    info.add_itxt("settings", "x" * 100_000)
    exif = Image.Exif()
    exif[0x0112] = rng.choice([0, 3, 9, 65535])
    jpeg = picture(rng, format="JPEG")
    return {
        "2^31 wide": mark + header(2**31 - 1, 1) + pixels + end,
        "2^32 wide": mark + header(2**32 - 1, 2**32 - 1) + pixels + end,
        "0 wide": mark + header(0, 0) + pixels + end,
        "30,000 x 30,000": mark + header(30_000, 30_000) + chunk(b"IDAT", rows) + end,
        "13,000 x 13,000": mark
        + header(13_000, 13_000, 1, 0)
        + chunk(b"IDAT", zlib.compress(bytes(1626 * 13_000), 9))
        + end,
        "text bomb": mark
        + small
        + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80_000_000), 9))
        + pixels
        + end,
        "many texts": mark + small + chunk(b"tEXt", b"a\0" + b"x" * 1000) * 70_000 + pixels + end,
        "profile bomb": mark
        + small
        + chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(80_000_000), 9))
        + pixels
        + end,
        "no profile": mark + small + chunk(b"iCCP", b"a\0\0" + zlib.compress(b"x" * 300)) + pixels + end,
        "depth 3": mark + header(48, 40, 3) + pixels + end,
        "no pixels": mark + small + end,
        "texts": picture(rng, pnginfo=info),
        "exif": picture(rng, exif=exif),
        "exif damaged": picture(rng, format="JPEG", exif=b"Exif\0\0" + rng.randbytes(60)),
        "profile damaged": picture(rng, icc_profile=rng.randbytes(200)),
        "1 pixel": picture(rng, size=(1, 1)),
        "thin": picture(rng, size=(3000, 1)),
        "frames": mark + small + chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)) + pixels + end,
        "65535 x 65535": jpeg.replace(struct.pack(">HH", 40, 48), b"\xff\xff\xff\xff", 1),
        "gif": picture(rng, format="GIF"),
        "tiff": picture(rng, format="TIFF"),
        "palette": mark + header(48, 40, 8, 3) + pixels + end,
        "chunks": mark + small + chunk(b"IDAT", b"") * 200_000 + pixels + end,
    }


@of_kind("data")
def data_picture_bomb(rng, folder):
    data, told = data_folder(rng, folder), rng.choice(list(bombs()))
    (data / "1.png").write_bytes(bombs()[told])
    return data_input(rng, folder, told)


@of_kind("data")
def data_caption(rng, folder):
    data = data_folder(rng, folder)
    texts = {
        "random": rng.randbytes(300),
        "zeros": bytes(50),
        "UTF-16": "a dress".encode("utf-16"),
        "half a character": b"\xed\xa0\x80 dress",
        "64 KiB": b"x, " * 30_000,
        "64 KiB of one word": b"x" * 65_536,
        "4,000 parts": b", ".join(b"part %d" % i for i in range(4000)),
        "empty": b"",
        "spaces": b" \n" * 99,
        "braces": b"{" * 60_000,
        "brackets": b"[" * 60_000,
        "closed": b"[" * 30_000 + b"]" * 30_000,
        "object": b'{"caption": ' * 5000,
        "digits": b'{"caption": ' + b"9" * 5000 + b"}",
        "number": b'{"caption": 1}',
        "list": b'{"caption": [1, 2]}',
        "surrogate": b'{"caption": "\\ud800"}',
        "tags": b'{"caption": "x", "tags": [' + b"1," * 9999 + b"1]}",
        "triggers": b"[trigger]" * 7000,
        "commas": b"," * 65_000,
        "quotes": b'"' * 65_000,
        "control": bytes(range(1, 32)) + b"dress",
        "line ends": b"\r" * 65_000,
        "escape": b"\x1b[31mred\x07",
        "combining": ("e" + "\u0301" * 20_000).encode(),
        "keys": b'{"caption": null, "text": "", "prompt": {}}',
        "yaml": b"&a [*a]",
        "bom": b"\xef\xbb\xbf\xff\xfe",
    }
    told = rng.choice(list(texts))
    name = rng.choice(["1.txt", "1.txt", "1.json", "default.txt", "1.caption"])
    (data / "1.txt").unlink()
    (data / name).write_bytes(texts[told])
    return data_input(rng, folder, f"{name}: {told}")


@of_kind("data")
def data_table(rng, folder):
    data = data_folder(rng, folder)
    (data / "1.txt").unlink()
    rows = {
        "good": b'{"file_name": "1.png", "text": "a hat"}',
        "wrong types": b'{"file_name": 1, "text": []}',
        "deep": b'{"file_name": "1.png", "text": ' + b"[" * 9999,
        "digits": b'{"file_name": "1.png", "text": ' + b"9" * 5000 + b"}",
        "surrogates": b'{"file_name": "1.png", "text": "\\ud800 hat"}',
        "NUL": b'{"file_name": "1\\u0000.png", "text": "x"}',
        "long name": b'{"file_name": "' + b"x" * 100_000 + b'", "text": "x"}',
        "slashes": b'{"file_name": "' + b"../" * 30_000 + b'1.png", "text": "x"}',
        "name surrogate": b'{"file_name": "\\udcff1.png", "text": "x"}',
        "null": b"null",
        "numbers": b"1\n2\n3",
        "csv": b"file_name,text\n1.png,a hat",
        "csv quotes": b'file_name,text\n1.png,"' + b"x" * 200_000,
        "csv NUL": b"file_name,text\n1.png,\0",
        "csv many": b"file_name,text" + b"," * 50_000 + b"\n1.png,x",
        "lists": b"[[[1]]]",
        "object": b'{"1.png": "a hat"}',
        "deep object": b'{"a":' * 50_000,
        "100,000 rows": b'{"file_name": "9.png", "text": "x"}\n' * 30_000,
        "binary": rng.randbytes(3000),
        "twice": b'{"file_name": "1.png", "text": "a"}\n{"file_name": "1.png", "text": "b"}',
        "empty": b"",
        "nan": b'{"file_name": "1.png", "text": NaN}',
        "windows": b'{"file_name": "C:\\\\a\\\\1.png", "text": "x"}',
    }
    told, name = (
        rng.choice(list(rows)),
        rng.choice(
            [
                "metadata.jsonl",
                "metadata.jsonl",
                "metadata.csv",
                "captions.json",
                "captions.txt",
                "x.json",
                "metadata.tsv",
                "x.parquet",
            ]
        ),
    )
    (data / name).write_bytes(rows[told] if rng.random() < 0.7 else damaged(rng, rows[told])[0])
    return data_input(rng, folder, f"{name}: {told}")


@of_kind("data")
def data_no_file(rng, folder):
    data = data_folder(rng, folder)
    name = rng.choice(
        ["1.txt", "1.png", "default.txt", "metadata.jsonl", "4.png", "1.json", "9.txt", "more", "2.jpg"]
    )
    return data_input(rng, folder, no_file(rng, data / name))


@of_kind("data")
def data_names(rng, folder):
    """Names that systems allow."""
    data = data_folder(rng, folder)
    names = [b"\xff\xfe.png", b"a\nb.png", b"a\x1b[31m.png", b" .png", b"-rf.png",
        "漢字.png".encode(), b"x" * 250 + b".png", b"'.png", b"a b\t.png", b"1.PNG", b"1.png.png",
        b"..png", b"...png", b"9999999999_x/1.png", b"1000_x/1.png", b"0_x/1.png",
        b"-1_x/1.png", b"a/" * 200 + b"1.png", "e\u0301.png".encode(), b"*.png", b"%s.png"]  # fmt: skip
    name = rng.choice(names)
    path = os.fsencode(data) + b"/" + name
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Path(os.fsdecode(path)).write_bytes(picture(rng))
    if rng.random() < 0.8:
        Path(os.fsdecode(os.path.splitext(path)[0] + b".txt")).write_text("a hat")
    return data_input(rng, folder, f"name {name[:40]}")


@of_kind("data")
def data_links(rng, folder):
    data, told = data_folder(rng, folder), rng.choice(["loop", "root", "proc", "many"])
    if told == "many":
        for i in range(500):
            (data / f"l{i}").symlink_to(data)
    else:
        (data / "l").symlink_to({"loop": data, "root": folder, "proc": "/proc/self"}[told])
    return data_input(rng, folder, f"link: {told}")


@of_kind("data")
def data_shuffled(rng, folder):
    """Captions of many parts, shuffled and dropped; what a run makes of a folder before it encodes."""
    data = data_folder(rng, folder)
    n = rng.choice([2, 800, 8000])
    (data / "1.txt").write_bytes(b",".join(b"%d" % i for i in range(n)))
    config = {
        "name": "x",
        "model": {"name_or_path": "ppcoat/assets/tiny_flux"},
        "datasets": [
            {
                "folder_path": str(data),
                "resolution": 64,
                "shuffle_tokens": True,
                "token_dropout_rate": rng.choice([0, 0.3]),
                "keep_tokens": rng.choice([0, 1, 10**9]),
                "caption_variants": rng.choice([1, 8, 64]),
            }
        ],
    }
    if rng.random() < 0.5:
        config["trigger_word"] = rng.choice(["sks", "a" * 1000, "0", "("])
    (folder / "x.json").write_bytes(as_json(config))
    return Input(f"{n} parts, {config['datasets'][0]}", "train", [str(folder / "x.json"), "--dry_run"])


# --- LAION's lists ------------------------------------------------------------------------------------------
def laion_row(rng, caption: bytes | None = None, cell: bytes | None = None) -> bytes:
    cell = base64.b64encode(picture(rng, format="JPEG")) if cell is None else cell
    return (
        b"http://x\t" + (b'{"caption": "a red dress"}' if caption is None else caption) + b"\t" + cell + b"\n"
    )


def laion_folder(rng, folder: Path, rows: Collection[bytes] = ()) -> None:
    (folder / "shards").mkdir()
    (folder / "list.txt").write_text("a.txt\n")
    (folder / "shards" / "a.txt").write_bytes(
        b"".join([*(laion_row(random.Random(i)) for i in range(3)), *rows])
    )


def laion_input(folder: Path, told: str, outputs: Collection[str] | None = None, statuses=EITHER) -> Input:
    return Input(
        told,
        "unpack",
        [str(folder / "shards"), str(folder / "list.txt"), str(folder / "out" / "data")],
        statuses,
        None,
        outputs,
    )


@of_kind("LAION")
def laion_list(rng, folder):
    laion_folder(rng, folder)
    lists = [b"", b"\n\n", b"\0", b"a\0.txt", b"x" * 5000, b"x/" * 5000, b"../list.txt",
        b"/etc/passwd", b"a.txt\n" * 5000, b"\xff\xfe", b"\xed\xa0\x80", b".", b"..", b"shards",
        b"a.txt\t" + b"x" * 10**6, b"b.txt", b"\x1b[31m", b"a.txt\nx" + b"\0",
        "a.txt\u2028b.txt".encode(), b"~", b"$HOME", b"a.txt/", b"./a.txt", b"x" * 256,
        b"\\\\x\\y", rng.randbytes(999)]  # fmt: skip
    (folder / "list.txt").write_bytes(content := rng.choice(lists))
    statuses = EITHER if content.startswith((b"a.txt\n" * 9, b"a.txt\t", b"./a.txt", b"a.txt/")) else REFUSED
    return laion_input(folder, f"list {content[:20]} of {len(content)}", statuses=statuses)


@of_kind("LAION")
def laion_caption(rng, folder):
    """One bad row of four is counted, and does not end the run."""
    captions = [b'{"caption": "\\ud800 dress"}', b'{"caption": "\xed\xa0\x80"}',
        b"{'caption': '\\ud800'}", b"{'caption': __import__('os')}", b"{" * 60, b"{" * 50_000,
        b"[" * 50_000, b"-" * 60_000, b"{'caption': " + b"-" * 50_000, b'{"caption": ' + b"9"
        * 5000 + b"}", b"{'caption': " + b"9" * 5000 + b"}", b"{'a': 1}", b"", b" ", b"\0",
        b'{"caption": "\\u0000"}', b"x" * 70_000, b'{"caption": null}', b"{'caption': b'x'}",
        b"{'caption': 1e999}", b"{1: 2}", b"{[]: 1}", b"{'caption': 'x' 'y'}", b"{**{}}",
        b"\xff\xff", b"{'caption': '" + b"\\" * 9999 + b"'}", b"{not}",
        b"{'caption': (((())))}", b"{'caption':" + b"+1" * 9999 + b"}", b"{'caption': " + b"~"
        * 9999 + b"1}", b"{'caption': 'a'" + b"+'a'" * 5000 + b"}"]  # fmt: skip
    caption = rng.choice(captions)
    laion_folder(rng, folder, [laion_row(rng, caption)])
    either = caption.startswith(
        (b"-", b"\0", b'{"caption": "\\u0', b"{'caption': 'x'", b"{'caption': '\\\\", b"[", b"{'caption': '")
    )
    outputs = [f"3 pictures, {bad} bad" for bad in (0, 1)] + (["4 pictures, 0 bad"] if either else [])
    return laion_input(folder, f"caption {caption[:30]} of {len(caption)}", outputs, RIGHT)


@of_kind("LAION")
def laion_picture(rng, folder):
    good = base64.b64encode(picture(rng, format="JPEG"))
    bomb = io.BytesIO()
    Image.new("1", (14_000, 14_000)).save(bomb, "PNG")
    cells = [
        b"",
        b"/9j/",
        good[:-9],
        good[:50],
        b"/9j/" + b"!" * 100,
        b"iVBORw0KGgo" + b"A" * 1000,
        good + b"=",
        good + b"\xff",
        base64.b64encode(bomb.getvalue()),
        b"UklGR" + b"A" * 999,
        b"/9j/" + rng.randbytes(99).replace(b"\n", b""),
        good.lower(),
    ]
    cell = rng.choice(cells)
    laion_folder(rng, folder, [laion_row(rng, cell=cell)])
    outputs = [
        "3 pictures, 0 bad",
        "3 pictures, 1 bad",
        "4 pictures, 0 bad",
    ]  # a JPEG that is cut may still be one
    return laion_input(folder, f"picture {cell[:20]} of {len(cell)}", outputs)


@of_kind("LAION")
def laion_shard(rng, folder):
    laion_folder(rng, folder)
    shard = folder / "shards" / "a.txt"
    if rng.random() < 0.3:
        return laion_input(folder, no_file(rng, shard), statuses=REFUSED)
    content, told = damaged(rng, shard.read_bytes())
    shard.write_bytes(content)
    return laion_input(folder, f"shard {told}")


@of_kind("LAION")
def laion_unpacked(rng, folder):
    """A folder of an earlier run whose mark is damaged is made anew."""
    laion_folder(rng, folder)
    done = folder / "out" / "data" / "unpacked.json"
    done.parent.mkdir()
    facts = {"pictures": 2, "bad": 0, "reasons": []}
    good = as_json(facts)
    what = rng.randrange(3)
    if what == 0:
        told = no_file(rng, done)
        return laion_input(folder, told, ["3 pictures, 0 bad"])
    content, told = damaged(rng, good) if what == 1 else (None, None)
    if content is None:
        value, told = replaced(rng, facts)
        content = as_json(rng.choice([value, *ODD, [facts]]))
    done.write_bytes(content)
    return laion_input(folder, f"unpacked.json: {told}, {content[:30]}")
