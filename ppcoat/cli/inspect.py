"""What a LoRA file holds, so that one sees why it draws as it does: format, ranks, alpha, norms, header.

python -m ppcoat inspect lora.safetensors
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from ppcoat.lora import LoRAFile, read_lora_file, summarize

SHOWN_PATHS = 10
LONGEST_VALUE = 300  # characters of a header field


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="LoRA file, .safetensors")


def run_command(arguments: argparse.Namespace) -> None:
    file = Path(arguments.file)
    print(describe(file, read_lora_file(file, incomplete_too=True)))


def describe(file: Path, lora: LoRAFile) -> str:
    """The table that is printed. Modules, ranks and alphas are those of diffusers' names, after fused modules
    were split."""
    modules, summary = lora.modules, summarize(lora.modules)
    rows = [
        ("file", f"{file} ({file.stat().st_size / 1e6:.1f} MB)"),
        ("format", lora.format or "none that is known"),
        ("dtype", ", ".join(lora.dtypes) or "-"),
        ("modules", str(len(modules))),
        ("rank", counts(module.rank for module in modules.values())),
        ("alpha", counts(module.alpha for module in modules.values())),
        ("scale", counts(module.scale for module in modules.values())),
        ("delta-W", f"norm {summary.norm:.6g}" + (f"; {extremes(summary.norms)}" if modules else "")),
        ("zero", f"{len(summary.zero)} modules" + (f": {some(summary.zero)}" if summary.zero else "")),
        (
            "unknown",
            f"{len(lora.unknown)} keys"
            + (f": {', '.join(map(clean, lora.unknown))}" if lora.unknown else ""),
        ),
    ]
    if lora.incomplete:
        halves = [f"{clean(name)} has {roles}" for name, roles in lora.incomplete.items()]
        rows.append(("incomplete", f"{len(halves)} modules, wanted A and B: {some(halves)}"))
    rows.append(("header", f"{len(lora.header)} fields"))
    rows += [(f"  {clean(key)}", clean(text)) for key, text in sorted(lora.header.items())]
    width = max(12, *(len(name) for name, _ in rows)) + 2
    return "\n".join(f"{name:{width}s}{text}" for name, text in rows)


def counts(values: Iterable[float]) -> str:
    """Each value, and how many modules have it where they differ: "16 (x 4), 8 (x 2)"."""
    found = Counter(f"{value:g}" for value in values)
    if len(found) < 2:
        return next(iter(found), "-")
    return ", ".join(f"{value} (x {count})" for value, count in found.most_common())


def extremes(norms: dict[str, float]) -> str:
    """The strongest module, or the first whose norm is no number."""
    path = next((path for path, norm in norms.items() if norm != norm), None) or max(norms, key=norms.get)
    return f"largest {norms[path]:.4g}, {path}"


def some(paths: list[str]) -> str:
    more = f" and {len(paths) - SHOWN_PATHS} more" if len(paths) > SHOWN_PATHS else ""
    return ", ".join(paths[:SHOWN_PATHS]) + more


def clean(text: str) -> str:
    """One line without control characters: a header comes from anywhere, and goes to a terminal."""
    text = json.dumps(text, ensure_ascii=False)[1:-1].replace('\\"', '"')
    text = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}... ({len(text)} characters)"
