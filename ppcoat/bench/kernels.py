"""Error and speed of the Triton kernels on a card, beside what they replace.

    python -m ppcoat benchmark kernels --output kernels.json
    python -m ppcoat benchmark kernels --static     # needs no card: kernel_static.py
    python tests/fp8/kernels_with_torch.py --output kernels.json     # where there is torch and no Paddle

Each kernel is compared with float64 on small inputs; then come medians by device events at FLUX's shapes,
beside what they replace, in the same run, and beside them how long the host takes to start them; last a whole
double block with LoRA, forward and backward. Exit
status 2 where a kernel is wrong (after the file is written), and without an NVIDIA GPU, where nothing is
measured and nothing claimed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppcoat.config.flags import flag, from_flags

if TYPE_CHECKING:
    from ppcoat.bench.kernel_cases import Kernels

# Ways through a double block. The first is a saving policy; the second adds FP8 weights and products.
COAT, FP8_PRODUCTS = "coat+recompute", "coat+recompute, FP8 products"
PLAIN, CHECKPOINTED = "16-bit autograd", "16-bit, gradient checkpointing"
WAYS = (COAT, FP8_PRODUCTS, PLAIN, CHECKPOINTED)  # as a library's `double_block` gives them
WITH_QUANTISING, OF_PEAK = "times as fast as 16-bit, with quantising", "share of measured FP8 peak"
HALF_STEP = 2.0**-4  # of E4M3, relative: no single rounding is more
UNEXPLAINED = "not known"
LAUNCHING = "a call that copies 256 bytes takes more than half as long as the copy: most of it is launching"
TURNED = "W is stored [in, out], which FP8 instructions do not read: W^T is written into scratch each time"
SMALL = "the product has fewer than 132 tiles of 128 x 128, one for each multiprocessor of an H200"
SAME_WORK = "attention and the 16-bit products, most of the time, are the same both ways"


@dataclass(frozen=True)
class Sizes:
    """What is timed. tokens: at 512, 768 and 1024 pixels, `text` of them the text's; linears: (in, out) of
    every FLUX Linear that works on tokens; rank: of the double block's LoRAs; parameters: of the AdamW step;
    runs: of which the median counts."""

    tokens: tuple[int, ...] = (1536, 2816, 4608)
    text: int = 512
    rank: int = 16
    width: int = 3072
    heads: int = 24
    linears: tuple[tuple[int, int], ...] = (
        *((3072, 3072), (3072, 12288), (12288, 3072), (15360, 3072)),
        *((4096, 3072), (64, 3072), (3072, 64)),
    )
    parameters: int = 100_000_000
    peak: int = 8192  # side of the product that measures the device's FP8 peak
    runs: int = 50


@dataclass
class Row:
    """One timed kernel. ms: its median on the device; host_ms: that of starting it, None where it is in `ms`;
    others: medians of what it is compared with; targets: name of a ratio -> its value and the least it should
    be; why: name of a ratio -> what is known to hold it down; peak_mib: of it and the others, above what they
    start with; remarks: what was not measured, and why."""

    kernel: str
    shape: list[int]
    ms: float
    host_ms: float | None = None
    others: dict[str, float] = field(default_factory=dict)
    targets: dict[str, tuple[float, float]] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    peak_mib: dict[str, float] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def entry(self) -> dict[str, Any]:
        """For the file: with `missed`, name of a ratio -> by how much it is below its target, and why."""
        entry = asdict(self)
        why = entry.pop("why")
        entry["missed"] = {
            name: {"by": least - value, "why": why.get(name, UNEXPLAINED)}
            for name, (value, least) in self.targets.items()
            if not value >= least  # true for NaN
        }
        return entry


@dataclass(frozen=True)
class KernelFlags:
    """Settings of the command."""

    output: str | None = flag("JSON file to write (default: kernels.json; with --static none)", None)
    static: bool = flag("compile and count instructions instead of timing; needs no card", False)
    runs: int = flag("timed calls of each kernel", Sizes.runs)


def run_command(arguments: argparse.Namespace) -> None:
    from ppcoat.bench.kernel_library import PaddleLibrary
    from ppcoat.bench.kernel_static import run_static

    flags = from_flags(KernelFlags, arguments)
    if flags.static:
        run_static(flags.output)
    else:
        run_with(PaddleLibrary, flags)


def run_with(library: type, flags: KernelFlags) -> None:
    """The command with tensors of `library`, a class like PaddleLibrary. Raises ConfigError for wrong flags
    and where there is nothing to measure."""
    from ppcoat.errors import ConfigError

    if flags.static:
        raise ConfigError(
            f"--static does without {library.name}: python -m ppcoat benchmark kernels --static"
        )
    output = Path(flags.output or "kernels.json")
    if output.suffix != ".json" or not output.absolute().parent.is_dir():
        raise ConfigError(f"--output must name a .json file in a folder that exists, got {output}")
    if flags.runs < 1:
        raise ConfigError(f"--runs must be at least 1, got {flags.runs}")
    if not library.has_gpu():
        raise ConfigError(f"{library.name} sees no NVIDIA GPU: nothing was measured; run it on a card")
    if importlib.util.find_spec("triton") is None:
        raise ConfigError("Triton is not installed: nothing was measured; pip install triton==3.5.0")
    from ppcoat.atomic import write_text
    from ppcoat.bench.kernel_cases import Kernels

    report = measure(Kernels(library()), Sizes(runs=flags.runs))
    write_text(output, json.dumps(without_nan(report), indent=1) + "\n")
    print(kernel_table(report))
    print(f"\nall numbers: {output}")
    if wrong := wrong_kernels(report):
        raise ConfigError(
            f"wrong results, their times count for nothing: {', '.join(wrong)}; do not train with "
            f"these kernels: PPCOAT_BACKEND=reference does without, and report {output}"
        )


def wrong_kernels(report: dict[str, Any]) -> list[str]:
    """Names of those whose error is above what is allowed, or NaN."""
    return [name for name, error in report["errors"].items() if not error <= 1]  # true for NaN


def without_nan(value: Any) -> Any:
    """None for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {name: without_nan(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def measure(kernels: Kernels, sizes: Sizes) -> dict[str, Any]:
    """The report: device, errors in units of what the formats allow, one entry for each timed kernel."""
    parts = {name: part(kernels, sizes) for name, part in PARTS.items()}
    rows = [row for name in PARTS if name != "errors" for row in parts[name]]
    return {"device": kernels.library.device(), "errors": parts["errors"], "rows": rows}


def kernel_table(report: dict[str, Any]) -> str:
    """The report as plain text, with a word for each kernel that is wrong and each target that was missed,
    and lines for why, and for what was not measured."""
    wrong = wrong_kernels(report)
    lines = [report["device"], "", "largest error, in units of what the formats allow:"]
    for name, error in report["errors"].items():
        lines.append(f"  {name:40s}{error:8.3f}{' WRONG' if name in wrong else ''}")
    lines += ["", f"{'kernel':26s}{'shape':24s}{'ms':>9s}{'to start':>9s}  compared with, ms; ratios"]
    for row in report["rows"]:
        others = ", ".join(f"{name} {ms:.4f}" for name, ms in row["others"].items())
        ratios = ", ".join(
            f"{name} {value:.2f}" + (f" (target {least:g}: missed)" if name in row["missed"] else "")
            for name, (value, least) in row["targets"].items()
        )
        shape = "x".join(map(str, row["shape"]))
        start = "" if row["host_ms"] is None else f"{row['host_ms']:.4f}"
        lines.append(f"{row['kernel']:26s}{shape:24s}{row['ms']:9.4f}{start:>9s}  {others}; {ratios}")
        if row["peak_mib"]:
            peaks = ", ".join(f"{name} {mib:.0f}" for name, mib in row["peak_mib"].items())
            lines.append(f"{'':26s}peak memory, MiB: {peaks}")
    reasons = dict.fromkeys(
        f"missed by {row['kernel']}: {name}: {miss['why']}"
        for row in report["rows"] for name, miss in row["missed"].items()
    )  # fmt: skip
    remarks = dict.fromkeys(remark for row in report["rows"] for remark in row["remarks"])
    return "\n".join([*lines, *([""] if reasons or remarks else []), *reasons, *remarks])


def _streaming(kernels: Kernels, sizes: Sizes) -> Iterator[Row]:
    """Kernels that are as fast as memory: against a copy of the same bytes, and eager ops in 16 bits."""
    library = kernels.library
    launch, _ = kernels.timed(library.copy(256), sizes.runs)
    for tokens in sizes.tokens:
        for case in kernels.streaming(tokens, sizes.width, sizes.heads):
            row = Row(case.name, [tokens, sizes.width], *kernels.timed(case.call, sizes.runs))
            copied, _ = kernels.timed(library.copy(case.nbytes), sizes.runs)
            row.others = {"copy of its bytes": copied, "copy of 256 bytes": launch}
            row.targets["share of copy bandwidth"] = (copied / row.ms, 0.8)
            if launch > copied / 2:
                row.why["share of copy bandwidth"] = LAUNCHING
            if case.eager is not None:
                row.others["eager"], _ = kernels.timed(case.eager, sizes.runs)
                row.targets["times as fast as eager"] = (row.others["eager"] / row.ms, 1.0)
            yield row


def _matmul(kernels: Kernels, sizes: Sizes) -> Iterator[Row]:
    """FP8 products in both directions, quantising included, against 16-bit and the library's own FP8 ones."""
    library, side = kernels.library, sizes.peak
    own = library.scaled_fp8_matmul(side, side, side)
    peak = 2e-9 * side**3 / kernels.timed(own, sizes.runs)[0] if own else None
    for tokens in sizes.tokens:
        for k, n in sizes.linears:
            dense, _ = kernels.timed(kernels.dense_matmul(tokens, k, n), sizes.runs)
            own = library.scaled_fp8_matmul(tokens, k, n)
            own_ms = kernels.timed(own, sizes.runs)[0] if own else None
            blockwise = library.blockwise_fp8_matmul(tokens, k, n)
            for name, quantised, whole in kernels.products(tokens, k, n):
                row = Row(name, [tokens, k, n], *kernels.timed(whole, sizes.runs))
                alone, _ = kernels.timed(quantised, sizes.runs)
                row.others = {"product alone": alone, "16-bit matmul": dense}
                row.targets[WITH_QUANTISING] = (dense / row.ms, 1.3)
                row.why = dict.fromkeys((WITH_QUANTISING, OF_PEAK), _why_slow(name, tokens, k, n))
                if own_ms:
                    row.others["the library's FP8 matmul"] = own_ms
                    if blockwise:
                        row.others["the same, block-wise scales"] = kernels.timed(blockwise, sizes.runs)[0]
                    row.targets[OF_PEAK] = (2e-9 * tokens * k * n / alone / peak, 0.6)
                else:
                    row.remarks.append(
                        f"not measured: share of FP8 peak (target 0.6), {library.name} multiplies no FP8 here"
                    )
                yield row


def _why_slow(name: str, tokens: int, k: int, n: int) -> str:
    """What is known to slow a product down."""
    tiles = -(-tokens // 128) * -(-(n if name == "y = x W" else k) // 128)
    if tiles < 132:
        return SMALL
    return TURNED if name == "y = x W" else UNEXPLAINED


def _adamw(kernels: Kernels, sizes: Sizes) -> Iterator[Row]:
    """Steps against the library's fused float32 AdamW and a copy of the bytes that they move."""
    library = kernels.library
    for name in ("adamw_step", "adamw_step, v only"):
        case = kernels.adamw(name, sizes.parameters)
        row = Row(name, [case.elements], *kernels.timed(case.call, sizes.runs))
        copied, _ = kernels.timed(library.copy(case.nbytes), sizes.runs)
        fused, _ = kernels.timed(library.fused_adamw(case.elements), sizes.runs)
        row.others = {"copy of its bytes": copied, "fused float32 AdamW": fused}
        row.targets["share of copy bandwidth"] = (copied / row.ms, 0.85)
        row.targets["times as fast as fused float32 AdamW"] = (fused / row.ms, 1.5)
        yield row


def _double_block(kernels: Kernels, sizes: Sizes) -> Iterator[Row]:
    """Forward and backward of a double block with LoRA: in FP8 what is saved, without and with FP8 products,
    against autograd in 16 bits. Its hundreds of launches are timed as in training, one call after another."""
    library = kernels.library
    for tokens in sizes.tokens:
        calls = _ways(library, tokens, sizes)
        ms = {way: kernels.in_a_row_ms(call, sizes.runs) for way, call in calls.items()}
        peaks = {way: library.peak_bytes(call) for way, call in calls.items()}
        plain = {way: ms[way] for way in (PLAIN, CHECKPOINTED)}
        for name, way in (("double block", COAT), ("double block, FP8 products", FP8_PRODUCTS)):
            row = Row(name, [tokens, sizes.width], ms[way], others=plain)
            row.targets = {
                "times as fast as gradient checkpointing": (plain[CHECKPOINTED] / row.ms, 1.4),
                "times as fast as without it": (plain[PLAIN] / row.ms, 1.0),
            }
            if way == COAT:
                row.why = dict.fromkeys(row.targets, SAME_WORK)
            known = {each: peaks[each] for each in (way, *plain) if peaks[each] is not None}
            row.peak_mib = {each: nbytes / 2**20 for each, nbytes in known.items()}
            row.remarks = library.fallbacks()
            if not row.peak_mib:
                row.remarks.append(f"not measured: peak memory, {library.name} is on a CPU")
            yield row


def _ways(library: Any, tokens: int, sizes: Sizes) -> dict[str, Callable[[], list[Any]]]:
    calls = library.double_block(tokens, sizes.text, sizes.width, sizes.heads, sizes.rank)
    return dict(zip(WAYS, calls, strict=True))


def _block_errors(library: Any, sizes: Sizes) -> Iterator[tuple[str, float]]:
    """Largest difference, as RMS, of a result or gradient of the double block from that of plain autograd, in
    half steps of E4M3; with FP8 products in as many as roundings come together: two factors in six products
    forward and six back, whose errors add up as roots of squares."""
    calls = _ways(library, min(sizes.tokens), sizes)
    plain = [library.get(x) for x in calls[PLAIN]()]
    for name, way, roundings in (("double block", COAT, 1), ("double block, FP8 products", FP8_PRODUCTS, 24)):
        ours = [library.get(x) for x in calls[way]()]
        squares = [((x - y) ** 2).mean() / (y**2).mean() for x, y in zip(ours, plain, strict=True)]
        error = math.nan if any(map(math.isnan, squares)) else math.sqrt(max(squares))
        yield name, error / HALF_STEP / math.sqrt(roundings)


def _all_errors(kernels: Kernels, sizes: Sizes) -> dict[str, float]:
    return kernels.errors() | dict(_block_errors(kernels.library, sizes))


def _entries(rows: Callable[[Kernels, Sizes], Iterator[Row]]) -> Callable[[Kernels, Sizes], list[dict]]:
    return lambda kernels, sizes: [row.entry() for row in rows(kernels, sizes)]


# Name of a part of the measurement -> function of kernels and sizes that gives its entries in the report.
PARTS: dict[str, Callable[[Kernels, Sizes], Any]] = {
    "errors": _all_errors,
    "memory bound": _entries(_streaming),
    "products": _entries(_matmul),
    "AdamW": _entries(_adamw),
    "double block": _entries(_double_block),
}
