"""Meters: real memory and time on the CPU, and CUDA's events and counters in the right order on a GPU."""

import mmap
import time
from types import SimpleNamespace

import paddle
import pytest

from ppcoat import device
from ppcoat.device import GpuMeter, HostMeter


def test_time_is_in_milliseconds():
    meter = HostMeter()
    meter.start()
    time.sleep(0.02)
    assert 20 <= meter.stop() < 500


def test_peak_memory_remembers_what_was_freed():
    meter = HostMeter()
    before, size = meter.memory(), 64 << 20
    block = mmap.mmap(-1, size)  # from the kernel: malloc could hand out memory that is resident already
    block.write(b"1" * size)
    assert meter.memory() - before > 0.9 * size
    block.close()
    assert meter.peak_memory() - before > 0.9 * size  # what was freed still counts
    assert before < meter.peak_memory() < meter.total_memory()
    assert 0 < meter.free_memory() < meter.total_memory()
    assert meter.name()


def test_a_system_without_proc_gives_none(monkeypatch):
    monkeypatch.setattr(device, "Path", lambda file: SimpleNamespace(exists=lambda: False))
    meter = HostMeter()
    assert (meter.memory(), meter.peak_memory(), meter.total_memory()) == (None, None, None)
    assert meter.free_memory() is None


@pytest.fixture
def calls(monkeypatch):
    """paddle.device.cuda replaced by a recorder: what would be asked of a GPU, in order."""
    done = []

    class Event:
        def __init__(self, enable_timing=False):
            assert enable_timing

        def record(self):
            done.append(("record", self))

        def synchronize(self):
            done.append(("wait", self))

        def elapsed_time(self, end):
            done.append(("elapsed", self, end))
            return 12.5

    cuda = SimpleNamespace(
        Event=Event,
        synchronize=lambda: done.append(("synchronize",)),
        reset_max_memory_allocated=lambda: done.append(("reset",)),
        memory_allocated=lambda: 100,
        max_memory_allocated=lambda: 300,
        memory_reserved=lambda: 700,
        get_device_properties=lambda: SimpleNamespace(total_memory=10_000),
    )
    monkeypatch.setattr(paddle.device, "cuda", cuda)
    return done


def test_gpu_time_is_taken_between_two_events(calls):
    meter = GpuMeter()
    meter.start()
    assert meter.stop() == 12.5
    assert [call[0] for call in calls] == ["reset", "synchronize", "record", "record", "wait", "elapsed"]
    begin, end = calls[2][1], calls[3][1]
    assert begin is not end and calls[4][1] is end and calls[5][1:] == (begin, end)
    assert (meter.memory(), meter.peak_memory()) == (100, 300)


def test_free_memory_counts_other_programs_and_what_paddle_holds_in_reserve(calls, monkeypatch):
    """4,000 bytes are free by the driver; of 700 that Paddle has reserved, 100 are in use."""
    monkeypatch.setattr(paddle, "cuda", SimpleNamespace(mem_get_info=lambda: (4_000, 10_000)), raising=False)
    assert GpuMeter().free_memory() == 4_000 + 600
    monkeypatch.setattr(paddle, "cuda", SimpleNamespace())  # an older Paddle does not ask
    assert GpuMeter().free_memory() == 10_000 - 100
