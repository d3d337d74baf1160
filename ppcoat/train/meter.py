"""Time and memory of this process, on a CPU or on a GPU: two meters with the same methods."""

from __future__ import annotations

import platform
import time
from pathlib import Path

import paddle


class HostMeter:
    """Wall time, and resident memory as /proc tells it; None where there is no /proc."""

    def start(self) -> None:
        """Begin to measure time."""
        self._began = time.perf_counter()

    def stop(self) -> float:
        """Milliseconds since `start`. A CPU has done its work when Paddle's call returns."""
        return 1e3 * (time.perf_counter() - self._began)

    def memory(self) -> int | None:
        """Bytes resident now."""
        return _proc_bytes("/proc/self/status", "VmRSS")

    def peak_memory(self) -> int | None:
        """The most bytes that were ever resident in this process."""
        return _proc_bytes("/proc/self/status", "VmHWM")

    def total_memory(self) -> int | None:
        """Bytes that the machine has."""
        return _proc_bytes("/proc/meminfo", "MemTotal")

    def name(self) -> str:
        """The processor."""
        return _proc_value("/proc/cpuinfo", "model name") or platform.processor()


class GpuMeter:
    """Time between two events in the GPU's own stream, and the memory that Paddle has allocated there. The
    peak counts from the making of this object.
    """

    def __init__(self) -> None:
        paddle.device.cuda.reset_max_memory_allocated()

    def start(self) -> None:
        """Begin to measure time, when all earlier work is done."""
        self._began, self._ended = (paddle.device.cuda.Event(enable_timing=True) for _ in range(2))
        paddle.device.cuda.synchronize()
        self._began.record()

    def stop(self) -> float:
        """Milliseconds since `start`, until the work given to the GPU since then is done."""
        self._ended.record()
        self._ended.synchronize()
        return self._began.elapsed_time(self._ended)

    def memory(self) -> int:
        """Bytes allocated now."""
        return paddle.device.cuda.memory_allocated()

    def peak_memory(self) -> int:
        """The most bytes that were ever allocated."""
        return paddle.device.cuda.max_memory_allocated()

    def total_memory(self) -> int:
        """Bytes that the GPU has."""
        return paddle.device.cuda.get_device_properties().total_memory

    def name(self) -> str:
        """The GPU."""
        return paddle.device.cuda.get_device_name()


def _proc_bytes(file: str, field: str) -> int | None:
    """A line such as "VmHWM:   1234 kB" in bytes."""
    value = _proc_value(file, field)
    return None if value is None else int(value.removesuffix("kB")) * 1024


def _proc_value(file: str, field: str) -> str | None:
    """What stands behind the colon in the first line of that name; None if there is no such line or file."""
    lines = Path(file).read_text().splitlines() if Path(file).exists() else []
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in pairs if name.strip() == field), None)
