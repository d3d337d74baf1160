"""Host settings change speed and nothing else; devices that are not there are refused."""

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest

from ppcoat import device
from ppcoat.device import (
    core_count,
    gpu_place,
    keep_freed_memory,
    memory_in_use,
    set_device,
    tune_host,
    use_all_cores,
    use_avx2_on_amd,
    use_deterministic_kernels,
    uses_gpu,
)
from ppcoat.errors import ConfigError

OPENMP = Path(paddle.__file__).parent / "libs" / "libiomp5.so"
ROOT = Path(__file__).parents[1]
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
needs_openmp = pytest.mark.skipif(not OPENMP.exists(), reason="this wheel of Paddle has no Intel OpenMP")


@pytest.fixture
def cpu():
    before = paddle.get_device()
    paddle.device.set_device("cpu")
    yield
    paddle.device.set_device(before)


def test_products_and_sums_are_what_they_were(cpu):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((300, 500)), rng.standard_normal((500, 200))
    left, right = (paddle.to_tensor(x, dtype="float32") for x in (a, b))
    before = [(left @ right).numpy(), paddle.nn.functional.gelu(left).numpy(), left.mean().numpy()]
    tune_host()
    tune_host()
    after = [(left @ right).numpy(), paddle.nn.functional.gelu(left).numpy(), left.mean().numpy()]
    for old, new in zip(before, after, strict=True):
        # more threads add in another order: the last bits of a sum of 500 terms may differ
        np.testing.assert_allclose(new, old, rtol=0, atol=1e-4)
    np.testing.assert_allclose(after[0], a @ b, atol=1e-3)  # float64, sums of 500 terms


def test_memory_is_kept_where_malloc_is_glibcs(monkeypatch):
    if sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "mallopt"):
        assert keep_freed_memory() is True
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_large_blocks_leave_the_process_when_they_are_freed_and_others_stay(fresh_process):
    assert fresh_process["left"]["large"] < 0.1 and fresh_process["left"]["small"] > 0.9


CPUINFO = "vendor_id : {maker}\nflags : fpu sse2 {flags}\n"


@pytest.mark.parametrize(
    ("maker", "flags", "chosen"),
    [("AuthenticAMD", "avx avx2", "5"), ("AuthenticAMD", "avx", None), ("GenuineIntel", "avx2", None)],
)
def test_mkl_takes_avx2_on_amd_processors_that_have_it(tmp_path, monkeypatch, maker, flags, chosen):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(CPUINFO.format(maker=maker, flags=flags))
    monkeypatch.delenv("MKL_DEBUG_CPU_TYPE", raising=False)
    assert use_avx2_on_amd(cpuinfo) is (chosen is not None)
    assert os.environ.get("MKL_DEBUG_CPU_TYPE") == chosen


def test_the_users_choice_of_mkl_code_wins(tmp_path, monkeypatch):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(CPUINFO.format(maker="AuthenticAMD", flags="avx2"))
    monkeypatch.setenv("MKL_DEBUG_CPU_TYPE", "4")
    use_avx2_on_amd(cpuinfo)
    assert os.environ["MKL_DEBUG_CPU_TYPE"] == "4"
    assert use_avx2_on_amd(tmp_path / "missing") is False


def threads_of_a_new_process(omp_num_threads):
    """[after use_all_cores, after it again on one core alone]; Paddle reads the environment when imported."""
    code = f"""
import ctypes, os
from ppcoat.device import use_all_cores
openmp = ctypes.CDLL({str(OPENMP)!r})
for cores in (os.sched_getaffinity(0), [min(os.sched_getaffinity(0))]):
    os.sched_setaffinity(0, cores)
    assert use_all_cores()
    print("threads", openmp.omp_get_max_threads())
"""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= omp_num_threads
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr
    return [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("threads ")]


@needs_openmp
@pytest.mark.skipif(CORES < 2, reason="one core is all there is")
def test_every_core_that_the_process_may_use_is_used():
    assert threads_of_a_new_process({}) == [CORES, 1]


@needs_openmp
def test_the_user_may_say_how_many_threads():
    assert threads_of_a_new_process({"OMP_NUM_THREADS": "3"}) == [3, 3]


@pytest.mark.parametrize(("ranks", "share"), [("1", 8), ("2", 4), ("3", 2), ("16", 1), ("0", 8), ("two", 8)])
def test_ranks_on_one_machine_share_its_cores(monkeypatch, ranks, share):
    monkeypatch.setattr(device, "_users_thread_count", lambda: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setenv("PADDLE_LOCAL_SIZE", ranks)
    assert core_count() == share


def test_a_gpu_is_used_where_it_is_named_or_there(monkeypatch):
    monkeypatch.setattr(device, "_gpu_count", lambda: 1)
    assert uses_gpu("auto") and uses_gpu("gpu:1") and not uses_gpu("cpu")
    monkeypatch.setattr(device, "_gpu_count", lambda: 0)
    assert not uses_gpu("auto")


def test_a_wheel_without_these_libraries_is_left_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(paddle, "__file__", str(tmp_path / "paddle" / "__init__.py"))
    assert use_all_cores() is False


def test_cpu_is_always_there(cpu):
    set_device("cpu")
    assert paddle.get_device() == "cpu"


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(paddle.device, "is_compiled_with_cuda", lambda: False)


def test_auto_takes_the_cpu_where_there_is_no_gpu(cpu, no_gpu):
    set_device("auto")
    assert paddle.get_device() == "cpu"


@pytest.mark.parametrize("name", ["gpu", "gpu:0", "gpu:7"])
def test_a_gpu_that_is_not_there_is_refused_in_one_line(cpu, no_gpu, name):
    with pytest.raises(
        ConfigError, match=f"^device: came {name}, but Paddle sees 0 GPUs; use cpu"
    ) as refused:
        set_device(name)
    assert "\n" not in str(refused.value)
    assert paddle.get_device() == "cpu"


def test_gpus_are_counted_from_0(monkeypatch):
    chosen = []
    monkeypatch.setattr(paddle.device, "is_compiled_with_cuda", lambda: True)
    monkeypatch.setattr(paddle.device.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(paddle.device, "set_device", chosen.append)
    for name in ("auto", "gpu", "gpu:1", "cpu"):
        set_device(name)
    assert chosen == ["gpu", "gpu", "gpu:1", "cpu"]
    with pytest.raises(ConfigError, match="came gpu:2, but Paddle sees 2 GPUs"):
        set_device("gpu:2")


def test_the_place_of_a_gpu_is_that_which_set_device_would_choose(monkeypatch):
    monkeypatch.setattr(paddle, "CUDAPlace", lambda number: ("gpu", number))
    monkeypatch.setattr(paddle.device, "is_compiled_with_cuda", lambda: True)
    monkeypatch.setattr(paddle.device.cuda, "device_count", lambda: 2)
    places = [gpu_place(name) for name in ("auto", "gpu", "gpu:1", "gpu:2", "cpu")]
    assert places == [("gpu", 0), ("gpu", 0), ("gpu", 1), None, None]
    monkeypatch.setattr(paddle.device.cuda, "device_count", lambda: 0)
    assert gpu_place("auto") is gpu_place("gpu") is None


def test_deterministic_kernels_are_a_flag_of_paddles_on_a_gpu_and_nothing_on_a_cpu(cpu, monkeypatch):
    flags = []
    monkeypatch.setattr(paddle, "set_flags", flags.append)
    assert "nothing to do" in use_deterministic_kernels() and flags == []
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    assert "not measured" in use_deterministic_kernels()
    assert flags == [{"FLAGS_cudnn_deterministic": True}]


def test_memory_in_use_grows_by_the_bytes_of_a_tensor(cpu):
    def shown():
        match = re.fullmatch(r"Allocated: (\d+\.\d\d)GB, Reserved: (\d+\.\d\d)GB", memory_in_use())
        return np.array([float(number) for number in match.groups()])

    before = shown()
    tensor = paddle.zeros([25, 1000, 1000])
    np.testing.assert_allclose(shown() - before, 0.1, atol=0.011)
    del tensor
    np.testing.assert_allclose(shown(), before, atol=0.011)


@pytest.mark.parametrize("users", [None, "error::FutureWarning"])
def test_a_process_hides_what_libraries_say_on_import_and_what_the_user_chose_stays(monkeypatch, users):
    monkeypatch.delenv("PYTHONWARNINGS", raising=False)
    if users is not None:
        monkeypatch.setenv("PYTHONWARNINGS", users)
    told = []
    monkeypatch.setattr(
        "multiprocessing.context.SpawnProcess.start",
        lambda process: told.extend(os.environ["PYTHONWARNINGS"].split(",")),
    )
    device.ChildProcess(print)
    assert "ignore::UserWarning:jieba._compat" in told and (users is None or told[0] == users)
    assert os.environ.get("PYTHONWARNINGS") == users
