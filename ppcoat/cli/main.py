"""The command table: `python -m ppcoat <command>`. The files in train_scripts/ and inference/ run the same
commands.

The table names modules and functions; what a command does is imported when its flags are right.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import ppcoat
from ppcoat.errors import ConfigError, likeness, nearest, not_installed, one_line, tell_plainly, unknown_name

_OF_A_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
_OF_A_LIMIT = (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM)
_SAID = {  # argparse's words -> ours
    r"^one of the arguments --\w+ (\w+) is required$": r"the following arguments are required: \1",
    r"invalid int value: (.*)": r"came \1, wanted a whole number",
    r"invalid float value: (.*)": r"came \1, wanted a number",
}
_FLAG = re.compile(r"(?<=^--)(no[-_])?([a-z0-9_]+(?:-[a-z0-9_]+)*)(?=$|=)")


@dataclass(frozen=True)
class Command:
    """what: it does. module: imported only when the command runs. run: its function that takes the parsed
    flags. flags: the function, in `flags_in`, that adds them to a parser; None for a command without.
    flags_in: the module that is imported for help and wrong flags, without Paddle. mixed: names may stand
    between and after flags."""

    what: str
    module: str
    run: str = "run_command"
    flags: str | None = "add_arguments"
    flags_in: str | None = None  # `module`
    mixed: bool = False

    def add_flags(self, parser: argparse.ArgumentParser) -> None:
        """Imports nothing else of the command."""
        if self.flags is not None:
            getattr(importlib.import_module(self.flags_in or self.module), self.flags)(parser)


_FILES, _BENCH, _DRAWING = "ppcoat.cli.flags", "ppcoat.bench.flags", "ppcoat.infer.drawing"
COMMANDS = {
    "quickstart": Command(
        "draw data, train a LoRA with and without COAT, draw with it, measure",
        "ppcoat.bench.quickstart",
        flags="add_quickstart_arguments",
        flags_in=_BENCH,
    ),
    "demo": Command(
        "edit, dress, inpaint, change the style, preserve the rest: train it on drawings, draw, measure",
        "ppcoat.bench.demo",
        flags="add_demo_arguments",
        flags_in=_BENCH,
    ),
    "train": Command(
        "train a LoRA, DoRA or LoKr of FLUX from a YAML or JSON file",
        "ppcoat.cli.train",
        flags="add_flux_arguments",
    ),
    "tune": Command(
        "find learning rate and rank of a config within a time",
        "ppcoat.cli.train",
        "run_tune",
        "add_tune_arguments",
    ),
    "train-flux-lightning": Command(
        "distil FLUX to 4 steps", "ppcoat.cli.train", "run_distill", "add_distill_arguments"
    ),
    "train-newbie": Command(
        "train a NewBie LoRA or LoKr from a TOML file", "ppcoat.cli.train", flags="add_newbie_arguments"
    ),
    "merge-newbie": Command(
        "write a NewBie folder with a LoRA or LoKr added",
        "ppcoat.cli.newbie",
        "run_merge_newbie",
        "add_merge_newbie_arguments",
        _FILES,
    ),
    "convert-newbie": Command(
        "write a NewBie folder from its released parts",
        "ppcoat.cli.newbie",
        "run_convert_newbie",
        "add_convert_newbie_arguments",
        _FILES,
    ),
    "generate": Command(
        "draw with FLUX or NewBie-image, with LoRAs, from pictures",
        "ppcoat.cli.draw",
        "run_generate",
        "add_generate_arguments",
    ),
    "lightning": Command(
        "draw in four steps with a FLUX-Lightning LoRA",
        "ppcoat.cli.draw",
        "run_lightning",
        "add_lightning_arguments",
    ),
    "evaluate": Command(
        "score folders of pictures, or a tiny FLUX on unseen captions",
        "ppcoat.infer.evaluate",
        flags="add_evaluate_arguments",
        flags_in=_DRAWING,
    ),
    "convert": Command(
        "write a LoRA file in diffusers', kohya's or Paddle's format",
        "ppcoat.cli.lora_files",
        "run_convert",
        "add_convert_arguments",
        _FILES,
    ),
    "inspect": Command(
        "show what a LoRA file holds: format, ranks, norms, header",
        "ppcoat.cli.lora_files",
        "run_inspect",
        "add_inspect_arguments",
        _FILES,
    ),
    "merge": Command(
        "write a FLUX folder with a LoRA added to its weights",
        "ppcoat.cli.merge",
        flags="add_merge_arguments",
        flags_in=_FILES,
    ),
    "lora resize": Command(
        "write a LoRA of smaller rank; makes one of a LoKr, LoHa or whole difference",
        "ppcoat.cli.lora_tools",
        "run_resize",
        "add_resize_arguments",
        _FILES,
        mixed=True,
    ),
    "lora combine": Command(
        "write the weighted sum of LoRAs",
        "ppcoat.cli.lora_tools",
        "run_combine",
        "add_combine_arguments",
        _FILES,
        mixed=True,
    ),
    "lora extract": Command(
        "write the difference of two models as a LoRA",
        "ppcoat.cli.lora_tools",
        "run_extract",
        "add_extract_arguments",
        _FILES,
        mixed=True,
    ),
    "data report": Command(
        "tell what a folder of pictures holds, and what is odd about which picture",
        "ppcoat.cli.data",
        "run_report",
        "add_report_arguments",
    ),
    "data captions": Command(
        "change the captions of a folder: prepend, append, replace",
        "ppcoat.cli.data",
        "run_captions",
        "add_caption_arguments",
    ),
    "doctor": Command(
        "tell what works on this machine, and what each miss costs", "ppcoat.cli.doctor", flags=None
    ),
    "firstlight": Command(
        "check, time and train on a card for ten minutes: one table to report",
        "ppcoat.bench.firstlight",
        flags="add_firstlight_arguments",
        flags_in=_BENCH,
    ),
    "studio": Command("open the web page: data, training, drawing, files", "ppcoat.studio.server"),
    "plan": Command(
        "tell how much memory a run needs, and choose settings that fit a card", "ppcoat.cli.plan"
    ),
    "benchmark": Command(
        "measure standard and COAT training side by side",
        "ppcoat.bench.benchmark",
        flags="add_benchmark_arguments",
        flags_in=_BENCH,
    ),
    "parity": Command(
        "train quickstart's LoRA under every saving policy and compare",
        "ppcoat.bench.parity",
        flags="add_parity_arguments",
        flags_in=_BENCH,
    ),
    "ablation": Command(
        "distil the tiny FLUX with each loss of FLUX-Lightning and compare",
        "ppcoat.bench.ablation",
        flags="add_ablation_arguments",
        flags_in=_BENCH,
    ),
    "accuracy": Command(
        "measure the error of FP8 optimizer states and of quantised bases",
        "ppcoat.bench.accuracy",
        flags="add_accuracy_arguments",
        flags_in=_BENCH,
    ),
    "pretrain-tiny-flux": Command(
        "make the built-in tiny FLUX from nothing",
        "ppcoat.pretrain.stages",
        flags="add_pretrain_arguments",
        flags_in="ppcoat.pretrain",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m ppcoat <command> ...` -> exit status: 0, or 2 for a user's mistake, 1 if training diverged;
    signals are `ppcoat.signals`'."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        return _status_of(_print_commands)
    if argv[0] in ("-V", "--version"):
        return _status_of(lambda: print(f"ppcoat {ppcoat.__version__}"))
    words = 2 if any(name.startswith(f"{argv[0]} ") for name in COMMANDS) else 1
    name = " ".join(argv[:words])
    if name not in COMMANDS:
        known = [each for each in COMMANDS if words == 1 or each.startswith(f"{argv[0]} ")]
        return _told(unknown_name("command", name, known))
    return run(name, argv[words:], prog=f"python -m ppcoat {name}")


def run(name: str, argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run one command with the flags `argv` (default: the process's own), which may have - for _.

    ConfigError, a package that is missing or cannot be loaded, a file that cannot be read or written, a limit
    of the system and want of memory (exit status 2), FloatingPointError and ChildProcessError (1) become one
    line on stderr.
    """
    command = COMMANDS[name]
    argv = [_FLAG.sub(_as_declared, each, count=1) for each in (sys.argv[1:] if argv is None else argv)]
    tell_plainly()
    for stream in (sys.stdout, sys.stderr):  # a redirected stream may know no Chinese, and no emoji
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def call() -> None:
        parser = _Parser(prog=prog, description=command.what, allow_abbrev=False)
        command.add_flags(parser)
        arguments = (parser.parse_intermixed_args if command.mixed else parser.parse_args)(argv)
        try:
            os.getcwd()
        except OSError as error:
            raise ConfigError(f"the current folder: {error.strerror}; change to another") from None
        getattr(importlib.import_module(command.module), command.run)(arguments)

    return _status_of(call)


def _status_of(call: Callable[[], object]) -> int:
    """The exit status of what `call()` does; what went wrong is told."""
    try:
        call()
    except ConfigError as error:
        return _told(error)
    except ImportError as error:
        if not _is_of_a_package(error):
            raise
        return _told(not_installed(error))
    except SystemExit as ended:  # argparse's, after help; else its status tells more: of a run that stopped
        unread = _flushed()
        if unread and not ended.code:
            return unread
        raise
    except BrokenPipeError:
        return _unread()
    except MemoryError as error:
        said = re.search(r".*(?:emory|llocate).*", str(error))  # Paddle's message is a page long
        wanted = said[0].strip()[:200] if said else "there is no more"
        return _told(f"out of memory ({wanted}): give smaller sizes, or a machine that has more")
    except (OSError, _safetensor_error()) as error:
        reason = _reason(error)
        if reason is None:
            raise
        return _told(reason)
    except (FloatingPointError, ChildProcessError) as error:
        return _told(error, status=1)
    return _flushed()


def _told(error: object, status: int = 2) -> int:
    print(f"error: {one_line(error)}", file=sys.stderr)
    return status


def _is_of_a_package(error: ImportError) -> bool:
    """Whether a package is missing, or its library does not load: for want of another, or of memory."""
    missing = isinstance(error, ModuleNotFoundError) or Path(error.path or "").suffix in (".so", ".pyd")
    return missing and not (error.name or "ppcoat").startswith("ppcoat")


def _as_declared(flag: re.Match) -> str:
    """--train-batch-size is --train_batch_size, and what switches --visualdl off is --no-visualdl."""
    return ("no-" if flag[1] else "") + flag[2].replace("-", "_")


def _reason(error: Exception) -> str | None:
    """What an error of the disk or of a limit says; None for one of the network, or of Paddle's, who gives
    device errors this type."""
    advice = "check the path, its permissions and the room on the disk"
    if not isinstance(error, OSError):
        return f"{error}; {advice}"
    if error.errno in _OF_A_LIMIT:
        return f"{error.filename or 'this process'}: {error.strerror}; ulimit -a shows the limits"
    if error.errno is None or (error.filename is None and error.errno not in _OF_A_DISK):
        return None
    if str(error.filename).startswith(os.path.expanduser("~/.")):
        advice += "; PPNLP_HOME and HF_HOME name other folders for what libraries keep there"
    named = error.filename or "what was being written"  # an open file has no name
    return f"{named}: {error.strerror}; {advice}"


def _safetensor_error() -> type[Exception]:
    """Imported once there is an error: the start of a command is short."""
    from safetensors import SafetensorError

    return SafetensorError


class _Parser(argparse.ArgumentParser):
    """Says a mistake in one line, as everything else here, instead of listing all flags."""

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError; a flag that is none is told with the nearest, or with the key of the config for
        which it may have been meant."""
        for theirs, ours in _SAID.items():
            message = re.sub(theirs, ours, message)
        unknown = re.search(r"^unrecognized.* --([a-z_]+)", message)
        if unknown:
            others = [each for action in self._actions if isinstance(action, argparse._SubParsersAction)
                      for each in action.choices.values()]  # fmt: skip
            usage = "".join(each.format_usage() for each in (self, *others))
            message += _meant(unknown[1], ["help", *re.findall(r"--([\w-]+)", usage)])
        raise ConfigError(f"{message}; {self.prog} --help lists the flags")


def _meant(unknown: str, flags: list[str]) -> str:
    """What to say of a flag that is none of `flags`."""
    flag = nearest(unknown, flags)
    if "set" in flags and likeness(unknown, flag) < 0.8:
        from ppcoat.config.explain import known_instead  # reads all sections of a config

        return f"; --set a.b=c changes a key of the config, and {known_instead((unknown,))}"
    return f"; the nearest flag is --{flag}"


def _print_commands() -> None:
    print("usage: python -m ppcoat <command> [flags]      (--help after a command lists its flags)\n")
    print("\n".join(f"  {name:20s} {command.what}" for name, command in COMMANDS.items()))


def _flushed() -> int:
    """Write out what stdout still holds -> exit status 0, or that of what could not be printed."""
    try:
        sys.stdout.flush()
        raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
        error = getattr(raw, "error", None)  # of ppcoat.__main__'s stream
    except BrokenPipeError:
        return _unread()
    except OSError as full:
        error = full
        _unread()
    return _told(f"what was to be printed: {error.strerror}") if error else 0


def _unread() -> int:
    """The exit status where the reader of stdout has ended, as `head` does: the shell's for SIGPIPE. Python
    is kept from trying once more, and from complaining."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141
