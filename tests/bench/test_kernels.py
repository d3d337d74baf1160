"""`benchmark kernels`: refused without a card; its whole path on a CPU, in Triton's interpreter, at tiny
sizes."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import paddle
import pytest

from ppcoat.bench import kernels
from ppcoat.bench.kernel_library import PaddleLibrary
from ppcoat.cli.main import main
from ppcoat.models.flux.transformer import DoubleBlock

ROOT = Path(__file__).parents[2]
WITHOUT_GPU = pytest.mark.skipif(PaddleLibrary.has_gpu(), reason="there is a GPU")
TINY = kernels.Sizes(
    tokens=(3,), text=1, width=256, heads=2, linears=((64, 144), (128, 128)), parameters=1000, peak=8, runs=1
)

CHECKED = ("quantize", "log_decode", "adamw_step")  # against float64, under several names each

HIDDEN = """
import runpy, sys
sys.modules.update(dict.fromkeys(["paddle", "ppdiffusers", "torch"]))
sys.argv = ["kernels.py"]
try:
    runpy.run_path({file!r}, run_name="__main__")
finally:
    sys.path.insert(0, {folder!r})
    import ppcoat.bench.kernel_cases, launcher_block
"""


@WITHOUT_GPU
def test_without_a_card_nothing_is_claimed(tmp_path, capsys):
    output = tmp_path / "kernels.json"
    assert main(["benchmark", "kernels", "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "paddle sees no NVIDIA GPU" in error and "nothing was measured" in error
    assert not output.exists()


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [(["--output", "kernels.txt"], "a .json file"), (["--runs", "0"], "at least 1, got 0")],
)
def test_wrong_flags_are_named(flags, wanted, capsys):
    assert main(["benchmark", "kernels", *flags]) == 2
    assert wanted in capsys.readouterr().err


@WITHOUT_GPU
def test_with_torch_it_runs_where_paddle_cannot_be_imported(tmp_path):
    """Paddle and ppdiffusers are hidden: the same line is said, and no import of a kernel fails."""
    pytest.importorskip("triton", reason="Triton is not installed")
    folder = ROOT / "tests/fp8"
    script = HIDDEN.format(file=str(folder / "kernels_with_torch.py"), folder=str(folder))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: torch sees no NVIDIA GPU: nothing was measured")


@pytest.fixture
def interpreted():
    """As in tests/fp8/conftest.py."""
    spec = importlib.util.spec_from_file_location("fp8_conftest", ROOT / "tests/fp8/conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.interpreted


def test_every_kernel_is_checked_and_timed(interpreted, monkeypatch, in_fork):
    """In a fork: the interpreter puts its functions into Triton's language, which then compiles no more.
    What is timed is launched once: in the interpreter a launch takes a second, and that is no kernel's
    time. Double blocks are measured further down; errors of all kernels are in tests/fp8/test_truth.py."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if PaddleLibrary.has_gpu():
        pytest.skip("the command itself measures here")
    from ppcoat.bench.kernel_cases import Kernels

    class Once(Kernels):
        def timed(self, call, runs):
            call()
            return super().timed(lambda: None, runs)

        def in_a_row_ms(self, call, runs):
            call()
            return super().in_a_row_ms(lambda: None, runs)

        def errors(self):
            every, self.run = self.run, {name: self.run[name] for name in CHECKED}
            found = super().errors()
            self.run = every
            return found

    monkeypatch.setattr(kernels, "_block_errors", lambda *_: ())
    monkeypatch.delitem(kernels.PARTS, "double block")
    report = in_fork(
        lambda: json.loads(json.dumps(kernels.measure(Once(PaddleLibrary(), interpreted), TINY)))
    )
    shown = kernels.kernel_table(report).splitlines()
    from ppcoat.bench.kernel_cases import LAUNCHERS

    products = {"y = x W", "dx = dy W^T"}
    single = set(LAUNCHERS) - {"scaled_matmul"}
    assert all(0 <= error <= 1 for error in report["errors"].values()), report["errors"]
    checked = report["errors"].keys()
    assert {name.partition(",")[0] for name in checked} == set(CHECKED)
    assert {"adamw_step, v only", "quantize, per tensor", "quantize, E5M2", "log_decode, E5M2"} < checked
    assert not any("WRONG" in line for line in shown)

    rows = {row["kernel"]: row for row in report["rows"]}
    assert {name.partition(",")[0] for name in rows} == single | products
    assert {"adamw_step, v only", "quantize, per tensor", "dequantize, E5M2"} < set(rows)
    assert all(row["ms"] > 0 for row in report["rows"])
    for name in ("quantize", "dequantize", "rms_norm_rotated_grad"):
        assert rows[name]["others"]["eager"] > 0
    assert report["device"] == f"cpu, paddle {paddle.__version__}"
    assert any(line.startswith("adamw_step") for line in shown)
    assert sum("not measured: share of FP8 peak (target 0.6)" in line for line in shown) == 1


class SlowToStart:
    """A library whose device is faster than its host: a launch takes the host 0.05 ms and the device 0.01, a
    write of FLUSHED bytes the device 0.25."""

    def __init__(self):
        self.host = self.device = 0.0  # ms since the start, of the device: when it will be idle

    def launch(self, ms):
        self.host += 0.05
        self.device = max(self.device, self.host) + ms

    def flush(self, times=1):
        for _ in range(times):
            self.launch(0.25)

    def event(self):
        library = self

        class Event:
            def record(self):
                self.at = max(library.device, library.host)

            def synchronize(self):
                library.host = max(library.host, library.device)

            def elapsed_time(self, later):
                return later.at - self.at

        return Event()


@pytest.mark.parametrize("launches", [1, 2, 100])
def test_launches_are_no_part_of_a_kernels_time(launches, monkeypatch):
    """They are behind writes that last longer; calls in a row are as slow as the host that starts them."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from ppcoat.bench import kernel_cases

    library = SlowToStart()
    monkeypatch.setattr(kernel_cases.time, "perf_counter", lambda: library.host / 1e3)
    made = kernel_cases.Kernels(library)

    def call():
        for _ in range(launches):
            library.launch(0.01)

    ms, host_ms = made.timed(call, 5)
    assert (ms, host_ms) == (pytest.approx(0.01 * launches), pytest.approx(0.05 * launches))
    assert made.in_a_row_ms(call, 5) == pytest.approx(0.05 * launches)


@pytest.mark.parametrize("error", [2.0, float("nan")])
def test_a_wrong_kernel_is_marked_and_ends_the_command(error, tmp_path, monkeypatch, capsys):
    """The file is written all the same."""
    report = {"device": "card", "errors": {"gelu, FP8": 0.5, "silu, FP8": error}, "rows": []}
    monkeypatch.setattr(kernels, "measure", lambda *_: report)
    monkeypatch.setattr(PaddleLibrary, "has_gpu", staticmethod(lambda: True))
    pytest.importorskip("triton", reason="Triton is not installed")
    output = tmp_path / "kernels.json"
    assert main(["benchmark", "kernels", "--output", str(output)]) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1 and "wrong results" in shown.err
    assert "silu, FP8" in shown.err and "gelu, FP8" not in shown.err
    (line,) = (line for line in shown.out.splitlines() if "WRONG" in line)
    assert line.split()[0] == "silu,"
    wanted = {"gelu, FP8": 0.5, "silu, FP8": 2.0 if error == 2 else None}  # JSON has no NaN
    assert json.loads(output.read_text())["errors"] == wanted


@pytest.mark.parametrize("value", [0.5, float("nan")])
def test_a_missed_target_is_in_the_file_with_by_how_much_and_why(value):
    row = kernels.Row("gelu", [3, 4], 1.0, targets={"share": (value, 0.8), "speed": (1.5, 1.5)})
    row.why = {"share": "launching", "speed": "never said"}
    missed = row.entry()["missed"]
    assert set(missed) == {"share"} and missed["share"]["why"] == "launching"
    assert missed["share"]["by"] == pytest.approx(0.8 - value, nan_ok=True)
    row.why = {}
    assert row.entry()["missed"]["share"]["why"] == "not known"
    text = kernels.kernel_table({"device": "card", "errors": {}, "rows": [row.entry()]})
    assert "(target 0.8: missed)" in text and "speed 1.50\n" in text
    assert "missed by gelu: share: not known" in text


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("y = x W", (1536, 3072, 3072), kernels.TURNED),
        ("y = x W", (1536, 3072, 64), kernels.SMALL),
        ("dx = dy W^T", (1536, 64, 3072), kernels.SMALL),
        ("dx = dy W^T", (1536, 3072, 64), kernels.UNEXPLAINED),
    ],
)
def test_what_is_known_to_slow_a_product(name, shape, reason):
    assert kernels._why_slow(name, *shape) == reason


@WITHOUT_GPU
def test_four_ways_through_a_double_block(monkeypatch):
    """The one forward of the block, in all of them; they give the same but for FP8."""
    own, runs = DoubleBlock.forward, []

    def counted(self, *args):
        runs.append(1)
        return own(self, *args)

    monkeypatch.setattr(DoubleBlock, "forward", counted)
    library, sizes = PaddleLibrary(), replace(TINY, text=4, width=128, rank=2)
    results, counts = {}, {}
    for way, call in kernels._ways(library, 12, sizes).items():
        call()
        runs.clear()
        results[way] = [library.get(x) for x in call()]  # a second call adds nothing to the first's gradients
        counts[way] = len(runs)
    assert counts == {kernels.COAT: 1, kernels.FP8_PRODUCTS: 1, kernels.PLAIN: 1, kernels.CHECKPOINTED: 2}
    plain = results[kernels.PLAIN]
    assert len(plain) == 4 + 2 * 12 and plain[0].shape == (1, 8, 128) and plain[1].shape == (1, 4, 128)
    assert all(np.abs(x).max() > 0 for x in plain)
    for x, y in zip(results[kernels.CHECKPOINTED], plain, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    errors, in_fp8 = (
        [np.sqrt(((x - y) ** 2).mean() / (y**2).mean()) for x, y in zip(results[way], plain, strict=True)]
        for way in (kernels.COAT, kernels.FP8_PRODUCTS)
    )
    assert max(errors[:2]) < 1e-6  # the forward pass rounds nothing
    assert 1e-3 < max(errors) < kernels.HALF_STEP
    assert min(in_fp8) > 1e-2 and max(in_fp8[:2]) < kernels.HALF_STEP  # every number has met FP8 products
    units = dict(kernels._block_errors(library, replace(sizes, tokens=(12,))))
    assert len(units) == 2 and all(0 < error < 1 for error in units.values())


@WITHOUT_GPU
def test_what_was_not_measured_is_said(monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    from ppcoat.bench.kernel_cases import Kernels

    library = PaddleLibrary()
    row, other = kernels._double_block(Kernels(library), replace(TINY, tokens=(6,), text=2, width=128))
    for each in (row, other):
        assert each.ms > 0 and not each.peak_mib and len(each.remarks) == 2
        assert set(each.others) == {kernels.PLAIN, kernels.CHECKPOINTED}
        assert [least for _, least in each.targets.values()] == [1.4, 1.0]
    assert [row.kernel, other.kernel] == ["double block", "double block, FP8 products"]
    kernel, memory = row.remarks
    assert kernel.startswith("without kernels: quantize, ") and "it needs an NVIDIA GPU" in kernel
    assert memory == "not measured: peak memory, paddle is on a CPU"
    row.targets = {"times as fast": (1.2, 1.4), "share": (0.9, 0.8)}
    row.peak_mib = {kernels.COAT: 123.4}
    monkeypatch.setenv("PPCOAT_BACKEND", "reference")
    assert library.fallbacks() == [
        "without kernels: all of the double block: PPCOAT_BACKEND asks for reference"
    ]
    text = kernels.kernel_table({"device": "card", "errors": {"double block": 0.5}, "rows": [row.entry()]})
    assert "times as fast 1.20 (target 1.4: missed)" in text and "share 0.90\n" in text
    assert "peak memory, MiB: coat+recompute 123" in text and memory in text
