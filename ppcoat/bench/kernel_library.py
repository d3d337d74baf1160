"""Paddle as `benchmark kernels` uses it: tensors, timing, what the kernels replace, and a whole FLUX double
block, forward and backward.

`eager` holds, under the names of the ops, what one would write in 16-bit floats without FP8 and without fused
kernels. tests/fp8/kernels_with_torch.py has a class with the same methods for torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn
from paddle.distributed.fleet.utils import recompute

from ppcoat.device import dtype_name, on_gpu, uses_gpu
from ppcoat.errors import ConfigError
from ppcoat.fp8 import backend
from ppcoat.fp8.formats import NORM_EPSILON, fp8_support
from ppcoat.fp8.truth import PaddleTensors
from ppcoat.lora import inject_lora
from ppcoat.lora.layer import FLUX_TARGETS
from ppcoat.models.flux.transformer import DoubleBlock
from ppcoat.nn.convert import multiply_in_fp8, quantize_linears
from ppcoat.nn.saved_tensors import fp8_saved_tensors

FLUSHED = 2**30  # bytes written to empty the caches; they hold less, but this lasts longer than some launches
GROUP_SIZE = 128  # values that share a scale
BLOCK_OPS = ("quantize", "dequantize", "modulated_norm", "modulated_norm_grad", "rms_norm_rotated",
             "rms_norm_rotated_grad", "gelu", "gelu_grad", "gated_residual", "scaled_matmul")  # fmt: skip
LORA_DEVIATION = 0.02  # of a LoRA's B, so that its A has a gradient


class PaddleLibrary(PaddleTensors):
    """Paddle on its current device. On a CPU, where only tests run it, time is the process's. Raises
    ConfigError on a GPU where Triton can build no kernel."""

    name = "paddle"

    def __init__(self) -> None:
        self.on_gpu = on_gpu()
        if self.on_gpu and (trouble := backend.unavailable("triton")):
            raise ConfigError(f"nothing was measured: {trouble}")
        self.half = "bfloat16" if self.on_gpu else "float32"

    @staticmethod
    def has_gpu() -> bool:
        """Whether Paddle was built with CUDA and sees a card."""
        return uses_gpu("auto")

    def device(self) -> str:
        """Name of the device and version of the library, for the report."""
        card = paddle.device.cuda.get_device_name() if self.on_gpu else "cpu"
        return f"{card}, paddle {paddle.__version__}"

    def zeros(self, shape: list[int], dtype: str) -> Any:
        return paddle.zeros(shape, dtype)

    def event(self) -> Any:
        """A point in the device's time, once it is recorded; on a CPU in the process's."""
        return paddle.device.cuda.Event(enable_timing=True) if self.on_gpu else ProcessEvent()

    def flush(self, times: int = 1) -> None:
        """Write FLUSHED bytes so often; nothing on a CPU."""
        for _ in range(times if self.on_gpu else 0):
            paddle.zeros([FLUSHED], "uint8")

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        """The most that a call allocates on the device at one time; None on a CPU."""
        if not self.on_gpu:
            return None
        cuda = paddle.device.cuda
        cuda.synchronize()
        cuda.reset_max_memory_allocated()
        before = cuda.memory_allocated()
        call()
        cuda.synchronize()
        return cuda.max_memory_allocated() - before

    def matmul(self, x: Any, w: Any) -> Any:
        return paddle.matmul(x, w)

    def copy(self, nbytes: int) -> Callable[[], Any]:
        """A device-to-device copy that reads and writes `nbytes` in all."""
        source = paddle.zeros([nbytes // 2], "uint8")
        return lambda: source.clone()

    def scaled_fp8_matmul(self, m: int, k: int, n: int) -> Callable[[], Any] | None:
        """Paddle's own FP8 product with a scale per tensor, None where the device has none."""
        if not fp8_support().matmul:
            return None
        x, w = (paddle.ones(s).astype("float8_e4m3fn") for s in ([m, k], [n, k]))
        multiply = paddle.linalg.fp8_fp8_half_gemm_fused
        return lambda: multiply(x, w, transpose_x=False, transpose_y=True, output_dtype="bfloat16")

    def blockwise_fp8_matmul(self, m: int, k: int, n: int) -> Callable[[], Any] | None:
        """Paddle's FP8 product x W^T with the scales of `scaled_matmul`: None where its check fails and for
        sides that it does not take."""
        if m % 4 or k % 512 or n % 128 or not backend.OPS["scaled_matmul"].verdict("paddle").usable:
            return None
        x, w = (paddle.ones(s).astype("float8_e4m3fn") for s in ([m, k], [n, k]))
        scales = paddle.ones([k // GROUP_SIZE, m]), paddle.ones([n // GROUP_SIZE, k // GROUP_SIZE])
        multiply = paddle.incubate.nn.functional.fp8_gemm_blockwise
        return lambda: multiply(
            x, scales[0], w, scales[1], paddle.bfloat16, is_a_1d_scaled=True, is_b_1d_scaled=False
        )

    def fused_adamw(self, count: int) -> Callable[[], Any]:
        """A step of Paddle's AdamW on one float32 parameter."""
        weight = paddle.create_parameter([count], "float32")
        optimizer = paddle.optimizer.AdamW(1e-4, parameters=[weight])
        (weight * 1e-3).sum().backward()
        return optimizer.step

    def eager(self) -> dict[str, Callable]:
        def norm(x, shift, scale):
            return F.layer_norm(x, x.shape[-1:], epsilon=NORM_EPSILON) * (1 + scale) + shift

        def rms(x, weight, scale):
            y = x * paddle.rsqrt((x * x).mean(-1, keepdim=True) + NORM_EPSILON) * weight
            return (y * (1 + scale)).astype(x.dtype)

        def rms_rotated(x, weight, cos, sin):
            y = x * paddle.rsqrt((x * x).mean(-1, keepdim=True) + NORM_EPSILON) * weight
            a, b = y[..., 0::2], y[..., 1::2]
            rotated = paddle.stack([a * cos - b * sin, a * sin + b * cos], -1)
            return rotated.reshape(x.shape).astype(x.dtype)

        def quantize(x):
            groups = x.reshape([*x.shape[:-1], -1, GROUP_SIZE])
            scale = groups.abs().max(-1, keepdim=True).astype("float32") / 448
            return (groups / scale.astype(x.dtype)).astype("float8_e4m3fn"), scale

        def dequantize(codes, scale):
            values = codes.view("float8_e4m3fn").astype(self.half).reshape([*scale.shape, GROUP_SIZE])
            return values * scale.astype(self.half).unsqueeze(-1)

        return {
            "quantize": quantize,
            "dequantize": dequantize,
            "modulated_norm": norm,
            "rms_norm": rms,
            "rms_norm_rotated": rms_rotated,
            "gelu": lambda x: F.gelu(x, approximate=True),
            "silu": F.silu,
            "gated_residual": lambda y, gate, x: y * gate + x,
        }

    def gradient(self, function: Callable, x: Any, dy: Any) -> Callable[[], Any]:
        """Forward and backward of function(x), as autograd does it."""
        x = x.detach()
        x.stop_gradient = False
        return lambda: paddle.grad([function(x)], [x], [dy])

    def double_block(
        self, tokens: int, text: int, width: int, heads: int, rank: int
    ) -> tuple[Callable[[], list[Any]], ...]:
        """Four ways through a FLUX double block with LoRA, in the order of WAYS in kernels.py.

        Each call is one forward and backward on `tokens` tokens, `text` of them the text's. It gives img,
        txt, their gradients and the LoRAs', which last until the next call.

        The ways: the saving policy "coat+recompute"; the same with an FP8 base whose Linears multiply in FP8
        (model.quantize_matmul); autograd; autograd with gradient checkpointing. All have the same random
        weights in `self.half`, frozen, and the same LoRA (float32, alpha = rank) on every Linear of attention
        and feed-forward.
        """
        paddle.seed(0)  # its weights are the same in every call
        block = DoubleBlock(heads, width // heads)
        block.to(dtype=self.half)
        quantised = _with_fp8_products(block, heads, rank)
        _train_loras(block, rank)
        inputs = _block_inputs(tokens, text, width, width // heads, self.half)
        checkpointed = partial(recompute, block, use_reentrant=False)
        return (
            partial(_forward_and_backward, block, partial(_under_coat, block), *inputs),
            partial(_forward_and_backward, quantised, partial(_under_coat, quantised), *inputs),
            partial(_forward_and_backward, block, block, *inputs),
            partial(_forward_and_backward, block, checkpointed, *inputs),
        )

    def fallbacks(self) -> list[str]:
        """A line for each reason for which ops of the double block do not run in their kernels here."""
        wanted = backend.forced()
        if wanted not in (None, "triton"):
            return [f"without kernels: all of the double block: {backend.VARIABLE} asks for {wanted}"]
        names: dict[str, list[str]] = {}
        for name in BLOCK_OPS:
            names.setdefault(backend.OPS[name].verdict("triton").reason, []).append(name)
        return [f"without kernels: {', '.join(ops)}: {reason}" for reason, ops in names.items() if reason]


class ProcessEvent:
    """A device event's methods on a CPU: a point in the process's time."""

    def record(self) -> None:
        self._at = time.process_time()

    def synchronize(self) -> None:
        """On a CPU the work is done when Paddle's call returns."""

    def elapsed_time(self, later: ProcessEvent) -> float:
        """Milliseconds from this event to `later`."""
        return 1e3 * (later._at - self._at)


# The double block: all that is read of ppcoat/nn and of the model stands here and in `double_block`.


def _with_fp8_products(block: DoubleBlock, heads: int, rank: int) -> DoubleBlock:
    """A block of the same weights in FP8; its Linears of attention and feed-forward multiply in FP8."""
    model = nn.Layer()
    model.blocks = nn.LayerList([DoubleBlock(heads, block.attn.to_q.weight.shape[0] // heads)])
    (quantised,) = model.blocks
    quantised.to(dtype=dtype_name(block.attn.to_q.weight.dtype))
    quantised.set_state_dict(block.state_dict())
    quantize_linears(model)
    multiply_in_fp8(model)
    _train_loras(quantised, rank)
    return quantised


def _train_loras(block: DoubleBlock, rank: int) -> None:
    """Put LoRAs into `block`, every time the same.

    Not by train/model_spec.py's `prepare`: the very block that runs under COAT also runs under autograd, so
    what it saves is chosen in the pass (`_under_coat`) and not put into its Linears.
    """
    rng = np.random.default_rng(1)
    for layer in inject_lora(block, rank, rank, targets=FLUX_TARGETS["transformer_blocks"]).values():
        b = rng.standard_normal(layer.lora_B.shape) * LORA_DEVIATION
        layer.lora_B.set_value(b.astype(np.float32))
    block.train()


def _under_coat(block: DoubleBlock, *args: paddle.Tensor) -> tuple[paddle.Tensor, ...]:
    with fp8_saved_tensors("coat+recompute"):
        return block(*args)


def _block_inputs(
    tokens: int, text: int, width: int, head_dim: int, dtype: str
) -> tuple[tuple[paddle.Tensor, ...], ...]:
    """-> (img, txt), (vec, cos, sin) and the gradients of img and txt."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> paddle.Tensor:
        return paddle.to_tensor(rng.standard_normal(shape, dtype=np.float32)).astype(dtype)

    shapes = [(1, tokens - text, width), (1, text, width)]
    angles = paddle.to_tensor(rng.uniform(0, 6, [tokens, head_dim // 2]).astype("float32"))
    streams, grads = (tuple(normal(*shape) for shape in shapes) for _ in range(2))
    return streams, (normal(1, width), angles.cos(), angles.sin()), grads


def _forward_and_backward(
    block: DoubleBlock,
    forward: Callable,
    streams: tuple[paddle.Tensor, ...],
    constants: tuple[paddle.Tensor, ...],
    grads: tuple[paddle.Tensor, ...],
) -> list[paddle.Tensor]:
    streams = [x.detach() for x in streams]
    for x in streams:
        x.stop_gradient = False
    loras = [p for p in block.parameters() if not p.stop_gradient]
    for p in loras:
        p.clear_gradient(set_to_zero=False)
    outputs = forward(*streams, *constants)
    # Not paddle.grad: the block's backward takes gradients itself.
    paddle.autograd.backward(list(outputs), list(grads))
    return [x.detach() for x in outputs] + [x.grad for x in (*streams, *loras)]
