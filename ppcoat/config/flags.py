"""Command line flags: made from the fields of a frozen dataclass or a config section, so that nothing is
written twice; and those that several commands share. No other module adds an argument to a parser.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Collection
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

from ppcoat.atomic import check_writable
from ppcoat.errors import ConfigError

if TYPE_CHECKING:  # benchmark kernels runs where there is no pydantic
    from pydantic import BaseModel

Fields = TypeVar("Fields")
_PACKAGE = Path(__file__).parents[1]
# An installed ppcoat has the folder inside, a clone beside it.
CONFIGS = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"
TINY_FLUX = str(_PACKAGE / "assets" / "tiny_flux")  # the model that comes with ppcoat
OF_FILE = "that a FLUX file lacks: a FLUX folder"  # what is given beside such a file


class TakesArguments(Protocol):
    """An ArgumentParser, or a group of one."""

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action: ...

    def add_mutually_exclusive_group(self, *, required: bool = ...) -> argparse._MutuallyExclusiveGroup: ...


def flag(
    what: str,
    default: Any = dataclasses.MISSING,
    name: str | None = None,
    *,
    shows_default: bool = True,
    positional: bool = False,
    named_too: bool = False,
    repeated: bool = False,
    metavar: str | None = None,
    choices: Collection[str] | None = None,
) -> Any:
    """A dataclass field with what its flag's help says; without default the flag is required.

    The help shows a default that is not None, False or empty, unless shows_default is off. name: of the
    flag, if not the field's own. positional: told by its place, without a name; named_too: or by its name.
    repeated: each use adds one item to the list, which otherwise takes several texts at once. metavar: what
    the help calls the value. choices: the texts allowed.
    """
    metadata = {
        "what": what,
        "name": name,
        "shows_default": shows_default,
        "positional": positional,
        "named_too": named_too,
        "repeated": repeated,
        "told": {"metavar": metavar, "choices": choices},
    }
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def set_flag() -> Any:
    """The field `overrides` of a command with a config: --set a.b=c."""
    what = "override one key, e.g. --set train.steps=50; may be repeated"
    return flag(what, [], "set", repeated=True, metavar="a.b=c")


def add_flags(parser: TakesArguments, fields_of: type, *names: str) -> None:
    """One flag per field that `flag` made (all, or those in `names`), read as the field's type says; and its
    value in the namespace under the flag's name. `from_flags` takes it from there."""
    types, fields = get_type_hints(fields_of), _flag_fields(fields_of)
    for name in names or fields:
        field = fields[name]
        told, default = field.metadata, _default_of(field)
        hidden = default is dataclasses.MISSING or not told["shows_default"]
        settings = _reading(types[name]) | {key: value for key, value in told["told"].items() if value}
        if told["repeated"]:
            del settings["nargs"]
            settings["action"] = "append"
        if default is not dataclasses.MISSING and settings.get("action") != "store_true":
            settings["default"] = default
        elif default is dataclasses.MISSING and not told["positional"]:
            settings["required"] = True
        name, shown = _name_of(field), None if hidden else default
        if told["named_too"]:
            either = parser.add_mutually_exclusive_group(required=True)
            settings["default"] = argparse.SUPPRESS
            _add(either, name, False, "the same, by name", shown, settings)
            _add(either, name, True, told["what"], shown, settings | {"nargs": "?"})
            continue
        _add(parser, name, told["positional"], told["what"], shown, settings)


def add_section_flags(parser: TakesArguments, section: type[BaseModel]) -> None:
    """One flag per field of a pydantic section, whose checks read the text. A flag that is not given is not
    in the namespace."""
    for name, field in section.model_fields.items():
        settings = _reading(field.annotation, as_text=True)
        settings |= {"required": field.is_required(), "default": argparse.SUPPRESS}
        shown = None if field.is_required() else field.default
        _add(parser, name, False, field.description, shown, settings)


def from_flags(fields_of: type[Fields], arguments: argparse.Namespace, **others: Any) -> Fields:
    """The dataclass with the values of its flags in the namespace; fields without a flag there keep their
    defaults. others: fields by name, which count instead. Raises OSError or ConfigError where the file
    `output` or `sheet` cannot be written.
    """
    names = {name: _name_of(field) for name, field in _flag_fields(fields_of).items()}
    given = {
        name: _found(name, getattr(arguments, said))
        for name, said in names.items()
        if hasattr(arguments, said)
    }
    for name in ("output", "sheet"):  # files that are written at the end: that must not fail then
        if given.get(name):
            _check_file(f"--{name}", Path(given[name]))
    return fields_of(**given | others)


def arguments_of(flags: Any) -> list[str]:
    """The arguments that `from_flags` reads as these flags: those that are not the defaults, in the order of
    the fields. What is told by its place stands first."""
    placed, named = [], []
    for name, field in _flag_fields(type(flags)).items():
        value, default = getattr(flags, name), _default_of(field)
        if value == default:
            continue
        texts = [str(each) for each in value] if isinstance(value, list | tuple) else [str(value)]
        if field.metadata["positional"]:  # a path: ./ keeps one from being read as a flag
            placed += [f"./{text}" if text.startswith("-") else text for text in texts]
        elif value is True:
            named.append(f"--{_name_of(field)}")
        elif field.metadata["repeated"] or len(texts) == 1:
            named += [f"--{_name_of(field)}={text}" for text in texts]
        else:
            named += [f"--{_name_of(field)}", *texts]
    return placed + named


def _check_file(flag: str, file: Path) -> None:
    if file.is_dir():
        raise ConfigError(f"{flag} {file} is a folder; name a file")
    above = next(parent for parent in file.absolute().parents if parent.exists())
    if not above.is_dir():
        raise ConfigError(f"{flag} {file}: {above} is a file; name another folder")
    check_writable(file.parent)


def built_in_model(path: str) -> str:
    """The folder of the tiny FLUX in the package where `path` is its name, or its path in a clone, and
    nothing of that name is there; else `path`."""
    names = ("tiny_flux", "ppcoat/assets/tiny_flux")
    return TINY_FLUX if path in names and not Path(path).exists() else path


_MODELS = (
    "model",
    "base",
    "tuned",
    "vae",
    "text_encoders",
    "tokenizers",
)  # fields that may name a FLUX model


def _found(name: str, value: Any) -> Any:
    """The value of a flag, with ~/ as the home folder, for shells that leave it, and the built-in model where
    the flag names one."""
    if isinstance(value, list | tuple):
        return type(value)(_found(name, each) for each in value)
    if not isinstance(value, str | Path):
        return value
    text = str(value)
    text = os.path.expanduser(text) if text.startswith("~/") else text
    return type(value)(built_in_model(text) if name in _MODELS else text)


# Flags that switch a field of the config on: flag -> (field, help).
SWITCHES = {
    "strict": (
        "save.strict_resume",
        "stop where the latest checkpoint is damaged, instead of going on from the one before it",
    ),
    "restart_data": (
        "save.restart_data",
        "go on where pictures, their sizes or the batch changed, with a new order of the pictures",
    ),
    "deterministic": (
        "train.deterministic",
        "on a GPU: kernels that give the same bits each time, so that a resumed run equals an uninterrupted "
        "one; slower",
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFlags:
    """What every command that trains from a config file is told, apart from the flags of SWITCHES. config:
    the file."""

    config: str
    overrides: list[str] = set_flag()
    dry_run: bool = flag(
        "check everything, show settings and data, time two steps, and leave nothing on the disk", False
    )


def add_run_flags(parser: argparse.ArgumentParser, fields_of: type[RunFlags]) -> None:
    """The flags of `fields_of`, and those of SWITCHES."""
    add_flags(parser, fields_of, "config", "overrides")
    for name, (key, what) in SWITCHES.items():
        parser.add_argument(
            f"--{name}",
            dest="set",
            action="append_const",
            const=f"{key}=true",
            help=f"{what}; the same as --set {key}=true",
        )
    add_flags(parser, fields_of, "dry_run")


def _add(
    parser: TakesArguments, name: str, positional: bool, what: str, shown: Any, settings: dict[str, Any]
) -> None:
    """The one place that adds a flag. shown: the default that its help tells, None for none."""
    hidden = shown is None or shown is False or shown in ("", (), [])
    text = what if hidden else f"{what} (default: {_told(shown)})"
    parser.add_argument(name if positional else f"--{name}", help=text.replace("%", "%%"), **settings)


def _told(value: Any) -> str:
    """A default as one would write it on the command line."""
    if isinstance(value, list | tuple):
        return " ".join(map(_told, value))
    return "tiny_flux" if str(value) == TINY_FLUX else str(value)


def _flag_fields(fields_of: type) -> dict[str, dataclasses.Field]:
    return {each.name: each for each in dataclasses.fields(fields_of) if each.metadata}


def _name_of(field: dataclasses.Field) -> str:
    return field.metadata["name"] or field.name


def _default_of(field: dataclasses.Field) -> Any:
    make = field.default_factory
    return field.default if make is dataclasses.MISSING else make()


def _reading(kind: Any, as_text: bool = False) -> dict[str, Any]:
    """What argparse is told of a field of this type; text needs nothing. as_text: numbers are read by someone
    else, and what is true by default can be switched off."""
    if get_origin(kind) in (Union, UnionType):
        kind, *others = (each for each in get_args(kind) if each is not type(None))
        if others:
            return {}
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction if as_text else "store_true"}
    if get_origin(kind) is Literal:
        return {"choices": [each for each in get_args(kind) if isinstance(each, str)]}
    if get_origin(kind) is tuple:
        return {"nargs": "*"}
    if get_origin(kind) is list:
        return {"nargs": "+"} | _reading(get_args(kind)[0], as_text)
    return {} if as_text or kind is str else {"type": kind}
