"""`benchmark kernels` with torch tensors, on a machine with a card and no Paddle: the same kernels and cases.

    python tests/fp8/kernels_with_torch.py --output kernels.json

The package is entered without its __init__, which wants Paddle. The double block is in launcher_block.py.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

PACKAGE = Path(__file__).resolve().parents[2] / "ppcoat"
FLUSHED, BLOCK, NORM_EPSILON = 2**30, 128, 1e-6  # as in kernel_library.py, fp8/formats.py


class TorchLibrary:
    """torch on its CUDA device; methods as in PaddleLibrary."""

    name, half, device_name = "torch", "bfloat16", "cuda"

    def __init__(self) -> None:
        import torch
        import torch.nn.functional as F
        import torch.utils.checkpoint

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
        tensor = self.torch.from_numpy(values).to(self.device_name)
        return tensor if dtype is None else tensor.to(getattr(self.torch, dtype))

    def get(self, x: Any) -> np.ndarray:
        return x.detach().double().cpu().numpy()

    def codec(self, fmt: Any, expand: bool, positive: bool) -> Any:
        return SimpleNamespace(fmt=fmt, expand=expand, positive=positive)

    def zeros(self, shape: list[int], dtype: str) -> Any:
        return self.torch.zeros(shape, dtype=getattr(self.torch, dtype), device=self.device_name)

    def event(self) -> Any:
        return self.torch.cuda.Event(enable_timing=True)

    def flush(self, times: int = 1) -> None:
        for _ in range(times):
            self.zeros([FLUSHED], "uint8")

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        cuda = self.torch.cuda
        cuda.synchronize()
        cuda.reset_peak_memory_stats()
        before = cuda.memory_allocated()
        call()
        cuda.synchronize()
        return cuda.max_memory_allocated() - before

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

    def blockwise_fp8_matmul(self, m: int, k: int, n: int) -> None:
        """torch's product with scales of blocks is not timed."""

    def fused_adamw(self, count: int) -> Callable[[], Any]:
        weight = self.torch.nn.Parameter(self.zeros([count], "float32"))
        weight.grad = self.torch.ones_like(weight)
        return self.torch.optim.AdamW([weight], lr=1e-4, fused=True).step

    def eager(self) -> dict[str, Callable]:
        F, torch = self.F, self.torch

        def norm(x, shift, scale):
            return F.layer_norm(x, x.shape[-1:], eps=NORM_EPSILON) * (1 + scale) + shift

        def rms(x, weight, scale):
            return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + NORM_EPSILON) * weight * (1 + scale)

        def rms_rotated(x, weight, cos, sin):
            y = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + NORM_EPSILON) * weight
            a, b = y[..., 0::2], y[..., 1::2]
            return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(x.shape).to(x.dtype)

        def quantize(x):
            groups = x.unflatten(-1, (-1, BLOCK))
            scale = groups.abs().amax(-1, keepdim=True).float() / 448
            return (groups / scale.to(x.dtype)).to(torch.float8_e4m3fn), scale

        def dequantize(codes, scale):
            values = codes.view(torch.float8_e4m3fn).to(torch.bfloat16).unflatten(-1, (-1, BLOCK))
            return values * scale.to(torch.bfloat16).unsqueeze(-1)

        return {
            "quantize": quantize,
            "dequantize": dequantize,
            "modulated_norm": norm,
            "rms_norm": rms,
            "rms_norm_rotated": rms_rotated,
            "gelu": lambda x: F.gelu(x, approximate="tanh"),
            "silu": F.silu,
            "gated_residual": lambda y, gate, x: y * gate + x,
        }

    def gradient(self, function: Callable, x: Any, dy: Any) -> Callable[[], Any]:
        x = x.detach().requires_grad_()
        return lambda: self.torch.autograd.grad(function(x), x, dy)

    def double_block(
        self, tokens: int, text: int, width: int, heads: int, rank: int
    ) -> tuple[Callable[[], list[Any]], ...]:
        from launcher_block import LauncherBlock, autograd_block, random_stream, with_fp8_weights

        from ppcoat.bench.kernel_cases import LAUNCHERS

        def put(values: np.ndarray, dtype: str = self.half) -> Any:
            return self.put(values, dtype)

        counts, rng = (text, tokens - text), np.random.default_rng(0)
        sizes = SimpleNamespace(width=width, heads=heads, rank=rank)
        streams = tuple(random_stream(put, sizes, count, seed) for seed, count in enumerate(counts))
        inputs, grads = (
            [put(rng.standard_normal([1, n, width], dtype="float32")) for n in counts] for _ in range(2)
        )
        vec = put(rng.standard_normal([1, width], dtype="float32"))
        wanted = [*inputs, *(lora for stream in streams for lora in stream.loras())]
        for x in wanted:
            x.requires_grad_()
        ops, operation = TorchOps(), _block_operation(self.torch)
        plain = partial(autograd_block, self.eager(), ops, streams, vec)
        checkpoint = partial(self.torch.utils.checkpoint.checkpoint, plain, use_reentrant=False)

        def coat(streams: Any, *_: Any) -> tuple[Any, Any]:
            return operation.apply(LauncherBlock(LAUNCHERS, ops, streams, self.half), vec, *wanted)

        def forward_and_backward(block: Callable) -> list[Any]:
            outputs = block(*inputs)
            return [*outputs, *self.torch.autograd.grad(outputs, wanted, grads)]

        in_fp8 = partial(coat, with_fp8_weights(ops, streams))
        ways = partial(coat, streams), in_fp8, plain, checkpoint
        return tuple(partial(forward_and_backward, block) for block in ways)

    def fallbacks(self) -> list[str]:
        return []


class TorchOps:
    """Products and attention as launcher_block.py wants them."""

    def __init__(self) -> None:
        import torch

        self.torch, self.F = torch, torch.nn.functional

    def linear(self, x: Any, w: Any, b: Any) -> Any:
        return self.F.linear(x, w.t(), b)

    def times(self, x: Any, w: Any) -> Any:
        return x @ w

    def times_transposed(self, x: Any, w: Any) -> Any:
        return x @ w.t()

    def transposed_times(self, x: Any, y: Any) -> Any:
        return x.flatten(0, 1).t() @ y.flatten(0, 1)

    def fp8_weight(self, w: Any) -> tuple[Any, Any]:
        blocks = w.float().unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
        scale = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scale[:, None, :, None]).to(self.torch.float8_e4m3fn)
        return codes.view(self.torch.uint8).reshape(w.shape), scale

    def concat(self, parts: Any, axis: int) -> Any:
        return self.torch.cat(parts, axis)

    def attention(self, *qkv: Any) -> Any:
        heads_first = self.F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv))
        return heads_first.transpose(1, 2).contiguous()

    def attention_again(self, *qkv: Any) -> tuple[Any, Callable]:
        qkv = [x.detach().requires_grad_() for x in qkv]
        with self.torch.enable_grad():
            output = self.attention(*qkv)
        return output.detach(), lambda do: self.torch.autograd.grad(output, qkv, do)


def _block_operation(torch: Any) -> type:
    class BlockOperation(torch.autograd.Function):
        """A LauncherBlock as one operation: vec, txt, img and all LoRAs -> txt, img."""

        @staticmethod
        def forward(ctx, block, vec, txt, img, *loras):
            ctx.block = block
            return block.forward(vec, txt, img)

        @staticmethod
        def backward(ctx, d_txt, d_img):
            return None, None, *ctx.block.backward(d_txt, d_img)

    return BlockOperation


def main(argv: list[str]) -> int:
    """Exit status 0, or 2 for wrong flags and where there is no card."""
    spec = importlib.util.spec_from_file_location(
        "ppcoat", PACKAGE / "__init__.py", submodule_search_locations=[str(PACKAGE)]
    )
    sys.modules["ppcoat"] = importlib.util.module_from_spec(spec)
    from ppcoat.bench import kernels
    from ppcoat.config.flags import add_flags, from_flags
    from ppcoat.errors import ConfigError

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser, kernels.KernelFlags)
    try:
        kernels.run_with(TorchLibrary, from_flags(kernels.KernelFlags, parser.parse_args(argv)))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
