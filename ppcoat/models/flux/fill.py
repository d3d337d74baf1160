"""FLUX.1 Fill: inpainting by a transformer that sees, for each token, the picture with a hole and the mask.

Source: diffusers' FluxFillPipeline and the model card of Black Forest Labs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import paddle

from ppcoat.errors import ConfigError
from ppcoat.models.flux.drawing import Canvas, FluxPipelineOutput, Prompt
from ppcoat.models.flux.editing_inputs import fill_latents, first_step, masked_pixels
from ppcoat.models.flux.files import INPUTS_OF_CLASS
from ppcoat.models.flux.image_to_image import MaskCall
from ppcoat.models.flux.picture_inputs import for_all, picture_mask, picture_pixels
from ppcoat.models.flux.pipeline import FluxPipeline
from ppcoat.models.pictures import pack_latents


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
