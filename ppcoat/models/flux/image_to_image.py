"""Drawing that begins at a picture: image-to-image, and inpainting with a model that knows nothing of masks.

Source: diffusers' FluxImg2ImgPipeline and FluxInpaintPipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import paddle

from ppcoat.errors import ConfigError
from ppcoat.models.flux.drawing import Canvas, DrawingCall, FluxPipelineOutput, Prompt
from ppcoat.models.flux.editing_inputs import first_step, latent_mask
from ppcoat.models.flux.picture_inputs import for_all, picture_mask
from ppcoat.models.flux.pipeline import FluxPipeline
from ppcoat.models.pictures import pack_latents


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
