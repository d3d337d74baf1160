"""Command line flags: made from the fields of a frozen dataclass or a config section, so that nothing is
written twice; and those that several commands share.
"""

from __future__ import annotations

import argparse
import dataclasses
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel


def flag(what: str, default: Any = dataclasses.MISSING, name: str | None = None) -> Any:
    """A dataclass field with what its flag's help says; without default the flag is required.

    The help shows a default that is not None, False or "". name: of the flag, if not the field's own.
    """
    return dataclasses.field(default=default, metadata={"what": what, "name": name})


def add_flags(parser: argparse.ArgumentParser, fields_of: type, *names: str) -> None:
    """One flag per field that `flag` made (all, or those in `names`), read as the field's type says; and its
    value in the namespace under the field's name."""
    types = get_type_hints(fields_of)
    fields = {each.name: each for each in dataclasses.fields(fields_of) if each.metadata}
    for name in names or fields:
        field = fields[name]
        required = field.default is dataclasses.MISSING
        default = None if required else field.default
        hidden = default is None or default is False or default == ""
        shown = "" if hidden else " (default: %(default)s)"
        settings = {"help": (field.metadata["what"] + shown).strip(), "dest": name} | _reading(types[name])
        if "action" not in settings:
            settings |= {"required": required, "default": default}
            if "choices" not in settings:
                settings["metavar"] = (field.metadata["name"] or name).upper()
        parser.add_argument(f"--{field.metadata['name'] or name}", **settings)


def add_section_flags(parser: argparse.ArgumentParser, section: type[BaseModel]) -> None:
    """One flag per field of a pydantic section, whose checks read the text. A flag that is not given is not
    in the namespace."""
    for name, field in section.model_fields.items():
        default = "" if field.is_required() or field.default is None else f" (default: {field.default})"
        settings: dict[str, Any] = {"help": (field.description + default).replace("%", "%%")}
        if field.annotation is bool:
            settings["action"] = argparse.BooleanOptionalAction
        elif get_origin(field.annotation) is tuple:
            settings["nargs"] = "*"
        elif get_origin(field.annotation) is Literal:
            settings["choices"] = field.annotation.__args__
        parser.add_argument(f"--{name}", required=field.is_required(), default=argparse.SUPPRESS, **settings)


def add_set_flag(parser: argparse.ArgumentParser) -> None:
    """--set a.b=c, as every command with a config has it."""
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="a.b=c",
        help="override one key, e.g. --set train.steps=50; may be repeated",
    )


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """--set, --strict and --dry_run, as every command that trains from a config file has them."""
    add_set_flag(parser)
    parser.add_argument(
        "--strict",
        dest="overrides",
        action="append_const",
        const="save.strict_resume=true",
        help="stop where the latest checkpoint is damaged, instead of going on from the one before it; "
        "the same as --set save.strict_resume=true",
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="check everything, show settings and data, time two steps, and leave nothing on the disk",
    )


def _reading(kind: Any) -> dict[str, Any]:
    """What argparse is told of a field of this type; text needs nothing."""
    if get_origin(kind) in (Union, UnionType):
        (kind,) = (each for each in get_args(kind) if each is not type(None))
    if kind is bool:
        return {"action": "store_true"}
    if get_origin(kind) is Literal:
        return {"choices": list(get_args(kind))}
    if get_origin(kind) is list:
        return {"nargs": "+"}
    return {} if kind is str else {"type": kind}
