"""The FP8 product, compiled for GPUs that need not be there: how tiles reach the tensor cores, and what share
of their time that leaves them at best, calculated."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ppcoat.bench import product_static, sass

HERE = Path(__file__).parent
SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}  # bytes that a program may have
TENSOR_CORES = {80: "HMMA.16816.F32", 89: "QMMA.16832.F32.E4M3", 90: "QGMMA.64x128x32.F32.E4M3"}
# Of the peak of tensor cores (FP8; sm_80: float16), with W turned and without, at 4608 rows and 3072 x 3072.
SHARES = {80: (0.5, 0.51), 89: (0.92, 0.99), 90: (0.56, 0.59), 120: (0.94, 0.99)}


# The script, with the package without its __init__, which takes seconds to import.
SCRIPT = """
import importlib.util, runpy, sys
spec = importlib.util.spec_from_file_location("ppcoat", sys.argv.pop(1))
sys.modules["ppcoat"] = importlib.util.module_from_spec(spec)
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def compiled(arch, wanted, cache):
    """Lines of compile_products.py as (row, clocks, launches, share)."""
    pytest.importorskip("triton", reason="Triton is not installed")
    package = HERE.parents[1] / "ppcoat/__init__.py"
    path = os.pathsep.join([str(HERE.parents[1]), *(entry for entry in sys.path if entry)])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, (package, HERE / "compile_products.py", arch, wanted))],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(arch, row, launches):
    """What holds for every product; a LoRA in float32, which no training on a card has, is summed without
    tensor cores, and reads its tiles as it can."""
    name, product = row["kernel"], launches[-1]
    turned = ["turn_kernel"] if "y = x W" in name else []
    assert [launch["name"] for launch in launches] == [*turned, "scaled_matmul_kernel"], name
    assert row["tensor_core_instruction"].startswith(TENSOR_CORES.get(arch, TENSOR_CORES[89])), name
    assert row["shared_bytes"] <= SHARED[arch], name
    assert product["tile_buffers"] >= 3 and product["spills_in_loop"] == 0, name
    assert product["descriptors"] == (arch == 90), name
    assert product["descriptors"] or product["wide_reads"] > 0, name
    assert arch == 80 or row["spill_bytes"] == 0, name
    assert "float32" in name or row["bank_conflict_degree"] == 1, name
    for launch in launches:
        assert launch["byte_accesses"] == 0, name
        assert all("i64" in offset for offset in launch["offsets"]), name


@pytest.mark.slow
def test_the_product_on_hopper(tmp_path):
    """Pairs of tiles by descriptors. dx and LoRA are in the slow test."""
    ((row, clocks, launches, share),) = compiled(90, "y = x W, one picture", tmp_path)
    check(90, row, launches)
    assert launches[-1]["programs"] == 36 * 12 and launches[-1]["tile_buffers"] == 4
    assert clocks["tensor"] == 1024 and 256 < clocks["issue"] < 700  # 256: the sums in float32
    in_turn = clocks["tensor"] / (clocks["tensor"] + clocks["issue"])  # as if nothing overlapped
    assert share >= 0.59 and in_turn >= 0.6 and row["reachable_share"] >= 0.56


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED)
def test_products_of_every_kind(arch, tmp_path):
    found = {row["kernel"]: (row, launches) for row, _, launches, _ in compiled(arch, "", tmp_path)}
    assert len(found) == 11
    for row, launches in found.values():
        check(arch, row, launches)
    for direction, least in zip(("y = x W", "dx = dy W^T"), SHARES[arch], strict=True):
        for kind in ("one picture", "LoRA in bfloat16"):
            assert found[f"{direction}, {kind}"][0]["reachable_share"] >= least


CARD = SimpleNamespace(
    flops=8192, lanes=128, cache=32.0, multiprocessors=100, clock=1e9, copy=1e12
)  # per clock, but for copy


def launch(loop, pair, name="scaled_matmul_kernel", warps=8):
    kernel = SimpleNamespace(metadata=SimpleNamespace(num_warps=warps), asm={"cubin": loop})
    arguments = {"TALL": 128, "SIDE": 128, "PAIR": pair, "down": 32, "across": 32}
    return SimpleNamespace(name=name, kernel=kernel, arguments=arguments)


@pytest.fixture
def loops(monkeypatch):
    """A launch's machine code is its loop."""
    code = SimpleNamespace
    executed = staticmethod(lambda loop: code(executed=lambda turns: sass.Counter(loop * (turns - 1))))
    monkeypatch.setattr(sass.MachineCode, "of", executed)


def test_the_clocks_of_a_step(loops):
    hopper = launch(["QGMMA.64x128x32.F32.E4M3.E4M3"] * 8 + ["FFMA"] * 192, True)
    clocks = product_static.step_clocks(CARD, hopper)
    assert clocks.tensor == 2 * 128 * 256 * 128 / 8192 == 1024
    assert clocks.issue == 200 * 8 * 32 / 128 == 400
    written, read = 384 * 128, 2 * 8 * (64 + 128) * 32  # two groups of warps
    assert clocks.shared == (written + read) / 128 == 1152
    assert clocks.cache == written / 32 == 1536
    assert clocks.share == 1024 / 1536
    ada = launch(["LDSM.16.M88.4"] * 24 + ["FFMA"] * 1000, False)
    clocks = product_static.step_clocks(SimpleNamespace(**{**vars(CARD), "flops": 1024, "cache": None}), ada)
    assert (clocks.tensor, clocks.cache) == (4096, None)
    assert clocks.shared == (256 * 128 + 24 * 4 * 128 * 8) / 128
    assert clocks.share == 1.0


def test_turning_the_weight_takes_its_time(loops):
    step = launch(["FFMA"] * 8, True)  # 1024 of 1536 clocks
    turn = launch([], False, "turn_kernel")
    flops = 8192 * 100 * 1e9 * 1e-6  # a microsecond
    assert product_static.product_share(CARD, flops, [step]) == pytest.approx(2 / 3)
    moved = 2 * 128 * 128 / 1e12
    assert product_static.product_share(CARD, flops, [turn, step]) == pytest.approx(1e-6 / (1.5e-6 + moved))
