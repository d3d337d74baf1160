"""What a user is told: the error for a mistake, whose message says in one line what came, what was wanted and
what to do; the words for what several modules have to say; and which warnings are kept from the user."""

import difflib
import warnings
from collections.abc import Iterable


class ConfigError(ValueError):
    """A wrong setting, file or folder. The command line prints it in one line and exits with 2."""


def unknown_name(what: str, name: object, known: Iterable[str]) -> str:
    """The message for a name that is none of `known`: it says the nearest of them, and all."""
    known = tuple(known)
    nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
    return f"unknown {what} {name!r}, the nearest is {nearest!r}; use one of {', '.join(known)}"


def not_installed(error: ModuleNotFoundError) -> str:
    """The message for a package that ppcoat needs and that is not there."""
    return (
        f"{error.msg}: ppcoat needs paddlepaddle or paddlepaddle-gpu 3.3 and what requirements.txt names "
        "(README.md, Install)"
    )


def ignore_warnings_of_libraries() -> None:
    """Hide user warnings of Paddle, ppdiffusers, paddlenlp and what these import, on which a user of ppcoat
    cannot act."""
    modules = "paddle|ppdiffusers|paddlenlp|_distutils_hack|jieba"
    warnings.filterwarnings("ignore", category=UserWarning, module=modules)
