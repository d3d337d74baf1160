"""The process and the device that a command runs on: CPU settings that change speed but never results;
set_device, and the dtype in which models compute; meters of time and memory, with the same methods for CPU
and GPU; and ChildProcess, which runs a function in a process of its own.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import TracebackType
from typing import Any

import paddle

from ppcoat.errors import ConfigError, warnings_of_a_child
from ppcoat.signals import child_main, held, started_with_signals_held

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # <malloc.h>
LARGEST_KEPT = 32 << 20  # HEAP_MAX_SIZE / 2 of glibc on 64 bits
COMPUTE_DTYPES = ("auto", "float32", "bfloat16", "float16")
GRACE = 30  # seconds between SIGTERM and SIGKILL


def tune_host() -> None:
    """Apply the three CPU settings below, where they apply, and leave signals to Python: Paddle would print a
    stack for SIGTERM. Call once, before the first tensor."""
    with held():
        paddle.disable_signal_handler()
    keep_freed_memory()
    use_avx2_on_amd()
    use_all_cores()


def keep_freed_memory() -> bool:
    """Let glibc reuse freed memory instead of handing every block above 128 KiB back to the kernel.

    Paddle's CPU allocator calls malloc for each tensor. By default blocks above 128 KiB are mapped and
    unmapped each time, and the page faults cost more than the arithmetic (measured: an elementwise product of
    1 M floats takes 1.6 ms by default and 0.12 ms after this call). Blocks above LARGEST_KEPT bytes, the
    most that glibc allows, still go back to the kernel at once. Returns False if malloc is not glibc's.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    settings = ((_M_MMAP_THRESHOLD, LARGEST_KEPT), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 << 20))
    return all([libc.mallopt(name, value) == 1 for name, value in settings])


def use_avx2_on_amd(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Make the MKL inside Paddle's CPU wheel use its AVX2 code on AMD processors, as it does on Intel's.

    That MKL is of 2019 and chooses its code by the maker's name; without this call its matrix products run at
    65 instead of 160 GFLOP/s on two cores of an EPYC. MKL reads the variable at its first product. A value
    set by the user is not changed. Returns False on other processors.
    """
    if not cpuinfo.exists():
        return False
    text = cpuinfo.read_text()
    if "AuthenticAMD" not in text or not re.search(r"\bavx2\b", text):
        return False
    os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "5")
    return True


def use_all_cores() -> bool:
    """Let matrix products and OpenMP loops use every core (see core_count); Paddle's CPU wheel starts with
    one.

    Calls the C interfaces of the MKL and OpenMP libraries inside the wheel, because Paddle reads the
    environment when it is imported. An OMP_NUM_THREADS set by the user has priority. Returns False if the
    libraries are not found.
    """
    cores = core_count()
    libraries = Path(paddle.__file__).parent / "libs"
    if not all((libraries / name).exists() for name in ("libmklml_intel.so", "libiomp5.so")):
        return False
    mkl = ctypes.CDLL(str(libraries / "libmklml_intel.so"))
    mkl.MKL_Set_Dynamic(0)  # otherwise MKL goes back to the single thread that Paddle asked for
    mkl.MKL_Set_Num_Threads(cores)
    ctypes.CDLL(str(libraries / "libiomp5.so")).omp_set_num_threads(cores)
    return True


def core_count() -> int:
    """Cores that this process may use: the user's OMP_NUM_THREADS, else its share of the machine's cores if
    paddle.distributed.launch started several processes here."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    local_ranks = os.environ.get("PADDLE_LOCAL_SIZE", "1")
    share = cores // int(local_ranks) if local_ranks.isdecimal() and int(local_ranks) else cores
    return _users_thread_count() or max(1, share)


def _users_thread_count() -> int | None:
    """OMP_NUM_THREADS at the start of the process; `import paddle` writes 1 into os.environ."""
    started_with = Path("/proc/self/environ")
    if not started_with.exists():
        return None
    value = dict(
        entry.split(b"=", 1) for entry in started_with.read_bytes().split(b"\0") if b"=" in entry
    ).get(b"OMP_NUM_THREADS", b"")
    return int(value) if value.isdigit() and int(value) > 0 else None


def set_device(name: str) -> None:
    """Make "cpu", "gpu", "gpu:N" or "auto" (a GPU if Paddle sees one) Paddle's device. Raises ConfigError for
    another name and for a GPU that Paddle does not see."""
    if not re.fullmatch(r"auto|cpu|gpu(:\d+)?", name):
        raise ConfigError(f"device: came {name!r}, wanted auto, cpu, gpu or gpu:N")
    gpus = _gpu_count()
    if name == "auto":
        name = "gpu" if gpus else "cpu"
    if name.startswith("gpu") and int(name.partition(":")[2] or 0) >= gpus:
        raise ConfigError(
            f"device: came {name}, but Paddle sees {gpus} GPUs; use cpu, or install a GPU wheel of Paddle"
        )
    paddle.device.set_device(name)


def uses_gpu(name: str) -> bool:
    """True if `set_device(name)` chooses a GPU."""
    return name.startswith("gpu") or (name == "auto" and _gpu_count() > 0)


def on_gpu() -> bool:
    """Whether Paddle's current device is a GPU. Call after set_device."""
    return paddle.get_device().startswith("gpu")


def gpu_place(name: str) -> paddle.CUDAPlace | None:
    """The place of the GPU that `set_device(name)` would choose; None where Paddle sees no such GPU."""
    number = int(name.partition(":")[2] or 0)
    return paddle.CUDAPlace(number) if uses_gpu(name) and number < _gpu_count() else None


def use_deterministic_kernels() -> str:
    """Let Paddle's kernels give the same bits each time. Returns a line that says what it costs. Call after
    set_device and before the first step.

    Without this flag the backward of flash attention adds up in the order in which its blocks of threads
    happen to run; with it one block does a whole head (`get_num_split` in Paddle's flash_attn_grad_kernel.cu
    is 1 then). The convolutions of the VAE follow the same flag.
    """
    if not on_gpu():
        return "deterministic: nothing to do, on a CPU every step gives the same bits"
    paddle.set_flags({"FLAGS_cudnn_deterministic": True})
    return (
        "deterministic: flash attention's backward has one block of threads for a head of a picture (24 for "
        "FLUX at batch 1), fewer than a large card has multiprocessors: slower, how much was not measured"
    )


def _gpu_count() -> int:
    return paddle.device.cuda.device_count() if paddle.device.is_compiled_with_cuda() else 0


def computes_in_half() -> bool:
    """Whether Paddle computes in bfloat16 and float16 on its current device: on a GPU it does, on a CPU most
    operators lack them. The functions below ask nothing else. Call after set_device."""
    return on_gpu()


def default_dtype() -> str:
    """The dtype of a model where nobody names one: bfloat16 on a GPU, float32 on a CPU."""
    return "bfloat16" if computes_in_half() else "float32"


def dtype_name(dtype: paddle.dtype | str) -> str:
    """paddle.float32 or "float32" -> "float32"."""
    return str(dtype).rpartition(".")[2]


def compute_dtype(name: str | paddle.dtype | None) -> str | None:
    """What a user asks a model to compute in ("float32", paddle.bfloat16, "auto", ...) as the name of a
    dtype; None, which is `default_dtype`, for None and "auto". float32 on a GPU means products of TF32 (10
    bits of mantissa) unless the process starts with NVIDIA_TF32_OVERRIDE=0.

    Raises ConfigError for another name, and for half precision where the device does not compute in it.
    """
    name = "auto" if name is None else dtype_name(name)
    if name not in COMPUTE_DTYPES:
        raise ConfigError(f"dtype: came {name!r}, wanted one of {', '.join(COMPUTE_DTYPES)}")
    if name not in ("auto", "float32") and not computes_in_half():
        raise ConfigError(
            f"dtype {name}: Paddle computes in float32 only on a CPU; use float32 or auto, or leave it out"
        )
    return None if name == "auto" else name


def memory_in_use() -> str:
    """ "Allocated: 8.23GB, Reserved: 10.50GB" (1 GB = 1e9 bytes): bytes of tensors on the current device, and
    bytes that Paddle has reserved for tensors. On a CPU the two are equal."""
    if on_gpu():
        allocated, reserved = paddle.device.cuda.memory_allocated(), paddle.device.cuda.memory_reserved()
    else:
        from paddle.base import core

        allocated, reserved = (
            core.host_memory_stat_current_value(kind, 0) for kind in ("Allocated", "Reserved")
        )
    return f"Allocated: {allocated / 1e9:.2f}GB, Reserved: {reserved / 1e9:.2f}GB"


class ChildProcess:
    """Runs function(pipe, *arguments) in a process of its own. Context manager: waits for the process on
    exit.

    The process starts a new Python ("spawn"), so function and arguments must be picklable. If the
    block ends with an error, the process gets SIGTERM, and is killed after GRACE seconds. Ctrl+C is for the
    parent, the process ignores it. pipe: connection to the process; EOF means that it died.
    """

    def __init__(self, function: Callable, *arguments: Any, daemon: bool = False) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        # pickled here, so that the process takes its signals before it imports what these need
        work = bytes(ForkingPickler.dumps((function, arguments)))
        self.process = context.Process(
            target=child_main, args=(theirs, work), daemon=daemon, name=f"ppcoat: {function.__name__}"
        )
        users, os.environ["PYTHONWARNINGS"] = os.environ.get("PYTHONWARNINGS"), warnings_of_a_child()
        try:
            with started_with_signals_held():
                self.process.start()
        finally:
            os.environ.pop("PYTHONWARNINGS")
            if users is not None:
                os.environ["PYTHONWARNINGS"] = users
        theirs.close()  # only the process has this end now, so EOF means that it died

    def __enter__(self):
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            self.process.terminate()
            self.process.join(GRACE)
            self.process.kill()
        self.process.join()
        self.pipe.close()

    def answer(self) -> Any:
        """Wait for the next object that the process sends, and return it, or raise it if it is an exception.
        Raises MemoryError if the system killed the process, ChildProcessError if it died in another way."""
        try:
            answer = self.pipe.recv()
        except EOFError as error:
            self.process.join()
            code = self.process.exitcode
            if code == -9:
                raise MemoryError(
                    "the system killed a process of this command, most likely for its memory"
                ) from error
            raise ChildProcessError(f"a process of this command ended with exit code {code}") from error
        if isinstance(answer, BaseException):
            raise answer
        return answer


class HostMeter:
    """Wall time, and resident memory from /proc; memory is None on systems without /proc."""

    def start(self) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def stop(self) -> float:
        """Milliseconds since `start`. On a CPU the work is done when Paddle's call returns."""
        return 1e3 * (time.perf_counter() - self._began)

    def memory(self) -> int | None:
        """Resident bytes of this process."""
        return _proc_bytes("/proc/self/status", "VmRSS")

    def peak_memory(self) -> int | None:
        """Largest number of resident bytes of this process so far."""
        return _proc_bytes("/proc/self/status", "VmHWM")

    def total_memory(self) -> int | None:
        """Bytes of memory of the machine."""
        return _proc_bytes("/proc/meminfo", "MemTotal")

    def free_memory(self) -> int | None:
        """Bytes that a process could still take, by the kernel's estimate."""
        return _proc_bytes("/proc/meminfo", "MemAvailable")

    def name(self) -> str:
        """Name of the processor."""
        return _proc_value("/proc/cpuinfo", "model name") or platform.processor()


class GpuMeter:
    """Time between two events in the GPU's stream, and the memory that Paddle has allocated there. The peak
    is that since this object was made.
    """

    def __init__(self) -> None:
        paddle.device.cuda.reset_max_memory_allocated()

    def start(self) -> None:
        """Wait for all earlier work, then start the clock."""
        self._began, self._ended = (paddle.device.cuda.Event(enable_timing=True) for _ in range(2))
        paddle.device.cuda.synchronize()
        self._began.record()

    def stop(self) -> float:
        """Wait for the work given to the GPU since `start` -> milliseconds it took."""
        self._ended.record()
        self._ended.synchronize()
        return self._began.elapsed_time(self._ended)

    def memory(self) -> int:
        """Bytes that are allocated."""
        return paddle.device.cuda.memory_allocated()

    def peak_memory(self) -> int:
        """Largest number of allocated bytes so far."""
        return paddle.device.cuda.max_memory_allocated()

    def total_memory(self) -> int:
        """Bytes of memory of the GPU."""
        return paddle.device.cuda.get_device_properties().total_memory

    def free_memory(self) -> int:
        """Bytes that this process can still take: what the driver says is free, other programs counted, and
        what Paddle has reserved but not allocated. A Paddle that does not ask the driver knows of this
        process only."""
        cuda = paddle.device.cuda
        ask = getattr(getattr(paddle, "cuda", None), "mem_get_info", None)
        free = ask()[0] if ask else self.total_memory() - cuda.memory_reserved()
        return free + cuda.memory_reserved() - cuda.memory_allocated()

    def name(self) -> str:
        """Name of the GPU."""
        return paddle.device.cuda.get_device_name()


def _proc_bytes(file: str, field: str) -> int | None:
    """A line such as "VmHWM:   1234 kB" in bytes."""
    value = _proc_value(file, field)
    return None if value is None else int(value.removesuffix("kB")) * 1024


def _proc_value(file: str, field: str) -> str | None:
    """The value of the first line "field: value"; None if there is no such line or file."""
    lines = Path(file).read_text().splitlines() if Path(file).exists() else []
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in pairs if name.strip() == field), None)
