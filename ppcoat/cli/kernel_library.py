"""Paddle as `benchmark kernels` uses it: tensors, timing, and what the kernels replace.

`eager` holds, under the names of the ops, what one would write in 16-bit floats without FP8 and without fused
kernels. tests/fp8/kernels_with_torch.py has a class with the same methods for torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ppcoat.fp8.rules import NORM_EPSILON

if TYPE_CHECKING:
    from ppcoat.cli.kernels import Sizes

FLUSHED = 2**28  # bytes written before each timed call, more than any cache holds
BLOCK = 128


class PaddleLibrary:
    """Paddle on its current device. On a CPU, where only tests run it, time is the process's."""

    name = "paddle"

    def __init__(self) -> None:
        import paddle
        import paddle.nn.functional as F

        self.paddle, self.F = paddle, F
        self.on_gpu = paddle.get_device().startswith("gpu")
        self.half = "bfloat16" if self.on_gpu else "float32"

    @staticmethod
    def has_gpu() -> bool:
        """Whether Paddle is installed, was built with CUDA and sees a card."""
        try:
            import paddle
        except ImportError:
            return False
        return paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0

    def device(self) -> str:
        """Name of the device and version of the library, for the report."""
        card = self.paddle.device.cuda.get_device_name() if self.on_gpu else "cpu"
        return f"{card}, paddle {self.paddle.__version__}"

    def put(self, values: np.ndarray, dtype: str | None = None) -> Any:
        """A tensor on the device, in `dtype` or the array's own."""
        tensor = self.paddle.to_tensor(values)
        return tensor if dtype is None else tensor.astype(dtype)

    def get(self, x: Any) -> np.ndarray:
        """A float64 array."""
        return x.astype("float32").numpy().astype(np.float64)

    def zeros(self, shape: list[int], dtype: str) -> Any:
        return self.paddle.zeros(shape, dtype)

    def median_ms(self, call: Callable[[], Any], runs: int) -> float:
        """Median of `runs` calls by device events, caches emptied before each; the first call left out."""
        call()
        if not self.on_gpu:
            return _host_ms(call, runs)
        event, times = self.paddle.device.cuda.Event, []
        for _ in range(runs):
            self.paddle.zeros([FLUSHED], "uint8")
            start, stop = event(enable_timing=True), event(enable_timing=True)
            start.record()
            call()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
        return float(np.median(times))

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        """The most that a call allocates on the device at one time; None on a CPU."""
        if not self.on_gpu:
            return None
        cuda = self.paddle.device.cuda
        cuda.synchronize()
        cuda.reset_max_memory_allocated()
        before = cuda.memory_allocated()
        call()
        cuda.synchronize()
        return cuda.max_memory_allocated() - before

    def matmul(self, x: Any, w: Any) -> Any:
        return self.paddle.matmul(x, w)

    def copy(self, nbytes: int) -> Callable[[], Any]:
        """A device-to-device copy that reads and writes `nbytes` in all."""
        source = self.paddle.zeros([nbytes // 2], "uint8")
        return lambda: source.clone()

    def scaled_fp8_matmul(self, m: int, k: int, n: int) -> Callable[[], Any] | None:
        """Paddle's own FP8 product with a scale per tensor, None where the device has none."""
        if not self.on_gpu:
            return None
        x, w = (self.paddle.ones(s).astype("float8_e4m3fn") for s in ([m, k], [n, k]))
        multiply = self.paddle.linalg.fp8_fp8_half_gemm_fused
        return lambda: multiply(x, w, transpose_x=False, transpose_y=True, output_dtype="bfloat16")

    def fused_adamw(self, count: int) -> Callable[[], Any]:
        """A step of Paddle's AdamW on one float32 parameter."""
        weight = self.paddle.create_parameter([count], "float32")
        optimizer = self.paddle.optimizer.AdamW(1e-4, parameters=[weight])
        (weight * 1e-3).sum().backward()
        return optimizer.step

    def eager(self) -> dict[str, Callable]:
        F = self.F

        def norm(x, shift, scale):
            return F.layer_norm(x, x.shape[-1:], epsilon=NORM_EPSILON) * (1 + scale) + shift

        def rms(x, weight, cos, sin):
            y = x * self.paddle.rsqrt((x * x).mean(-1, keepdim=True) + NORM_EPSILON) * weight
            a, b = y[..., 0::2], y[..., 1::2]
            turned = self.paddle.stack([a * cos - b * sin, a * sin + b * cos], -1)
            return turned.reshape(x.shape).astype(x.dtype)

        def quantize(x):
            groups = x.reshape([*x.shape[:-1], -1, BLOCK])
            scale = groups.abs().max(-1, keepdim=True).astype("float32") / 448
            return (groups / scale.astype(x.dtype)).astype("float8_e4m3fn"), scale

        def dequantize(codes, scale):
            values = codes.view("float8_e4m3fn").astype(self.half).reshape([*scale.shape, BLOCK])
            return values * scale.astype(self.half).unsqueeze(-1)

        return {
            "quantize": quantize,
            "dequantize": dequantize,
            "modulated_norm": norm,
            "rms_norm_rotated": rms,
            "gelu": lambda x: F.gelu(x, approximate=True),
            "silu": F.silu,
            "gated_residual": lambda y, gate, x: y * gate + x,
        }

    def gradient(self, function: Callable, x: Any, dy: Any) -> Callable[[], Any]:
        """Forward and backward of function(x), as autograd does it."""
        x = x.detach()
        x.stop_gradient = False
        return lambda: self.paddle.grad([function(x)], [x], [dy])

    def double_block(self, tokens: int, sizes: Sizes) -> dict[str, Callable[[], list[Any]]]:
        """Ways through a double block, see kernel_block.py."""
        from .kernel_block import double_block

        return double_block(tokens, sizes, self.half)

    def fallbacks(self) -> list[str]:
        """Ops of the double block that do not run in a kernel here."""
        from .kernel_block import fallbacks

        return fallbacks()


def _host_ms(call: Callable[[], Any], runs: int) -> float:
    times = []
    for _ in range(runs):
        start = time.process_time()
        call()
        times.append(1e3 * (time.process_time() - start))
    return float(np.median(times))
