"""Draw in four steps with a FLUX-Lightning LoRA, if wanted through static graphs, and time it.

The flags are those of PaddleMIX's FLUX-Lightning example, and `--model`. One thing differs: a LoRA file says
its own alpha here, so `--lora_scale` is 1.0 unless told otherwise. The file published by PaddleMIX was
trained with rank 32 and alpha 8 and does not say so.

The graphs are compiled by CINN (Paddle's compiler) if Paddle has it. Without CINN `paddle.jit.to_static`
silently uses its plain executor; so CINN is requested by name, and a line is printed if it is missing. The
graphs share their parameters with the model. PaddleMIX's example uses `paddle.incubate.jit.inference`
instead, which writes all weights to disk, has them in memory twice, and on a CPU (Paddle 3.3.1) returns wrong
results for whole blocks (errors as large as the values).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import paddle
from PIL import Image

from ppcoat.device import on_gpu, set_device
from ppcoat.errors import ConfigError
from ppcoat.infer.card import flux_within_card, placement_of
from ppcoat.infer.drawing import WARM_UPS, LightningDrawing, check_numbers
from ppcoat.infer.generate import (
    control_picture,
    output_folder,
    put_loras,
    read_loras,
    save_picture,
)
from ppcoat.lora import merge_lora, read_lora_file
from ppcoat.models.blocks import adapters
from ppcoat.models.flux.pipeline import FluxPipeline
from ppcoat.models.flux.transformer import FluxTransformer2DModel
from ppcoat.models.loading import check_folder

OFF = ("0", "false", "off", "no")


def draw_lightning(drawing: LightningDrawing) -> Path:
    """Draw the first prompt of `drawing` with its LoRAs and save it; returns the file.

    Raises ConfigError before any weight is read for what can be checked.
    """
    check_numbers(drawing)
    if drawing.repeat < 0:
        raise ConfigError(f"repeat: came {drawing.repeat}, wanted 0 (draw once) or how many runs to average")
    if drawing.inference_optimize and (drawing.quantize or drawing.vram or drawing.offload):
        raise ConfigError(
            "inference_optimize folds the LoRA into float weights that stay on the card: leave out "
            "--inference_optimize, or --quantize, --vram and --offload"
        )
    files = drawing.files
    check_folder(files)
    loras = read_loras(drawing, files, "transformer", "text_encoder", "text_encoder_2")
    folder = output_folder(drawing)
    set_device(drawing.device)
    pipeline = flux_within_card(drawing, files, None, placement_of([drawing], files))
    put_loras(pipeline, loras)
    if drawing.inference_optimize:
        merge_lora(pipeline.transformer)
        compile_transformer(pipeline.transformer)
    pipeline.set_progress_bar_config(disable=drawing.repeat > 0)
    picture = _timed(lambda: draw_once(pipeline, drawing), drawing.repeat)
    return save_picture(picture, folder, 0, drawing.prompt[0], drawing.seed)


def draw_once(
    pipeline: FluxPipeline, drawing: LightningDrawing, output_type: str = "pil"
) -> Image.Image | np.ndarray:
    """The picture of the first prompt with what `pipeline` holds; output_type as in FluxPipeline."""
    return pipeline(
        drawing.prompt[0],
        height=drawing.height,
        width=drawing.width,
        num_inference_steps=drawing.steps,
        guidance_scale=drawing.guidance_scale,
        seed=drawing.seed,
        max_sequence_length=drawing.max_sequence_length,
        output_type=output_type,
        control_image=control_picture(drawing, pipeline),
    ).images[0]


def default_scale(path: str | Path) -> float:
    """1.0, with a word of warning for a file that does not say its alpha. Raises ConfigError for one that
    cannot be read."""
    if not read_lora_file(path).states_alpha:
        print(
            f"{path} does not say its alpha, so alpha = rank is assumed (scale 1.0). The FLUX-Lightning file "
            "that PaddleMIX published was trained with alpha 8 at rank 32: give --lora_scale 0.25 for it"
        )
    return 1.0


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


def _timed(draw: Callable[[], Image.Image], repeat: int) -> Image.Image:
    for _ in range(WARM_UPS if repeat else 1):
        picture = draw()
    wait_for_device()
    start = time.perf_counter()
    for _ in range(repeat):
        picture = draw()
    wait_for_device()
    if repeat:
        milliseconds = (time.perf_counter() - start) / repeat * 1000
        print(
            f"average of {repeat} runs after {WARM_UPS} to warm up: "
            f"{milliseconds:.1f} ms from prompt to picture"
        )
    return picture


def wait_for_device() -> None:
    """Wait until the GPU has done all its work; on a CPU nothing is pending."""
    if on_gpu():
        paddle.device.synchronize()
