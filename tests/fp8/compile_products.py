"""Compile the FP8 product as FLUX's Linears call it, for a GPU that need not be there.

    python compile_products.py CAPABILITY [PREFIX]       # TRITON_INTERPRET unset

Prints a line of JSON for each case whose name starts with PREFIX: its row of the static table, the clocks of
a step, and of each launch what only tests ask for.
"""

import json
import re
import sys
from dataclasses import asdict
from functools import partial

from ppcoat.bench.kernel_static import CARDS, Shaped, StaticCase, compiled, static_row
from ppcoat.bench.product_static import one_turn, step_clocks
from ppcoat.fp8.formats import BlockMatrix, Epilogue
from ppcoat.fp8.matmul_triton import scaled_matmul

WIDTH, RANK = 3072, 64
TOKENS = {"one picture": 4608, "text": 512, "few rows": 64}


def cases():
    """Each direction alone at each number of rows, with bias and LoRA at the most."""
    for name, transpose in (("y = x W", False), ("dx = dy W^T", True)):
        for rows, m in TOKENS.items():
            yield case(f"{name}, {rows}", m, transpose)
        for dtype in ("bfloat16", "float32"):
            up = Shaped([WIDTH, RANK] if transpose else [RANK, WIDTH], dtype)
            added = Epilogue(Shaped([WIDTH], dtype), Shaped([4608, RANK], dtype), up)
            yield case(f"{name}, LoRA in {dtype}", 4608, transpose, added)
    yield case("ragged, y = x W", 100, False, k=1040)


def case(name, m, transpose, added=None, k=WIDTH):
    blocks = -(-k // 128)
    weight = BlockMatrix(Shaped([k, WIDTH], "uint8"), Shaped([blocks, WIDTH // 128], "float32"))
    x = Shaped([m, k], "uint8"), Shaped([m, blocks], "float32")
    call = partial(scaled_matmul, *x, weight, transpose, added, "bfloat16")
    return StaticCase(name, [m, k, WIDTH], call, m * WIDTH, m * WIDTH, 2.0 * m * k * WIDTH)


def facts(launch):
    ptx, loop = launch.kernel.asm["ptx"], one_turn(launch)
    buffers = re.findall(r"local_alloc.*memdesc<(\d+)x\d+x\d+x(?:f8E4M3FN|i8)", launch.kernel.asm["ttgir"])
    return {
        "name": launch.name,
        "offsets": re.findall(r"tt\.addptr .*, ([^,]*i\d+)>?(?: loc.*)?$", launch.kernel.asm["ttir"], re.M),
        "byte_accesses": len(re.findall(r"(?:ld|st)\.shared(?:\.v\d)?\.[busf]8", ptx)),
        "descriptors": "cp.async.bulk.tensor" in ptx,
        "wide_reads": len(re.findall(r"ld\.global(?:\.\w+)*\.v4\.b32|cp\.async\.cg.*, 0x10,", ptx)),
        "tile_buffers": min(map(int, buffers), default=None),
        "spills_in_loop": sum(count for name, count in loop.items() if name.startswith(("LDL", "STL"))),
        "programs": launch.programs,
    }


if __name__ == "__main__":
    arch, wanted = int(sys.argv[1]), "".join(sys.argv[2:])
    card = next(card for card in CARDS if card.arch == arch)
    for each, launches in compiled(arch, wanted, cases()):
        clocks = step_clocks(card, launches[-1])
        found = asdict(static_row(each, launches, arch)), asdict(clocks), [facts(x) for x in launches]
        print(json.dumps([*found, clocks.share]), flush=True)
