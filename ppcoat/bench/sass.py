"""What a compiled kernel is made of, read from its machine code (SASS) and its PTX, without a card.

Counted is the path that a thread takes on ordinary numbers: from the start to the first EXIT that is not
conditional, without the blocks that call a slow path (a division by a subnormal number), each loop as often
as it runs. NVIDIA's cuobjdump, which comes with Triton, prints the machine code.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# Instructions of the special function units, which give 16 results a clock and multiprocessor (CUDA
# programming guide, table of arithmetic throughput), so that each keeps a scheduler's unit for 8 clocks:
# approximations, and, on the safe side, conversions between integers and floats that have no short form.
SPECIAL = re.compile(r"MUFU|I2F\.|F2I\.|F2F\.|FRND")
TENSOR = re.compile(r"[HQI]G?MMA\.|UTC[A-Z]*MMA")
BANKS, WORD, LANES = 32, 4, 32
WIDEST = 128  # bytes that a warp reads from shared memory at a time

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+)?\s*([A-Z][A-Za-z0-9_.]*)([^;]*);", re.MULTILINE)
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")
_TARGET = re.compile(r"0x([0-9a-f]+)")


@dataclass(frozen=True)
class Instruction:
    """address: in bytes; guard: the predicate, empty without one."""

    address: int
    guard: str
    name: str
    operands: str

    @property
    def target(self) -> int | None:
        """Where a branch or a call goes, None for all else."""
        found = _TARGET.search(self.operands) if self.name.startswith(("BRA", "CALL")) else None
        return int(found[1], 16) if found else None


@dataclass(frozen=True)
class MachineCode:
    """registers: of a thread; spill_bytes: its stack; instructions: in the order of addresses."""

    registers: int
    spill_bytes: int
    instructions: list[Instruction]

    @classmethod
    def of(cls, cubin: bytes) -> MachineCode:
        """Of a kernel as Triton compiled it. Raises RuntimeError where cuobjdump fails."""
        found = importlib.util.find_spec("triton")
        tool = Path(found.origin).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "kernel.cubin")
            file.write_bytes(cubin)
            done = subprocess.run([tool, "-sass", "-res-usage", file], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"cuobjdump failed: {done.stderr.strip()}")
        return cls.parsed(done.stdout)

    @classmethod
    def parsed(cls, text: str) -> MachineCode:
        """From what cuobjdump prints."""
        usage = _USAGE.search(text)
        assert usage, "cuobjdump printed no resource usage"
        found = [
            Instruction(int(a, 16), guard, name, rest.strip()) for a, guard, name, rest in _LINE.findall(text)
        ]
        return cls(int(usage[1]), int(usage[2]), found)

    def executed(self, trips: int = 1) -> Counter[str]:
        """Name of an instruction -> how often a thread executes it on the main path. trips: of the main loop,
        the longest one; other loops count once. One turn of it is executed(2) - executed(1)."""
        path = self._main_path()
        main = max(self._loops(path), key=lambda loop: loop[1] - loop[0], default=None)
        found: Counter[str] = Counter()
        for each in path:
            inside = main is not None and main[0] <= each.address <= main[1]
            found[each.name] += trips if inside else 1
        return found

    def _main_path(self) -> list[Instruction]:
        """Block after block, the slow paths left out: those that call what stands behind the exit."""
        every = self.instructions
        end = next((i for i, x in enumerate(every) if x.name == "EXIT" and not x.guard), len(every) - 1)
        starts = {x.target for x in every} - {None}
        blocks: list[list[Instruction]] = [[]]
        for each in every[: end + 1]:
            if each.address in starts:
                blocks.append([])
            blocks[-1].append(each)
            if each.target is not None:
                blocks.append([])
        last = every[end].address
        slow = {id(b) for b in blocks for x in b if x.name.startswith("CALL") and x.target > last}
        return [x for block in blocks if id(block) not in slow for x in block]

    @staticmethod
    def _loops(path: list[Instruction]) -> list[tuple[int, int]]:
        """First and last address of each."""
        return [(x.target, x.address) for x in path if x.target is not None and x.target < x.address]


def special(executed: Counter[str]) -> int:
    """How many of them the special function units do."""
    return sum(count for name, count in executed.items() if SPECIAL.match(name))


def tensor_core_instruction(executed: Counter[str]) -> str | None:
    """The one that is executed most, None without any."""
    found = Counter({name: count for name, count in executed.items() if TENSOR.match(name)})
    return found.most_common(1)[0][0] if found else None


# What a shared-memory access of a warp looks like in PTX: a vector load or store, an asynchronous copy, or a
# matrix of 8 x 8 whose rows of 16 bytes 8 lanes each name.
_ACCESS = re.compile(
    r"^\s*(?:@(!?)(%p\d+)\s+)?(?:"
    r"(?:ld|st)\.(?:volatile\.)?shared(?:\.v(\d))?\.[a-z](\d+)|(cp\.async\.c[ag])\.shared\.global|((?:ld|st)matrix)"
    r")[^\[;]*\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+))?\s*\](?:[^;]*?\],\s*0x([0-9a-f]+))?",
    re.MULTILINE,
)
_DEFINITION = re.compile(r"^\s*([a-z][a-z0-9_.]*)\s+([^;]*);", re.MULTILINE)


_THREADS = re.compile(r"\.reqntid\s+(\d+)")


def bank_conflict_degree(ptx: str) -> int | None:
    """How many times as long as without conflicts the worst shared-memory access of a kernel takes; None
    without shared memory. The addresses of all lanes are evaluated. Raises ValueError for one that cannot
    be."""
    threads = int(_THREADS.search(ptx)[1])
    registers = Registers(ptx, threads)
    worst = None
    for negated, guard, count, bits, copy, matrix, base, offset, size in _ACCESS.findall(ptx):
        addresses = registers.value(base) + int(offset or 0)
        active = np.ones(threads, bool)
        if guard:
            active = registers.value(guard).astype(bool) ^ bool(negated)
        width = 16 if matrix else int(size, 16) if copy else int(count or 1) * int(bits) // 8
        worst = max(worst or 1, _degree(addresses, active, width))
    return worst


def _degree(addresses: np.ndarray, active: np.ndarray, width: int) -> int:
    """Of one access, `width` bytes a lane: the hardware serves as many lanes at a time as make 128 bytes."""
    lanes, degree = min(LANES, WIDEST // width), 1
    for start in range(0, len(addresses), lanes):
        part = addresses[start : start + lanes][active[start : start + lanes]]
        words = np.unique(part[:, None] // WORD + np.arange(-(-width // WORD)))
        degree = max(degree, int(np.bincount(words % BANKS).max(initial=0)))
    return degree


class Registers:
    """Values of PTX registers for each thread of the first program, int64 [threads]: where a register is
    written more than once (in a loop) the first value."""

    def __init__(self, ptx: str, threads: int) -> None:
        self._tid = np.arange(threads, dtype=np.int64)
        self._known: dict[str, np.ndarray] = {}
        self._written: dict[str, tuple[str, list[str]]] = {}
        for name, operands in _DEFINITION.findall(ptx):
            into, *rest = (each.strip() for each in operands.split(","))
            if into.startswith("%"):
                self._written.setdefault(into.partition("|")[0], (name, rest))

    def value(self, operand: str) -> np.ndarray:
        """Of a register, a number or the start of shared memory. Raises ValueError for one that depends on
        memory or arguments."""
        if operand not in self._known:
            self._known[operand] = self._evaluated(operand)
        return self._known[operand]

    def _evaluated(self, operand: str) -> np.ndarray:
        if operand == "%tid.x":
            return self._tid
        if operand.startswith("%ctaid") or operand.startswith("global_smem"):
            return np.zeros_like(self._tid)
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", operand):
            return np.full_like(self._tid, int(operand, 0))
        name, operands = self._written.get(operand, ("nothing", []))
        kind, *modifiers = name.split(".")
        if kind == "setp":
            operands = operands[:2]
        if kind == "shfl":  # Triton asks the first lane of a warp for the warp's number
            return self.value(operands[0])[self._tid // LANES * LANES]
        if kind not in _ARITHMETIC:
            raise ValueError(f"{operand} is made by {name}: no address of shared memory should depend on it")
        with np.errstate(over="ignore"):
            return np.asarray(_ARITHMETIC[kind](modifiers, *map(self.value, operands)), np.int64)


def _wrapped(x: np.ndarray) -> np.ndarray:
    return x & 0xFFFFFFFF


def _bits(modifiers: list[str], x: np.ndarray, first: np.ndarray, count: np.ndarray) -> np.ndarray:
    found = (_wrapped(x) >> first) & ((1 << count) - 1)
    return np.where(found >> (count - 1) & 1, found - (1 << count), found) if "s32" in modifiers else found


def _inserted(m: list[str], x: np.ndarray, y: np.ndarray, first: np.ndarray, count: np.ndarray) -> np.ndarray:
    mask = ((1 << count) - 1) << first
    return (x << first & mask) | (y & ~mask)


def _compared(modifiers: list[str], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    compare = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
               "ge": np.greater_equal, "lo": np.less, "hi": np.greater}  # fmt: skip
    return compare[modifiers[0]](x, y)


def _table(
    modifiers: list[str], a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray
) -> np.ndarray:
    result = np.zeros_like(a)
    for i in range(8):
        term = (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        result |= np.where(table >> i & 1, term, 0)
    return _wrapped(result)


_ARITHMETIC: dict[str, Callable] = {
    "mov": lambda m, x: x,
    "cvt": lambda m, x: x,
    "cvta": lambda m, x: x,
    "not": lambda m, x: 1 - x if "pred" in m else _wrapped(~x),
    "neg": lambda m, x: -x,
    "and": lambda m, x, y: x & y,
    "or": lambda m, x, y: x | y,
    "xor": lambda m, x, y: x ^ y,
    "shl": lambda m, x, y: _wrapped(x << y),
    "shr": lambda m, x, y: (x if "s32" in m else _wrapped(x)) >> y,
    "add": lambda m, x, y: x + y,
    "sub": lambda m, x, y: x - y,
    "mul": lambda m, x, y: x * y,
    "mad": lambda m, x, y, z: x * y + z,
    "min": lambda m, x, y: np.minimum(x, y),
    "max": lambda m, x, y: np.maximum(x, y),
    "rem": lambda m, x, y: x % y,
    "div": lambda m, x, y: x // y,
    "bfe": _bits,
    "bfi": _inserted,
    "lop3": _table,
    "setp": _compared,
    "selp": lambda m, x, y, p: np.where(p, x, y),
}
