"""Pipelines that edit pictures: image-to-image and inpainting with a model that knows nothing of masks;
FLUX.1 Fill, whose transformer sees, for each token, the picture with a hole and the mask; FLUX.1 Kontext,
whose transformer sees one or several references as more tokens.

Kontext's transformer has the structure of FLUX.1-dev's, so a LoRA that taught FLUX.1-dev to look at a
reference is drawn with here, too. Sources: diffusers' pipelines of these names; several references as ComfyUI
places them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import paddle
from PIL import Image

from ppcoat.errors import ConfigError
from ppcoat.models.flux.drawing import Canvas, DrawingCall, FluxPipelineOutput, Prompt
from ppcoat.models.flux.files import INPUTS_OF_CLASS
from ppcoat.models.flux.picture_inputs import (
    fill_latents,
    first_step,
    for_all,
    latent_mask,
    masked_pixels,
    output_size,
    pack_references,
    picture_mask,
    picture_pixels,
    reference_size,
)
from ppcoat.models.flux.pipeline import FluxPipeline
from ppcoat.models.pictures import check_drawing, pack_latents


@dataclass(frozen=True, kw_only=True)
class ImageCall(DrawingCall):
    """See FluxImg2ImgPipeline.__call__."""

    image: Any
    strength: float


@dataclass(frozen=True, kw_only=True)
class MaskCall(ImageCall):
    """See FluxInpaintPipeline.__call__."""

    mask_image: Any
    masked_image_latents: paddle.Tensor | None


class FluxImg2ImgPipeline(FluxPipeline):
    """FluxPipeline that begins at a picture instead of noise."""

    def __call__(
        self,
        prompt: Prompt = None,
        prompt_2: Prompt = None,
        negative_prompt: Prompt = None,
        negative_prompt_2: Prompt = None,
        true_cfg_scale: float = 1.0,
        image: Any = None,
        height: int | None = None,
        width: int | None = None,
        strength: float = 0.6,
        num_inference_steps: int = 28,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 7.0,
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
        seed: int | None = None,
        control_image: Any = None,
    ) -> FluxPipelineOutput | tuple:
        """Draws pictures; what FluxPipeline.__call__ has, too, is as there.

        image: one for all or one a prompt, as for `image_latents`. strength: above 0, the share of the steps
        that is drawn, at most 1, where nothing of the image is left. latents: packed [B, tokens, 64], where
        to begin instead. Raises ConfigError for what is not as described.
        """
        height, width = self._size(height, width)
        return self._draw(ImageCall.of(locals()))

    def _check_call(self, call: ImageCall) -> None:
        super()._check_call(call)
        first_step(1, call.strength)
        if call.image is None:
            raise ConfigError(f"no image: {type(self).__name__} begins at one, give image")

    def _canvas(self, call: ImageCall, batch: int) -> Canvas:
        return self._begun(call, self._picture(call, batch), self._noise(call, batch))

    def _begun(self, call: ImageCall, picture: paddle.Tensor, noise: paddle.Tensor) -> Canvas:
        """picture, noise: [B, 16, h, w]."""
        control = self.control_tokens(call.control_image, call.height, call.width, len(picture))
        first = first_step(len(self.scheduler.timesteps), call.strength)
        latents = call.latents
        if latents is None:
            latents = pack_latents(self._noised(picture, noise, first))
        return Canvas(latents=latents.astype(self.transformer.dtype), first=first, channels=control)

    def _picture(self, call: ImageCall, batch: int) -> paddle.Tensor:
        """Latents [batch, 16, h, w] of the call's image."""
        return self.image_latents(call.image, call.height, call.width, batch)


class FluxInpaintPipeline(FluxImg2ImgPipeline):
    """Draws anew what a mask marks. After every step the rest is put back, as noisy as the step left it."""

    def __call__(
        self,
        prompt: Prompt = None,
        prompt_2: Prompt = None,
        negative_prompt: Prompt = None,
        negative_prompt_2: Prompt = None,
        true_cfg_scale: float = 1.0,
        image: Any = None,
        mask_image: Any = None,
        masked_image_latents: paddle.Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: int | None = None,
        strength: float = 0.6,
        num_inference_steps: int = 28,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 7.0,
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
        seed: int | None = None,
        control_image: Any = None,
    ) -> FluxPipelineOutput | tuple:
        """Draws pictures; what FluxImg2ImgPipeline.__call__ has, too, is as there.

        mask_image: as for `picture_mask`; white is drawn anew. One for all or one a prompt. latents:
        [B, 16, height/8, width/8], the noise and where to begin at any strength. The picture is what the VAE
        makes of the latents: what was put back is the image as near as the VAE knows it. Raises ConfigError
        for what is not as described, and for masked_image_latents and padding_mask_crop, which are not done
        here.
        """
        if padding_mask_crop is not None:
            raise ConfigError(
                "padding_mask_crop is not done here: leave it out, cut picture and mask out before"
            )
        height, width = self._size(height, width)
        return self._draw(MaskCall.of(locals()))

    def _check_call(self, call: MaskCall) -> None:
        super()._check_call(call)
        if call.masked_image_latents is not None:
            raise ConfigError("masked_image_latents: only FLUX.1 Fill sees them; leave them out")
        if call.mask_image is None:
            raise ConfigError("no mask_image: give one that is white where the image is drawn anew")

    def _canvas(self, call: MaskCall, batch: int) -> Canvas:
        picture = self._picture(call, batch)
        noise = self._noise(call, batch) if call.latents is None else call.latents
        begun = None if call.latents is None else pack_latents(noise)
        canvas = self._begun(replace(call, latents=begun), picture, noise)
        mask = picture_mask(call.mask_image, call.height, call.width)
        mask = latent_mask(mask, self.vae_scale_factor).astype(picture.dtype)
        mask = for_all(mask, batch, "mask_image")
        tokens = pack_latents(mask.expand_as(picture))

        def put_back(latents: paddle.Tensor, level: int) -> paddle.Tensor:
            return (1 - tokens) * pack_latents(self._noised(picture, noise, level)) + tokens * latents

        return replace(canvas, put_back=put_back)


class FluxFillPipeline(FluxPipeline):
    """Draws anew what a mask marks, with a transformer of 384 inputs."""

    def __call__(
        self,
        prompt: Prompt = None,
        prompt_2: Prompt = None,
        image: Any = None,
        mask_image: Any = None,
        masked_image_latents: paddle.Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        strength: float = 1.0,
        num_inference_steps: int = 50,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 30.0,
        num_images_per_prompt: int = 1,
        generator: Any = None,
        latents: paddle.Tensor | None = None,
        prompt_embeds: paddle.Tensor | None = None,
        pooled_prompt_embeds: paddle.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict | None = None,
        callback_on_step_end: Callable[[Any, int, float, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
        seed: int | None = None,
        negative_prompt: Prompt = None,
        negative_prompt_2: Prompt = None,
        true_cfg_scale: float = 1.0,
        negative_prompt_embeds: paddle.Tensor | None = None,
        negative_pooled_prompt_embeds: paddle.Tensor | None = None,
    ) -> FluxPipelineOutput | tuple:
        """Draws pictures; what FluxPipeline.__call__ has, too, is as there.

        image, mask_image: one for all or one a prompt, as for `picture_pixels` and `picture_mask`; white is
        drawn anew. masked_image_latents: [B, tokens, 320], the packed `fill_latents`, instead of both.
        strength: below 1, drawing begins at the image as noisy as that, as FluxImg2ImgPipeline's. latents:
        packed [B, tokens, 64], where to begin instead. Nothing is pasted: what the mask leaves comes from the
        model, too. Raises ConfigError for what is not as described, and for another model.
        """
        height, width = self._size(height, width)
        return self._draw(MaskCall.of(locals()))

    def _check_call(self, call: MaskCall) -> None:
        self._check_parts("draw", "transformer")
        inputs, channels = self.transformer.config.in_channels, self.transformer.out_channels
        wanted = INPUTS_OF_CLASS["FluxFillPipeline"] * channels
        if inputs != wanted:
            raise ConfigError(
                f"this transformer takes {inputs} inputs a token, and FluxFillPipeline draws with {wanted}: "
                "load FLUX.1 Fill, or draw with FluxInpaintPipeline"
            )
        first_step(1, call.strength)
        begun = call.latents is not None or call.strength == 1
        if call.image is None and (call.masked_image_latents is None or not begun):
            raise ConfigError("FLUX.1 Fill fills a hole in a picture: give image")
        if call.mask_image is None and call.masked_image_latents is None:
            raise ConfigError("FLUX.1 Fill draws what a mask marks: give mask_image, white where to draw")
        super()._check_call(call)

    def _canvas(self, call: MaskCall, batch: int) -> Canvas:
        first = first_step(len(self.scheduler.timesteps), call.strength)
        if call.latents is not None or call.strength == 1:
            latents = self._start(call, batch)
        else:
            picture = self.image_latents(call.image, call.height, call.width, batch)
            latents = pack_latents(self._noised(picture, self._noise(call, batch), first))
        seen = call.masked_image_latents
        seen = self._seen(call, batch) if seen is None else for_all(seen, batch, "masked_image_latents")
        return Canvas(latents=latents, first=first, channels=seen.astype(latents.dtype))

    def _seen(self, call: MaskCall, batch: int) -> paddle.Tensor:
        """[batch, tokens, 320]: the picture with the hole, and the mask."""
        size = (call.height, call.width)
        pixels, mask = picture_pixels(call.image, *size), picture_mask(call.mask_image, *size)
        pictures = max(len(pixels), len(mask))
        pixels, mask = for_all(pixels, pictures, "image"), for_all(mask, pictures, "mask_image")
        masked = self.encode_image(masked_pixels(pixels, mask))
        return for_all(pack_latents(fill_latents(masked, mask)), batch, "image")


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
