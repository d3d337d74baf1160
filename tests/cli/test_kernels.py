"""`benchmark kernels`: refused without a card; its whole path on a CPU, in Triton's interpreter, at tiny
sizes."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import paddle
import pytest

from ppcoat.cli import kernels
from ppcoat.cli.kernel_library import PaddleLibrary
from ppcoat.cli.main import main
from ppcoat.models.flux import DoubleBlock

ROOT = Path(__file__).parents[2]
WITHOUT_GPU = pytest.mark.skipif(PaddleLibrary.has_gpu(), reason="there is a GPU")
TINY = kernels.Sizes(
    tokens=(3,), text=1, width=256, heads=2, linears=((64, 130), (128, 128)), parameters=1000, peak=8, runs=1
)

HIDDEN = """
import runpy, sys
sys.modules.update(dict.fromkeys(["paddle", "ppdiffusers", "torch"]))
sys.argv = ["kernels.py"]
try:
    runpy.run_path({file!r}, run_name="__main__")
finally:
    sys.path.insert(0, {folder!r})
    import ppcoat.cli.kernel_cases, launcher_block
"""

# Runs in a process of its own: Triton reads TRITON_INTERPRET when a kernel is defined.
MEASURE = """
import json, sys
sys.path.insert(0, {tests!r})
from conftest import adapted, plain
from ppcoat.cli import kernels
from ppcoat.cli.kernel_cases import Kernels
from ppcoat.cli.kernel_library import PaddleLibrary
def connect(launcher):
    return lambda *args, **kwargs: plain(launcher(*(adapted(arg) for arg in args), **kwargs))
sizes = kernels.Sizes(**{sizes!r})
report = kernels.measure(Kernels(PaddleLibrary(), connect), sizes)
print(kernels.table(report))
print(json.dumps(report))
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


def test_every_kernel_is_checked_and_timed():
    pytest.importorskip("triton", reason="Triton is not installed")
    if PaddleLibrary.has_gpu():
        pytest.skip("the command itself measures here")
    sizes = {name: getattr(TINY, name) for name in TINY.__dataclass_fields__}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE.format(tests=str(ROOT / "tests/fp8"), sizes=sizes)],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    *shown, last = done.stdout.splitlines()
    report = json.loads(last)
    from ppcoat.cli.kernel_cases import LAUNCHERS

    assert all(0 <= error <= 1 for error in report["errors"].values()), report["errors"]
    timed = {row["kernel"] for row in report["rows"]}
    encoders = {"log_encode", "signed_log_encode"}
    whole = {"y = x W", "dx = dy W^T", "double block"}
    assert timed == set(LAUNCHERS) - encoders - {"scaled_matmul"} | whole
    assert set(report["errors"]) == timed - {"adamw_step"}
    assert all(row["ms"] > 0 for row in report["rows"])
    assert report["device"] == f"cpu, paddle {paddle.__version__}"
    assert any(line.startswith("adamw_step") for line in shown)
    assert sum("not measured: share of FP8 peak (target 0.6)" in line for line in shown) == 1
    (block,) = (row for row in report["rows"] if row["kernel"] == "double block")
    assert set(block["others"]) == {kernels.PLAIN, kernels.CHECKPOINTED}
    assert [least for _, least in block["targets"].values()] == [1.4, 1.0]


@WITHOUT_GPU
def test_three_ways_through_a_double_block(monkeypatch):
    """One holds FP8, one runs the block's own forward once, one twice; all give the same but for FP8."""
    own, runs = DoubleBlock.forward, []

    def counted(self, *args):
        runs.append(1)
        return own(self, *args)

    monkeypatch.setattr(DoubleBlock, "forward", counted)
    library, sizes = PaddleLibrary(), replace(TINY, text=4, width=128, rank=2)
    results, counts = {}, {}
    for way, call in library.double_block(12, sizes).items():
        call()
        runs.clear()
        results[way] = [library.get(x) for x in call()]  # a second call adds nothing to the first's gradients
        counts[way] = len(runs)
    assert counts == {kernels.COAT: 0, kernels.PLAIN: 1, kernels.CHECKPOINTED: 2}
    plain = results[kernels.PLAIN]
    assert len(plain) == 4 + 2 * 12 and plain[0].shape == (1, 8, 128) and plain[1].shape == (1, 4, 128)
    assert all(np.abs(x).max() > 0 for x in plain)
    for x, y in zip(results[kernels.CHECKPOINTED], plain, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    errors = [
        np.sqrt(((x - y) ** 2).mean() / (y**2).mean())
        for x, y in zip(results[kernels.COAT], plain, strict=True)
    ]
    assert max(errors[:2]) < 1e-6  # the forward pass rounds nothing
    assert 1e-3 < max(errors) < kernels.HALF_STEP
    assert kernels._block_error(library, replace(sizes, tokens=(12,))) < 1


@WITHOUT_GPU
def test_what_was_not_measured_is_said(monkeypatch):
    library = PaddleLibrary()
    (row,) = kernels._double_block(library, replace(TINY, tokens=(6,), text=2, width=128))
    assert row.ms > 0 and not row.peak_mib
    kernel, memory = row.remarks
    assert kernel.startswith("without kernels: quantize, ") and "it needs an NVIDIA GPU" in kernel
    assert memory == "not measured: peak memory, paddle is on a CPU"
    row.targets = {"times as fast": (1.2, 1.4), "share": (0.9, 0.8)}
    row.peak_mib = {kernels.COAT: 123.4}
    monkeypatch.setenv("PPCOAT_BACKEND", "reference")
    assert library.fallbacks() == [
        "without kernels: all of the double block: PPCOAT_BACKEND asks for reference"
    ]
    text = kernels.table({"device": "card", "errors": {"double block": 0.5}, "rows": [asdict(row)]})
    assert "times as fast 1.20 (target 1.4: missed)" in text and "share 0.90\n" in text
    assert "peak memory, MiB: coat+recompute 123" in text and memory in text
