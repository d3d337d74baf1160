"""What Triton needs from the process before a kernel can run: a driver, and tools to build with.

Triton's own driver asks torch which device and stream are current. `connect` gives it one that asks Paddle,
by Triton's public interface: it does not matter what was imported before, nor whether torch is installed.
`trial_build` and `what_is_missing` say whether kernels can be built here; neither needs a card.
"""

from __future__ import annotations

import functools
import os
import shutil
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import paddle
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

FLUSHED = 2**30  # bytes that Triton's autotuner writes to empty the caches before it times


class PaddleDriver(nvidia.CudaDriver):
    """Triton's driver for NVIDIA cards with Paddle's answers. The current card may change between calls.

    Raises what Triton raises where it can neither load nor build its bridge to libcuda.
    """

    def __init__(self) -> None:
        # Not super().__init__(): it imports torch.
        self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
        self.get_current_stream = paddle.base.libpaddle._get_current_raw_stream
        self.get_device_capability = paddle.device.cuda.get_device_capability
        self.set_current_device = lambda device: paddle.device.set_device(f"gpu:{device}")
        self._targets: dict[int, GPUTarget] = {}

    def get_current_device(self) -> int:
        """Index of Paddle's current card, which its last op has made CUDA's current one, too."""
        return int(paddle.get_device().removeprefix("gpu:"))

    def get_current_target(self) -> GPUTarget:
        """Compute capability of the current card; each card is asked once."""
        device = self.get_current_device()
        if device not in self._targets:
            self._targets[device] = super().get_current_target()
        return self._targets[device]

    @staticmethod
    def is_active() -> bool:
        return paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0

    def get_active_torch_device(self) -> Any:
        """Paddle's place of the current card, where Triton's own driver gives a torch.device."""
        return paddle.CUDAPlace(self.get_current_device())

    def get_device_interface(self) -> ModuleType:
        """Paddle's module of events and synchronize, with which Triton times."""
        return paddle.device.cuda

    def get_empty_cache_for_benchmark(self) -> Any:
        """Tensor [FLUSHED / 4] int32 that Triton writes between timed calls."""
        return paddle.empty([FLUSHED // 4], "int32")


def connect() -> None:
    """Make Triton ask Paddle for device, stream and capability from now on. Raises what PaddleDriver does."""
    triton.runtime.driver.set_active(PaddleDriver())


def what_is_missing() -> str:
    """What lacks for compiling Triton's C code (its bridge to libcuda, a launcher for each kernel), and what
    to install; empty if nothing does."""
    named = os.environ.get("CC")
    if not (shutil.which(named) if named else shutil.which("gcc") or shutil.which("clang")):
        there = f"CC names {named}, which is not there" if named else "there is no C compiler"
        return f"{there}: install gcc (apt install gcc)"
    scheme = sysconfig.get_default_scheme()  # Debian's own names /usr/local, where no headers are
    headers = Path(sysconfig.get_paths(scheme.replace("posix_local", "posix_prefix"))["include"])
    if not (headers / "Python.h").is_file():
        return f"Python.h is not in {headers}: install Python's headers (apt install python3-dev)"
    return ""


@functools.cache
def trial_build(capability: int) -> None:
    """Build a small kernel for a card of this capability (90 for sm_90) as Triton builds every kernel, with
    ptxas, and its launcher with the C compiler; nothing is taken from a cache. The launcher is neither linked
    to libcuda nor loaded, so no card is needed. Raises what Triton raises."""
    from triton.runtime.build import _build

    types = {"p_x": "*fp32", "n": "i32", "BLOCK": "constexpr"}
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.always_compile = True
        source = ASTSource(JITFunction(_doubled), types, {"BLOCK": 128})
        kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    launcher = nvidia.make_launcher(source.constants, dict(enumerate(types.values())), None)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "launcher.c"
        file.write_text(launcher, encoding="utf-8")
        _build(kernel.name, str(file), folder, [], nvidia.include_dirs, [], [])


def _doubled(p_x, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_x + i, 2 * tl.load(p_x + i, mask=i < n), mask=i < n)
