"""Compile every kernel of `benchmark kernels --static` for a GPU that need not be there.

    python compile_kernels.py CAPABILITY        # 80, 89, 90, 120; TRITON_INTERPRET unset

Prints a line of JSON for each case: its row of the static table, and for each of its launches what only the
tests ask for: the kernel's name, types of the offsets that it adds to pointers, whether FP8 is converted by
the device, its tensor-core instructions and its accesses to memory.
"""

import json
import re
import sys
from dataclasses import asdict

from ppcoat.bench.kernel_static import compiled, static_row

OFFSET = re.compile(r"tt\.addptr %\S+, (%[^\s:]+) .*, ([^,\n]*i\d+)>?(?: loc.*)?$", re.MULTILINE)


def facts(launch):
    text, ptx = launch.kernel.asm["ttir"], launch.kernel.asm["ptx"]
    constants = set(re.findall(r"(%\S+) = arith\.constant", text))  # which stay within a row
    return {
        "name": launch.name,
        "offsets": [kind for name, kind in OFFSET.findall(text) if name not in constants],
        "narrow_products": re.findall(r"arith\.muli .* : i32", text),
        "native_fp8": "tt.fp_to_fp" in text,
        "tensor_cores": sorted(set(re.findall(r"(?:wgmma\.|mma\.)[a-z0-9_.]+", ptx))),
        "accesses": re.findall(
            r"(?:ld|st)\.global\.[a-z0-9.]+|cp\.async\.c[ag][a-z0-9.]+ \[[^,]*, \[[^,]*, 0x10", ptx
        ),
    }


if __name__ == "__main__":
    arch = int(sys.argv[1])
    for case, launches in compiled(arch):
        print(json.dumps([asdict(static_row(case, launches, arch)), [facts(each) for each in launches]]))
