"""pydantic's findings in a run's settings -> one line: where, what came, what was wanted, the nearest key.

"Where" is the line of the file or the override that a setting was written in, and the name it has there.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from ppcoat.config.ai_toolkit_keys import KEYS, Honour, Read
from ppcoat.config.schema import RunConfig
from ppcoat.errors import ConfigError, likeness, printable

# pydantic speaks of Python's types; a user wrote YAML
_WANTED = {
    "string_type": "text; put it in quotes",
    "float_type": "a number without quotes",
    "int_type": "a whole number without quotes",
    "bool_type": "true or false",
    "model_type": "a section with keys",
    "tuple_type": "a list",
    "too_short": "at least {min_length} entry",
    "too_long": "at most {max_length} entry",
    "string_pattern_mismatch": "text like {pattern}",
}
# What other programs and other people call a setting, its section before it or not -> its key
OTHER_WORDS = {
    **dict.fromkeys(("learning_rate", "train_learning_rate"), "train.lr"),
    **dict.fromkeys(("max_train_steps", "num_train_steps", "iterations"), "train.steps"),
    **dict.fromkeys(("epochs", "max_train_epochs"), "train.num_epochs"),
    **dict.fromkeys(("train_batch_size", "bs"), "train.batch_size"),
    **dict.fromkeys(("optim", "optimizer_type"), "train.optimizer"),
    **dict.fromkeys(("clip", "grad_clip", "clip_grad_norm"), "train.max_grad_norm"),
    **dict.fromkeys(("timesteps", "train_timestep"), "train.timestep_type"),
    **dict.fromkeys(("network_dim", "lora_dim", "lora_rank", "network_r"), "network.linear"),
    **dict.fromkeys(("network_alpha", "lora_alpha"), "network.linear_alpha"),
    **dict.fromkeys(("target_modules", "network_modules", "network_layers"), "network.targets"),
    **dict.fromkeys(("lora_path", "network_path", "network_weights"), "network.pretrained_lora_path"),
    **dict.fromkeys(("mixed_precision", "precision"), "model.dtype"),
    **dict.fromkeys(("base_model", "pretrained_model_name_or_path"), "model.name_or_path"),
    **dict.fromkeys(("model_name", "model_path"), "model.name_or_path"),
    **dict.fromkeys(("model_fp8", "fp8_base", "load_in_4bit"), "model.quantize"),
    **dict.fromkeys(
        ("path", "dir", "image_dir", "images", "data", "data_path", "train_data_dir"),
        "datasets.0.folder_path",
    ),  # fmt: skip
    **dict.fromkeys(("size", "res", "image_size"), "datasets.0.resolution"),
    "datasets_dropout": "datasets.0.caption_dropout_rate",
    **dict.fromkeys(("instance_prompt", "activation_word"), "trigger_word"),
    **dict.fromkeys(("output_name", "run_name"), "name"),
    **dict.fromkeys(("save_every_n_steps", "checkpointing_steps", "save_steps"), "save.save_every"),
    **dict.fromkeys(("save_total_limit", "checkpoints_total_limit"), "save.max_step_saves_to_keep"),
    **dict.fromkeys(("sample_every_n_steps", "validation_steps"), "sample.sample_every"),
    **dict.fromkeys(("validation_prompt", "sample_prompt"), "sample.prompts"),
    **dict.fromkeys(("cfg", "guidance"), "sample.guidance_scale"),
    "sample_size": "sample.width",
    "coat_fp8": "coat.enabled",
    **dict.fromkeys(("wandb", "tensorboard"), "logging.visualdl"),
    **dict.fromkeys(("gpu", "cuda"), "device"),
}
_BESIDE = 100  # problems that are explained; what was meant by an unknown key takes milliseconds
_LIKE = 0.6  # likeness of two keys, 0..1, from which one may have been meant by the other
Location = tuple[str | int, ...]  # keys and list numbers from the outermost section inwards
_Value = TypeVar("_Value")


class SettingsError(ConfigError):
    """What is wrong with settings. by_key: what to say beside each field, by its dotted key in our schema;
    what concerns no single one has the key of its section."""

    def __init__(self, line: str, by_key: Mapping[str, str]) -> None:
        super().__init__(line)
        self.by_key = dict(by_key)


def settings_error(error: ValidationError, origins: Origins) -> SettingsError:
    """A line for the first problem, unknown keys before what follows from them; and each beside its key."""
    problems = error.errors(include_url=False)
    # a list whose entry is wrong is also called too short: drop what follows from a problem further inside
    inside = {each["loc"][:end] for each in problems for end in range(len(each["loc"]))}
    problems = [each for each in problems if each["loc"] not in inside]
    problems.sort(key=lambda each: each["type"] != "extra_forbidden")
    others = ", ".join(filter(None, (dotted(origins.as_written(each["loc"])) for each in problems[1:])))
    more = f" (and {len(problems) - 1} more{': ' if others else ''}{others})" if problems[1:] else ""
    written = origins.as_written(problems[0]["loc"])
    line = f"{origins.where(written)}: {_sentence(problems[0], written)}{more}"
    by_key: dict[str, str] = {}
    for each in reversed(problems[:_BESIDE]):
        by_key[_key_of(each)] = printable(_beside(each, origins.as_written(each["loc"])))
    return SettingsError(printable(line), by_key)  # keys and values may hold line ends


def _sentence(problem: Mapping[str, Any], written: Location) -> str:
    """A problem with the name of its key, as the user wrote that."""
    key, kind = dotted(written), problem["type"]
    if kind == "extra_forbidden":
        return _beside(problem, written)
    if kind == "missing":
        return f"the key '{key}' {_beside(problem, written)}"
    if kind == "value_error":
        return f"{key + ': ' if key else ''}{_beside(problem, written)}"
    return f"{key}: {_beside(problem, written)} ({_description(problem['loc'])})"


def _beside(problem: Mapping[str, Any], written: Location) -> str:
    """A problem, to be read beside its key."""
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{dotted(written)}'; {known_instead(written)}"
    if problem["type"] == "missing":
        return f"is missing: {_description(problem['loc'])}"
    return str(problem["ctx"]["error"]) if problem["type"] == "value_error" else came_and_wanted(problem)


def _key_of(problem: Mapping[str, Any]) -> str:
    """The dotted key of a problem; of one that a section has, the first key that it names."""
    location = dotted(problem["loc"])
    for word in re.findall(r"[a-z][\w.]*\w", str(problem.get("ctx", {}).get("error", ""))):
        for start in (location, ""):
            key = f"{start}.{word}" if start else word
            if re.sub(r"\.[0-9]+\b", ".0", key) in schema_keys() - _sections():
                return key
    return location


def came_and_wanted(problem: Mapping[str, Any]) -> str:
    """One of pydantic's problems, of a value: what it is, and what it should be."""
    wanted = _WANTED.get(problem["type"], problem["msg"].removeprefix("Input should be "))
    missing = problem["type"] == "missing" or problem["input"] is None
    came = "nothing" if missing else repr(problem["input"])
    came = came if len(came) <= 80 else came[:77] + "..."
    wanted = wanted.format(**problem.get("ctx", {}))
    if problem["type"] == "tuple_type" and isinstance(problem["input"], str):
        wanted += f" such as [{problem['input']:.40}]"
    return f"came {came}, wanted {wanted}"


def known_instead(location: Location) -> str:
    """What to say of an unknown key: the known one that was meant by it, else those of its section.

    Known are the keys of our schema and those of ai-toolkit that are followed; those of the same section come
    before others. Words of other programs count as the keys that they mean.
    """
    *parents, unknown = location
    # every entry of a list has the keys of the first
    prefix = dotted((*(0 if isinstance(part, int) else part for part in parents), ""))
    followed = (key.replace("[]", ".0") for key, rule in KEYS.items() if isinstance(rule, Honour | Read))
    likely: dict[str, float] = {}
    for key in dict.fromkeys((*_all_keys(RunConfig, ""), *followed)):
        inside, name = key.startswith(prefix), key.rpartition(".")[2]
        own = inside and "." not in key.removeprefix(prefix)
        likely[key] = likeness(str(unknown), name) * (1 if own else 0.85)
    names = [str(part) for part in location if not isinstance(part, int)]
    for said, weight in (("_".join(names[-2:]), 1.0), (names[-1], 0.95)):
        for word in difflib.get_close_matches(said, OTHER_WORDS, n=1, cutoff=0.8):
            key = OTHER_WORDS[word]
            likely[key] = max(likely[key], weight * difflib.SequenceMatcher(None, said, word).ratio())
    nearest = max(likely, key=likely.__getitem__)
    if likely[nearest] >= _LIKE:
        if nearest.startswith(prefix):
            nearest = dotted((*parents, "")) + nearest.removeprefix(prefix)
        return f"the nearest known key is '{nearest}'"
    own_keys = [key.removeprefix(prefix) for key in likely if key.startswith(prefix)]
    known = ", ".join(key for key in own_keys if "." not in key and prefix + key in schema_keys())
    return f"known are {known}" if known else f"the nearest known key is '{nearest}'"


@cache
def schema_keys() -> frozenset[str]:
    """Dotted paths of all sections and keys of our schema, list entries as number 0."""
    return frozenset(_all_keys(RunConfig, ""))


@cache
def _sections() -> frozenset[str]:
    """Those of schema_keys that have others below them."""
    return frozenset(key.rpartition(".")[0].removesuffix(".0") for key in schema_keys())


def _section_at(location: tuple[str | int, ...]) -> type[BaseModel]:
    """The section that a location without its last key leads to."""
    section: type[BaseModel] = RunConfig
    for part in location:
        if isinstance(part, str) and part in section.model_fields:
            annotation = section.model_fields[part].annotation
            inner = next((arg for arg in (annotation, *get_args(annotation)) if _is_section(arg)), None)
            section = inner or section
    return section


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _description(location: tuple[str | int, ...]) -> str:
    names = [part for part in location if isinstance(part, str)]
    field = _section_at(location[:-1]).model_fields.get(names[-1]) if names else None
    return field.description or "" if field else "see the sections of the config"


def _all_keys(section: type[BaseModel], prefix: str) -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        inner = next(
            (arg for arg in (field.annotation, *get_args(field.annotation)) if _is_section(arg)), None
        )
        if inner:
            dot = ".0." if get_args(field.annotation) else "."
            keys += _all_keys(inner, prefix + name + dot)
    return keys


@dataclass
class Origins:
    """The way back from a setting to the place where its user wrote it.

    path and root: the file and its YAML node. moved: location without ai-toolkit's nesting -> location in the
    file. overrides: location -> the override that set it. spelled: location in our schema -> location as
    written. In all three the longest known beginning of a location counts.
    """

    path: str
    root: yaml.Node | None
    moved: dict[Location, Location] = dataclasses.field(default_factory=dict)
    overrides: dict[Location, str] = dataclasses.field(default_factory=dict)
    spelled: dict[Location, Location] = dataclasses.field(default_factory=dict)

    def as_written(self, location: Location) -> Location:
        """The user's name of a setting of our schema."""
        start, spelling = _longest_start(self.spelled, location, ())
        return spelling + location[len(start) :]

    def where(self, location: Location) -> str:
        """Override, or file and line, of a setting under the user's name."""
        _, override = _longest_start(self.overrides, location, None)
        start, place = _longest_start(self.moved, location, ())
        line, found = _line_of(self.root, place + location[len(start) :])
        if override is None and not found:  # a section that is there because of an override
            below = (each for at, each in self.overrides.items() if at[: len(location)] == location)
            override = next(below, None) if location else None
        return f"{self.path}:{line}" if override is None else f"--set {override}"


def dotted(location: Location) -> str:
    """("datasets", 0, "resolution") -> "datasets.0.resolution"."""
    return ".".join(map(str, location))


def _line_of(root: yaml.Node | None, location: Location) -> tuple[int, bool]:
    """Line number (from 1) of the deepest node on the way to location that the file has, and whether that is
    the node itself."""
    line, node = 1, root
    for part in location:
        if isinstance(node, yaml.MappingNode):
            pair = next((pair for pair in node.value if pair[0].value == str(part)), None)
            if pair is None:
                return line, False
            line, node = pair[0].start_mark.line + 1, pair[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            return line, False
    return line, True


def _longest_start(
    table: dict[Location, _Value], location: Location, default: _Value
) -> tuple[Location, _Value]:
    for end in range(len(location), -1, -1):
        if location[:end] in table:
            return location[:end], table[location[:end]]
    return (), default
