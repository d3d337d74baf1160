"""Two commands on LoRA files of FLUX; the first knows base models in one file, too.

    python -m ppcoat inspect lora.safetensors [--model newbie]
    python -m ppcoat convert lora.safetensors lora_kohya.safetensors --format kohya

`inspect` shows what a file or folder holds, so that one sees why it draws as it does: format, kinds, ranks,
alpha, norms, header. `convert` writes it in the format of another program, with the same delta-W, and refuses
by name what that format cannot hold. What can be read is in ppcoat/lora/parse.py; the format of the input is
found by its keys.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ppcoat.cli.flags import ConvertFlags, InspectFlags
from ppcoat.config.flags import from_flags
from ppcoat.errors import ConfigError
from ppcoat.lora import LoRAFile, LoRAModule, inputs_of, read_lora_file, summarize, write_lora_file
from ppcoat.lora.files import adapter_file, check_known
from ppcoat.lora.header import OF_TENSORS
from ppcoat.lora.keys import TRANSFORMER, clean
from ppcoat.lora.parse import described
from ppcoat.lora.writing import LORA_DTYPES
from ppcoat.models.flux.files import FLUX_COMPONENTS
from ppcoat.models.single_file import components_in
from ppcoat.models.tensor_files import FilePart

SHOWN_PATHS = 10
INPUTS = {128: ": a control LoRA (Canny, Depth) of FLUX.1", 384: ": a Fill LoRA of FLUX.1"}
NOTABLE_ERROR = 0.01
COMFYUI_MEASURES = (
    "LyCORIS' loader draws this as PEFT does at strength 1; ComfyUI measures rows before the update, which "
    "is a little different (a run with save.format kohya writes magnitudes for ComfyUI)"
)


def run_inspect(arguments: argparse.Namespace) -> None:
    flags = from_flags(InspectFlags, arguments)
    file, paths = flags.file, None
    if flags.model:
        from ppcoat.models.loading import parameter_shapes  # imports the models

        names = parameter_shapes(flags.model, TRANSFORMER)[TRANSFORMER]
        paths = {name.rpartition(".")[0] for name in names}
    try:
        parts = components_in(file) if file.is_file() else {}
    except ConfigError:  # the reader of LoRAs says what else it is
        parts = {}
    print(
        describe_model(file, parts)
        if parts
        else describe(file, read_lora_file(file, paths, incomplete_too=True))
    )


def describe_model(file: Path, parts: Mapping[str, FilePart]) -> str:
    """The table of a base model in one file: its components, and those that it lacks."""
    rows = [("file", f"{file} ({file.stat().st_size / 1e6:.1f} MB)")]
    for name, part in parts.items():
        infos = part.tensors.values()
        stored = Counter(info.stored or info.dtype for info in infos)
        kinds = ", ".join(f"{count} {kind}" for kind, count in stored.most_common())
        rows.append((name, f"{sum(math.prod(info.shape) for info in infos):,} values in tensors of {kinds}"))
    lacks = [name for name in FLUX_COMPONENTS if name not in parts and name != "scheduler"]  # needs no file
    return _table([*rows, ("lacks", ", ".join(lacks))])


def describe(file: Path, lora: LoRAFile) -> str:
    """The table that is printed. Modules, ranks and alphas are those of the transformer's plain LoRAs, in
    diffusers' names, after fused modules were split; left out where all is of other kinds."""
    rows = [
        ("file", f"{file} ({adapter_file(file).stat().st_size / 1e6:.1f} MB)"),
        ("format", lora.foreign or lora.format or "none that is known"),
        ("kinds", described(lora.changes)),
        ("dtype", ", ".join(lora.dtypes) or "-"),
    ]
    if inputs_of(lora):
        rows.append(("x_embedder", f"takes {inputs_of(lora)} inputs{INPUTS.get(inputs_of(lora), '')}"))
    if lora.modules or not (lora.changes or lora.foreign):
        rows += plain_rows(lora.modules)
    unknown = [clean(key) for key in lora.unknown]
    listed = f": {some(unknown) if lora.foreign else ', '.join(unknown)}" if unknown else ""
    rows.append(("unknown", f"{len(lora.unknown)} keys{listed}"))
    if lora.incomplete:
        halves = [f"{clean(name)} has {roles}" for name, roles in lora.incomplete.items()]
        rows.append(("incomplete", f"{len(halves)} modules, wanted A and B: {some(halves)}"))
    rows += [("note", note) for note in lora.notes]
    if lora.foreign and "NewBie" in lora.foreign:
        rows.append(("note", "if it is of NewBie: --model, with NewBie's folder, reads it"))
    rows.append(("header", f"{len(lora.header)} fields"))
    rows += [(f"  {clean(key)}", clean(text)) for key, text in sorted(lora.header.items())]
    return _table(rows)


def _table(rows: Sequence[tuple[str, str]]) -> str:
    width = max(12, *(len(name) for name, _ in rows)) + 2
    return "\n".join(f"{name:{width}s}{text}" for name, text in rows)


def plain_rows(modules: Mapping[str, LoRAModule]) -> list[tuple[str, str]]:
    """The rows on the transformer's plain LoRAs."""
    summary = summarize(modules)
    return [
        ("modules", str(len(modules))),
        ("rank", counts(module.rank for module in modules.values())),
        ("alpha", counts(module.alpha for module in modules.values())),
        ("scale", counts(module.scale for module in modules.values())),
        ("delta-W", f"norm {summary.norm:.6g}" + (f"; {extremes(summary.norms)}" if modules else "")),
        ("zero", f"{len(summary.zero)} modules" + (f": {some(summary.zero)}" if summary.zero else "")),
    ]


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


def run_convert(arguments: argparse.Namespace) -> None:
    flags = from_flags(ConvertFlags, arguments)
    source, target = flags.input, flags.output
    if target.exists():
        raise ConfigError(f"{target} exists: remove it, or choose another name")
    lora = read_lora_file(source)
    check_known(lora, str(source), flags.ignore_unknown)
    dtype = flags.dtype or stored_dtype(lora)
    error = write_lora_file(target, lora.modules, carried_fields(lora), flags.format, dtype, lora.others)
    if not error <= NOTABLE_ERROR:
        print(
            f"warning: {dtype} keeps delta-W within {error:.1%} only, --dtype float32 does better",
            file=sys.stderr,
        )
    print(f"{source} ({lora.format}) -> {target} ({flags.format}, {dtype})")
    if lora.modules:
        print(summarize(lora.modules).line())
    if lora.others:
        print(f"beside it, as it was: {described(lora.others)}")
    if flags.format == "kohya" and any(getattr(each.kind, "rule", "") == "PEFT" for each in lora.others):
        print(f"note: {COMFYUI_MEASURES}")
    for note in (*lora.notes, *([f"left out: {len(lora.unknown)} keys"] if lora.unknown else [])):
        print(f"note: {note}")
    print(f"read back: every delta-W is that of the input within a relative error of {error:.1g}")


def stored_dtype(lora: LoRAFile) -> str:
    """The dtype of a file that has one which can be written, else float32."""
    return lora.dtypes[0] if len(lora.dtypes) == 1 and lora.dtypes[0] in LORA_DTYPES else "float32"


def carried_fields(lora: LoRAFile) -> Mapping[str, str]:
    """What the header says of the training: true of every file with the same delta-W."""
    alphas = sorted({module.alpha for module in lora.modules.values()})
    fields = {"original_alpha": f"{alphas[0]:g}"} if len(alphas) == 1 else {}
    return fields | {key: text for key, text in lora.header.items() if key not in OF_TENSORS}
