"""What each Triton kernel could reach at best, calculated without a card.

    python -m ppcoat benchmark kernels --static [--output FILE]

Every case that `benchmark kernels` times is compiled at FLUX.1-dev's shapes for sm_80, 89, 90 and 120, and
its machine code is counted (sass.py). From instructions and bytes follows how long the schedulers of a card
issue and how long its memory moves what the kernel must move; the share of copy speed is the second over the
first, 1 at most; for FP8 products see product_static.py. Latency, occupancy and the last wave are left out: a
card may be slower, not faster.

Each architecture is compiled in a process of its own, because Triton decides when a kernel is defined whether
it interprets it. Nothing is launched; the tensors have shapes and no memory.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from ppcoat.atomic import write_text
from ppcoat.bench import sass
from ppcoat.bench.kernel_cases import ADAMW, Kernels
from ppcoat.bench.product_static import product_share
from ppcoat.errors import ConfigError
from ppcoat.fp8.backend import INSTALL_TRITON
from ppcoat.fp8.formats_triton import dtype_name

SCHEDULERS = 4  # of a multiprocessor; each issues one instruction of a warp a clock
SPECIAL_CLOCKS = 8  # that an instruction of the special function units keeps a scheduler's unit
COPIES = 0.9  # share of a data sheet's bandwidth that a copy is assumed to reach
TOKENS, WIDTH, HEADS, GROUPS = 4608, 3072, 24, 7813  # of FLUX.1-dev at 1024 pixels; of AdamW's parameters
PRODUCTS = ((3072, 3072), (3072, 12288), (15360, 3072))
# The package without its __init__, which takes seconds to import.
ENTER = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("ppcoat", {package!r})
sys.modules["ppcoat"] = importlib.util.module_from_spec(spec)
"""
COMPILE = "from ppcoat.bench.kernel_static import print_rows; print_rows({arch}, {wanted!r})"


@dataclass(frozen=True)
class Card:
    """A card as its data sheet has it. bandwidth: bytes a second; clock: of the multiprocessors in Hz, as
    they boost; flops: of its fastest dense products that sum in float32, a clock and multiprocessor; cache:
    bytes a clock that its second-level cache delivers to a multiprocessor, None where no source is known."""

    name: str
    arch: int
    bandwidth: float
    clock: float
    multiprocessors: int
    flops: int
    product: str = "FP8"
    cache: float | None = None

    @property
    def lanes(self) -> int:
        """Instructions of threads that a multiprocessor issues in a clock."""
        return SCHEDULERS * sass.LANES

    @property
    def issue(self) -> float:
        """Instructions of threads a second."""
        return self.multiprocessors * self.lanes * self.clock

    @property
    def copy(self) -> float:
        """Bytes a second that a copy is assumed to move."""
        return COPIES * self.bandwidth


# Bytes a second, measured on an H100 (XLA's cost model of products); bytes a clock, from the A100 whitepaper.
_HOPPERS_CACHE, _AMPERES_CACHE = 6.65e12 / 132 / 1.755e9, 5120 / 108

# The first of an architecture is the one whose memory is fastest for its multiprocessors: shares are of it.
CARDS = (
    Card("A100 80GB SXM", 80, 2.039e12, 1.410e9, 108, 2048, "FP16", _AMPERES_CACHE),
    Card("RTX 4090", 89, 1.008e12, 2.520e9, 128, 1024),
    Card("H200", 90, 4.8e12, 1.755e9, 132, 8192, cache=_HOPPERS_CACHE),
    Card("H100 SXM", 90, 3.35e12, 1.755e9, 132, 8192, cache=_HOPPERS_CACHE),
    Card("RTX 5090", 120, 1.792e12, 2.407e9, 170, 1024),
)
ARCHITECTURES = tuple(dict.fromkeys(card.arch for card in CARDS))


@dataclass(frozen=True)
class StaticRow:
    """One case on one architecture. Of several launches the registers, shared bytes and conflicts of the
    worst, the instructions and spills of all. An element is one of the op's largest tensor, of a product one
    of its result. bank_conflict_degree: 1 without conflicts, None without shared memory; reachable_share: of
    what `of` names."""

    kernel: str
    shape: list[int]
    arch: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions_per_element: float
    bytes_per_element: float
    bank_conflict_degree: int | None
    tensor_core_instruction: str | None
    reachable_share: float
    of: str


@dataclass(frozen=True)
class StaticCase:
    """A call whose launches are counted. flops: of a product, 0 for what memory limits."""

    name: str
    shape: list[int]
    call: Callable[[], Any]
    elements: int
    nbytes: int
    flops: float = 0.0


@dataclass(frozen=True)
class Launch:
    """A compiled kernel and how it would have been launched. arguments: by their names."""

    name: str
    kernel: Any
    programs: int
    arguments: dict[str, Any]

    def trips(self) -> int:
        """Turns of its main loop over memory; 1 where it has none."""
        names = self.arguments
        if self.name == "amax_kernel":
            return names["tiles_each"]
        return -(-names["k"] // 128) if self.name == "scaled_matmul_kernel" else 1


class Shaped:
    """A tensor as a launcher sees it: dtype and shape, and no memory."""

    def __init__(self, shape: list[int], dtype: str) -> None:
        import paddle

        self.shape, self.dtype = list(shape), getattr(paddle, dtype_name(dtype))

    def data_ptr(self) -> int:
        return 0

    def is_contiguous(self) -> bool:
        return True

    def element_size(self) -> int:
        import paddle

        return paddle.empty([0], self.dtype).element_size()

    def new_empty(self, shape: list[int], dtype: Any = None) -> Shaped:
        return Shaped(shape, dtype or self.dtype)

    def reshape(self, shape: list[int]) -> Shaped:
        known = -math.prod(shape) if -1 in shape else 1
        return Shaped([math.prod(self.shape) // known if n == -1 else n for n in shape], self.dtype)

    def __mul__(self, other: Shaped) -> Shaped:
        return self

    def __getitem__(self, first: tuple[int, ...]) -> Shaped:
        return Shaped(self.shape[len(first) :], self.dtype)


class ShapedLibrary:
    """What `Kernels` asks of a library."""

    half = "bfloat16"

    def put(self, values: np.ndarray, dtype: str | None = None) -> Shaped:
        return Shaped(list(values.shape), dtype or str(values.dtype))

    def zeros(self, shape: list[int], dtype: str) -> Shaped:
        return Shaped(shape, dtype)

    def codec(self, fmt: Any, expand: bool, positive: bool) -> Any:
        return SimpleNamespace(fmt=fmt, expand=expand, positive=positive)

    def eager(self) -> dict[str, Callable]:
        return defaultdict(lambda: lambda *_: None)

    def gradient(self, *_: Any) -> None:
        return None


class ShapedKernels(Kernels):
    """The cases of `benchmark kernels` on tensors without memory."""

    def _random(self, shape: list[int], dtype: str) -> Shaped:
        return Shaped(shape, dtype)

    def cases(self) -> Iterator[StaticCase]:
        for case in self.streaming(TOKENS, WIDTH, HEADS):
            wide = case.elements // TOKENS
            yield StaticCase(case.name, [TOKENS, wide], case.call, case.elements, case.nbytes)
        for name in ADAMW:
            case = self.adamw(name, GROUPS * 128)
            yield StaticCase(name, [GROUPS, 128], case.call, case.elements, case.nbytes)
        for k, n in PRODUCTS:
            for name, product, _ in self.products(TOKENS, k, n):
                wide = n if name == "y = x W" else k
                nbytes = TOKENS * (k + n - wide) + k * n + 2 * TOKENS * wide
                yield StaticCase(name, [TOKENS, k, n], product, TOKENS * wide, nbytes, 2.0 * TOKENS * k * n)


def pretended_driver(arch: int) -> Any:
    """What Triton asks before it launches, of a card that is not there."""
    from triton.backends.compiler import GPUTarget

    return SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )


def run_static(output: str | None) -> None:
    """The command. Raises ConfigError where Triton is missing, a kernel cannot be compiled or `output` names
    no .json file in a folder that exists."""
    file = Path(output) if output else None
    if file and (file.suffix != ".json" or not file.absolute().parent.is_dir()):
        raise ConfigError(f"--output must name a .json file in a folder that exists, got {output}")
    rows = [row for arch in ARCHITECTURES for row in static_rows(arch)]
    print(static_table(rows))
    if file:
        write_text(file, json.dumps([asdict(row) for row in rows], indent=1) + "\n")
        print(f"\nall numbers: {file}")


def static_rows(arch: int, wanted: str = "") -> list[StaticRow]:
    """The cases whose name starts with `wanted`, compiled in a process of their own for sm_`arch`. Raises
    ConfigError where that fails."""
    from ppcoat.progress import Progress

    package = str(Path(__file__).parents[1] / "__init__.py")
    script = ENTER.format(package=package) + COMPILE.format(arch=arch, wanted=wanted)
    command = [sys.executable, "-c", script]
    path = os.pathsep.join([str(Path(package).parents[1]), *(each for each in sys.path if each)])
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path}
    rows = []
    with (
        tempfile.TemporaryFile("w+") as complaint,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaint, text=True, env=environment)
        as process, Progress(desc=f"compiling for sm_{arch}", unit=" kernels") as progress,
    ):  # fmt: skip
        for line in process.stdout:
            rows.append(StaticRow(**json.loads(line)))
            progress.update()
        failed = process.wait()
        complaint.seek(0)
        last = (complaint.read().strip() or "no message").splitlines()[-1]
    if failed:
        raise ConfigError(
            f"kernels cannot be compiled for sm_{arch}: {last}; {INSTALL_TRITON} has a compiler"
        )
    return rows


def compiled(
    arch: int, wanted: str = "", cases: Iterator[StaticCase] | None = None
) -> Iterator[tuple[StaticCase, list[Launch]]]:
    """Each case (of all unless others are given) whose name starts with `wanted` with its launches, compiled
    for sm_`arch`. Once a process, without TRITON_INTERPRET."""
    import triton
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []
    run = JITFunction.run

    def stop_short(self: Any, *args: Any, grid: Any, **kwargs: Any) -> None:
        kernel = run(self, *args, grid=grid, **{**kwargs, "warmup": True})
        arguments = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        launches.append(Launch(self.fn.__name__, kernel, math.prod(grid), arguments))

    JITFunction.run = stop_short
    triton.runtime.driver.set_active(pretended_driver(arch))
    for case in cases or ShapedKernels(ShapedLibrary()).cases():
        if case.name.startswith(wanted):
            launches.clear()  # of what prepared the case
            case.call()
            yield case, list(launches)


def static_row(case: StaticCase, launches: list[Launch], arch: int) -> StaticRow:
    """What the launches' machine code says."""
    card = next(card for card in CARDS if card.arch == arch)
    codes = [sass.MachineCode.of(launch.kernel.asm["cubin"]) for launch in launches]
    executed: Counter[str] = Counter()
    for code, launch in zip(codes, launches, strict=True):
        threads = launch.programs * launch.kernel.metadata.num_warps * sass.LANES
        for name, count in code.executed(launch.trips()).items():
            executed[name] += count * threads
    issue = max(sum(executed.values()), sass.special(executed) * SPECIAL_CLOCKS) / card.issue
    share = (
        product_share(card, case.flops, launches) if case.flops else min(1.0, case.nbytes / card.copy / issue)
    )
    degrees = [sass.bank_conflict_degree(launch.kernel.asm["ptx"]) for launch in launches]
    return StaticRow(
        case.name, case.shape, f"sm_{arch}", max(code.registers for code in codes),
        sum(code.spill_bytes for code in codes), max(launch.kernel.metadata.shared for launch in launches),
        round(sum(executed.values()) / case.elements, 2), round(case.nbytes / case.elements, 3),
        max((degree for degree in degrees if degree), default=None), sass.tensor_core_instruction(executed),
        round(share, 3),
        f"{card.product} peak of an {card.name}" if case.flops else f"copy speed of an {card.name}",
    )  # fmt: skip


def static_table(rows: list[StaticRow]) -> str:
    """The cards that are assumed and one line a case, as Markdown."""
    lines = [
        "| card | arch | GB/s | GHz | multiprocessors | instructions a byte copied |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {card.name} | sm_{card.arch} | {card.bandwidth / 1e9:.0f} | {card.clock / 1e9:.3f} | "
        f"{card.multiprocessors} | {card.issue / card.copy:.1f} |"
        for card in CARDS
    ]
    archs = list(dict.fromkeys(row.arch for row in rows))
    lines += [
        "",
        "| kernel | shape | bytes | " + " | ".join(archs) + " |",
        "|---|---|---|" + "---|" * len(archs),
    ]
    cases: dict[tuple, dict[str, StaticRow]] = defaultdict(dict)
    for row in rows:
        cases[row.kernel, tuple(row.shape), row.bytes_per_element][row.arch] = row
    for (kernel, shape, nbytes), found in cases.items():
        cells = (_cell(found[arch]) if arch in found else "" for arch in archs)
        lines.append(f"| {kernel} | {'x'.join(map(str, shape))} | {nbytes:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: StaticRow) -> str:
    conflicts = f", conflicts {row.bank_conflict_degree}" if (row.bank_conflict_degree or 1) > 1 else ""
    spills = f", spills {row.spill_bytes}" if row.spill_bytes else ""
    return (
        f"{row.instructions_per_element:.1f}, {row.registers}{conflicts}{spills}: {row.reachable_share:.2f}"
    )


def print_rows(arch: int, wanted: str) -> None:
    """A line of JSON for each."""
    for case, launches in compiled(arch, wanted):
        print(json.dumps(asdict(static_row(case, launches, arch))), flush=True)
