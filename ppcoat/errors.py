"""The error for a user's mistake, whose message says in one line what came, what was wanted and what to do;
and the words for a name that is not among the known ones."""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A wrong setting, file or folder. The command line prints it in one line and exits with 2."""


def unknown_name(what: str, name: object, known: Iterable[str]) -> str:
    """The message for a name that is none of `known`: it says the nearest of them, and all."""
    known = tuple(known)
    nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
    return f"unknown {what} {name!r}, the nearest is {nearest!r}; use one of {', '.join(known)}"
