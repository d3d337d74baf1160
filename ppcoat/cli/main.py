"""The command table: `python -m ppcoat <command>`. The files in train_scripts/ and inference/ run the same
commands.

A command is a module with `add_arguments(parser)` and `run_command(arguments)`; named "module:part" it is one
of several in that module, with `add_<part>_arguments` and `run_<part>`. The module is imported when it is
called.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from ppcoat.device import ignore_warnings_of_libraries
from ppcoat.errors import ConfigError

COMMANDS = {  # name -> (module, what it does)
    "quickstart": (
        "ppcoat.bench.quickstart",
        "draw data, train a LoRA with and without COAT, draw with it, measure",
    ),
    "train": ("ppcoat.cli.train:flux", "train a FLUX LoRA from a YAML file"),
    "train-flux-lightning": ("ppcoat.distill.flux_lightning", "distil FLUX to 4 steps"),
    "train-newbie": ("ppcoat.cli.train:newbie", "train a NewBie LoRA or LoKr from a TOML file"),
    "merge-newbie": ("ppcoat.cli.newbie:merge", "write a NewBie folder with a LoRA or LoKr added"),
    "convert-newbie": ("ppcoat.cli.newbie:convert", "write a NewBie folder from its released parts"),
    "generate": ("ppcoat.infer.generate", "draw pictures with a FLUX folder and, if wanted, a LoRA"),
    "lightning": ("ppcoat.infer.lightning", "draw in four steps with a FLUX-Lightning LoRA"),
    "evaluate": ("ppcoat.infer.evaluate", "score folders of pictures, or a tiny FLUX on unseen captions"),
    "convert": (
        "ppcoat.cli.lora_files:convert",
        "write a LoRA file in diffusers', kohya's or Paddle's format",
    ),
    "inspect": ("ppcoat.cli.lora_files:inspect", "show what a LoRA file holds: format, ranks, norms, header"),
    "merge": ("ppcoat.cli.merge", "write a FLUX folder with a LoRA added to its weights"),
    "doctor": ("ppcoat.cli.doctor", "tell what works on this machine, and what is lost where it does not"),
    "plan": ("ppcoat.cli.plan", "tell the memory a run will need, choose settings that fit a card"),
    "benchmark": ("ppcoat.bench.benchmark", "measure standard and COAT training side by side"),
    "parity": ("ppcoat.bench.parity", "train quickstart's LoRA under every saving policy and compare"),
    "ablation": (
        "ppcoat.bench.ablation",
        "distil the tiny FLUX with each loss of FLUX-Lightning and compare",
    ),
    "accuracy": ("ppcoat.bench.accuracy", "error of the FP8 optimizer states beside the published rules"),
    "pretrain-tiny-flux": ("ppcoat.pretrain.stages", "make the built-in tiny FLUX from nothing"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m ppcoat <command> ...` -> exit status: 0, or 2 for a user's mistake, 130 for Ctrl+C, 1
    where the numbers went bad."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m ppcoat <command> [flags]      (--help after a command lists its flags)\n")
        print("\n".join(f"  {name:20s} {what}" for name, (_, what) in COMMANDS.items()))
        return 0
    if argv[0] not in COMMANDS:
        print(f"error: unknown command {argv[0]!r}; known are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return run(argv[0], argv[1:], prog=f"python -m ppcoat {argv[0]}")


def run(name: str, argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run one command with the flags `argv` (default: the process's own); ConfigError (exit status 2),
    FloatingPointError and ChildProcessError (1) become one line on stderr."""
    module_name, add_arguments, run_command = functions_of(name)
    ignore_warnings_of_libraries()
    try:
        module = importlib.import_module(module_name)
        parser = argparse.ArgumentParser(prog=prog, description=COMMANDS[name][1], allow_abbrev=False)
        getattr(module, add_arguments)(parser)
        getattr(module, run_command)(parser.parse_args(argv))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (FloatingPointError, ChildProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def functions_of(name: str) -> tuple[str, str, str]:
    """Of a command: its module, and there the names of the function that adds its flags and of the one that
    runs it."""
    module, _, part = COMMANDS[name][0].partition(":")
    return (
        (module, f"add_{part}_arguments", f"run_{part}") if part else (module, "add_arguments", "run_command")
    )
