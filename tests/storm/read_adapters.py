"""Adapters, damaged: bytes, headers, metadata, names, numbers, shapes, PEFT's config, and where they go."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
from inputs import (
    EITHER,
    FIXTURES,
    ODD,
    REFUSED,
    Input,
    as_json,
    damaged,
    no_file,
    of_kind,
    replaced,
)

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
        return {"inspect": [str(file)], "convert": [str(file), str(folder / out), "--format",
            rng.choice(["diffusers", "kohya", "paddle"])], "lora resize": [str(file),
            str(folder / out), "--rank", "2"], "merge": ["--model",
            str(FIXTURES / "tiny_flux_fp32"), "--lora", str(file), "--output_dir",
            str(folder / out)],}[command]  # fmt: skip

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
    new = rng.choice([long * (10**6 // len(long)), f"{name}{long * (10**6 // len(long))}",
        f"transformer.{long * 50_000}.lora_A.weight",
        f"lora_unet_{long * 50_000}.lora_down.weight",
        f"lora_unet_double_blocks_{'9' * 5000}_img_attn_qkv.alpha",
        f"transformer.transformer_blocks.{'9' * 5000}.attn.to_q.lora_A.weight", "", "\0",
        "\ud800", "..", "/" * 300,])  # fmt: skip
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
    return adapter_input(rng, folder, f"{base.name}: {name[:30]} twice", statuses=REFUSED)


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
