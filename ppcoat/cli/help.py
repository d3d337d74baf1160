"""Help of a command without the seconds that Paddle and its libraries take to import.

Flags are fields of dataclasses that stand beside the code that reads them, and that code imports models. For
help nothing is computed, so stand-ins take the place of those libraries. Only in a process that prints help
and ends.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType
from typing import Any

LIBRARIES = ("paddle", "ppdiffusers", "paddlenlp")


def without_libraries() -> None:
    """From now on an import of LIBRARIES gives stand-ins, unless they are imported already."""
    if not any(name in sys.modules for name in LIBRARIES):
        sys.meta_path.insert(0, _Finder())


class _Kind(type):
    """A class that has every attribute, and of which everything can be made: called, subclassed, or'ed into a
    type, used as a decorator."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _Kind(name, (StandIn,), {})
        setattr(cls, name, made)
        return made

    def __or__(cls, other: Any) -> Any:
        return StandIn

    __ror__ = __or__

    def __iter__(cls) -> Iterator:
        return iter(())


class StandIn(metaclass=_Kind):
    """Whatever a library would give: a value, a function, a decorator."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(type(self), name)

    def __class_getitem__(cls, _: Any) -> Any:
        return cls


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if fullname.partition(".")[0] not in LIBRARIES:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None: ...


class _Module(ModuleType):
    def __getattr__(self, name: str) -> Any:
        return getattr(StandIn, name)
