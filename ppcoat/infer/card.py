"""Loading a model such that it draws within the card: quantised, with parts that come and go, as the flags
say or, with --vram, as the plan of drawing chooses.

The text encoders are loaded to host memory first, the transformer is quantised on the device, or its copy on
disk read, while nothing else is there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import paddle

from ppcoat.device import default_dtype, on_gpu
from ppcoat.infer.editing import Sight, reference_pixels
from ppcoat.lora.files import adapter_file
from ppcoat.models.fingerprint import folder_identity
from ppcoat.models.flux.drawing import DEFAULT_SIDE
from ppcoat.models.flux.files import FluxFiles
from ppcoat.models.flux.pipeline import FluxPipeline
from ppcoat.models.loading import load_transformer
from ppcoat.models.newbie.files import load_nextdit, load_quantized_nextdit
from ppcoat.models.newbie.pipeline import NewbiePipeline
from ppcoat.models.offload import Placement, loaded_to_host
from ppcoat.models.quantized_base import QuantizedCopy, load_quantized_transformer
from ppcoat.models.tensor_files import Component
from ppcoat.plan import GB
from ppcoat.plan.drawing import FORMATS, Drawn, drawing_memory, plan_drawing


def placement_of(drawings: Sequence[Any], model: FluxFiles | Path) -> Placement:
    """How drawings (infer.drawing.Drawing, of one command) are to lie on the device. With --vram it is
    planned for the largest, from headers, and told in one line. Raises ConfigError if nothing fits. Call
    after set_device."""
    drawing = drawings[0]
    asked = Placement(drawing.quantize or False, drawing.offload)
    if drawing.vram is None:
        return asked
    memory = drawing_memory(_drawn(drawings, model), on_gpu())
    formats = (drawing.quantize,) if drawing.quantize else FORMATS
    planned = plan_drawing(memory, drawing.vram, asked, formats)
    peak = planned.peak
    sent = f", {planned.sent / GB:.2f} GB over PCIe a step" if planned.sent else ""
    print(
        f"within {drawing.vram:g} GB: {planned.placement}; planned peak {peak.total / GB:.2f} GB "
        f"({peak.name}){sent}"
    )
    return planned.placement


def flux_within_card(drawing: Any, files: FluxFiles, dtype: str | None, placement: Placement) -> FluxPipeline:
    """FLUX, without its LoRAs."""
    component, given = files["transformer"], {}
    if placement.quantize or placement.blocks_to_swap:
        load = load_quantized_transformer, load_transformer
        given = {"transformer": _transformer(drawing, component, dtype, placement, *load)}
    return _placed(FluxPipeline.from_pretrained(files, dtype, offload=placement.offload, **given), placement)


def newbie_within_card(drawing: Any, folder: Path, dtype: str | None, placement: Placement) -> NewbiePipeline:
    """NewBie-image, without its LoRAs."""
    transformer = None
    if placement.quantize or placement.blocks_to_swap:
        load = load_quantized_nextdit, load_nextdit
        transformer = _transformer(drawing, folder / "transformer", dtype, placement, *load)
    pipeline = NewbiePipeline.from_pretrained(
        folder, dtype, transformer=transformer, offload=placement.offload
    )
    return _placed(pipeline, placement)


def _drawn(drawings: Sequence[Any], model: FluxFiles | Path) -> Drawn:
    """What is planned: the largest picture, and as many tokens as any of them is seen with."""
    sight = Sight.of(model) if isinstance(model, FluxFiles) else None
    side = DEFAULT_SIDE if sight is None else sight.side
    sizes = [(each.height or side, each.width or side) for each in drawings]
    height, width = max(sizes, key=math.prod)
    seen = [math.prod(size) + (reference_pixels(each, sight) if sight else 0)
            for size, each in zip(sizes, drawings, strict=True)]  # fmt: skip
    drawing = drawings[0]
    beside = {name: getattr(drawing, name) for name in ("text_encoders", "vae", "tokenizers")}
    return Drawn(
        model=str(drawing.model),
        height=height,
        width=width,
        pictures=drawing.num_images,
        family="flux" if sight else "newbie",
        beside=tuple((name, place) for name, place in beside.items() if place),
        max_sequence_length=drawing.max_sequence_length,
        dtype="float32" if drawing.dtype == "float32" else "auto",
        lora_bytes=sum(2 * adapter_file(path).stat().st_size for path, _ in drawing.loras),  # in float32
        reference_pixels=max(seen) - height * width,
    )


def _transformer(
    drawing: Any,
    component: Component,
    dtype: str | None,
    placement: Placement,
    quantized: Callable[..., paddle.nn.Layer],
    plain: Callable[..., paddle.nn.Layer],
) -> paddle.nn.Layer:
    """The one that is quantised, or of which blocks stay in host memory."""
    dtype = dtype or default_dtype()
    if not placement.quantize:
        with loaded_to_host():
            return plain(component, dtype)
    copy = _copy(drawing, component, placement.quantize)
    return quantized(component, dtype, copy, placement.blocks_to_swap, placement.quantize)


def _copy(drawing: Any, component: Component, base: str) -> QuantizedCopy | None:
    """A training run's copy beside the model, if there is one; else that in cache_dir, if it is given."""
    model, source = Path(drawing.model), folder_identity(Path(component), times=True)
    here = Path(drawing.cache_dir or ".")
    beside = QuantizedCopy.beside_or_in(model, here, source, True, base)
    if beside.is_usable():
        return beside
    return QuantizedCopy.beside_or_in(model, here, source, False, base) if drawing.cache_dir else None


def _placed(pipeline: Any, placement: Placement) -> Any:
    """The pipeline as `placement` says; blocks before LoRAs come, whose factors stay on the device."""
    if placement.blocks_to_swap:
        pipeline.enable_block_swap(placement.blocks_to_swap)
    if placement.stream_encoders:
        for part in ("text_encoder", "text_encoder_2", "clip_model"):
            if getattr(pipeline, part, None) is not None:
                pipeline.enable_block_swap(part=part)
    if placement.vae_tiling:
        pipeline.enable_vae_tiling()
    if placement.vae_slicing:
        pipeline.enable_vae_slicing()
    return pipeline
