"""`benchmark kernels` with torch tensors, on a machine with a card and no Paddle: the same kernels and cases.

    python tests/fp8/kernels_with_torch.py --output kernels.json

The package is entered without its __init__, which wants Paddle.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PACKAGE = Path(__file__).resolve().parents[2] / "ppcoat"
FLUSHED, NORM_EPSILON = 2**28, 1e-6  # as in ppcoat/cli/kernel_library.py


class TorchLibrary:
    """torch on its CUDA device; methods as in PaddleLibrary."""

    name, half, on_gpu = "torch", "bfloat16", True

    def __init__(self) -> None:
        import torch
        import torch.nn.functional as F

        self.torch, self.F = torch, F

    @staticmethod
    def has_gpu() -> bool:
        try:
            import torch
        except ImportError:
            return False
        return torch.cuda.is_available()

    def device(self) -> str:
        return f"{self.torch.cuda.get_device_name()}, torch {self.torch.__version__}"

    def put(self, values: np.ndarray, dtype: str | None = None) -> Any:
        tensor = self.torch.from_numpy(values).cuda()
        return tensor if dtype is None else tensor.to(getattr(self.torch, dtype))

    def get(self, x: Any) -> np.ndarray:
        return x.double().cpu().numpy()

    def zeros(self, shape: list[int], dtype: str) -> Any:
        return self.torch.zeros(shape, dtype=getattr(self.torch, dtype), device="cuda")

    def median_ms(self, call: Callable[[], Any], runs: int) -> float:
        call()
        event, times = self.torch.cuda.Event, []
        for _ in range(runs):
            self.zeros([FLUSHED], "uint8")
            start, stop = event(enable_timing=True), event(enable_timing=True)
            start.record()
            call()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
        return float(np.median(times))

    def matmul(self, x: Any, w: Any) -> Any:
        return x @ w

    def copy(self, nbytes: int) -> Callable[[], Any]:
        source = self.zeros([nbytes // 2], "uint8")
        return source.clone

    def scaled_fp8_matmul(self, m: int, k: int, n: int) -> Callable[[], Any] | None:
        if self.torch.cuda.get_device_capability() < (8, 9):
            return None
        x, w = (self.zeros(shape, "float32").to(self.torch.float8_e4m3fn) for shape in ([m, k], [n, k]))
        one = self.torch.ones([], device="cuda")
        dtype = self.torch.bfloat16
        return lambda: self.torch._scaled_mm(x, w.t(), scale_a=one, scale_b=one, out_dtype=dtype)

    def fused_adamw(self, count: int) -> Callable[[], Any]:
        weight = self.torch.nn.Parameter(self.zeros([count], "float32"))
        weight.grad = self.torch.ones_like(weight)
        return self.torch.optim.AdamW([weight], lr=1e-4, fused=True).step

    def eager(self) -> dict[str, Callable]:
        F, torch = self.F, self.torch

        def norm(x, shift, scale):
            return F.layer_norm(x, x.shape[-1:], eps=NORM_EPSILON) * (1 + scale) + shift

        def rms(x, weight, cos, sin):
            y = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + NORM_EPSILON) * weight
            a, b = y[..., 0::2], y[..., 1::2]
            return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(x.shape)

        return {
            "modulated_norm": norm,
            "rms_norm_rotated": rms,
            "gelu": lambda x: F.gelu(x, approximate="tanh"),
            "silu": F.silu,
            "gated_residual": lambda y, gate, x: y * gate + x,
        }

    def gradient(self, function: Callable, x: Any, dy: Any) -> Callable[[], Any]:
        x = x.detach().requires_grad_()
        return lambda: self.torch.autograd.grad(function(x), x, dy)


def main(argv: list[str]) -> int:
    """Exit status 0, or 2 for wrong flags and where there is no card."""
    spec = importlib.util.spec_from_file_location(
        "ppcoat", PACKAGE / "__init__.py", submodule_search_locations=[str(PACKAGE)]
    )
    sys.modules["ppcoat"] = importlib.util.module_from_spec(spec)
    from ppcoat.cli import kernels
    from ppcoat.errors import ConfigError

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kernels.add_arguments(parser)
    try:
        kernels.run_with(TorchLibrary, parser.parse_args(argv))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
