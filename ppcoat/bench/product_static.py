"""What share of a card's tensor cores an FP8 product could keep busy at best, calculated without a card.

A program of `fp8/matmul_triton.py` goes through its operands in steps 128 deep. Four things take time in a
step, and all four can overlap: the tensor cores multiply, the schedulers issue instructions (among them one
multiply-add in float32 for each number of the tile, which takes the partial sum out of the tensor cores),
shared memory is written and read, and the second-level cache delivers the tiles. The longest of the four
bounds the product. Before y = x W the weight's codes are turned, which takes as long as memory needs for it.

Left out are latency, the first and last steps of a program, its epilogue and the last wave of programs: a
card may be slower, not faster. Where nothing overlapped, tensor cores and schedulers would take turns.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ppcoat.bench import sass

if TYPE_CHECKING:
    from ppcoat.bench.kernel_static import Card, Launch

DEEP = 128  # values of one step, along the axis that is summed over
SHARED_BYTES = sass.BANKS * sass.WORD  # that a multiprocessor's shared memory moves in a clock
WARPS_OF_A_GROUP = 4  # which execute one instruction of Hopper's tensor cores together
# Hopper's tensor cores read both tiles from shared memory, for each group of warps; before, warps load
# matrices of 8 rows of 16 bytes into registers.
_GROUP_PRODUCT = re.compile(r"QGMMA\.(\d+)x(\d+)x(\d+)")
_MATRICES = re.compile(r"LDSM\.16\.M88(?:\.(\d))?")


@dataclass(frozen=True)
class StepClocks:
    """Clocks of one multiprocessor for one step of one program, each as if it were alone. cache: None where
    the card's figure is not known."""

    tensor: float
    issue: float
    shared: float
    cache: float | None

    @property
    def share(self) -> float:
        """Of the time in which tensor cores multiply, where all overlaps."""
        return self.tensor / max(self.tensor, self.issue, self.shared, self.cache or 0.0)


def step_clocks(card: Card, launch: Launch) -> StepClocks:
    """Of a compiled `scaled_matmul_kernel`."""
    arguments, warps = launch.arguments, launch.kernel.metadata.num_warps
    tall, wide = arguments["TALL"], arguments["SIDE"] * (2 if arguments["PAIR"] else 1)
    loop = one_turn(launch)
    moved = DEEP * (tall + wide)
    return StepClocks(
        tensor=2 * tall * wide * DEEP / card.flops,
        issue=sum(loop.values()) * warps * sass.LANES / card.lanes,
        shared=(moved + _read(loop, warps)) / SHARED_BYTES,
        cache=moved / card.cache if card.cache else None,
    )


def one_turn(launch: Launch) -> Counter[str]:
    """Name of an instruction -> how often a thread executes it in one turn of the longest loop: that over the
    depth, unless a LoRA in float32 makes its own loop longer."""
    code = sass.MachineCode.of(launch.kernel.asm["cubin"])
    return code.executed(2) - code.executed(1)


def product_share(card: Card, flops: float, launches: list[Launch]) -> float:
    """Of a whole product of `flops` operations and its launches: the time that the tensor cores need for it
    over what it takes at least."""
    multiplying = flops / (card.flops * card.multiprocessors * card.clock)
    taken = 0.0
    for launch in launches:
        if launch.name == "scaled_matmul_kernel":
            taken += multiplying / step_clocks(card, launch).share
        else:  # turn_kernel: words of 4 x 4 codes, in and out
            taken += 2 * 16 * math.prod(launch.arguments[side] for side in ("down", "across")) / card.copy
    return multiplying / taken


def _read(loop: Counter[str], warps: int) -> int:
    """Bytes that a program reads from shared memory for its tensor cores in one turn of its loop."""
    total = 0
    for name, count in loop.items():
        if found := _GROUP_PRODUCT.match(name):
            m, n, k = map(int, found.groups())
            total += count * (m + n) * k * warps // WARPS_OF_A_GROUP
        elif found := _MATRICES.match(name):
            total += count * int(found[1] or 1) * 8 * 16 * warps
    return total
