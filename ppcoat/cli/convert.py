"""A LoRA file of one program written as another's, with the same delta-W.

    python -m ppcoat convert lora.safetensors lora_kohya.safetensors --format kohya

What can be read is in ppcoat/lora/files.py. The format of the input is found by its keys.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from ppcoat.errors import ConfigError
from ppcoat.lora import LoRAFile, read_lora_file, summarize, write_lora_file
from ppcoat.lora.header import OF_TENSORS
from ppcoat.lora.writing import DTYPES, FORMATS

from .inspect import clean

SHOWN_KEYS = 10
NOTABLE_ERROR = 0.01


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="IN", help="LoRA file, .safetensors")
    parser.add_argument("output", metavar="OUT", help="file to write, .safetensors")
    parser.add_argument("--format", required=True, choices=FORMATS, help="what to write")
    parser.add_argument("--dtype", choices=DTYPES, help="of the tensors (default: as in IN)")
    parser.add_argument(
        "--ignore_unknown", action="store_true", help="leave keys out that name no FLUX module"
    )


def run_command(arguments: argparse.Namespace) -> None:
    source, target = Path(arguments.input), Path(arguments.output)
    if target.exists():
        raise ConfigError(f"{target} exists: remove it, or choose another name")
    lora = read_known(source, arguments.ignore_unknown)
    dtype = arguments.dtype or stored_dtype(lora)
    error = write_lora_file(target, lora.modules, carried_fields(lora), arguments.format, dtype)
    if not error <= NOTABLE_ERROR:
        print(
            f"warning: {dtype} keeps delta-W within {error:.1%} only, --dtype float32 does better",
            file=sys.stderr,
        )
    print(f"{source} ({lora.format}) -> {target} ({arguments.format}, {dtype})")
    print(summarize(lora.modules).line())
    print(f"read back: every delta-W is that of the input within a relative error of {error:.1g}")


def read_known(file: Path, ignore_unknown: bool = False) -> LoRAFile:
    """Read a LoRA file. Raises ConfigError if there is no module in it, or a key that names none."""
    lora = read_lora_file(file)
    listed = ", ".join(clean(key) for key in lora.unknown[:SHOWN_KEYS])
    listed += f" and {len(lora.unknown) - SHOWN_KEYS} more" if len(lora.unknown) > SHOWN_KEYS else ""
    if not lora.modules:
        raise ConfigError(f"{file} is no LoRA of FLUX: it has {listed or 'no tensors'}")
    if lora.unknown and not ignore_unknown:
        known = "name no FLUX module, --ignore_unknown leaves them out"
        raise ConfigError(f"{len(lora.unknown)} keys of {file} {known}: {listed}")
    return lora


def stored_dtype(lora: LoRAFile) -> str:
    """The dtype of a file that has one which can be written, else float32."""
    (dtype, *others) = lora.dtypes
    return dtype if dtype in DTYPES and not others else "float32"


def carried_fields(lora: LoRAFile) -> Mapping[str, str]:
    """What the header says of the training: true of every file with the same delta-W."""
    alphas = sorted({module.alpha for module in lora.modules.values()})
    fields = {"original_alpha": f"{alphas[0]:g}"} if len(alphas) == 1 else {}
    return fields | {key: text for key, text in lora.header.items() if key not in OF_TENSORS}
