"""What a user is told: the error for a mistake, whose message says in one line what came, what was wanted and
what to do; the words for what several modules have to say; and which warnings are kept from the user."""

import difflib
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterable

# They have handlers of their own, in colours and with dates.
_LOGS_OF_LIBRARIES = ("PaddleNLP", "ppdiffusers", "aistudio_sdk", "datasets", "huggingface_hub", "jieba")


_WORD = re.compile("[a-z][a-z0-9]*")
LONGEST_NAME = 100  # characters of a name that are compared with the known ones
START_OF_LINE, END_OF_LINE, LONGEST_LINE = 1200, 400, 1800  # characters of a message


class ConfigError(ValueError):
    """A wrong setting, file or folder. The command line prints it in one line and exits with 2."""


def printable(text: object) -> str:
    """Text from a user or a file for a message: line ends and other control characters escaped."""
    return "".join(mark if mark.isprintable() else repr(mark)[1:-1] for mark in str(text))


def check_whole(name: str, *texts: str | None) -> None:
    """Raises ConfigError for half of a character in texts, which nothing reads: what a terminal of another
    encoding than UTF-8 makes of its letters, or an escape. name: of what they are."""
    for text in filter(None, texts):
        if any("\ud800" <= mark <= "\udfff" for mark in text):
            raise ConfigError(f"{name}: {printable(text):.80} holds half of a character: write it as UTF-8")


def one_line(text: object) -> str:
    """`text` as a command says it: printable, and of a long one its beginning and its end, where the advice
    is."""
    shown = str(text)
    if len(shown) > LONGEST_LINE:
        start, end = printable(shown[:START_OF_LINE]), printable(shown[-END_OF_LINE:])
        return f"{start[:START_OF_LINE]} ... {end[-END_OF_LINE:]}"
    return printable(shown)[: 2 * LONGEST_LINE]


def unknown_name(what: str, name: object, known: Iterable[str]) -> str:
    """The message for a name that is none of `known`: it says the nearest of them, and all."""
    known = tuple(known)
    return f"unknown {what} {name!r}, the nearest is {nearest(name, known)!r}; use one of {', '.join(known)}"


def nearest(name: object, known: Iterable[str]) -> str:
    """The one of `known`, which are some, that may have been meant by `name`."""
    return max(known, key=lambda each: likeness(str(name), each))


def likeness(name: str, known: str) -> float:
    """How much `name` may have been meant for `known`, 0..1: by their letters, of which some may have changed
    places, and by their words, as of steps and max_steps for sample_steps and steps."""
    name, known = name[:LONGEST_NAME].lower(), known.lower()
    letters = difflib.SequenceMatcher(None, name, known)
    like = (letters.ratio() + letters.quick_ratio()) / 2
    words, others = _WORD.findall(name), _WORD.findall(known)
    shortened = set(words) <= set(others) or (set(others) <= set(words) and words[-1:] == others[-1:])
    return 0.7 + 0.3 * like if words and others and shortened else like


def not_installed(error: ImportError) -> str:
    """The message for a package that ppcoat needs and that is not there, or cannot be loaded."""
    return (
        f"{error.msg}: ppcoat needs paddlepaddle or paddlepaddle-gpu 3.3 and what requirements.txt names "
        "(README.md, Install)"
    )


def tell_plainly() -> None:
    """Show warnings, and those that modules of ppcoat log, as a line "warning: ..." on stderr, above the bars
    of the terminal and without the names of Python files; of libraries only errors. For commands."""
    ignore_warnings_of_libraries()
    warnings.showwarning = lambda message, *_, **__: _show_warning(message)
    for name in _LOGS_OF_LIBRARIES:
        logging.getLogger(name).addFilter(_is_error)
    # at the root, where libraries add a handler with a look of its own only if there is none
    root = logging.getLogger()
    if not any(isinstance(handler, _Plainly) for handler in root.handlers):
        root.addHandler(_Plainly(logging.WARNING))


class _Plainly(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith("ppcoat") or _is_error(record):
            _show_warning(record.getMessage())


def _show_warning(text: object) -> None:
    bars = sys.modules.get("ppcoat.progress")
    write = bars.Progress.write if bars else print
    write(f"warning: {one_line(text)}", file=sys.stderr)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def warnings_of_a_child() -> str:
    """PYTHONWARNINGS for a process that imports those libraries before it can call `tell_plainly`: the user's
    own, and without what they say on import. It knows no patterns, hence the names."""
    modules = ("paddle.utils.cpp_extension.extension_utils", "_distutils_hack", "jieba._compat")
    hidden = [f"ignore::UserWarning:{module}" for module in modules]
    return ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), *hidden]))


def ignore_warnings_of_libraries() -> None:
    """Hide user warnings of Paddle, ppdiffusers, paddlenlp and what these import, on which a user of ppcoat
    cannot act."""
    modules = "paddle|ppdiffusers|paddlenlp|_distutils_hack|jieba"
    warnings.filterwarnings("ignore", category=UserWarning, module=modules)
