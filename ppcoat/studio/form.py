"""The form of a training run, made from the fields of its config: what each is called, means, may be, and how
it is asked for. What was typed becomes a config by the loader of files, so its messages are those of a file.

The form's state is one flat table, {"train.lr": 0.0001, "datasets.0.folder_path": "photos"}, of what is set;
all else has its default. No page is drawn here: see train_page.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from ppcoat.config.base import PathText
from ppcoat.config.explain import SettingsError
from ppcoat.config.flags import CONFIGS, TINY_FLUX
from ppcoat.config.load import config_of_text, dump_data, value_of_text
from ppcoat.config.newbie import load_run_config
from ppcoat.config.schema import RunConfig, Section
from ppcoat.errors import ConfigError

Values = dict[str, Any]
Kind = Literal["switch", "choice", "choices", "number", "text", "lines", "list", "entries"]
FORM = "the form"  # what messages call it
# The fields that a first run needs; all others have defaults that train well.
BASIC = (
    "name", "trigger_word", "device", "model.name_or_path", "model.family", "model.quantize", "network.type",
    "network.linear", "network.linear_alpha", "datasets", "datasets.0.folder_path", "datasets.0.resolution",
    "datasets.0.default_caption", "datasets.0.num_repeats", "datasets.0.flip_x", "datasets.0.control_path",
    "datasets.0.mask_path", "train.steps", "train.batch_size", "train.gradient_accumulation", "train.lr",
    "train.lr_scheduler", "train.optimizer", "train.gradient_checkpointing", "coat.enabled",
    "coat.activation.policy", "save.save_every", "sample.sample_every", "sample.prompts", "sample.width",
    "sample.height", "sample.sample_steps",
)  # fmt: skip
_LIMITS = {"ge": "≥ {}", "gt": "> {}", "le": "≤ {}", "lt": "< {}", "multiple_of": "{} × n"}


@dataclass(frozen=True)
class FormField:
    """One setting. key: dotted, the entries of a list as number 0. choices: (value, what it is called) of
    choice and choices. limits: of numbers, to read. entry: the fields of one entry, of entries. is_path: it
    names files or folders."""

    key: str
    description: str
    default: Any
    kind: Kind
    choices: tuple[tuple[Any, str], ...] = ()
    limits: str = ""
    required: bool = False
    optional: bool = False
    is_path: bool = False
    entry: tuple[FormField, ...] = ()

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.key.rpartition(".")[2]

    @property
    def group(self) -> str:
        """The section that it stands in: "" for the first lines of a config."""
        return self.key.partition(".")[0] if "." in self.key else ""

    @property
    def is_basic(self) -> bool:
        """Whether a first run needs it."""
        return self.key in BASIC

    def text_of(self, value: Any) -> Any:
        """A value as its widget holds it: a bool of a switch, one of the choices, else text."""
        if self.kind in ("switch", "choice"):
            return value
        if self.kind == "choices":
            return list(value or ())
        if value is None:
            return ""
        if isinstance(value, list | tuple):
            return ("\n" if self.kind == "lines" else ", ").join(map(str, value))
        return str(value)

    def value_of(self, text: Any) -> Any:
        """The way back; None where nothing is set. Text that is no number stays text: the loader says what
        was wanted."""
        if self.kind in ("switch", "choice"):
            return text
        if self.kind == "choices":
            return list(text) or None
        text = str(text or "")
        if not text.strip():
            return None
        if self.kind == "lines":
            return [line.strip() for line in text.splitlines() if line.strip()]
        if self.kind == "text":
            return text
        parts = [_scalar(part) for part in text.strip().strip("[]").split(",") if part.strip()]
        return parts if self.kind == "list" or "," in text else parts[0] if parts else None


@cache
def form_fields(section: type[BaseModel] = RunConfig, prefix: str = "") -> tuple[FormField, ...]:
    """Every setting of a section and of those inside it, in the order of the schema."""
    hints = get_type_hints(section, include_extras=True)
    fields: list[FormField] = []
    for name, field in section.model_fields.items():
        key, parts = prefix + name, list(_parts(hints[name]))
        inner = next((each for each in parts if isinstance(each, type) and issubclass(each, Section)), None)
        if inner is not None and tuple not in [get_origin(each) for each in parts]:
            fields += form_fields(inner, f"{key}.")
            continue
        default = None if field.default is PydanticUndefined else field.default
        limits = [_LIMITS[limit].format(getattr(each, limit)) for each in _limits(field.metadata, parts)
                  for limit in _LIMITS if getattr(each, limit, None) is not None]  # fmt: skip
        fields.append(
            FormField(
                key,
                field.description or "",
                default,
                "entries" if inner else _kind(parts),
                tuple((each, _called(each)) for each in _choices(parts)),
                ", ".join(dict.fromkeys(limits)),
                field.is_required(),
                NoneType in parts,
                PathText in parts,
                form_fields(inner, f"{key}.0.") if inner else (),
            )
        )
    return tuple(fields)


def all_fields(fields: Iterable[FormField] | None = None) -> Iterator[FormField]:
    """Those of form_fields with those inside entries."""
    for field in form_fields() if fields is None else fields:
        yield field
        yield from all_fields(field.entry)


def templates() -> dict[str, str]:
    """Files that a form can begin with, by name, each with its first line of comment."""
    found = {}
    for file in sorted([*CONFIGS.glob("*.yaml"), *CONFIGS.glob("*.toml")]):
        first = file.read_text("utf-8").partition("\n")[0]
        found[file.name] = first.removeprefix("#").strip() if first.startswith("#") else ""
    return found


def template_values(name: str) -> Values:
    """What a file of `templates` sets. Raises ConfigError for one that is none."""
    if name not in templates():
        raise ConfigError(f"there is no template {name!r}; choose one of {', '.join(templates())}")
    return values_in(load_run_config(CONFIGS / name))


def values_in(config: RunConfig) -> Values:
    """What a config sets, defaults left out, as the form holds it."""
    values = _flat(config.model_dump(mode="json", exclude_unset=True))
    defaults = {field.key: field.default for field in all_fields() if not field.required}
    values = {key: value for key, value in values.items()
              if _first(key) not in defaults or value != defaults[_first(key)]}  # fmt: skip
    if values.get("model.name_or_path") == TINY_FLUX:
        values["model.name_or_path"] = "tiny_flux"
    return values


def form_text(values: Values) -> str:
    """The form as the text of a config file."""
    data: dict[str, Any] = {}
    order = {field.key: number for number, field in enumerate(all_fields())}
    for key in sorted(values, key=lambda key: (order.get(_first(key), len(order)), _numbers(key))):
        here, (*above, last) = data, key.split(".")
        for part in above:  # also of nothing: an entry that was added is there, and lacks something
            here = here.setdefault(part, {})
        if values[key] is not None:
            here[last] = values[key]
    for field in form_fields():  # so that what is missing is said of the field, not of its section
        if field.required and field.group:
            data.setdefault(field.group, {})
    data.setdefault("datasets", {"0": {}})
    return dump_data(_with_lists(data))


def form_config(values: Values) -> RunConfig:
    """The form as the config of a run. Raises ConfigError as the loader does; a SettingsError says it for
    each field."""
    return config_of_text(form_text(values), FORM)


def errors_by_field(error: ConfigError) -> dict[str, str]:
    """What form_config raised, by the key of the field that it is to be shown at; "" for none of them."""
    if isinstance(error, SettingsError):
        return error.by_key
    text = re.sub(rf"^{FORM}:[0-9]+: ", "", str(error))
    key, _, rest = text.partition(": ")
    known = {field.key for field in all_fields()}
    return {key: rest} if _first(key) in known else {"": text}


def text_values(text: str) -> Values:
    """What the text of a config file sets. Raises ConfigError as the loader does."""
    return values_in(config_of_text(text, FORM))


def entries_of(values: Values, key: str) -> int:
    """How many entries the form has of a list."""
    numbers = [
        int(each.removeprefix(f"{key}.").partition(".")[0]) for each in values if each.startswith(f"{key}.")
    ]
    return max(numbers, default=-1) + 1


def with_entry(values: Values, field: FormField) -> Values:
    """The form with one more, empty entry."""
    first = next((each for each in field.entry if each.required), field.entry[0])
    return values | {numbered(first.key, [entries_of(values, field.key)]): None}


def without_entry(values: Values, key: str, number: int) -> Values:
    """The form without one entry of a list; the others move up."""
    kept: Values = {}
    for name, value in values.items():
        rest = name.removeprefix(f"{key}.")
        here, _, last = rest.partition(".")
        if rest == name or int(here) < number:
            kept[name] = value
        elif int(here) > number:
            kept[f"{key}.{int(here) - 1}.{last}"] = value
    return kept


def numbered(key: str, numbers: Sequence[int]) -> str:
    """The key of a setting in other entries than the first: one number for each list that it lies in."""
    left = iter(numbers)
    return re.sub(r"\.0(?=\.|$)", lambda _: f".{next(left)}", key)


def paths_in(config: RunConfig) -> dict[str, list[str]]:
    """The files and folders that a config names, by key; the model that comes with ppcoat left out."""
    values, found = _flat(config.model_dump(mode="json")), {}
    keys = {field.key for field in all_fields() if field.is_path}
    for key, value in values.items():
        if _first(key) not in keys or not value:
            continue
        named = [value] if isinstance(value, str) else value
        if named != [TINY_FLUX]:
            found[key] = named
    return found


def training_argv(config: RunConfig, file: str | Path) -> list[str]:
    """The arguments of `python -m ppcoat` that train a config which lies in this file."""
    newbie = config.model.family == "newbie"
    return ["train-newbie", "--config_file", str(file)] if newbie else ["train", str(file)]


def with_changes(values: Values, changes: Mapping[str, Any]) -> Values:
    """The form with what a plan says: {"model.quantize": "fp4", ...}."""
    defaults = {field.key: field.default for field in form_fields()}
    kept = {key: value for key, value in values.items() if key not in changes}
    return kept | {key: value for key, value in changes.items() if value != defaults.get(key)}


def _scalar(text: str) -> Any:
    try:
        return value_of_text(text.strip())
    except ConfigError:  # the loader of the whole form says it
        return text.strip()


def _parts(annotation: Any) -> Iterator[Any]:
    """A type and all that it is made of."""
    yield annotation
    if get_origin(annotation) is Annotated:
        yield from _parts(get_args(annotation)[0])
        yield from get_args(annotation)[1:]
    elif get_origin(annotation) in (Union, UnionType, tuple):
        for each in get_args(annotation):
            yield from _parts(each)


def _limits(metadata: list[Any], parts: list[Any]) -> Iterator[Any]:
    for each in [*metadata, *parts]:
        yield from getattr(each, "metadata", [each])


def _choices(parts: list[Any]) -> list[Any]:
    return [choice for each in parts if get_origin(each) is Literal for choice in get_args(each)]


def _kind(parts: list[Any]) -> Kind:
    several = tuple in [get_origin(each) for each in parts]
    if _choices(parts):
        return "choices" if several else "choice"
    if bool in parts:
        return "switch"
    if several:
        return "lines" if str in parts else "list"
    return "number" if int in parts or float in parts else "text"


def _called(choice: Any) -> str:
    return "none" if choice is False else str(choice)


def _flat(data: Any, prefix: str = "") -> Values:
    """Nested sections -> dotted keys; entries of a list by number, lists of numbers and texts as they are."""
    if isinstance(data, list) and any(isinstance(each, dict) for each in data):
        data = dict(enumerate(data))
    if not isinstance(data, dict):
        return {prefix.rstrip("."): data}
    found: Values = {}
    for name, value in data.items():
        found |= _flat(value, f"{prefix}{name}.")
    return {key: value for key, value in found.items() if value != {}}


def _with_lists(data: Any) -> Any:
    """Sections whose keys are numbers become lists, in their order."""
    if not isinstance(data, dict):
        return data
    data = {key: _with_lists(value) for key, value in data.items()}
    if data and all(key.isdecimal() for key in data):
        return [data[key] for key in sorted(data, key=int)]
    return data


def _first(key: str) -> str:
    """The key of the same setting in the first entry."""
    return re.sub(r"\.[0-9]+(?=\.|$)", ".0", key)


def _numbers(key: str) -> list[int]:
    return [int(part) for part in key.split(".") if part.isdecimal()]
