"""Configs, damaged: values, extremes, bytes, texts that cost more to read than they are worth, --set."""

import json
from functools import cache
from pathlib import Path

from inputs import CONFIGS, EITHER, FIXTURES, REFUSED, Input, as_json, damaged, no_file, of_kind, replaced
from read_data import data_folder

from ppcoat.config.load import value_of_text

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
    lines = [line for name, table in value.items() if isinstance(table, dict)
        for line in (f"[{name}]", *(f"{key} = {as_json(each).decode()}" for key,
        each in table.items()))]  # fmt: skip
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
    keys = [("train", "batch_size"), ("train", "steps"), ("train", "gradient_accumulation"),
        ("network", "linear"), ("datasets", 0, "num_repeats"), ("datasets", 0, "resolution"),
        ("sample", "width"), ("train", "num_epochs"), ("save", "max_step_saves_to_keep"),
        ("datasets", 0, "caption_variants"), ("sample", "prompts")]  # fmt: skip
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
    base = {
        "name": "x",
        "output_dir": str(folder / "out"),
        "model": {"name_or_path": "tiny_flux"},
        "network": {"linear": 4},
        "train": {"steps": 2},
        "datasets": [{"folder_path": str(data), "resolution": 64}],
    }
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
    content, ending = [("\ufeff" + text, ".yaml"), (text.replace("\n", "\r\n"), ".yml"), (text
        + "\n# x" * 50_000, ".yaml"), (json.dumps(said_by(base), indent=1), ".json")][what]  # fmt: skip
    return config_input(rng, folder, f"{base.name}: harmless {what}", content.encode(), ending, calm=base)


@cache
def monsters(n: int) -> dict[tuple[str, str], str]:
    """{(ending, name): text} that costs more to read than it is worth, of some `n` characters."""
    keys = "\n".join(f"k{i}: {i}" for i in range(90_000))
    laughs = "a0: &a0 [x, x]\n" + "\n".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)
    )
    yaml_texts = {
        "brackets": "train: " + "[" * n,
        "closed": "train: " + "[" * n + "]" * n,
        "braces": "train: " + "{a: " * (n // 4),
        "block": "\n".join(" " * i + f"k{i}:" for i in range(min(n, 1400))),
        "dashes": "datasets: \n" + "- " * n,
        "questions": "? " * n,
        "digits": "train: {steps: " + "9" * n + "}",
        "keys": keys,
        "one level": "train:\n " + keys.replace("\n", "\n "),
        "laughs": laughs,
        "tag": "train: !!python/object/apply:os.system [id]",
        "long key": "x" * n + ": 1",
        "entries": "datasets: [" + "{}, " * (n // 4) + "]",
        "texts": 'name: "' + "\\u0041" * (n // 6) + '"',
        "float": "train: {lr: 1e" + "9" * n + "}",
        "variable": "name: " + "${" * (n // 2),
        "exclamation": "!" * n,
        "quotes": "'" * n,
        "names": "name: " + "[name]" * (n // 6),
        "documents": "---\n" * (n // 4),
        "merge": "train: {<<: {steps: 1}}",
        "big": "# " + "x" * 2**20,
        "ones": "name: " + "1" * n,
        "commas": "datasets: [" + "," * n,
        "colons": ":" * n,
        "stars": "*" * n,
        "date": "name: 2020-01-01",
        "percent": "%" * n,
    }
    toml_texts = {
        "tables": "[" + ".".join("a" * (n // 2)) + "]",
        "arrays": "a = " + "[" * n,
        "closed": "a = " + "[" * n + "]" * n,
        "inline": "a = " + "{a = " * (n // 5),
        "digits": "[Model]\nlora_rank = " + "9" * n,
        "hex": "[Model]\nlora_rank = 0x" + "f" * n,
        "keys": keys.replace(":", " ="),
        "dotted": ".".join("a" * (n // 2)) + " = 1",
        "date": "[Model]\nlora_rank = 1979-05-27",
        "nan": "[Model]\nlearning_rate = nan",
        "float": "[Model]\nlearning_rate = 1e" + "9" * n,
        "many": "[a]\n" * (n // 4),
        "array tables": "".join(f"[[a{i % 7}]]\n" for i in range(n // 7)),
        "quotes": "a = '" + "x" * n,
        "big": "# " + "x" * 2**20,
        "dotted keys": "\n".join(f"[Model.a{i}.b.c]" for i in range(n // 16)),
        "brackets": "[" * n,
        "string": 'a = """' + "\\" * n,
    }
    json_texts = {
        "brackets": "[" * n,
        "closed": '{"train": ' + "[" * n + "]" * n + "}",
        "objects": '{"a":' * (n // 5),
        "digits": '{"train": {"steps": ' + "9" * n + "}}",
        "quotes": '"' * n,
        "comments": "/*" * (n // 2),
        "slashes": "//" * (n // 2),
        "escapes": '{"name": "' + "\\" * n,
        "twice": '{"name": 1, "name": 2}',
        "tabs": "\t" * n,
        "keys": json.dumps({f"k{i}": i for i in range(60_000)}),
        "surrogate": '{"name": "\\ud800"}',
    }
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
    text = rng.choice(["train.steps=" + "9" * n, "train.lr=1e" + "9" * n, "train.steps=" + "["
        * n, "name=" + "x" * n, "a." * (n // 2) + "a=1", "=" * n, "." * n,
        f"datasets.{'9' * min(n, 5000)}.folder_path=x", "datasets.0.resolution=[" + "1,"
        * (n // 2) + "]", "train={" + "a: {" * (n // 4), "train.steps", "train.steps=",
        "train=5", "train.steps.x=5", "datasets=x", "datasets.0=x", "datasets.-1.folder_path=x",
        "datasets.²=x", "name=&a x", "name=*a", "name=!!python/name:os.system", "name=\ud800",
        "name=\0", "name=[name]" * (n // 12 + 1), "name=${HOME}", "name=${" + "A" * n + "}",
        "train.batch_size=.nan", "train.batch_size=true", "train.batch_size=1.0", "train.lr=-1",
        "sample.prompts=[" + "x," * (n // 2) + "]", "datasets.0." + "x" * n + "=1", "x" * n
        + "=1", "train." + "漢" * (n // 3) + "=1", "train.steps=? ", "train.steps=- - - -",
        "train.steps=\t1", "network.linear=" + "1" * 18, "train.steps=0x10",
        "train.steps=1_000", "train.steps=1:30", "--set=x",])  # fmt: skip
    return Input(f"--set {text[:40]!r}, {len(text)}", "plan", [base, "--set", text])


@of_kind("configs")
def config_no_file(rng, folder):
    name = f"x{rng.choice(['.yaml', '.json', '.toml', '.yml', '.txt', ''])}"
    return Input(no_file(rng, folder / name), "plan", [str(folder / name)], REFUSED)
