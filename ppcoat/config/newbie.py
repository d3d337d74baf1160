"""NewBie-image's trainer file (TOML, tables [Model] and [Optimization]) + overrides -> validated RunConfig.

Keys and defaults are those of the public NewbieLoraTrainer and its template. Tables and keys with the names
of our own schema ([sample], [coat], [save], seed, ...) may stand beside them and win. Where the values of the
two differ in meaning, the difference is logged in one line.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ppcoat.config.ai_toolkit_optimizers import read_lr, read_optimizer
from ppcoat.config.ai_toolkit_values import Document
from ppcoat.config.explain import Location, Origins, settings_error
from ppcoat.config.load import (
    BACKSLASH,
    JSON_ENDINGS,
    MAX_NODES,
    YAML_ENDINGS,
    apply_override,
    load_config,
    read_config_text,
)
from ppcoat.config.schema import RunConfig
from ppcoat.errors import ConfigError, nearest, printable
from ppcoat.reading import MAX_LEVELS, TOO_DEEP, leaves

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

# Key of [Model] or [Optimization] -> our setting, where the value means the same; others are read below.
SAME = {
    "base_model_path": ("model", "name_or_path"),
    "gemma3_prompt": ("model", "prompt_prefix"),
    "output_dir": ("output_dir",),
    "output_name": ("name",),
    "train_data_dir": ("datasets", 0, "folder_path"),
    "resolution": ("datasets", 0, "resolution"),
    "use_cache": ("datasets", 0, "cache_to_disk"),
    "train_batch_size": ("train", "batch_size"),
    "num_epochs": ("train", "num_epochs"),
    "learning_rate": ("train", "lr"),
    "lr_scheduler": ("train", "lr_scheduler"),
    "lr_warmup_steps": ("train", "lr_warmup_steps"),
    "gradient_checkpointing": ("train", "gradient_checkpointing"),
    "gradient_clip_norm": ("train", "max_grad_norm"),
}
ADAPTER = {  # key without "lora_" or "lokr_" -> our setting, and whether LoRA and LoKr have it
    "rank": ("linear", ("lora", "lokr")),
    "alpha": ("linear_alpha", ("lora", "lokr")),
    "target_modules": ("targets", ("lora", "lokr")),
    "dropout": ("dropout", ("lora", "lokr")),
    "factor": ("lokr_factor", ("lokr",)),
    "rank_dropout": ("lokr_rank_dropout", ("lokr",)),
    "module_dropout": ("lokr_module_dropout", ("lokr",)),
    "train_norm": (None, ("lokr",)),
}
DEFAULT_TARGETS = ("attention.qkv", "attention.out", "feed_forward.w2", "time_text_embed.1",
                   "clip_text_pooled_proj.1")  # fmt: skip
_DEFAULTS = {
    "resolution": 1024, "use_cache": True, "train_batch_size": 1, "num_epochs": 50, "learning_rate": 1e-4,
    "lr_scheduler": "cosine", "lr_warmup_steps": 100, "gradient_checkpointing": True,
    "gradient_clip_norm": 1.0, "enable_bucket": True, "save_epochs_interval": 0, "mixed_precision": "bf16",
    "optimizer_type": "AdamW8bit", "adapter_type": "lora", "lora_rank": 32, "lora_dropout": 0.05,
}  # fmt: skip
_ADAPTERS = dict.fromkeys(("lokr", "lyco_lokr", "lycoris_lokr", "lyco-lokr"), "lokr") | {"lora": "lora"}
_OPTIMIZERS = {"AdamW": "adamw", "AdamW8bit": "coat_fp8_adamw"}
_PRECISIONS = {"no": "float32", "bf16": "auto", "fp16": "auto"}
_NO_EFFECT = ("trust_remote_code", "dataloader_num_workers", "use_flash_attention_2")
_PARTS = ("gemma_model_path", "clip_model_path", "transformer_path", "vae_path")
_WEIGHT_ENDINGS = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")
_OWN_TABLES = tuple(RunConfig.model_fields)
_SAVE_EVERY = 1000  # steps, beside the epochs

# texts and comments of TOML, on one line
_TEXTS = re.compile(r'"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\'|#[^\n]*')

_log = logging.getLogger(__name__)


def load_run_config(path: str | Path, overrides: Sequence[str] = (), family: str = "flux") -> RunConfig:
    """The settings of a run from a file of either form: ours and ai-toolkit's (YAML, JSON), or this (TOML).

    family: the command's, newbie or flux; it says which form a file with another ending was meant to have.
    Raises ConfigError as load_config and load_newbie_config do.
    """
    forms = dict.fromkeys((*YAML_ENDINGS, *JSON_ENDINGS), load_config) | {".toml": load_newbie_config}
    other = load_newbie_config if family == "newbie" else load_config
    return forms.get(Path(path).suffix.lower(), other)(path, overrides)


def load_newbie_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and check the settings of a NewBie LoRA run.

    path: a .toml file. overrides: "section.key=value" in our own names ("train.steps=20", which takes the
    place of num_epochs). Raises ConfigError, one line, naming file, key, what came and what was wanted; an
    unknown key is answered with the nearest known one.
    """
    path = Path(path)
    text = read_config_text(path, (".toml",))
    content = _parse(text, path)
    origins = _TomlOrigins(str(path), None, text=text)
    given, own = _split(content, origins)
    data = _translate(given, origins)
    _merge(data, own)
    for override in overrides:
        location = apply_override(data, override)
        origins.overrides[location] = override
        if location == ("train", "steps"):
            data["train"]["num_epochs"] = data["save"]["save_every_epochs"] = None
    _read_optimizer(data, origins)
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise settings_error(error, origins) from None


def _parse(text: str, path: Path) -> dict[str, Any]:
    """TOML -> its tables. What its reader would take very long for, or has no bound of its own for, is
    refused before and after."""
    bare = _TEXTS.sub("", text)
    if bare.count("=") > MAX_NODES or any(part.count(".") > MAX_LEVELS for part in re.split("[=\n]", bare)):
        raise ConfigError(f"{path}: more than {MAX_NODES} keys, or {TOO_DEEP}; wanted tables with keys")
    try:
        content = tomllib.loads(text)
        if any(type(each) is int and abs(each) >= 2**63 for each in leaves(content)):
            raise ValueError("a whole number of more than 64 bits")
    except RecursionError:
        raise ConfigError(f"{path}: {TOO_DEEP}; wanted tables with keys") from None
    except ValueError as error:
        advice = f"; {BACKSLASH}" if "\\" in str(error) or "hex" in str(error) else ""
        raise ConfigError(f"{path}: this is not TOML: {error}{advice}") from None
    return content


def _read_optimizer(data: dict[str, Any], origins: _TomlOrigins) -> None:
    """Other programs' names of optimizers and a rate for Prodigy are read as in YAML."""
    train = data["train"]
    for key, read in (("optimizer", read_optimizer), ("lr", read_lr)):
        if not isinstance(train, dict) or key not in train:
            continue
        said = printable(f"{origins.where(('train', key))}: train.{key}: came {train[key]!r}")
        try:
            reading = read(train[key], Document(data, nested=False))
        except ValueError as error:
            raise ConfigError(printable(f"{said}; {error}")) from None
        for note in reading.notes:
            _log.warning("%s, %s", said, note)
        train |= {name.removeprefix("train."): value for name, value in reading.settings.items()}


@dataclass
class _TomlOrigins(Origins):
    """Lines are found by the text, because a TOML reader tells none."""

    text: str = ""

    def where(self, location: Location) -> str:
        """Override, or file and line, of a setting under the user's name."""
        if any(location[:end] in self.overrides for end in range(len(location) + 1)):
            return super().where(location)
        keys = [part for part in location if isinstance(part, str)]
        found = keys and re.search(rf"(?m)^\s*{re.escape(keys[-1])}\s*=", self.text)
        return f"{self.path}:{self.text[: found.end()].count(chr(10)) + 1}" if found else self.path


def _split(content: dict, origins: _TomlOrigins) -> tuple[dict[str, Any], dict[str, Any]]:
    """TOML -> the keys of [Model] and [Optimization] in one, and tables of our own schema."""
    given, own = {}, {}
    for name, value in content.items():
        if name in ("Model", "Optimization"):
            if not isinstance(value, dict):
                raise ConfigError(f"{origins.where((name,))}: {name} is a value, wanted a table [{name}]")
            given |= value
        elif name in _OWN_TABLES:
            own[name] = value
        else:
            known = ", ".join(("Model", "Optimization", *_OWN_TABLES))
            raise ConfigError(f"{origins.path}: unknown table or key '{printable(name)}'; known are {known}")
    known = known_keys()
    for key in given:
        if key not in known:
            unknown = f"{origins.where((key,))}: unknown key '{printable(key)}'"
            raise ConfigError(f"{unknown}; the nearest known key is '{nearest(key, known)}'")
    return given, own


def known_keys() -> list[str]:
    """All keys of [Model] and [Optimization] that are read here."""
    adapter = [f"{kind}_{key}" for key, (_, kinds) in ADAPTER.items() for kind in kinds]
    return sorted({*SAME, *adapter, *_DEFAULTS, *_NO_EFFECT, *_PARTS})


def _released_weights(base: Any) -> Path | None:
    """The checkpoint that a base_model_path is or holds, where it is not the folder of a pipeline."""
    path = Path(base) if isinstance(base, str) else None
    if path is None or path.suffix.lower() in _WEIGHT_ENDINGS:
        return path
    if not path.is_dir() or (path / "model_index.json").exists():
        return None
    return next((file for file in sorted(path.iterdir()) if file.suffix.lower() in _WEIGHT_ENDINGS), None)


def _translate(given: dict[str, Any], origins: _TomlOrigins) -> dict[str, Any]:
    """Keys of the original -> nested settings of our schema."""
    _warn_of_what_differs(given, origins)
    for part in _PARTS:
        if part in given:
            raise ConfigError(
                f"{origins.where((part,))}: {part}: give base_model_path, a folder that "
                "train_scripts/convert_newbie_to_diffusers.py has written from the four parts"
            )
    weights = _released_weights(given.get("base_model_path"))
    if weights is not None:
        came = "a file of" if str(weights) == given["base_model_path"] else "a folder of"
        raise ConfigError(
            f"{origins.where(('base_model_path',))}: base_model_path: came {given['base_model_path']!r}, "
            f"{came} released weights, wanted a converted folder: write one first with python -m ppcoat "
            f"convert-newbie --checkpoint {weights} ... (--help tells the rest)"
        )
    values = _DEFAULTS | given
    data: dict[str, Any] = {
        "model": {"family": "newbie", "dtype": _one_of("mixed_precision", values, _PRECISIONS, origins)},
        "datasets": [{
            "default_caption": "",  # a picture without a caption file has the empty caption, as there
            "bucket_rule": _one_of("enable_bucket", values, {True: "aspect", False: "square"}, origins),
        }],
        "train": {"optimizer": _one_of("optimizer_type", values, _OPTIMIZERS, origins)},
        "save": {"save_every": _SAVE_EVERY, "save_every_epochs": values["save_epochs_interval"] or 1},
        "sample": {"guidance_scale": 5.0, "width": values["resolution"], "height": values["resolution"]},
        "network": _adapter(values, origins),
    }  # fmt: skip
    origins.spelled |= {
        ("save", "save_every_epochs"): ("save_epochs_interval",),
        ("sample", "width"): ("resolution",),
        ("sample", "height"): ("resolution",),
    }
    for key, location in SAME.items():
        if key in values:
            _place(data, location, values[key])
            origins.spelled[location] = (key,)
    if values["lr_scheduler"] == "constant":
        data["train"]["lr_warmup_steps"] = 0
    return data


def _adapter(values: dict[str, Any], origins: _TomlOrigins) -> dict[str, Any]:
    """The section `network`. LoKr's rank, alpha and targets are LoRA's where it has none of its own."""
    kind = _one_of("adapter_type", values, _ADAPTERS, origins)
    network: dict[str, Any] = {"type": kind, "targets": list(DEFAULT_TARGETS)}
    for key, (name, kinds) in ADAPTER.items():
        source = f"{kind}_{key}"
        if kind == "lokr" and source not in values and key in ("rank", "alpha", "target_modules"):
            source = f"lora_{key}"
        if kind in kinds and name is not None and source in values:
            network[name] = values[source]
            origins.spelled[("network", name)] = (source,)
    if kind == "lokr" and network.pop("dropout", 0):
        _log.warning("%s: lokr_dropout has no effect, as in LyCORIS", origins.where(("lokr_dropout",)))
    if kind == "lokr" and values.get("lokr_train_norm"):
        _log.warning("%s: norms stay frozen", origins.where(("lokr_train_norm",)))
    network.setdefault("linear_alpha", network["linear"])
    return network


def _warn_of_what_differs(given: dict[str, Any], origins: _TomlOrigins) -> None:
    unused = [key for key in _NO_EFFECT if key in given]
    if unused:
        _log.warning("%s: no effect here: %s", origins.path, ", ".join(unused))
    if given.get("mixed_precision") == "fp16":
        _log.warning(
            "%s: mixed_precision fp16 becomes bf16: Gemma3 leaves float16's range",
            origins.where(("mixed_precision",)),
        )
    if given.get("lr_scheduler") == "constant" and given.get("lr_warmup_steps"):
        _log.warning("%s: lr_scheduler constant has no warmup", origins.where(("lr_warmup_steps",)))
    prompt = given.get("gemma3_prompt")
    if isinstance(prompt, str) and prompt and prompt == prompt.rstrip():
        _log.warning(
            "%s: gemma3_prompt ends without the space that the base model was trained with; it is used as it "
            "stands", origins.where(("gemma3_prompt",)),
        )  # fmt: skip


def _one_of(key: str, values: dict[str, Any], table: dict, origins: _TomlOrigins) -> Any:
    value = values[key]
    if isinstance(value, (str, bool)) and value in table:
        return table[value]
    wanted = ", ".join(str(each).lower() if isinstance(each, bool) else each for each in table)
    raise ConfigError(f"{origins.where((key,))}: {key}: came {value!r}, wanted one of {wanted}")


def _place(data: dict[str, Any], location: Location, value: Any) -> None:
    here: Any = data
    for part in location[:-1]:
        here = here[part]
    here[location[-1]] = value


def _merge(data: dict[str, Any], own: dict[str, Any]) -> None:
    """Put `own` over `data`, table by table; lists are replaced."""
    for key, value in own.items():
        if isinstance(value, dict) and isinstance(data.get(key), dict):
            _merge(data[key], value)
        else:
            data[key] = value
