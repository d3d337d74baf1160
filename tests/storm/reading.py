"""Files of the world, damaged: one of each kind that is read here, and what is done to it.

    KINDS["adapters"][i](rng, folder) -> Input, whose files lie in `folder`

A mutator states what is right where it can be known: the exit status, and what a success prints. The rest
must end in a success or in one line. Commands without a form of their own have a stand-in at the end, so that
all are run by `ppcoat.cli.main.run`. Model folders are in model_mutations.py.
"""

# ruff: noqa: E501  tables of inputs

import argparse
import base64
import importlib.util
import io
import json
import os
import random
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from ppcoat.cli.main import Command
from ppcoat.config.load import value_of_text

FIXTURES = Path(__file__).parents[1] / "fixtures"
CONFIGS = Path(__file__).parents[2] / "configs"
TINY_FLUX = Path(__file__).parents[2] / "ppcoat" / "assets" / "tiny_flux"
RIGHT, REFUSED = frozenset({0}), frozenset({2})
EITHER = RIGHT | REFUSED


@dataclass(frozen=True)
class Input:
    """argv: of `command`, which is in COMMANDS or a stand-in. told: what was done, for messages. statuses:
    exit statuses that are right. calm: arguments whose status and output are this input's, too. outputs: what
    a success may print; both without the names of folders."""

    told: str
    command: str
    argv: list[str]
    statuses: frozenset[int] = EITHER
    calm: list[str] | None = None
    outputs: Collection[str] | None = None


Mutator = Callable[[random.Random, Path], Input]
KINDS: dict[str, list[Mutator]] = {}


def of_kind(kind: str):
    def put(mutator: Mutator) -> Mutator:
        KINDS.setdefault(kind, []).append(mutator)
        return mutator

    return put


# --- values that no field wants -----------------------------------------------------------------------------
DIGITS, DEEP, OBJECTS = "@digits@", "@deep@", "@objects@"
ODD = [None, True, False, -1, 0, 1, 7, 1.5, -1e-30, 1e308, 2**31, 2**63, 2**64, 10**30, float("nan"), float("inf"),
       "", " ", "x", "-1", "1e999", "nan", "\0", "\ud800", "../../x", "/dev/zero", "x" * 100_000, "漢" * 300,
       [], [[]], [None], {}, {"a": {"a": 1}}, [0] * 3000, DIGITS, DEEP, OBJECTS]  # fmt: skip


def as_json(value) -> bytes:
    """JSON, also of what Python's own writer would not write: integers of 5,000 digits, 100,000 brackets."""
    text = json.dumps(value)
    for mark, raw in ((DIGITS, "9" * 5000), (DEEP, "[" * 10**5 + "]" * 10**5), (OBJECTS, '{"a":' * 3000)):
        text = text.replace(f'"{mark}"', raw)
    return text.encode()


def places(value, path=()) -> list[tuple]:
    """The paths of everything inside a value of JSON."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [each for key, inner in pairs for each in [(*path, key), *places(inner, (*path, key))]]


def replaced(rng: random.Random, value, odd=None):
    """A copy in which one place holds an odd value, or is gone, or has an odd name -> it, and what was done."""
    value = json.loads(json.dumps(value))
    path = rng.choice(places(value))
    here = value
    for part in path[:-1]:
        here = here[part]
    name = "/".join(map(str, path))
    if odd is None and rng.random() < 0.1:
        del here[path[-1]]
        return value, f"without {name}"
    odd = rng.choice(ODD) if odd is None else odd
    here[path[-1]] = odd
    return value, f"{name} = {str(odd)[:30]!r}"


def damaged(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    """Bytes as disks and downloads leave them."""
    place, what = rng.randrange(max(1, len(content))), rng.randrange(8) if content else 1
    if what == 0:
        return content[:place], f"cut at {place}"
    if what == 1:
        return b"", "empty"
    if what == 2:
        return content + rng.randbytes(rng.randrange(1, 50)), "bytes added"
    if what == 3:
        return bytes(len(content)), "zeros"
    if what == 4:
        return rng.randbytes(min(len(content), 4000)), "random bytes"
    if what == 5:
        return content[place:] + content[:place], f"turned by {place}"
    many = bytearray(content)
    for _ in range(1 if what == 6 else 20):
        many[rng.randrange(len(many))] ^= 1 << rng.randrange(8)
    return bytes(many), "bits flipped"


def no_file(rng: random.Random, path: Path) -> str:
    """Something in the place of a file that is none, or that never ends."""
    what = rng.choice(["fifo", "folder", "loop", "nowhere", "zero", "random"])
    path.unlink(missing_ok=True)
    if what == "fifo":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to({"loop": path.name, "nowhere": "nothing"}.get(what, f"/dev/{what}"))
    return f"{path.name} is a {what}"


# --- adapters -----------------------------------------------------------------------------------------------
ADAPTERS = sorted((FIXTURES / "adapters").glob("*.safetensors"))
FOLDERS = [*(FIXTURES / "adapters").glob("*peft*/"), *(FIXTURES / "tiny_newbie").glob("lo*/")]


def split(content: bytes) -> tuple[dict, bytes]:
    start = 8 + struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8:start]), content[start:]


def joined(header: dict | bytes, data: bytes) -> bytes:
    header = header if isinstance(header, bytes) else as_json(header)
    return struct.pack("<Q", len(header)) + header + data


def adapter_input(
    rng, folder: Path, told: str, name="x.safetensors", statuses=EITHER, calm: Path | None = None
):
    """One of the commands on an adapter. inspect shows more than the others take."""

    def argv(file, out):
        return {
            "inspect": [str(file)],
            "convert": [str(file), str(folder / out), "--format", rng.choice(["diffusers", "kohya", "paddle"])],
            "lora resize": [str(file), str(folder / out), "--rank", "2"],
            "merge": ["--model", str(FIXTURES / "tiny_flux_fp32"), "--lora", str(file), "--output_dir", str(folder / out)],
        }[command]  # fmt: skip

    commands = ["inspect", "convert", "convert", "lora resize", "merge"]
    command = rng.choice([c for c in commands if statuses != REFUSED or c != "inspect"])
    state = rng.getstate()
    mine = argv(folder / name, "out/y.safetensors")
    rng.setstate(state)  # the same format
    return Input(told, command, mine, statuses, argv(calm, "out/calm.safetensors") if calm else None)


@of_kind("adapters")
def adapter_bytes(rng, folder):
    base = rng.choice(ADAPTERS)
    content, told = damaged(rng, base.read_bytes())
    (folder / "x.safetensors").write_bytes(content)
    refused = told.startswith(("cut", "empty", "bytes added", "zeros", "random"))
    return adapter_input(rng, folder, f"{base.name}: {told}", statuses=REFUSED if refused else EITHER)


@of_kind("adapters")
def adapter_header_bytes(rng, folder):
    """Damage in the header alone."""
    base = rng.choice(ADAPTERS)
    content = base.read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    many = bytearray(content)
    for _ in range(rng.choice([1, 1, 3])):
        many[rng.randrange(start)] = rng.choice(b'{}[]",:0123456789nNeE\\\x00\xff FBI')
    (folder / "x.safetensors").write_bytes(bytes(many))
    return adapter_input(rng, folder, f"{base.name}: header damaged")


@of_kind("adapters")
def adapter_harmless(rng, folder):
    """The header's tensors in another order and spaces behind it: the same adapter."""
    base = rng.choice(ADAPTERS)
    header, data = split(base.read_bytes())
    text = json.dumps(
        {"__metadata__": header.pop("__metadata__"), **header} if "__metadata__" in header else header
    )
    (folder / "x.safetensors").write_bytes(joined(text.encode() + b" " * rng.randrange(1, 99), data))
    one = adapter_input(rng, folder, f"{base.name}: written again", calm=base)
    return one if one.command != "inspect" else Input(one.told, *convert_of(folder, base))


def convert_of(folder, base):
    def argv(file, out):
        return [str(file), str(folder / "out" / out), "--format", "paddle"]

    return "convert", argv(folder / "x.safetensors", "y.safetensors"), EITHER, argv(base, "c.safetensors")


@of_kind("adapters")
def adapter_entry(rng, folder):
    """What the header says of one tensor: its dtype, shape, place."""
    base = rng.choice(ADAPTERS)
    header, data = split(base.read_bytes())
    name = rng.choice([key for key in header if key != "__metadata__"])
    entry, size = header[name], len(data)
    lies = [("dtype", each) for each in ("F99", 5, None, [], "BOOL", "I64", "F64", "F16", "U8", "F8_E5M2")]
    lies += [
        ("shape", each)
        for each in ([-1], [2**63], [2**32, 2**32], "4", None, [1.5, 4], [[4]], {}, [10**30], [])
    ]
    lies += [
        ("data_offsets", each)
        for each in (
            [0, size + 1],
            [4, 0],
            [-4, 0],
            [0],
            [0, 2**64],
            [1.5, 4],
            "0",
            None,
            [0, 0],
            [size, size + 8],
            [0, 0, 0],
        )
    ]
    key, value = rng.choice(lies)
    if key == "dtype" and rng.random() < 0.3:
        key, value = "more", 1  # an entry with a field that nobody knows
    was, entry[key] = entry.get(key), value
    (folder / "x.safetensors").write_bytes(joined(header, data))
    harmless = key == "more" or value == was or (key == "dtype" and value in ("F16", "BOOL", "U8", "F8_E5M2"))
    return adapter_input(rng, folder, f"{base.name}: {name[:40]} {key} {str(value)[:30]}",
                         statuses=EITHER if harmless else REFUSED)  # fmt: skip


@of_kind("adapters")
def adapter_metadata(rng, folder):
    """The header's texts: strength, rank, PEFT's config, or what is no map of texts."""
    base = rng.choice(ADAPTERS)
    header, data = split(base.read_bytes())
    texts = dict(header.get("__metadata__") or {})
    if rng.random() < 0.3:
        header["__metadata__"] = value = rng.choice(
            [1, [], "x", None, {"a": 1}, {"a": None}, {"a": {}}, [["a", "b"]]]
        )
        told, statuses = f"metadata {value!r}", EITHER if value is None else REFUSED
    else:
        field = rng.choice(
            [
                "alpha",
                "rank",
                "lora_alpha",
                "lora_rank",
                "ss_network_alpha",
                "ss_network_dim",
                "step",
                "format",
                "layout",
                "dora_rule",
                "trigger_word",
                "training_info",
                "lora_adapter_metadata",
            ]
        )
        config = {
            "r": 4,
            "lora_alpha": 4,
            "peft_type": "LORA",
            "alpha_pattern": {"(a+)+$": 3},
            "rank_pattern": {},
        }
        odd = as_json(rng.choice([replaced(rng, config)[0], *ODD])).decode()
        texts[field] = (
            odd if field in ("training_info", "lora_adapter_metadata") else rng.choice([odd, odd.strip('"')])
        )
        header["__metadata__"], statuses, told = texts, EITHER, f"{field} = {texts[field][:30]!r}"
    (folder / "x.safetensors").write_bytes(joined(header, data))
    return adapter_input(rng, folder, f"{base.name}: {told}", statuses=statuses)


@of_kind("adapters")
def adapter_names(rng, folder):
    """Keys: a million characters, patterns that are slow to match, many, twice, none."""
    base = rng.choice(ADAPTERS)
    header, data = split(base.read_bytes())
    name = rng.choice([key for key in header if key != "__metadata__"])
    entry = header.pop(name)
    long = rng.choice(
        ["x", "a.", "_", "lora_", "transformer_blocks.0.", "0", "\n", "漢", ".lora_A.weight", "\ud83d\ude00"]
    )
    new = rng.choice([
        long * (10**6 // len(long)), f"{name}{long * (10**6 // len(long))}", f"transformer.{long * 50_000}.lora_A.weight",
        f"lora_unet_{long * 50_000}.lora_down.weight", f"lora_unet_double_blocks_{'9' * 5000}_img_attn_qkv.alpha",
        f"transformer.transformer_blocks.{'9' * 5000}.attn.to_q.lora_A.weight", "", "\0", "\ud800", "..", "/" * 300,
    ])  # fmt: skip
    header[new] = entry
    (folder / "x.safetensors").write_bytes(joined(header, data))
    return adapter_input(rng, folder, f"{base.name}: a key is {new[:30]!r} of {len(new)}")


@of_kind("adapters")
def adapter_many(rng, folder):
    """20,000 tensors, or one key twice."""
    base = rng.choice(ADAPTERS)
    header, data = split(base.read_bytes())
    if rng.random() < 0.5:
        one = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
        names = [
            rng.choice(
                [
                    "a{}.b",
                    "transformer.transformer_blocks.{}.attn.to_q.lora_A.weight",
                    "lora_unet_double_blocks_{}_img_attn_qkv.alpha",
                ]
            ).format(i)
            for i in range(20_000)
        ]
        header = {name: one | {"data_offsets": [4 * i, 4 * i + 4]} for i, name in enumerate(names)}
        (folder / "x.safetensors").write_bytes(joined(header, bytes(80_000)))
        return adapter_input(rng, folder, f"20,000 tensors like {names[0]}")
    name = next(key for key in header if key != "__metadata__")
    text = json.dumps(header)[:-1] + f', "{name}": {json.dumps(header[name])}}}'
    (folder / "x.safetensors").write_bytes(joined(text.encode(), data))
    return adapter_input(rng, folder, f"{base.name}: {name[:30]} twice")


@of_kind("adapters")
def adapter_values(rng, folder):
    """NaN, infinities, zeros, and the largest numbers in one tensor."""
    base = (
        FIXTURES
        / "adapters"
        / rng.choice(
            [
                "split_diffusers.safetensors",
                "split_kohya.safetensors",
                "loha.safetensors",
                "dora.safetensors",
                "lokr_full.safetensors",
                "oft.safetensors",
            ]
        )
    )
    header, data = split(base.read_bytes())
    entries = [each for key, each in header.items() if key != "__metadata__" and each["dtype"] == "F32"]
    begin, end = rng.choice(entries)["data_offsets"]
    value = rng.choice([float("nan"), float("inf"), -float("inf"), 0.0, 3e38, -3e38, 1e-45, 1e20])
    values = np.frombuffer(data[begin:end], "float32").copy()
    values[rng.choice([slice(None), rng.randrange(len(values))])] = value
    (folder / "x.safetensors").write_bytes(joined(header, data[:begin] + values.tobytes() + data[end:]))
    return adapter_input(
        rng, folder, f"{base.name}: {value}", statuses=EITHER if np.isfinite(value) else REFUSED
    )


@of_kind("adapters")
def adapter_shapes(rng, folder):
    """Whole files whose shapes do not fit each other or the model."""
    stem = rng.choice(
        [
            "transformer.transformer_blocks.0.attn.to_q",
            "lora_unet_double_blocks_0_img_attn_qkv",
            "transformer.x_embedder",
            "transformer.single_transformer_blocks.0.proj_out",
            "transformer.norm_out.linear",
        ]
    )
    roles = rng.choice(
        [
            ("lora_A.weight", "lora_B.weight"),
            ("lora_down.weight", "lora_up.weight"),
            ("lokr_w1", "lokr_w2"),
            ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
            ("oft_blocks",),
            ("diff",),
            ("diff_b",),
            ("lora_A.weight", "lora_B.weight", "dora_scale"),
            ("lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"),
            ("lora_A.weight", "lora_B.weight", "alpha"),
            ("a1.weight", "a2.weight", "b1.weight", "b2.weight"),
        ]
    )
    sides = [0, 1, 2, 3, 4, 16, 64, 192, 4096]
    header, data = {}, b""
    for role in roles:
        shape = [rng.choice(sides) for _ in range(rng.choice([0, 1, 2, 2, 2, 2, 3, 4, 5]))]
        shape = shape if np.prod(shape) < 2**18 else [4, 64]
        size = 4 * int(np.prod(shape))
        header[f"{stem}.{role}"] = {
            "dtype": "F32",
            "shape": shape,
            "data_offsets": [len(data), len(data) + size],
        }
        data += np.full(size // 4, 0.01, "float32").tobytes()
    (folder / "x.safetensors").write_bytes(joined(header, data))
    return adapter_input(rng, folder, f"{stem} {[each['shape'] for each in header.values()]} {roles}")


@of_kind("adapters")
def adapter_folder(rng, folder):
    """PEFT's config beside the weights."""
    base = rng.choice(FOLDERS)
    for file in base.iterdir():
        shutil.copy(file, folder)
    config = folder / "adapter_config.json"
    what = rng.randrange(4)
    if what == 0:
        told = no_file(rng, config)
    elif what == 1:
        content, told = damaged(rng, config.read_bytes())
        config.write_bytes(content)
    else:
        said = json.loads(config.read_text())
        path = {
            key: said[key]
            for key in ("r", "lora_alpha", "alpha_pattern", "peft_type", "alpha", "use_rslora")
            if key in said
        }
        value, told = replaced(rng, path or said)
        config.write_bytes(as_json({**said, **value}))
    return adapter_input(
        rng, folder, f"{base.name}: {told}", name=rng.choice(["", "adapter_model.safetensors"])
    )


@of_kind("adapters")
def adapter_target(rng, folder):
    """A good adapter, and a place where nothing can be written."""
    base = rng.choice([file for file in ADAPTERS if file.name.startswith("split_diff")])
    (folder / "file").write_text("x")
    targets = [
        "file/y.safetensors",
        "file/a/b/y.safetensors",
        "x" * 300 + ".safetensors",
        "a\0b.safetensors",
        "\ud800.safetensors",
        "y.txt",
        "",
        "file",
        ".",
        "/proc/y.safetensors",
        "/dev/null/y.safetensors",
    ]
    target = rng.choice(targets)
    out = target if target.startswith("/") else f"{folder}/{target}"
    return Input(
        f"written to {target[:40]!r}",
        "convert",
        [str(base), out, "--format", "kohya"],
        EITHER if target == "y.txt" else REFUSED,
    )


@of_kind("adapters")
def adapter_no_file(rng, folder):
    return adapter_input(rng, folder, no_file(rng, folder / "x.safetensors"), statuses=REFUSED)


# --- configs ------------------------------------------------------------------------------------------------
CONFIG_FILES = [CONFIGS / "quickstart.yaml", CONFIGS / "coat_flux_lora.yaml", CONFIGS / "demo_try_on.yaml",
                CONFIGS / "newbie_lora.toml", FIXTURES / "ai_toolkit" / "train_lora_flux_24gb.yaml",
                FIXTURES / "ai_toolkit" / "train_lora_flux_kontext_24gb.yaml"]  # fmt: skip


def config_input(
    rng, folder: Path, told: str, content: bytes, ending: str, statuses=EITHER, calm: Path | None = None
):
    (folder / f"x{ending}").write_bytes(content)
    mine = [str(folder / f"x{ending}")]
    return Input(f"{ending}: {told}", "plan", mine, statuses, [str(calm)] if calm else None)


def as_toml(value: dict) -> bytes:
    """Tables of plain values."""
    lines = [line for name, table in value.items() if isinstance(table, dict) for line in
             (f"[{name}]", *(f"{key} = {as_json(each).decode()}" for key, each in table.items()))]  # fmt: skip
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def said_by(base: Path) -> dict:
    """What a config file says."""
    if base.suffix == ".yaml":
        return value_of_text(base.read_text())  # 1e-4 is a number
    from ppcoat.config.newbie import tomllib

    return tomllib.loads(base.read_text())


@of_kind("configs")
def config_value(rng, folder):
    base = rng.choice(CONFIG_FILES)
    value, told = replaced(rng, said_by(base))
    if base.suffix == ".toml":
        return config_input(rng, folder, f"{base.name}: {told}", as_toml(value), ".toml")
    ending = rng.choice([".yaml", ".json"])
    return config_input(rng, folder, f"{base.name}: {told}", as_json(value), ending)


@of_kind("configs")
def config_extreme(rng, folder):
    """Settings that are allowed and that no machine can do."""
    base = said_by(CONFIGS / "quickstart.yaml")
    keys = [("train", "batch_size"), ("train", "steps"), ("train", "gradient_accumulation"), ("network", "linear"),
            ("datasets", 0, "num_repeats"), ("datasets", 0, "resolution"), ("sample", "width"), ("train", "num_epochs"),
            ("save", "max_step_saves_to_keep"), ("datasets", 0, "caption_variants"), ("sample", "prompts")]  # fmt: skip
    here, (*path, last) = base, rng.choice(keys)
    for part in path:
        here = here[part]
    here[last] = value = (
        ["a dress"] * 100_000 if last == "prompts" else rng.choice([10**5, 10**9, 10**18, 2**62])
    )
    argv = [
        *config_input(rng, folder, "", as_json(base), ".yaml").argv,
        *rng.choice([[], [], ["--vram", "8"], ["--cards", "8", "24"]]),
    ]
    return Input(f"{last} = {str(value)[:20]}", "plan", argv)


@of_kind("configs")
def training_extreme(rng, folder):
    """A run of them: what it would take is told before it is taken."""
    data = data_folder(rng, folder)
    base = {"name": "x", "output_dir": str(folder / "out"), "model": {"name_or_path": "tiny_flux"}, "network": {"linear": 4}, "train": {"steps": 2},
            "datasets": [{"folder_path": str(data), "resolution": 64}]}  # fmt: skip
    key, value = rng.choice(
        [
            (("train", "batch_size"), 10**5),
            (("train", "batch_size"), 10**12),
            (("datasets", 0, "num_repeats"), 10**6),
            (("datasets", 0, "num_repeats"), 10**9),
            (("datasets", 0, "num_repeats"), 2**62),
            (("network", "linear"), 10**5),
            (("network", "linear"), 10**15),
            (("train", "gradient_accumulation"), 10**5),
            (("datasets", 0, "resolution"), 2**20),
            (("datasets", 0, "caption_variants"), 10**9),
            (("train", "lr"), 1e300),
            (("train", "num_epochs"), 10**15),
        ]
    )
    here = base
    for part in key[:-1]:
        here = here[part]
    here[key[-1]] = value
    (folder / "x.json").write_bytes(as_json(base))
    return Input(f"{key[-1]} {value}", "train", [str(folder / "x.json"), "--dry_run"])


@of_kind("configs")
def config_bytes(rng, folder):
    base = rng.choice(CONFIG_FILES)
    content, told = damaged(rng, base.read_bytes())
    statuses = REFUSED if told in ("empty", "zeros", "random bytes") else EITHER
    return config_input(rng, folder, f"{base.name}: {told}", content, base.suffix, statuses)


@of_kind("configs")
def config_harmless(rng, folder):
    """Another encoding mark, line ends, comments, JSON for YAML: the same plan."""
    base = rng.choice([file for file in CONFIG_FILES if file.suffix == ".yaml" and file.parent == CONFIGS])
    text, what = base.read_text(), rng.randrange(4)
    content, ending = [("\ufeff" + text, ".yaml"), (text.replace("\n", "\r\n"), ".yml"), (text + "\n# x" * 50_000, ".yaml"),
                       (json.dumps(said_by(base), indent=1), ".json")][what]  # fmt: skip
    return config_input(rng, folder, f"{base.name}: harmless {what}", content.encode(), ending, calm=base)


@cache
def monsters(n: int) -> dict[tuple[str, str], str]:
    """{(ending, name): text} that costs more to read than it is worth, of some `n` characters."""
    keys = "\n".join(f"k{i}: {i}" for i in range(90_000))
    laughs = "a0: &a0 [x, x]\n" + "\n".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)
    )
    yaml_texts = {
        "brackets": "train: " + "[" * n, "closed": "train: " + "[" * n + "]" * n, "braces": "train: " + "{a: " * (n // 4),
        "block": "\n".join(" " * i + f"k{i}:" for i in range(min(n, 1400))), "dashes": "datasets: \n" + "- " * n,
        "questions": "? " * n, "digits": "train: {steps: " + "9" * n + "}", "keys": keys, "one level": "train:\n " + keys.replace("\n", "\n "),
        "laughs": laughs, "tag": "train: !!python/object/apply:os.system [id]", "long key": "x" * n + ": 1",
        "entries": "datasets: [" + "{}, " * (n // 4) + "]", "texts": "name: \"" + "\\u0041" * (n // 6) + "\"", "float": "train: {lr: 1e" + "9" * n + "}",
        "variable": "name: " + "${" * (n // 2), "exclamation": "!" * n, "quotes": "'" * n, "names": "name: " + "[name]" * (n // 6),
        "documents": "---\n" * (n // 4), "merge": "train: {<<: {steps: 1}}", "big": "# " + "x" * 2**20, "ones": "name: " + "1" * n,
        "commas": "datasets: [" + "," * n, "colons": ":" * n, "stars": "*" * n, "date": "name: 2020-01-01", "percent": "%" * n,
    }  # fmt: skip
    toml_texts = {
        "tables": "[" + ".".join("a" * (n // 2)) + "]", "arrays": "a = " + "[" * n, "closed": "a = " + "[" * n + "]" * n,
        "inline": "a = " + "{a = " * (n // 5), "digits": "[Model]\nlora_rank = " + "9" * n, "hex": "[Model]\nlora_rank = 0x" + "f" * n,
        "keys": keys.replace(":", " ="), "dotted": ".".join("a" * (n // 2)) + " = 1", "date": "[Model]\nlora_rank = 1979-05-27",
        "nan": "[Model]\nlearning_rate = nan", "float": "[Model]\nlearning_rate = 1e" + "9" * n, "many": "[a]\n" * (n // 4),
        "array tables": "".join(f"[[a{i % 7}]]\n" for i in range(n // 7)), "quotes": "a = '" + "x" * n, "big": "# " + "x" * 2**20,
        "dotted keys": "\n".join(f"[Model.a{i}.b.c]" for i in range(n // 16)), "brackets": "[" * n, "string": 'a = """' + "\\" * n,
    }  # fmt: skip
    json_texts = {
        "brackets": "[" * n, "closed": '{"train": ' + "[" * n + "]" * n + "}", "objects": '{"a":' * (n // 5), "digits": '{"train": {"steps": ' + "9" * n + "}}",
        "quotes": '"' * n, "comments": "/*" * (n // 2), "slashes": "//" * (n // 2), "escapes": '{"name": "' + "\\" * n, "twice": '{"name": 1, "name": 2}',
        "tabs": "\t" * n, "keys": json.dumps({f"k{i}": i for i in range(60_000)}), "surrogate": '{"name": "\\ud800"}',
    }  # fmt: skip
    kinds = {".yaml": yaml_texts, ".toml": toml_texts, ".json": json_texts}
    return {(ending, name): text for ending, texts in kinds.items() for name, text in texts.items()}


@of_kind("configs")
def config_monster(rng, folder):
    n = rng.choice([65, 1000, 100_000, 500_000])
    ending, name = rng.choice(list(monsters(n)))
    return config_input(rng, folder, f"{name}, {n}", monsters(n)[ending, name].encode(), ending, REFUSED)


@of_kind("configs")
def config_override(rng, folder):
    """--set, on a command line that the system still takes (128 kB a word)."""
    base, n = (
        str(CONFIGS / rng.choice(["quickstart.yaml", "newbie_lora.toml"])),
        rng.choice([5, 500, 60_000, 120_000]),
    )
    text = rng.choice([
        "train.steps=" + "9" * n, "train.lr=1e" + "9" * n, "train.steps=" + "[" * n, "name=" + "x" * n, "a." * (n // 2) + "a=1", "=" * n, "." * n,
        f"datasets.{'9' * min(n, 5000)}.folder_path=x", "datasets.0.resolution=[" + "1," * (n // 2) + "]", "train={" + "a: {" * (n // 4),
        "train.steps", "train.steps=", "train=5", "train.steps.x=5", "datasets=x", "datasets.0=x", "datasets.-1.folder_path=x",
        "datasets.²=x", "name=&a x", "name=*a", "name=!!python/name:os.system", "name=\ud800", "name=\0", "name=[name]" * (n // 12 + 1),
        "name=${HOME}", "name=${" + "A" * n + "}", "train.batch_size=.nan", "train.batch_size=true", "train.batch_size=1.0", "train.lr=-1",
        "sample.prompts=[" + "x," * (n // 2) + "]", "datasets.0." + "x" * n + "=1", "x" * n + "=1", "train." + "漢" * (n // 3) + "=1", "train.steps=? ",
        "train.steps=- - - -", "train.steps=\t1", "network.linear=" + "1" * 18, "train.steps=0x10", "train.steps=1_000", "train.steps=1:30", "--set=x",
    ])  # fmt: skip
    return Input(f"--set {text[:40]!r}, {len(text)}", "plan", [base, "--set", text])


@of_kind("configs")
def config_no_file(rng, folder):
    name = f"x{rng.choice(['.yaml', '.json', '.toml', '.yml', '.txt', ''])}"
    return Input(no_file(rng, folder / name), "plan", [str(folder / name)], REFUSED)


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
        "2^31 wide": mark + header(2**31 - 1, 1) + pixels + end, "2^32 wide": mark + header(2**32 - 1, 2**32 - 1) + pixels + end,
        "0 wide": mark + header(0, 0) + pixels + end, "30,000 x 30,000": mark + header(30_000, 30_000) + chunk(b"IDAT", rows) + end,
        "13,000 x 13,000": mark + header(13_000, 13_000, 1, 0) + chunk(b"IDAT", zlib.compress(bytes(1626 * 13_000), 9)) + end,
        "text bomb": mark + small + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80_000_000), 9)) + pixels + end,
        "many texts": mark + small + chunk(b"tEXt", b"a\0" + b"x" * 1000) * 70_000 + pixels + end,
        "profile bomb": mark + small + chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(80_000_000), 9)) + pixels + end,
        "no profile": mark + small + chunk(b"iCCP", b"a\0\0" + zlib.compress(b"x" * 300)) + pixels + end,
        "depth 3": mark + header(48, 40, 3) + pixels + end, "no pixels": mark + small + end, "texts": picture(rng, pnginfo=info),
        "exif": picture(rng, exif=exif), "exif damaged": picture(rng, format="JPEG", exif=b"Exif\0\0" + rng.randbytes(60)),
        "profile damaged": picture(rng, icc_profile=rng.randbytes(200)), "1 pixel": picture(rng, size=(1, 1)), "thin": picture(rng, size=(3000, 1)),
        "frames": mark + small + chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)) + pixels + end,
        "65535 x 65535": jpeg.replace(struct.pack(">HH", 40, 48), b"\xff\xff\xff\xff", 1), "gif": picture(rng, format="GIF"), "tiff": picture(rng, format="TIFF"),
        "palette": mark + header(48, 40, 8, 3) + pixels + end, "chunks": mark + small + chunk(b"IDAT", b"") * 200_000 + pixels + end,
    }  # fmt: skip


@of_kind("data")
def data_picture_bomb(rng, folder):
    data, told = data_folder(rng, folder), rng.choice(list(bombs()))
    (data / "1.png").write_bytes(bombs()[told])
    return data_input(rng, folder, told)


@of_kind("data")
def data_caption(rng, folder):
    data = data_folder(rng, folder)
    texts = {
        "random": rng.randbytes(300), "zeros": bytes(50), "UTF-16": "a dress".encode("utf-16"), "half a character": b"\xed\xa0\x80 dress",
        "64 KiB": b"x, " * 30_000, "64 KiB of one word": b"x" * 65_536, "4,000 parts": b", ".join(b"part %d" % i for i in range(4000)), "empty": b"", "spaces": b" \n" * 99,
        "braces": b"{" * 60_000, "brackets": b"[" * 60_000, "closed": b"[" * 30_000 + b"]" * 30_000, "object": b'{"caption": ' * 5000, "digits": b'{"caption": ' + b"9" * 5000 + b"}",
        "number": b'{"caption": 1}', "list": b'{"caption": [1, 2]}', "surrogate": b'{"caption": "\\ud800"}', "tags": b'{"caption": "x", "tags": [' + b"1," * 9999 + b"1]}",
        "triggers": b"[trigger]" * 7000, "commas": b"," * 65_000, "quotes": b'"' * 65_000, "control": bytes(range(1, 32)) + b"dress", "line ends": b"\r" * 65_000, "escape": b"\x1b[31mred\x07",
        "combining": ("e" + "\u0301" * 20_000).encode(), "keys": b'{"caption": null, "text": "", "prompt": {}}', "yaml": b"&a [*a]", "bom": b"\xef\xbb\xbf\xff\xfe",
    }  # fmt: skip
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
        "good": b'{"file_name": "1.png", "text": "a hat"}', "wrong types": b'{"file_name": 1, "text": []}', "deep": b'{"file_name": "1.png", "text": ' + b"[" * 9999,
        "digits": b'{"file_name": "1.png", "text": ' + b"9" * 5000 + b"}", "surrogates": b'{"file_name": "1.png", "text": "\\ud800 hat"}', "NUL": b'{"file_name": "1\\u0000.png", "text": "x"}',
        "long name": b'{"file_name": "' + b"x" * 100_000 + b'", "text": "x"}', "slashes": b'{"file_name": "' + b"../" * 30_000 + b'1.png", "text": "x"}', "name surrogate": b'{"file_name": "\\udcff1.png", "text": "x"}',
        "null": b"null", "numbers": b"1\n2\n3", "csv": b"file_name,text\n1.png,a hat", "csv quotes": b'file_name,text\n1.png,"' + b"x" * 200_000, "csv NUL": b"file_name,text\n1.png,\0",
        "csv many": b"file_name,text" + b"," * 50_000 + b"\n1.png,x", "lists": b"[[[1]]]", "object": b'{"1.png": "a hat"}', "deep object": b'{"a":' * 50_000, "100,000 rows": b'{"file_name": "9.png", "text": "x"}\n' * 30_000,
        "binary": rng.randbytes(3000), "twice": b'{"file_name": "1.png", "text": "a"}\n{"file_name": "1.png", "text": "b"}', "empty": b"", "nan": b'{"file_name": "1.png", "text": NaN}', "windows": b'{"file_name": "C:\\\\a\\\\1.png", "text": "x"}',
    }  # fmt: skip
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
    names = [b"\xff\xfe.png", b"a\nb.png", b"a\x1b[31m.png", b" .png", b"-rf.png", "漢字.png".encode(), b"x" * 250 + b".png", b"'.png", b"a b\t.png",
             b"1.PNG", b"1.png.png", b"..png", b"...png", b"9999999999_x/1.png", b"1000_x/1.png", b"0_x/1.png", b"-1_x/1.png", b"a/" * 200 + b"1.png", "e\u0301.png".encode(), b"*.png", b"%s.png"]  # fmt: skip
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
    config = {"name": "x", "model": {"name_or_path": "ppcoat/assets/tiny_flux"}, "datasets": [{
        "folder_path": str(data), "resolution": 64, "shuffle_tokens": True, "token_dropout_rate": rng.choice([0, 0.3]),
        "keep_tokens": rng.choice([0, 1, 10**9]), "caption_variants": rng.choice([1, 8, 64])}]}  # fmt: skip
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
    lists = [b"", b"\n\n", b"\0", b"a\0.txt", b"x" * 5000, b"x/" * 5000, b"../list.txt", b"/etc/passwd", b"a.txt\n" * 5000, b"\xff\xfe", b"\xed\xa0\x80", b".", b"..", b"shards",
             b"a.txt\t" + b"x" * 10**6, b"b.txt", b"\x1b[31m", b"a.txt\nx" + b"\0", "a.txt\u2028b.txt".encode(), b"~", b"$HOME", b"a.txt/", b"./a.txt", b"x" * 256, b"\\\\x\\y", rng.randbytes(999)]  # fmt: skip
    (folder / "list.txt").write_bytes(content := rng.choice(lists))
    statuses = EITHER if content.startswith((b"a.txt\n" * 9, b"a.txt\t", b"./a.txt", b"a.txt/")) else REFUSED
    return laion_input(folder, f"list {content[:20]} of {len(content)}", statuses=statuses)


@of_kind("LAION")
def laion_caption(rng, folder):
    """One bad row of four is counted, and does not end the run."""
    captions = [b'{"caption": "\\ud800 dress"}', b'{"caption": "\xed\xa0\x80"}', b"{'caption': '\\ud800'}", b"{'caption': __import__('os')}", b"{" * 60, b"{" * 50_000, b"[" * 50_000,
                b"-" * 60_000, b"{'caption': " + b"-" * 50_000, b'{"caption": ' + b"9" * 5000 + b"}", b"{'caption': " + b"9" * 5000 + b"}", b"{'a': 1}", b"", b" ", b"\0", b'{"caption": "\\u0000"}', b"x" * 70_000,
                b'{"caption": null}', b"{'caption': b'x'}", b"{'caption': 1e999}", b"{1: 2}", b"{[]: 1}", b"{'caption': 'x' 'y'}", b"{**{}}", b"\xff\xff", b"{'caption': '" + b"\\" * 9999 + b"'}", b"{not}", b"{'caption': (((())))}",
                b"{'caption':" + b"+1" * 9999 + b"}", b"{'caption': " + b"~" * 9999 + b"1}", b"{'caption': 'a'" + b"+'a'" * 5000 + b"}"]  # fmt: skip
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


# --- torch's checkpoints ------------------------------------------------------------------------------------
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
    text = lambda raw: b"X" + struct.pack("<I", len(raw)) + raw  # noqa: E731
    listed = [b"(" + b"".join(map(number, each)) + b"t" for each in (shape, strides)]
    return (b"\x80\x02" + before + b"}" + text(b"a") + b"ctorch._utils\n_rebuild_tensor_v2\n((" + text(b"storage") + b"ctorch\n" + storage + b"\n"
            + text(key) + text(b"cpu") + number(8) + b"tQ" + offset + listed[0] + listed[1] + b"\x89ccollections\nOrderedDict\n)RtRs" + after + b".")  # fmt: skip


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
    numbers = lambda: tuple(rng.choice(odd) for _ in range(rng.choice([0, 1, 2, 2, 2, 3, 3000])))  # noqa: E731
    more = rng.choice([
        {"offset": number(rng.choice(odd))}, {"shape": numbers()}, {"strides": numbers()}, {"shape": numbers(), "strides": numbers()},
        {"offset": rng.choice([b"N", b"G" + struct.pack(">d", 0.5), b"\x88", b"}", b")", b"X\x01\0\0\x000"])}, {"key": rng.choice([b"1", b"../0", b"", b"x" * 9999, b"\0"])},
        {"storage": rng.choice([b"ByteStorage", b"ComplexFloatStorage", b"QInt8Storage", b"HalfStorage", b"DoubleStorage", b"load"])},
    ])  # fmt: skip
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
    odd = [b"ccollections\nOrderedDict\n)R}b", b"(" * 100_000, b")" * 100_000, b"]" * 100_000, b"(" * 50_000 + b"t" * 50_000, b"\x95" + b"\xff" * 8, b"}" + b"\x94h\0" * 9999, b"N" + b"\x85" * 200_000, b"]" + b"\x94h\0a" * 1000,
           b"\x80\xff", b"I" + b"9" * 9999 + b"\n", b"L" + b"9" * 9999 + b"L\n", b"V\\ud800\n", b"F1e9999\n", b"(tQ", b"((((l(ld(t" * 999, b"N" + b"\x85" * 40_000, b"N" * 500_000, b"N" * 700_000]  # fmt: skip
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


# --- lists of prompts ---------------------------------------------------------------------------------------
@of_kind("prompt lists")
def prompt_list(rng, folder):
    n = rng.choice([10, 1000, 60_000])
    lines = [b"a red dress", b'{"prompt": "a hat", "seed": 3}', b"prompt,seed\na hat,3", b"a --w 64 --h 64 --d 7", b"x --s " + b"9" * n, b"x --d -1", b"--n x", b"x --l 3", b"x --zz 3",
             b'{"prompt": 1}', b'{"prompt": ""}', b'{"prompt": "x", "seed": ' + b"9" * n + b"}", b'{"prompt": "x", "seed": NaN}', b'{"prompt": "x", "width": 1e308}', b'{"prompt": "x", "width": ' + b"[" * n,
             b'{"prompt": "\\ud800"}', b'{"prompt": "x\\u0000"}', b'{"prompt": "x", "name": "../x"}', b'{"prompt": "x", "name": "' + b"x" * n + b'"}', b'{"prompt": "x", "name": "con"}', b'{"prompt": "x", "num_images": 1000000000}',
             b'{"prompt": "x", "image": "/dev/zero"}', b'{"prompt": "x", "lora_scale": [1]}', b'{"prompt": "x", "size": "' + b"9" * n + b"x" * n + b'"}', b'{"prompt": "x", "steps": 1000000000}', b'{"prompt": "x", "prompt": "y"}',
             b"[" * n, b"{" * n, b"null", b"\0" * n, b"\xff\xfe", b"x " * n, b"x --" * n, b"," * n, b'"' * n, b"\r" * n, b"\x1b[31m", b"x\n" * n, "漢".encode() * n, b"sep=,\n", b"prompt,prompt\nx,y", b"prompt;seed\nx;y", b"prompt\n\"" + b"x" * n]  # fmt: skip
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
    return Input(f"{name}: {told} {strict}", "checkpoint", [str(folder / "run"), strict], EITHER if strict else RIGHT,
                 None, ["step 1, loss 1, a 1.0", "step 2, loss 2, a 2.0"])  # fmt: skip


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


NOTES = {
    "studio.json": {"argv": ["train", "x.yaml"], "cwd": "/", "pid": 1, "born": "x", "stop": False},
    "queue.json": {"waiting": ["a", "b"], "current": "c"},
    "drawing.json": {"asked": {"prompt": "x", "loras": [["a", 1.0]], "strengths": [1.0], "step_counts": [8], "width": 64}, "rows": [""], "columns": [""], "names": [["r0_c0"]]},
    "log.jsonl": {"step": 3, "loss": 0.5, "lr": 1e-4, "validation_loss": 0.1},
    "studio.yaml": {"train": {"steps": 5, "num_epochs": None}},
    "config.yaml": {"train": {"steps": 5}},
}  # fmt: skip


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


# --- model folders ------------------------------------------------------------------------------------------
@cache
def model_damages() -> list:
    from model_mutations import mutations

    return list(mutations(TINY_FLUX))


def model_folder(rng, folder):
    """A copy of the built-in model, made of links, that is drawn with."""
    shutil.copytree(TINY_FLUX, folder / "model", copy_function=os.symlink)
    damage = rng.choice(model_damages())
    damage.mutate(folder / "model")
    argv = [
        "--model",
        str(folder / "model"),
        "--prompt",
        "a hat",
        "--output_dir",
        str(folder / "out" / "drawn"),
    ]
    return Input(damage.name, "generate", [*argv, "--steps", "1", "--width", "64", "--height", "64"])


if importlib.util.find_spec("model_mutations"):
    KINDS["model folders"] = [model_folder] * 3


# --- stand-ins: commands of one argument that read, and print what they read --------------------------------
def stand_ins() -> dict[str, Command]:
    names = ("unpack", "weights", "prompts", "checkpoint", "cache", "studio", "dropped")
    return {name: Command(f"read {name}", "reading", f"read_{name}") for name in names}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+")


def read_unpack(arguments: argparse.Namespace) -> None:
    from ppcoat.data.laion import LaionSource, unpack_laion

    shards, listed, folder = arguments.paths
    found = unpack_laion(LaionSource(shards, listed, max_bad_share=0.5), Path(folder))
    assert found.pictures == len(list(Path(folder).glob("*.jpg"))) or found.pictures == 0
    print(f"{found.pictures} pictures, {found.bad} bad")


def read_weights(arguments: argparse.Namespace) -> None:
    from ppcoat.models.newbie.convert import checkpoint_infos
    from ppcoat.models.tensor_files import map_tensor

    infos = checkpoint_infos(Path(arguments.paths[0]))
    print(
        ", ".join(
            f"{name} {info.shape} {float(map_tensor(info).sum(dtype='float64')):g}"
            for name, info in infos.items()
        )
    )


def read_prompts(arguments: argparse.Namespace) -> None:
    from ppcoat.infer.drawing import Drawing
    from ppcoat.infer.generate import check_numbers
    from ppcoat.infer.prompts import read_pictures

    print(len(read_pictures(arguments.paths[0], Drawing(model="tiny_flux"), check_numbers)))


def read_checkpoint(arguments: argparse.Namespace) -> None:
    from ppcoat.train.checkpoint import load_latest

    found = load_latest(arguments.paths[0], strict=bool(arguments.paths[1]))
    print(f"step {found.step}, loss {found.state['loss']}, a {float(found.tensors['lora']['a'][0])}")


def read_cache(arguments: argparse.Namespace) -> None:
    from ppcoat.data.embedding_store import EmbeddingStore

    found = EmbeddingStore(arguments.paths[0]).get(KEY)
    print(
        "none"
        if found is None
        else ", ".join(f"{name} {float(t.astype('float32').mean())}" for name, t in sorted(found.items()))
    )


def read_studio(arguments: argparse.Namespace) -> None:
    from ppcoat.studio.access import Roots
    from ppcoat.studio.draw_list import read_drawing
    from ppcoat.studio.run_log import RunLog, find_runs, progress_of
    from ppcoat.studio.runs import ChildRun, Queue

    folder = Path(arguments.paths[0])
    job, log, queue = ChildRun(folder), RunLog(folder), Queue(folder)
    log.read()
    find_runs(Roots([folder.parent]))
    print(
        job.status,
        job.error,
        job.memory,
        job.tail(),
        progress_of(job, log),
        queue.waiting,
        queue.current,
        read_drawing(folder),
    )


def read_dropped(arguments: argparse.Namespace) -> None:
    from ppcoat.studio.draw_list import asked_of_picture, table_of

    print(len(table_of(asked_of_picture(Path(arguments.paths[0]).read_bytes())).lines))
