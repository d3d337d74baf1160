"""What the FLUX pipelines share: what a call asks for, and the one loop from noise to latents.

A pipeline is: encode the prompts -> make a Canvas -> denoise -> decode. The pipelines differ in their Canvas.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import paddle
import PIL.Image
from ppdiffusers.utils import BaseOutput

from ppcoat.errors import ConfigError
from ppcoat.models.flux.prompt_encoding import Away, PromptEncoding
from ppcoat.models.flux.scheduler import set_flux_timesteps
from ppcoat.models.pictures import (
    check_drawing,
    latent_image_ids,
    noise_of_seeds,
    pack_latents,
    picture_seeds,
    unpack_latents,
)
from ppcoat.progress import Progress

Prompt = str | Sequence[str] | None
DEFAULT_SIDE = 1024  # pixels of FLUX.1's own size, where there is no VAE to say it


@dataclass
class FluxPipelineOutput(BaseOutput):
    """images by output_type: "pil" a list of PIL images; "np" float32 [B, height, width, 3] in 0..1;
    "latent" packed latents [B, tokens, channels]."""

    images: list[PIL.Image.Image] | np.ndarray | paddle.Tensor


@dataclass(frozen=True, kw_only=True)
class DrawingCall:
    """The arguments of a call that all FLUX pipelines know: see FluxPipeline.__call__."""

    prompt: Prompt
    prompt_2: Prompt
    negative_prompt: Prompt
    negative_prompt_2: Prompt
    true_cfg_scale: float
    height: int
    width: int
    num_inference_steps: int
    timesteps: Sequence[float] | None = None
    sigmas: Sequence[float] | None
    guidance_scale: float
    num_images_per_prompt: int
    generator: Any
    seed: int | None
    latents: paddle.Tensor | None
    prompt_embeds: paddle.Tensor | None
    pooled_prompt_embeds: paddle.Tensor | None
    negative_prompt_embeds: paddle.Tensor | None
    negative_pooled_prompt_embeds: paddle.Tensor | None
    output_type: str
    return_dict: bool
    joint_attention_kwargs: dict | None
    callback_on_step_end: Callable[[Any, int, float, dict], dict | None] | None
    callback_on_step_end_tensor_inputs: Sequence[str]
    max_sequence_length: int | None
    control_image: Any = None

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> DrawingCall:
        """Of a call's arguments by name; others among them (`self`) are left out."""
        return cls(**{each.name: arguments[each.name] for each in fields(cls) if each.name in arguments})


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """What the loop begins with and what the transformer sees beside the noise, in its dtype.

    latents [B, tokens, 64], of the scheduler's noise level number `first`. channels [B, tokens, n]: seen with
    each token (control picture, hole and mask). references [B, more tokens, 64], at reference_ids float32
    [more tokens, 3]: seen after them, clean at each step. put_back(latents, i): what becomes of the latents
    [B, tokens, 64] when they have come to noise level i.
    """

    latents: paddle.Tensor
    first: int = 0
    channels: paddle.Tensor | None = None
    references: paddle.Tensor | None = None
    reference_ids: paddle.Tensor | None = None
    put_back: Callable[[paddle.Tensor, int], paddle.Tensor] | None = None

    def seen(self, latents: paddle.Tensor) -> paddle.Tensor:
        """The transformer's input [B, all tokens, channels] at latents [B, tokens, 64], in their dtype."""
        if self.channels is not None:
            latents = paddle.concat([latents, self.channels], axis=-1)
        return latents if self.references is None else paddle.concat([latents, self.references], axis=1)

    def ids(self, grid: tuple[int, int]) -> paddle.Tensor:
        """Where these tokens stand, float32 [all tokens, 3]."""
        ids = latent_image_ids(*grid)
        return ids if self.reference_ids is None else paddle.concat([ids, self.reference_ids])


class DrawingLoop(PromptEncoding):
    """For a pipeline of FLUX's parts with LoRAMethods, PictureInputs and LatentPictures."""

    _callback_tensor_inputs = ("latents", "prompt_embeds")

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """These pixels, or the VAE's sample_size."""
        side = DEFAULT_SIDE if self.vae is None else self.vae.config.sample_size
        return height or side, width or side

    def _grid(self, call: DrawingCall) -> tuple[int, int]:
        """Rows and columns of tokens, each of 2 x 2 latents."""
        side = 2 * self.vae_scale_factor
        return call.height // side, call.width // side

    @paddle.no_grad()
    def _draw(self, call: DrawingCall) -> FluxPipelineOutput | tuple:
        """The stages in their order; each uses other models than the one before."""
        self._check_call(call)
        conditions, away = self._encoded(call)
        rows, columns = self._grid(call)
        set_flux_timesteps(
            self.scheduler, rows * columns, call.num_inference_steps, call.timesteps, call.sigmas
        )
        canvas = self._canvas(call, len(conditions["encoder_hidden_states"]))
        latents = self._denoise(canvas, conditions, away, call)
        return self._decoded(latents, call)

    def _check_call(self, call: DrawingCall) -> None:
        """Raises ConfigError before anything is computed."""
        self._check_parts("draw", "transformer", *(() if call.output_type == "latent" else ("vae",)))
        check_drawing(call.height, call.width, 2 * self.vae_scale_factor, call.output_type)
        unknown = set(call.callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ConfigError(
                f"callback tensors {sorted(unknown)}: only {self._callback_tensor_inputs} can be had"
            )

    def _canvas(self, call: DrawingCall, batch: int) -> Canvas:
        """For `batch` pictures, when the scheduler knows its noise levels."""
        control = self.control_tokens(call.control_image, call.height, call.width, batch)
        return Canvas(latents=self._start(call, batch), channels=control)

    def _start(self, call: DrawingCall, batch: int) -> paddle.Tensor:
        """Packed noise [batch, tokens, 64] in the transformer's dtype: the call's own or of its seeds."""
        latents = pack_latents(self._noise(call, batch)) if call.latents is None else call.latents
        return latents.astype(self.transformer.dtype)

    def _noise(self, call: DrawingCall, batch: int) -> paddle.Tensor:
        """float32 [batch, 16, height/8, width/8]."""
        rows, columns = self._grid(call)
        shape = (self.transformer.out_channels // 4, 2 * rows, 2 * columns)
        return noise_of_seeds(picture_seeds(batch, call.seed, call.generator), shape)

    def _noised(self, clean: paddle.Tensor, noise: paddle.Tensor, level: int) -> paddle.Tensor:
        """Latents of any shape at the scheduler's noise level of this number, of which the last is 0."""
        sigma = float(self.scheduler.sigmas[level])
        return ((1 - sigma) * clean.astype("float32") + sigma * noise.astype("float32")).astype(clean.dtype)

    def _denoise(
        self, canvas: Canvas, conditions: dict[str, Any], away: Away | None, call: DrawingCall
    ) -> paddle.Tensor:
        """Take the scheduler's steps from the canvas to latents [B, tokens, 64]. conditions: the
        transformer's arguments for the prompts."""
        latents = canvas.latents
        conditions = conditions | self._settings(canvas, call)
        times = self.scheduler.timesteps.tolist()[canvas.first :]
        self._interrupt = False  # diffusers' name, by which a callback ends the drawing
        shown = {"desc": "drawing", "unit": "step"} | getattr(self, "_progress_bar_config", {})
        with Progress(total=len(times), **shown) as progress:
            for i, t in enumerate(times):
                velocity = self._velocity(canvas, latents, t, conditions, away)
                latents = self.scheduler.step(velocity, t, latents).prev_sample
                if canvas.put_back is not None:
                    latents = canvas.put_back(latents, canvas.first + i + 1)
                if call.callback_on_step_end is not None:
                    state = {"latents": latents, "prompt_embeds": conditions["encoder_hidden_states"]}
                    asked = {name: state[name] for name in call.callback_on_step_end_tensor_inputs}
                    state.update(call.callback_on_step_end(self, i, t, asked) or {})
                    latents, conditions["encoder_hidden_states"] = state["latents"], state["prompt_embeds"]
                progress.update()
                if self._interrupt:
                    break
        return latents

    def _decoded(self, latents: paddle.Tensor, call: DrawingCall) -> FluxPipelineOutput | tuple:
        """latents: packed [B, tokens, 64]."""
        images = latents
        if call.output_type != "latent":
            images = self.pictures(unpack_latents(latents, *self._grid(call)), call.output_type)
        return FluxPipelineOutput(images=images) if call.return_dict else (images,)

    def _settings(self, canvas: Canvas, call: DrawingCall) -> dict[str, Any]:
        """Arguments of the transformer that stay the same over all steps and are not of the prompts."""
        guided = self.transformer.config.guidance_embeds
        batch = len(canvas.latents)
        return {
            "img_ids": canvas.ids(self._grid(call)),
            "joint_attention_kwargs": call.joint_attention_kwargs,
            "guidance": paddle.full([batch], call.guidance_scale, dtype="float32") if guided else None,
        }

    def _velocity(
        self, canvas: Canvas, latents: paddle.Tensor, t: float, conditions: dict, away: Away | None
    ) -> paddle.Tensor:
        """[B, tokens, 64], guided away from what is not wanted."""
        time = paddle.full([len(latents)], t / 1000, dtype="float32").astype(latents.dtype)
        seen, tokens = canvas.seen(latents), latents.shape[1]
        velocity = self.transformer(seen, timestep=time, **conditions).sample[:, :tokens]
        if away is None:
            return velocity
        other = self.transformer(seen, timestep=time, **conditions | away.conditions).sample[:, :tokens]
        return other + away.scale * (velocity - other)
