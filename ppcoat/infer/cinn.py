"""The transformer's blocks as static graphs, compiled by CINN (Paddle's compiler) if Paddle has it.

Without CINN `paddle.jit.to_static` silently uses its plain executor; so CINN is requested by name, and a line
is printed if it is missing. The graphs share their parameters with the model. PaddleMIX's example uses
`paddle.incubate.jit.inference` instead, which writes all weights to disk, has them in memory twice, and on a
CPU (Paddle 3.3.1) returns wrong results for whole blocks (errors as large as the values).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import paddle

from ppcoat.device import on_gpu
from ppcoat.errors import ConfigError
from ppcoat.models.blocks import adapters
from ppcoat.models.flux.transformer import FluxTransformer2DModel

OFF = ("0", "false", "off", "no")


def cinn_missing() -> str | None:
    """The reason why CINN cannot compile for the current device; None if it can. Call after set_device."""
    if not paddle.is_compiled_with_cinn():
        return "this Paddle is built without it, as every CPU wheel is"
    if not on_gpu():
        return f"it compiles for NVIDIA GPUs, and the device is {paddle.get_device()}"
    for name in ("FLAGS_use_cinn", "ENABLE_CINN_IN_DY2ST"):
        if os.environ.get(name, "").lower() in OFF:
            return f"the environment has {name}={os.environ[name]}"
    return None


def compile_transformer(model: FluxTransformer2DModel) -> None:
    """Make `model` draw through two static graphs: one of all double blocks, one of all single blocks.

    A graph is traced at its first call and for each new set of input shapes; a line is printed each time.
    Another line is printed if CINN is missing; the graphs then run on Paddle's own kernels. For drawing only:
    no gradients, no controlnets. Raises ConfigError if the model has a LoRA, because a graph would freeze its
    strength.
    """
    if adapters(model):
        raise ConfigError("the model has a LoRA, whose strength a static graph would freeze: merge it first")
    reason = cinn_missing()
    if reason is not None:
        print(f"CINN is not used: {reason}. Static graphs draw the same picture with Paddle's own kernels.")
    backend = "CINN" if reason is None else None
    model.jit_transformer_blocks = StaticGraph(model.jit_transformer_blocks, backend)
    model.jit_single_transformer_blocks = StaticGraph(model.jit_single_transformer_blocks, backend)
    model.forward = model.jit_forward


class StaticGraph:
    """A method over tensors as static graphs, one for each set of input shapes.

    backend: "CINN", or None for Paddle's own kernels.
    """

    def __init__(self, method: Callable, backend: str | None):
        self.name = method.__name__
        self.traced: set[tuple] = set()
        self._call = paddle.jit.to_static(method, full_graph=True, backend=backend)

    @paddle.no_grad()
    def __call__(self, *tensors: paddle.Tensor) -> paddle.Tensor | tuple[paddle.Tensor, ...]:
        key = tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors)
        if key in self.traced:
            return self._call(*tensors)
        start = time.perf_counter()
        result = self._call(*tensors)
        wait_for_device()
        shapes = ", ".join("x".join(map(str, tensor.shape)) for tensor in tensors)
        why = "compiled again for new shapes" if self.traced else "compiled for shapes"
        print(f"{self.name} {why} {shapes} in {time.perf_counter() - start:.1f} s")
        self.traced.add(key)
        return result


def wait_for_device() -> None:
    """Wait until the GPU has done all its work; on a CPU nothing is pending."""
    if on_gpu():
        paddle.device.synchronize()
