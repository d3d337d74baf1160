"""Which version of an op runs, and what is said where it is not the wanted one."""

import inspect
import logging

import numpy as np
import paddle
import pytest

from ppcoat.cli.main import main
from ppcoat.data import garments
from ppcoat.errors import ConfigError
from ppcoat.fp8 import adamw, backend, matmul, norm, pointwise
from ppcoat.fp8.backend import Op, Unsuited, Verdict
from ppcoat.fp8.quantize import quantize

X = paddle.to_tensor([1.0, 2.0])


def doubled(x, times=2):
    """The reference of these tests."""
    return x * times


@pytest.fixture
def gpu(monkeypatch):
    """gpu(triton=f, paddle=g) -> an op with these versions, as if its tensors lay on a GPU."""

    def build(**versions):
        monkeypatch.setattr(backend, "_on_gpu", lambda x: True)
        monkeypatch.setattr(backend, "unavailable", lambda name: "")
        modules = {name: {"doubled": name} if name in versions else {} for name in backend.ORDER[:-1]}
        monkeypatch.setattr(backend, "MODULES", modules)
        made = Op(doubled)
        monkeypatch.setattr(made, "version", lambda name: versions.get(name, doubled))

        def check(candidate):
            return float((candidate(X) - doubled(X)).abs().max() / 0.5)

        monkeypatch.setattr(made, "check", check)
        return made

    return build


def tripled(x, times=2):
    return x * 3


def near(x, times=2):
    """Passes the check, and is told from the reference by its 0.25."""
    return x * times + 0.25


def broken(x, times=2):
    raise RuntimeError("ptxas said\nno such register")


def unsuited(x, times=2):
    if x.shape[0] > 2:
        raise Unsuited("more than two numbers")
    return near(x, times)


def test_tensors_on_a_cpu_go_to_the_reference(monkeypatch):
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    monkeypatch.setattr(Op, "verdict", lambda self, name: pytest.fail("nothing is to be checked"))
    assert Op(doubled)(X, times=5).tolist() == [5.0, 10.0]
    codes, scale = quantize(X, adamw.FP8Format("e4m3", 448.0, 2.0**-6, 2.0**-9, 3, "float8_e4m3fn"), 2)
    assert codes.tolist()[1] == 0x7E


def test_the_first_version_that_passes_its_check_runs(gpu, caplog):
    op = gpu(triton=near, paddle=tripled)
    assert op(X).tolist() == [2.25, 4.25] and op(X, times=1).tolist() == [1.25, 2.25]
    assert op.verdict("triton") == Verdict(0.5, "") and caplog.records == []


@pytest.mark.parametrize(
    ("version", "reason"), [(tripled, "error 4, allowed 1"), (broken, "no such register")]
)
def test_a_version_that_fails_its_check_is_left_with_one_logged_reason(gpu, caplog, version, reason):
    op = gpu(triton=version, paddle=near)
    assert op(X).tolist() == op(X).tolist() == [2.25, 4.25]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "doubled does not run in triton" in record.getMessage() and reason in record.getMessage()


def test_a_check_that_says_nan_has_failed(gpu):
    op = gpu(triton=lambda x, times=2: x * float("nan"))
    assert op(X).tolist() == [2.0, 4.0]
    assert np.isnan(op.verdict("triton").error) and not op.verdict("triton").usable


def test_a_mistake_of_ours_is_not_a_reason_to_fall_back(gpu):
    def buggy(x, times=2):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        gpu(triton=buggy)(X)


def test_nor_is_one_in_a_later_call(gpu):
    """What Triton raises while it builds is one: test_driver.py."""

    def fails_on_three(x, times=2):
        if x.shape[0] > 2:
            raise RuntimeError("no matter of building")
        return near(x, times)

    op = gpu(triton=fails_on_three)
    assert op(X).tolist() == [2.25, 4.25]
    with pytest.raises(RuntimeError, match="no matter of building"):
        op(paddle.ones([3]))
    assert op.verdict("triton").usable


def test_an_input_that_a_version_does_not_take_goes_to_the_next(gpu, caplog):
    op, three = gpu(triton=unsuited), paddle.ones([3])
    assert op(X).tolist() == [2.25, 4.25]
    assert op(three).tolist() == op(three).tolist() == [2.0, 2.0, 2.0]
    assert [record.getMessage() for record in caplog.records] == [
        "doubled does not run in triton: more than two numbers"
    ]
    with backend.use("triton"), pytest.raises(Unsuited):
        op(three)


def test_use_and_the_variable_force_a_version(gpu, monkeypatch):
    op = gpu(triton=near)
    with backend.use("reference"):
        assert op(X).tolist() == [2.0, 4.0]
        with backend.use("triton"):
            assert op(X).tolist() == [2.25, 4.25]
        assert backend.forced() == "reference"
    monkeypatch.setenv(backend.VARIABLE, "reference")
    assert op(X).tolist() == [2.0, 4.0]
    with backend.use("triton"):  # nearer than the variable
        assert op(X).tolist() == [2.25, 4.25]
    monkeypatch.setenv(backend.VARIABLE, "paddle")  # no such version was written
    assert op(X).tolist() == [2.0, 4.0]


def test_a_forced_version_that_cannot_run_is_an_error_in_one_line(gpu, monkeypatch):
    op = gpu(triton=tripled)
    with (
        backend.use("triton"),
        pytest.raises(ConfigError, match="doubled cannot run in it.*error 4") as raised,
    ):
        op(X)
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(paddle.get_device() != "cpu", reason="there is a GPU")
def test_triton_forced_without_a_gpu(monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "triton")
    monkeypatch.setattr(quantize, "_verdicts", {})
    with pytest.raises(
        ConfigError, match="quantize cannot run in it: this is cpu, and it needs an NVIDIA GPU"
    ):
        quantize(X, adamw.FP8Format("e4m3", 448.0, 0.1, 0.1, 3, "float8_e4m3fn"), 2)


@pytest.mark.skipif(paddle.is_compiled_with_cuda(), reason="Triton may run here")
def test_triton_forced_without_a_gpu_stops_a_training_before_its_pictures_are_encoded(
    tmp_path, write_run, monkeypatch, capsys
):
    data = tmp_path / "data"
    garments.write_folder(data, 2, seed=1, motif="gold star", prefix="[trigger] ")
    monkeypatch.setenv(backend.VARIABLE, "triton")
    before = sorted(tmp_path.rglob("*"))
    assert main(["train", str(write_run(tmp_path, data, train={"steps": 1}))]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "it needs an NVIDIA GPU; unset PPCOAT_BACKEND" in error
    assert "quantize" not in error  # no op was asked for yet
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "run.yaml"])
    monkeypatch.setenv(backend.VARIABLE, "reference")
    backend.check_forced()


def test_an_unknown_name_is_refused(monkeypatch):
    with pytest.raises(
        ConfigError, match="backend.use: unknown backend 'cuda'; use one of triton, paddle, ref"
    ):
        backend.use("cuda").__enter__()
    monkeypatch.setenv(backend.VARIABLE, "fast")
    with pytest.raises(ConfigError, match="PPCOAT_BACKEND: unknown backend 'fast'"):
        Op(doubled)(X)


def test_every_listed_version_has_its_signature():
    assert {op.name for op in (norm.rms_norm, pointwise.silu, matmul.scaled_matmul)} < set(backend.OPS)
    assert set(backend.MODULES["triton"]) == set(backend.OPS)
    assert set(backend.MODULES["paddle"]) < set(backend.OPS)
    for name in backend.MODULES["paddle"]:
        op = backend.OPS[name]
        assert op.version("paddle").__name__ == f"{name}_by_paddle"
        twin, reference = (inspect.signature(f) for f in (op.version("paddle"), op.reference))
        assert list(twin.parameters) == list(reference.parameters)
