"""What the doctor says, and when it says that the main job cannot run."""

import re

import pytest

from ppcoat.cli import doctor
from ppcoat.cli.main import main
from ppcoat.device import on_gpu
from ppcoat.fp8 import backend
from ppcoat.nn.attention import EFFICIENT, FLASH, MATH


@pytest.fixture(scope="module")
def findings():
    return {finding.name: finding for finding in doctor.examine()}


def test_this_machine_can_run_the_main_job(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr()
    assert shown.err == "" and shown.out.splitlines()[-1].startswith("the main job can run")


def test_every_subject_has_a_line(findings):
    wanted = {
        "python",
        "ppdiffusers",
        "safetensors",
        "numpy",
        "device",
        "memory",
        "FP8 cast",
        "FP8 matmul",
        "attention",
    }
    wanted |= {"tiny FLUX", *(f"built with {part}" for part in ("CUDA", "CINN", "NCCL", "distributed"))}
    wanted |= {"kernel build", "Triton kernels", "Paddle's FP8 ops"}
    assert wanted <= set(findings)


def test_every_miss_says_what_is_lost_and_how_to_get_it(findings):
    for finding in findings.values():
        assert finding.mark in ("ok", "miss") and "\n" not in finding.what + finding.advice
        assert bool(finding.advice) == (finding.mark == "miss")
        assert any(word in finding.advice for word in ("install", "takes", "use ")) or finding.mark == "ok"


@pytest.mark.skipif(on_gpu(), reason="there is a GPU")
def test_without_a_gpu_no_fast_path_is_claimed(findings):
    assert findings["device"].mark == "miss" and findings["device"].what.startswith("cpu")
    for version, title in (("triton", "Triton kernels"), ("paddle", "Paddle's FP8 ops")):
        what = f"none of {len(backend.MODULES[version])} used: this is cpu"  # one line, not one for each op
        assert findings[title].what.startswith(what) and not any(
            f" in {version}" in name for name in findings
        )
        assert "it takes an NVIDIA GPU" in findings[title].advice or "pip install" in findings[title].advice


def test_a_small_kernel_is_built_and_what_lacks_for_it_is_named(findings, monkeypatch, tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed")
    from ppcoat.fp8 import driver_triton

    assert findings["kernel build"].mark == "ok"
    assert findings["kernel build"].what.startswith("a small kernel was built for sm_")
    driver_triton.trial_build.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    found = doctor.kernel_build()
    assert found.mark == "miss" and found.what.endswith("install gcc (apt install gcc)")
    assert "the slower references do" in found.advice


@pytest.mark.parametrize(
    ("flux", "newbie", "what", "lost"),
    [
        (FLASH, FLASH, "flash attention for FLUX and NewBie, as Paddle chooses", None),
        (EFFICIENT, EFFICIENT, "memory-efficient attention for FLUX and NewBie", "memory is that of flash"),
        # 24 heads, 4608 x 4608 tokens, float32 on this CPU
        (FLASH, MATH, "flash attention for FLUX, written out in matmuls for NewBie", "2.04 GB (calculated)"),
    ],
)
def test_attention_is_what_paddle_takes_for_each_model(monkeypatch, flux, newbie, what, lost):
    kernels = {128: flux, 96: newbie}
    monkeypatch.setattr(doctor, "kernel_of_paddle", lambda place, head_dim, dtype: kernels[head_dim])
    found = doctor.attention_row()
    assert found.what == what and found.mark == ("ok" if lost is None else "miss")
    assert lost is None or (lost in found.advice and "not measured" in found.advice)


def test_an_advice_names_everything_it_is_for():
    found = [
        doctor.Finding("miss", "gelu in triton", "wrong", "use a newer driver"),
        doctor.Finding("ok", "silu in triton", "fast"),
        doctor.Finding("miss", "device", "cpu", "use a card"),
        doctor.Finding("miss", "gelu_grad in triton", "wrong", "use a newer driver"),
    ]
    *_, first, second = doctor.doctor_table(found).splitlines()
    assert first == "  gelu in triton, gelu_grad in triton: use a newer driver"
    assert second == "  device: use a card"


def test_a_missing_model_or_a_broken_cast_fails(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(doctor, "TINY_FLUX", tmp_path)
    monkeypatch.setattr(doctor, "fast_paths", list)
    assert main(["doctor"]) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1 and "the main job cannot run: tiny FLUX" in shown.err
    assert "fail  tiny FLUX" in shown.out
    monkeypatch.setattr(doctor, "dequantize", lambda codes, *_: codes.astype("float32"))
    assert doctor.fp8_cast().mark == "fail"


def test_a_fast_path_is_shown_with_error_and_speed(monkeypatch):
    """As on a GPU: an op whose Triton version is the reference itself."""
    op = backend.OPS["log_decode"]
    monkeypatch.setattr(backend, "OPS", {"log_decode": op, "log_encode": backend.OPS["log_encode"]})
    monkeypatch.setattr(backend, "unavailable", lambda name: "")
    monkeypatch.setattr(backend.Op, "version", lambda self, name: self.reference)
    monkeypatch.setattr(backend.Op, "_verdicts", {}, raising=False)
    for each in backend.OPS.values():
        monkeypatch.setattr(each, "_verdicts", {})
    found = doctor.fast_paths()
    assert [finding.name for finding in found] == ["log_decode in triton", "log_encode in triton"]
    for finding in found:
        assert finding.mark == "ok" and finding.what.endswith("x")
        assert re.match(r"error 0\.\d+ of 1 allowed, [\d.]+ ms", finding.what)


def test_an_op_has_arguments_to_be_timed_with():
    for name, op in backend.OPS.items():
        with backend.use(backend.REFERENCE):
            op(*doctor._arguments(name))
