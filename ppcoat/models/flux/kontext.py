"""FLUX.1 Kontext: draws after one or several references, which the transformer sees as more tokens.

Source: diffusers' FluxKontextPipeline; several references as ComfyUI places them. Kontext's transformer has
the structure of FLUX.1-dev's, so a LoRA that taught FLUX.1-dev to look at a reference is drawn with here,
too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import paddle
from PIL import Image

from ppcoat.errors import ConfigError
from ppcoat.models.flux.drawing import Canvas, DrawingCall, FluxPipelineOutput, Prompt
from ppcoat.models.flux.editing_inputs import output_size, pack_references, reference_size
from ppcoat.models.flux.pipeline import FluxPipeline
from ppcoat.models.pictures import check_drawing


@dataclass(frozen=True, kw_only=True)
class KontextCall(DrawingCall):
    """See FluxKontextPipeline.__call__."""

    image: Any
    auto_resize: bool


class FluxKontextPipeline(FluxPipeline):
    """FluxPipeline whose pictures are edits of references. Without any it draws as FluxPipeline does."""

    def __call__(
        self,
        image: Any = None,
        prompt: Prompt = None,
        prompt_2: Prompt = None,
        negative_prompt: Prompt = None,
        negative_prompt_2: Prompt = None,
        true_cfg_scale: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 3.5,
        num_images_per_prompt: int = 1,
        generator: Any = None,
        latents: paddle.Tensor | None = None,
        prompt_embeds: paddle.Tensor | None = None,
        pooled_prompt_embeds: paddle.Tensor | None = None,
        negative_prompt_embeds: paddle.Tensor | None = None,
        negative_pooled_prompt_embeds: paddle.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict | None = None,
        callback_on_step_end: Callable[[Any, int, float, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
        max_area: int | None = None,
        _auto_resize: bool = True,
        seed: int | None = None,
    ) -> FluxPipelineOutput | tuple:
        """Draws pictures; what FluxPipeline.__call__ has, too, is as there.

        image: a reference for all (as for `picture_pixels`, in 0..1, or latents [B, 16, h, w]); a list of PIL
        pictures, one a prompt; or a list of lists, several references for each prompt, or [[a, b]] for all.
        They are brought to a size that Kontext was trained with, or, without _auto_resize, to their own
        rounded down to 16; those of several prompts to the size of the first's. height, width: changed to
        max_area pixels at their ratio, by default the area of the model's own size; max_area=height * width
        keeps them. Raises ConfigError for what is not as described.
        """
        own = self._size(None, None)
        max_area = max_area or own[0] * own[1]
        height, width = output_size(*self._size(height, width), max_area)
        auto_resize = _auto_resize
        return self._draw(KontextCall.of(locals()))

    def _canvas(self, call: KontextCall, batch: int) -> Canvas:
        canvas = super()._canvas(call, batch)
        if call.image is None:
            return canvas
        latents = [self._reference(each, call, batch) for each in _references(call.image)]
        tokens, ids = pack_references(latents)
        return replace(canvas, references=tokens, reference_ids=ids)

    def _reference(self, image: Any, call: KontextCall, batch: int) -> paddle.Tensor:
        """Latents [batch, 16, h, w] of one reference for all, or of one for each prompt."""
        height, width = _sides(image)
        if isinstance(image, paddle.Tensor) and image.shape[-3] == self.transformer.out_channels // 4:
            height, width = (self.vae_scale_factor * side for side in (height, width))
            check_drawing(height, width, 2 * self.vae_scale_factor, call.output_type)
        else:
            height, width = reference_size(height, width, call.auto_resize)
        return self.image_latents(image, height, width, batch, "image")


def _references(image: Any) -> list[Any]:
    """-> for each reference, one for all prompts or a list with one for each."""
    rows = image if isinstance(image, list | tuple) else ()
    if not any(isinstance(row, list | tuple) for row in rows):
        return [image]
    if not all(isinstance(row, list | tuple) and row and len(row) == len(rows[0]) for row in rows):
        raise ConfigError(
            "image: a list of lists is wanted with as many references for each prompt, one at least"
        )
    return [list(column) for column in zip(*rows, strict=True)]


def _sides(image: Any) -> tuple[int, int]:
    """Height and width of a picture, or of the first of several."""
    first = image[0] if isinstance(image, list | tuple) and image else image
    if isinstance(first, Image.Image):
        return first.height, first.width
    shape = list(getattr(first, "shape", ()))
    if len(shape) not in (3, 4):
        raise ConfigError(
            f"image: came {type(first).__name__}, wanted a PIL picture, numbers in 0..1, or latents; or a "
            "list of PIL pictures, one a prompt"
        )
    return (shape[-2], shape[-1]) if isinstance(first, paddle.Tensor) else (shape[-3], shape[-2])
