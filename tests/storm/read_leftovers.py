"""Lists of prompts, and what runs and the studio leave, damaged."""

import json
import os
from pathlib import Path

from inputs import EITHER, ODD, REFUSED, RIGHT, Input, as_json, damaged, no_file, of_kind, replaced
from PIL import PngImagePlugin
from read_adapters import joined, split
from read_data import bombs, picture


# --- lists of prompts ---------------------------------------------------------------------------------------
@of_kind("prompt lists")
def prompt_list(rng, folder):
    n = rng.choice([10, 1000, 60_000])
    lines = [b"a red dress", b'{"prompt": "a hat", "seed": 3}', b"prompt,seed\na hat,3",
        b"a --w 64 --h 64 --d 7", b"x --s " + b"9" * n, b"x --d -1", b"--n x", b"x --l 3",
        b"x --zz 3", b'{"prompt": 1}', b'{"prompt": ""}', b'{"prompt": "x", "seed": ' + b"9" * n
        + b"}", b'{"prompt": "x", "seed": NaN}', b'{"prompt": "x", "width": 1e308}',
        b'{"prompt": "x", "width": ' + b"[" * n, b'{"prompt": "\\ud800"}',
        b'{"prompt": "x\\u0000"}', b'{"prompt": "x", "name": "../x"}',
        b'{"prompt": "x", "name": "' + b"x" * n + b'"}', b'{"prompt": "x", "name": "con"}',
        b'{"prompt": "x", "num_images": 1000000000}', b'{"prompt": "x", "image": "/dev/zero"}',
        b'{"prompt": "x", "lora_scale": [1]}', b'{"prompt": "x", "size": "' + b"9" * n + b"x"
        * n + b'"}', b'{"prompt": "x", "steps": 1000000000}', b'{"prompt": "x", "prompt": "y"}',
        b"[" * n, b"{" * n, b"null", b"\0" * n, b"\xff\xfe", b"x " * n, b"x --" * n, b"," * n,
        b'"' * n, b"\r" * n, b"\x1b[31m", b"x\n" * n, "漢".encode() * n, b"sep=,\n",
        b"prompt,prompt\nx,y", b"prompt;seed\nx;y", b"prompt\n\"" + b"x" * n]  # fmt: skip
    content = b"\n".join(rng.choice(lines) for _ in range(rng.choice([1, 1, 2, 5])))
    if rng.random() < 0.2:
        content = damaged(rng, content)[0]
    name = f"x{rng.choice(['.txt', '.jsonl', '.jsonl', '.csv', '.tsv'])}"
    (folder / name).write_bytes(content)
    return Input(f"{name}: {content[:50]} of {len(content)}", "prompts", [str(folder / name)])


@of_kind("prompt lists")
def prompt_no_file(rng, folder):
    name = f"x{rng.choice(['.txt', '.jsonl', '.csv', '.md'])}"
    told = no_file(rng, folder / name)
    return Input(told, "prompts", [str(folder / name)], REFUSED)


FORMATS = ["AVIF", "BMP", "DDS", "GIF", "ICO", "IM", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM",
           "SGI", "TGA", "TIFF", "WEBP"]  # fmt: skip


# --- pictures that are drawn from, and scored ---------------------------------------------------------------
def drawn_input(folder: Path, told: str) -> Input:
    for name in ("picture.txt", "prompts.txt"):
        if not os.path.lexists(folder / name):
            (folder / name).write_text("a red dress")
    return Input(told, "drawn", [str(folder / "picture"), str(folder / "prompts.txt")])


@of_kind("pictures drawn from")
def drawn_bytes(rng, folder):
    """Of all formats that Pillow writes, read or not."""
    form = rng.choice(
        [
            "AVIF",
            "BMP",
            "DDS",
            "GIF",
            "ICO",
            "IM",
            "JPEG",
            "JPEG2000",
            "MPO",
            "PCX",
            "PNG",
            "PPM",
            "SGI",
            "TGA",
            "TIFF",
            "WEBP",
        ]
    )
    try:
        content, told = damaged(rng, picture(rng, format=form))
    except (KeyError, OSError):  # a Pillow without it
        content, told = b"", "none"
    (folder / "picture").write_bytes(content)
    return drawn_input(folder, f"{form}: {told}")


@of_kind("pictures drawn from")
def drawn_bomb(rng, folder):
    told = rng.choice(list(bombs()))
    (folder / "picture").write_bytes(bombs()[told])
    return drawn_input(folder, told)


@of_kind("pictures drawn from")
def drawn_prompt(rng, folder):
    """A caption beside it, and a list."""
    (folder / "picture").write_bytes(picture(rng))
    texts = [
        b"\xff\xfe\xfa",
        "a hat".encode("utf-16"),
        b"a\0",
        b"\xef\xbb\xbfa",
        b"a\r\n",
        b"",
        b"\xed\xa0\x80",
    ]
    name = rng.choice(["picture.txt", "prompts.txt"])
    (folder / name).write_bytes(rng.choice(texts))
    return drawn_input(folder, f"{name}: {(folder / name).read_bytes()}")


@of_kind("pictures drawn from")
def drawn_no_file(rng, folder):
    name = rng.choice(["picture", "picture.txt", "prompts.txt"])
    if name != "picture":
        (folder / "picture").write_bytes(picture(rng))
    return drawn_input(folder, no_file(rng, folder / name))


# --- what runs and the studio leave -------------------------------------------------------------------------
def save_run(folder: Path) -> None:
    import paddle

    from ppcoat.train.checkpoint import save_checkpoint

    for step in (1, 2):
        lora = {"a": paddle.full([4], step, "float32"), "b": paddle.full([2, 2], step, "bfloat16")}
        save_checkpoint(
            folder / "run",
            step,
            {"lora": lora, "optimizer": {"c": paddle.zeros([3])}},
            {"loss": step},
            keep=2,
        )


@of_kind("checkpoints")
def checkpoint(rng, folder):
    """The newest, or the one before it; with strict, one of both or none."""
    save_run(folder)
    root = folder / "run" / "checkpoints"
    file = rng.choice(sorted(path for path in root.rglob("*") if path.is_file()))
    if rng.random() < 0.25:
        told = no_file(rng, file)
    elif file.suffix == ".json" and rng.random() < 0.6:
        value, told = replaced(rng, json.loads(file.read_text()))
        file.write_bytes(as_json(value))
    elif file.name == "latest":
        told = rng.choice(["000000001", "000000003", "9" * 9, "9" * 5000, "-1", "../x", "", "\0", "漢", "1"])
        file.write_text(told)
    else:
        content, told = damaged(rng, file.read_bytes())
        file.write_bytes(content)
    strict = rng.choice(["strict", ""])
    name = file.relative_to(root)
    return Input(f"{name}: {told} {strict}", "checkpoint", [str(folder / "run"), strict], EITHER
        if strict else RIGHT, None, ["step 1, loss 1, a 1.0", "step 2, loss 2, a 2.0"])  # fmt: skip


KEY = "3f" * 32


@of_kind("caches")
def cache_entry(rng, folder):
    """The entry, or none, so that it is made anew; never another."""
    import paddle

    from ppcoat.data.embedding_store import EmbeddingStore

    EmbeddingStore(folder / "cache").put(
        KEY, {"x": paddle.full([5], 3, "bfloat16"), "y": paddle.ones([2, 2])}
    )
    file = folder / "cache" / KEY[:2] / f"{KEY}.safetensors"
    header, data = split(file.read_bytes())
    what = rng.randrange(4)
    if what == 0:
        told = no_file(rng, file)
    elif what == 1:
        value, told = replaced(rng, header)
        file.write_bytes(joined(value, data))
    elif what == 2:
        content = joined(rng.choice(ODD), data)
        told, _ = "header is no object", file.write_bytes(content)
    else:
        content, told = damaged(rng, file.read_bytes())
        file.write_bytes(content)
    return Input(told, "cache", [str(folder / "cache")], RIGHT, None, ["none", "x 3.0, y 1.0"])


@of_kind("what runs leave")
def run_leftover(rng, folder):
    """Beside checkpoints: a log, which nobody synced, journals, results, pictures of a list."""
    from ppcoat.train.search import Candidate, Costs, Journal, Result, Rounds

    run, log = folder / "out", [{"step": 1, "loss": 0.5}, {"step": 2}, {"step": 3}]
    journal = {Candidate(1e-3, 4, None): [Result(20, 0.5, 1.0)]}
    Journal(run / "journal.json", {"a": 1}, Costs(1.0, 1.0, 1.0), Rounds((2,), (20,)), 1, journal).save()
    (run / "log.jsonl").write_bytes(b"".join(as_json(line) + b"\n" for line in log))
    (run / "parity.json").write_bytes(as_json({"settings": {}, "results": {"none/0": {"loss": 1.0}}}))
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "latest").write_text("000000001\n")
    info = PngImagePlugin.PngInfo()
    info.add_itxt("settings", as_json(rng.choice([{"seed": 1}, *ODD])).decode("utf-8", "replace"))
    (run / "picture.png").write_bytes(picture(rng, pnginfo=info))
    names = ["log.jsonl", "journal.json", "parity.json", "checkpoints/latest", "picture.png"]
    file = run / rng.choice(names)
    what = rng.randrange(3)
    if what == 0:
        told = no_file(rng, file)
    elif what == 1:
        odd = rng.choice(ODD)
        told, _ = f"all of it is {str(odd)[:20]}", file.write_bytes(as_json(odd) + b"\n")
    else:
        content, told = damaged(rng, file.read_bytes())
        file.write_bytes(content)
    return Input(f"{file.name}: {told}", "run", [str(run)])


NOTES = {
    "studio.json": {"argv": ["train", "x.yaml"], "cwd": "/", "pid": 1, "born": "x", "stop": False},
    "queue.json": {"waiting": ["a", "b"], "current": "c"},
    "drawing.json": {
        "asked": {"prompt": "x", "loras": [["a", 1.0]], "strengths": [1.0], "step_counts": [8], "width": 64},
        "rows": [""],
        "columns": [""],
        "names": [["r0_c0"]],
    },
    "log.jsonl": {"step": 3, "loss": 0.5, "lr": 1e-4, "validation_loss": 0.1},
    "studio.yaml": {"train": {"steps": 5, "num_epochs": None}},
    "config.yaml": {"train": {"steps": 5}},
}


@of_kind("studio's notes")
def studio_note(rng, folder):
    """A damaged note is one that is not there: the page goes on."""
    for name, value in NOTES.items():
        (folder / name).write_bytes(as_json(value) + b"\n")
    (folder / "studio.log").write_text("step 1\nerror: x\n")
    name = rng.choice([*NOTES, *NOTES, "studio.log"])
    what = rng.randrange(4)
    if what == 0:
        told = no_file(rng, folder / name)
    elif what == 1 and name in NOTES:
        value, told = replaced(rng, NOTES[name])
        (folder / name).write_bytes(as_json(value) + b"\n")
    elif what == 2:
        odd = rng.choice(ODD)
        told = f"all of it is {str(odd)[:20]}"
        (folder / name).write_bytes(as_json(odd) + b"\n")
    else:
        content, told = damaged(rng, (folder / name).read_bytes())
        (folder / name).write_bytes(content)
    return Input(f"{name}: {told}", "studio", [str(folder)], RIGHT)


@of_kind("studio's notes")
def studio_picture(rng, folder):
    """A picture that is dropped on the page."""
    settings = {"seed": 3, "steps": 4, "lora_scale": [1.0], "guidance_scale": 3.5}
    files = {"model": "tiny_flux", "path_to_lora": ["x"], "reference": ["a"]}
    info, told = PngImagePlugin.PngInfo(), "whole"
    if rng.random() < 0.7:
        settings, told = replaced(rng, settings)
    if rng.random() < 0.3:
        files, told = replaced(rng, files)
    for key, value in (("prompt", b"a hat"), ("settings", as_json(settings)), ("files", as_json(files))):
        text = rng.choice([value, value, value, value, as_json(rng.choice(ODD))]).decode(
            "utf-8", "surrogatepass"
        )
        info.add_itxt(key, text.encode("utf-8", "replace").decode())
    content = picture(rng, pnginfo=info)
    if rng.random() < 0.3:
        content, told = damaged(rng, content)
    (folder / "x.png").write_bytes(content)
    return Input(f"picture: {told}", "dropped", [str(folder / "x.png")])
