"""`benchmark kernels`: refused without a card; its whole path on a CPU, in Triton's interpreter, at tiny
sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import paddle
import pytest

from ppcoat.cli import kernels
from ppcoat.cli.kernel_library import PaddleLibrary
from ppcoat.cli.main import main

ROOT = Path(__file__).parents[2]
WITHOUT_GPU = pytest.mark.skipif(PaddleLibrary.has_gpu(), reason="there is a GPU")
TINY = kernels.Sizes(
    tokens=(3,), width=256, heads=2, linears=((64, 130), (128, 128)), parameters=1000, peak=8, runs=1
)

HIDDEN = """
import runpy, sys
sys.modules.update(dict.fromkeys(["paddle", "ppdiffusers", "torch"]))
sys.argv = ["kernels.py"]
try:
    runpy.run_path({file!r}, run_name="__main__")
finally:
    import ppcoat.cli.kernel_cases
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
    script = HIDDEN.format(file=str(ROOT / "tests/fp8/kernels_with_torch.py"))
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
    assert timed == set(LAUNCHERS) - encoders - {"scaled_matmul"} | {"y = x W", "dx = dy W^T"}
    assert set(report["errors"]) == timed - {"adamw_step"}
    assert all(row["ms"] > 0 for row in report["rows"])
    assert report["device"] == f"cpu, paddle {paddle.__version__}"
    assert any(line.startswith("adamw_step") for line in shown)
