"""Everything that is to be known of a card, in one command and ten minutes.

    python -m ppcoat firstlight --output firstlight.json

Sections: self-checks of all ops; a short kernel benchmark; LoRA steps on random weights at FLUX.1-dev's
block sizes, with COAT and in plain 16 bits without and with gradient checkpointing, peak memory beside the
plan. Each section has a process of its own and a share of the time: what fails or does not fit is recorded,
and the others go on. Writes one JSON file and prints one table in Markdown to paste into an issue. Exit
status 2 if a check did not pass. On a CPU all is tiny, and times say nothing of a card.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import paddle

from ppcoat.atomic import write_text
from ppcoat.bench import kernels
from ppcoat.bench.bench_worker import MeasuredTraining, coat_of
from ppcoat.bench.firstlight_report import (
    CHECKPOINTED,
    CHECKS,
    COAT,
    KERNELS,
    MACHINE,
    PLAIN,
    checks,
    firstlight_table,
)
from ppcoat.bench.flags import BenchmarkCase, FirstlightFlags
from ppcoat.cli import doctor
from ppcoat.config.flags import from_flags
from ppcoat.config.schema import RunConfig
from ppcoat.device import ChildProcess, on_gpu, set_device, tune_host
from ppcoat.errors import ConfigError, ignore_warnings_of_libraries
from ppcoat.fp8 import backend, truth
from ppcoat.models.pictures import TOKEN_SIDE
from ppcoat.plan.phases import MemoryModel
from ppcoat.plan.settings import as_given

Parts = dict[str, Callable[[], Any]]

LIMIT = 600.0  # seconds in all; a section's own are in SECTIONS
WARM_UP = 2  # steps in which kernels are built and states made
# A double and two single blocks of FLUX.1-dev at 1024 x 1024 pixels, which fit into 8 GB.
CARD = BenchmarkCase(
    hidden_size=3072, head_dim=128, num_layers=3, batch_size=1, tokens=4096, text_tokens=512, device="gpu"
)
TINY = replace(CARD, hidden_size=256, tokens=64, text_tokens=16, rank=4, device="cpu")
SIZES = kernels.Sizes(
    tokens=(4608,), linears=((3072, 3072), (3072, 12288), (12288, 3072)), parameters=50_000_000, runs=20
)
TINY_SIZES = kernels.Sizes(
    tokens=(3,), text=1, width=256, heads=2, linears=((64, 130),), parameters=1000, peak=8, runs=1
)


@dataclass(frozen=True)
class FirstlightSection:
    """seconds: that it may take. parts: small or not -> its parts by name; nothing is allocated before one is
    called. A part's result is a JSON value."""

    seconds: float
    parts: Callable[[bool], Parts]


def run_command(arguments: argparse.Namespace) -> None:
    flags = from_flags(FirstlightFlags, arguments)
    output = Path(flags.output)
    if output.suffix != ".json" or not output.absolute().parent.is_dir():
        raise ConfigError(f"--output must name a .json file in a folder that exists, got {flags.output}")
    set_device("auto")
    small = flags.small or not on_gpu()
    if small:
        print("tiny sizes: this tries the command, its times say nothing of a card\n", flush=True)
    report = firstlight(small)
    write_text(output, json.dumps(kernels.without_nan(report), indent=1) + "\n")
    print(firstlight_table(report))
    print(f"\nall numbers: {output}")
    if failed := [name for name, check in report["checks"].items() if not check["passed"]]:
        raise ConfigError(f"not passed: {', '.join(failed)}; report it with the table above and {output}")


def firstlight(small: bool) -> dict[str, Any]:
    """Run all sections -> the report, as JSON values. Prints a line as each begins."""
    began, found = time.monotonic(), {}
    report = {"small": small, "on_gpu": on_gpu(), "machine": machine(), "sections": found}
    for name, section in SECTIONS.items():
        seconds = max(0.0, min(section.seconds, LIMIT - (time.monotonic() - began)))
        print(f"{name}: at most {seconds:.0f} s", flush=True)
        found[name] = run_section(name, small, seconds)
    report["seconds"] = time.monotonic() - began
    report["checks"] = {name: {"passed": not what, "what": what} for name, what in checks(report)}
    return report


def machine() -> dict[str, str]:
    """Device, driver and versions, by name."""
    versions = {finding.name: finding.what for finding in doctor.versions()}
    cuda = paddle.version.cuda() if paddle.is_compiled_with_cuda() else "none"
    found = {"device": doctor.device().what, "driver": _driver(), "ppcoat": _version()}
    if wanted := backend.forced():
        found[backend.VARIABLE] = wanted
    return found | {"CUDA of Paddle": str(cuda)} | versions


def run_section(name: str, small: bool, seconds: float) -> dict[str, Any]:
    """Run one for at most so many seconds -> those it took, and for each part its seconds and its result, or
    why there is none: "failed" or "left_out". On a GPU it has a process of its own, with which whatever makes
    the card unusable ends."""
    began, parts = time.monotonic(), SECTIONS[name].parts(small)
    entries: dict[str, dict] = {}
    reason = f"did not fit into {seconds:.0f} s"
    try:
        for part, entry in (_from_child if on_gpu() else _one_by_one)(name, small, began + seconds):
            entries[part] = entry
    except (ChildProcessError, MemoryError) as error:
        reason = str(error)
        for part in [part for part in parts if part not in entries][:1]:  # none, if it died after the last
            entries[part] = {"failed": reason}
    entries |= {part: {"left_out": reason} for part in parts if part not in entries}
    return {"seconds": time.monotonic() - began, "budget_seconds": seconds, "parts": entries}


def serve_section(pipe: Connection, name: str, small: bool, deadline: float) -> None:
    """Main function of a section's process: sends (part, entry) for each, then None."""
    ignore_warnings_of_libraries()
    tune_host()
    for entry in _one_by_one(name, small, deadline):
        pipe.send(entry)
    pipe.send(None)


def _from_child(name: str, small: bool, deadline: float) -> Iterator[tuple[str, dict]]:
    """What the process sends, until it is through or the time is over."""
    with ChildProcess(serve_section, name, small, deadline) as child:
        while child.pipe.poll(max(0.0, deadline - time.monotonic())):
            if (answer := child.answer()) is None:
                return
            yield answer
        child.process.kill()  # it hangs in a part


def _one_by_one(name: str, small: bool, deadline: float) -> Iterator[tuple[str, dict]]:
    """(part, entry) of all parts that begin before the deadline, which is in seconds of time.monotonic."""
    for part, run in SECTIONS[name].parts(small).items():
        began = time.monotonic()
        if began >= deadline:
            return
        try:
            entry = {"result": run()}
        except (*backend.failures(), ArithmeticError, LookupError, MemoryError) as error:
            entry = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        yield part, entry | {"seconds": time.monotonic() - began}


def _check_parts(small: bool) -> Parts:
    """What doctor looks at, and each op: its largest error beside float64, or why its kernel is not used. On
    a CPU the references are checked, those of a block in float32."""
    ops = {name: partial(_check_op, op) for name, op in backend.OPS.items()}
    return {MACHINE: lambda: [asdict(finding) for finding in doctor.examine_machine()]} | ops


def _check_op(op: backend.Op) -> dict[str, Any]:
    if on_gpu():
        return asdict(op.verdict("triton"))
    error = truth.largest_error(op.name, _in_float32(op))
    return asdict(backend.Verdict(error, "" if error <= 1 else f"its results are wrong: error {error:.3g}"))


def _in_float32(run: Callable) -> Callable:
    """The reference of an op or launcher; those of a block leave bfloat16 to cards, as a CPU cannot."""
    name = run.__name__
    reference = backend.OPS[name].reference
    if backend.MODULES["triton"][name] not in doctor.LAYER_MODULES:
        return reference

    def computed(*arguments: Any) -> Any:
        if any(str(getattr(each, "dtype", each)).endswith("bfloat16") for each in arguments):
            raise backend.Unsuited("Paddle computes in float32 on a CPU")
        return reference(*arguments)

    return computed


def _kernel_parts(small: bool) -> Parts:
    """Those of `benchmark kernels`, fewer sizes and calls; on a CPU of the references."""
    sizes = TINY_SIZES if small else SIZES

    @cache
    def made() -> Any:
        from ppcoat.bench.kernel_cases import Kernels
        from ppcoat.bench.kernel_library import PaddleLibrary

        return Kernels(PaddleLibrary()) if on_gpu() else Kernels(PaddleLibrary(), _in_float32)

    return {name: lambda part=part: part(made(), sizes) for name, part in kernels.PARTS.items()}


def _training_parts(small: bool, **changes: Any) -> Parts:
    case = replace(TINY if small else CARD, device="gpu" if on_gpu() else "cpu", **changes)
    return {"steps": partial(_steps, case, 1 if small else 10), "plan": partial(_planned, case)}


def _steps(case: BenchmarkCase, count: int) -> dict[str, Any]:
    training = MeasuredTraining(case)
    records = [training.step() for _ in range(WARM_UP + count)]
    milliseconds = statistics.median(record.milliseconds for record in records[WARM_UP:])
    losses = [record.loss for record in records]
    return training.result() | {"milliseconds": milliseconds, "losses": losses, "dtype": training.dtype}


def _planned(case: BenchmarkCase) -> int:
    """Bytes at the fullest moment of the steps by `plan`: of tensors on a GPU, of the process on a CPU."""
    rows, columns = case.token_grid
    assert rows == columns, "the plan knows the side of a square"
    config = RunConfig.model_validate(
        {
            "name": "firstlight",
            "output_dir": "none",
            "device": case.device,
            "model": {"name_or_path": "none"},
            "network": {"linear": case.rank, "linear_alpha": float(case.rank)},
            "datasets": [{"folder_path": "none", "resolution": rows * TOKEN_SIDE, "bucket_rule": "square"}],
            "train": {
                "batch_size": case.batch_size,
                "max_sequence_length": case.text_tokens,
                "gradient_checkpointing": case.gradient_checkpointing,
            },
            "coat": coat_of(case).config.model_dump(),
            "sample": {"sample_every": 0},
        }
    )
    memory = MemoryModel(config, case.device != "cpu", case.settings)
    phases = memory.phases(as_given(config, len(memory.model.blocks)))
    beside = ("context",) if memory.on_gpu else ()
    return max(
        phase.total - sum(phase.parts[name] for name in beside) for phase in phases if "base" in phase.parts
    )


SECTIONS = {
    CHECKS: FirstlightSection(150, _check_parts),
    KERNELS: FirstlightSection(210, _kernel_parts),
    COAT: FirstlightSection(75, partial(_training_parts, fp8_states=True, policy="coat+recompute")),
    PLAIN: FirstlightSection(75, _training_parts),
    CHECKPOINTED: FirstlightSection(75, partial(_training_parts, gradient_checkpointing=True)),
}


def _driver() -> str:
    """Version of NVIDIA's driver."""
    return _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown"


def _version() -> str:
    """Of ppcoat, and of what commit where it runs from its repository."""
    try:
        version = importlib.metadata.version("ppcoat")
    except importlib.metadata.PackageNotFoundError:
        version = "not installed"
    folder = Path(__file__).parents[2]
    in_repository = (folder / ".git").exists()
    commit = _first_line("git", "-C", str(folder), "describe", "--always", "--dirty") if in_repository else ""
    return f"{version}, {commit}" if commit else version


def _first_line(*command: str) -> str:
    """What a program prints; "" where there is none, or it does not work."""
    if not shutil.which(command[0]):
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout.partition("\n")[0].strip() if done.returncode == 0 else ""
