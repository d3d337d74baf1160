"""FLUX from prompt to picture: encode_prompt -> denoise -> decode, on ppdiffusers' pipeline machinery.

The folders are diffusers' (models/loading.py reads, models/writing.py writes). Noise is drawn on the host
from one seed per picture, so a seed gives the same picture on CPU and GPU, alone or within a batch.
"""

import inspect
import os
import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import paddle.nn as nn
import PIL.Image
from ppdiffusers import AutoencoderKL, DiffusionPipeline
from ppdiffusers.utils import BaseOutput

from ppcoat.atomic import whole_folder
from ppcoat.device import compute_dtype
from ppcoat.errors import ConfigError
from ppcoat.models import loading, writing
from ppcoat.models.flux.control import ControlPictures
from ppcoat.models.flux.lora_methods import LoRAMethods
from ppcoat.models.flux.scheduler import FlowMatchEulerDiscreteScheduler, calculate_shift
from ppcoat.models.flux.transformer import FluxTransformer2DModel
from ppcoat.models.pictures import (
    LatentPictures,
    check_drawing,
    latent_image_ids,
    noise_of_seeds,
    pack_latents,
    unpack_latents,
)

MAX_T5_TOKENS = 512


@dataclass
class FluxPipelineOutput(BaseOutput):
    """images by output_type: "pil" a list of PIL images; "np" float32 [B, height, width, 3] in 0..1;
    "latent" packed latents [B, tokens, channels]."""

    images: list[PIL.Image.Image] | np.ndarray | paddle.Tensor


class FluxPipeline(LoRAMethods, ControlPictures, LatentPictures, DiffusionPipeline):
    """The seven parts of FLUX.1 and the loop over them.

    A scheduler that cannot shift dynamically (ppdiffusers' own, in some versions) is replaced by ours with
    its config. Text encoders and tokenizers may be None if embeddings are given to every call, and the
    transformer as long as there is only encoding to do.
    """

    _callback_tensor_inputs = ("latents", "prompt_embeds")

    def __init__(
        self,
        scheduler: Any,
        vae: AutoencoderKL,
        text_encoder: nn.Layer | None,
        tokenizer: Any,
        text_encoder_2: nn.Layer | None,
        tokenizer_2: Any,
        transformer: FluxTransformer2DModel | None,
    ):
        super().__init__()
        if "mu" not in inspect.signature(scheduler.set_timesteps).parameters:
            config = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
            scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
        self.register_modules(
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            transformer=transformer,
        )
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike,
        paddle_dtype: str | paddle.dtype | None = None,
        *,
        transformer: FluxTransformer2DModel | None = None,
        vae: AutoencoderKL | None = None,
        text_encoder: nn.Layer | None = None,
        text_encoder_2: nn.Layer | None = None,
        tokenizer: Any = None,
        tokenizer_2: Any = None,
        scheduler: Any = None,
        without: Collection[str] = (),
    ) -> "FluxPipeline":
        """Loads a diffusers-format folder; writes nothing into it. A part given by name is used instead of
        its folder; one named in `without` (the transformer, or a text part) is not loaded and stays None.

        paddle_dtype: dtype of all weights; by default float32 on CPU and bfloat16 on a GPU.
        Raises ConfigError for a dtype that the device does not compute in (compute_dtype), and for an
        incomplete or inconsistent folder (loading.check_folder), before any weight is read.
        """
        folder, dtype = Path(folder), compute_dtype(paddle_dtype)
        loading.check_folder(folder)

        def part(given: Any, load: Callable, name: str, *args: Any) -> Any:
            wanted = given is None and name not in without
            return load(folder / name, *args) if wanted else given

        return cls(
            scheduler=part(scheduler, loading.load_scheduler, "scheduler"),
            tokenizer=part(tokenizer, loading.load_clip_tokenizer, "tokenizer"),
            tokenizer_2=part(tokenizer_2, loading.load_t5_tokenizer, "tokenizer_2"),
            text_encoder=part(text_encoder, loading.load_clip, "text_encoder", dtype),
            text_encoder_2=part(text_encoder_2, loading.load_t5, "text_encoder_2", dtype),
            vae=part(vae, loading.load_vae, "vae", dtype),
            transformer=part(transformer, loading.load_transformer, "transformer", dtype),
        )

    def save_pretrained(self, folder: str | os.PathLike, dtype: str | None = None) -> None:
        """Writes a folder that diffusers (PyTorch) and `from_pretrained` load; a new one whole or not at all,
        into one that is there file by file, model_index.json last.

        dtype: float32, bfloat16 or float16 (None: as loaded). Raises ConfigError if a part is None or a
        LoRA is on.
        """
        absent = [name for name in loading.FLUX_COMPONENTS if getattr(self, name) is None]
        if absent:
            raise ConfigError(f"the pipeline has no {absent[0]}, and a folder is not complete without it")
        folder = Path(folder)
        with nullcontext(folder) if folder.exists() else whole_folder(folder) as target:
            writing.save_diffusers_model(self.transformer, target / "transformer", dtype)
            writing.save_diffusers_model(self.vae, target / "vae", dtype)
            writing.save_text_encoder(self.text_encoder, target / "text_encoder", dtype)
            writing.save_text_encoder(self.text_encoder_2, target / "text_encoder_2", dtype)
            writing.save_tokenizer(self.tokenizer, target / "tokenizer")
            writing.save_tokenizer(self.tokenizer_2, target / "tokenizer_2")
            writing.save_scheduler(self.scheduler, target / "scheduler")
            index = {**writing.MODEL_INDEX, "_class_name": writing.pipeline_class(self.transformer)}
            writing.write_json(target / "model_index.json", index)

    @paddle.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        prompt_2: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 3.5,
        num_images_per_prompt: int = 1,
        generator: np.random.Generator | paddle.framework.core.Generator | None = None,
        seed: int | None = None,
        latents: paddle.Tensor | None = None,
        prompt_embeds: paddle.Tensor | None = None,
        pooled_prompt_embeds: paddle.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict | None = None,
        callback_on_step_end: Callable[["FluxPipeline", int, float, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
        negative_prompt: str | Sequence[str] = "",
        true_cfg_scale: float = 1.0,
        control_image: Any = None,
    ) -> FluxPipelineOutput | tuple:
        """Draws pictures; B = prompts * num_images_per_prompt, the pictures of one prompt side by side.

        height, width: pixels, multiples of 16 (default: the VAE's sample_size). timesteps and sigmas
        replace num_inference_steps (see FlowMatchEulerDiscreteScheduler.set_timesteps). Picture i is drawn
        from seed + i; without seed, a number from `generator` (or from the system) is the seed. latents:
        packed noise [B, tokens, channels] instead. prompt_embeds and pooled_prompt_embeds replace the
        prompts. max_sequence_length: T5 tokens, by default what tokenizer_2 allows, 512 at most.
        true_cfg_scale above 1 is classifier-free guidance away from negative_prompt (one for all prompts, or
        as many), at two passes a step; guidance_scale, the model's own distilled guidance, is then best 1.
        callback_on_step_end(pipeline, step, timestep, tensors) may return a dict of tensors to go on with.
        control_image: what a control LoRA or FLUX.1 Canny or Depth draws after (see `control_tokens`).
        Raises ConfigError for sizes, output types, prompts and callback tensors that are not as described.
        """
        size = self.vae.config.sample_size
        height, width = height or size, width or size
        check_drawing(height, width, 2 * self.vae_scale_factor, output_type)
        self._check_callback(callback_on_step_end_tensor_inputs)
        with self._lora_scaled(joint_attention_kwargs):
            prompt_embeds, pooled, txt_ids = self.encode_prompt(
                prompt,
                prompt_2,
                num_images_per_prompt,
                prompt_embeds,
                pooled_prompt_embeds,
                max_sequence_length,
            )
        batch = len(prompt_embeds)
        control = self.control_tokens(control_image, height, width, batch)
        rows, columns = grid = tuple(side // (2 * self.vae_scale_factor) for side in (height, width))
        if latents is None:
            channels = self.transformer.out_channels // 4
            noise = noise_of_seeds(batch, (channels, 2 * rows, 2 * columns), _seed(seed, generator))
            latents = pack_latents(noise)
        self._set_timesteps(rows * columns, num_inference_steps, timesteps, sigmas)
        conditions = self._conditions(prompt_embeds, pooled, txt_ids, grid, guidance_scale)
        conditions["joint_attention_kwargs"] = joint_attention_kwargs
        away = None
        if true_cfg_scale > 1:
            with self._lora_scaled(joint_attention_kwargs):
                embeds = self._negative(negative_prompt, batch, length=prompt_embeds.shape[1])
            away = _Away(true_cfg_scale, *embeds)
        latents = self._denoise(
            latents.astype(prompt_embeds.dtype),
            control,
            conditions,
            away,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        images = latents
        if output_type != "latent":
            images = self.pictures(unpack_latents(latents, rows, columns), output_type)
        return FluxPipelineOutput(images=images) if return_dict else (images,)

    def _negative(
        self, prompt: str | Sequence[str], batch: int, length: int
    ) -> tuple[paddle.Tensor, paddle.Tensor]:
        """The embeddings of negative prompts, one for each of `batch` pictures."""
        prompts = _as_list(prompt)
        if len(prompts) != 1 and batch % len(prompts):
            raise ConfigError(
                f"{len(prompts)} negative prompts for {batch} pictures: give one, or one a prompt"
            )
        each = batch // len(prompts)
        embeds, pooled, _ = self.encode_prompt(prompts, None, each, max_sequence_length=length)
        return embeds, pooled

    def _denoise(
        self,
        latents: paddle.Tensor,
        control: paddle.Tensor | None,
        conditions: dict,
        away: "_Away | None",
        callback: Callable | None,
        asked: Sequence[str],
    ) -> paddle.Tensor:
        """Take the scheduler's steps from noise to latents. control: what the transformer sees beside them;
        conditions: its arguments."""
        batch, dtype = latents.shape[0], latents.dtype
        with self.progress_bar(total=len(self.scheduler.timesteps)) as progress:
            for i, t in enumerate(self.scheduler.timesteps.tolist()):
                time = paddle.full([batch], t / 1000, dtype="float32").astype(dtype)
                seen = latents if control is None else paddle.concat([latents, control], axis=-1)
                velocity = self.transformer(seen, timestep=time, **conditions).sample
                if away is not None:
                    other = self.transformer(seen, timestep=time, **{**conditions, **away.conditions}).sample
                    velocity = other + away.scale * (velocity - other)
                latents = self.scheduler.step(velocity, t, latents).prev_sample
                if callback is not None:
                    state = {"latents": latents, "prompt_embeds": conditions["encoder_hidden_states"]}
                    state.update(callback(self, i, t, {name: state[name] for name in asked}) or {})
                    latents, conditions["encoder_hidden_states"] = state["latents"], state["prompt_embeds"]
                progress.update()
        return latents

    @paddle.no_grad()
    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None = None,
        prompt_2: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        prompt_embeds: paddle.Tensor | None = None,
        pooled_prompt_embeds: paddle.Tensor | None = None,
        max_sequence_length: int | None = None,
    ) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
        """(prompt_embeds [B, tokens, dim] of T5, pooled [B, dim] of CLIP, text ids [tokens, 3], zeros).

        The embeddings in the transformer's dtype, text ids float32. prompt goes to CLIP, prompt_2 (default:
        prompt) to T5. T5 sees the padding too, as FLUX was trained. Raises ConfigError for no prompt, one of
        the two embeddings without the other, lists of different lengths, and a max_sequence_length beyond
        MAX_T5_TOKENS.
        """
        if (prompt_embeds is None) != (pooled_prompt_embeds is None):
            raise ConfigError("prompt_embeds and pooled_prompt_embeds belong together: give both or neither")
        if prompt_embeds is None:
            if prompt is None:
                raise ConfigError("no prompt: give prompt, or prompt_embeds and pooled_prompt_embeds")
            prompts = _as_list(prompt)
            prompts_2 = prompts if prompt_2 is None else _as_list(prompt_2)
            if len(prompts) != len(prompts_2):
                raise ConfigError(
                    f"{len(prompts)} prompts, {len(prompts_2)} of prompt_2: give as many of each"
                )
            length = max_sequence_length or min(MAX_T5_TOKENS, self.tokenizer_2.model_max_length)
            if not 0 < length <= MAX_T5_TOKENS:
                raise ConfigError(f"max_sequence_length is {length}: it must lie in 1..{MAX_T5_TOKENS}")
            clip_ids = _token_ids(self.tokenizer, prompts, self.tokenizer.model_max_length)
            pooled_prompt_embeds = self.text_encoder(clip_ids).pooler_output
            t5_ids = _token_ids(self.tokenizer_2, prompts_2, length)
            _warn_if_cut(self.tokenizer_2, prompts_2, t5_ids)
            prompt_embeds = self.text_encoder_2(t5_ids)[0]
        dtype = (self.transformer or self.text_encoder_2).dtype
        prompt_embeds = prompt_embeds.astype(dtype).repeat_interleave(num_images_per_prompt, axis=0)
        pooled = pooled_prompt_embeds.astype(dtype).repeat_interleave(num_images_per_prompt, axis=0)
        return prompt_embeds, pooled, paddle.zeros([prompt_embeds.shape[1], 3], dtype="float32")

    def _set_timesteps(self, tokens: int, steps: int, timesteps, sigmas) -> None:
        config = self.scheduler.config
        mu = calculate_shift(
            tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
        )
        if timesteps is None and sigmas is None:
            if steps < 1:
                raise ConfigError(f"num_inference_steps is {steps}: it must be at least 1")
            sigmas = np.linspace(1.0, 1 / steps, steps)
        self.scheduler.set_timesteps(timesteps=timesteps, sigmas=sigmas, mu=mu)

    def _conditions(
        self,
        prompt_embeds: paddle.Tensor,
        pooled: paddle.Tensor,
        txt_ids: paddle.Tensor,
        grid: tuple[int, int],
        guidance_scale: float,
    ) -> dict:
        """Arguments of the transformer that stay the same over all steps."""
        conditions = {
            "encoder_hidden_states": prompt_embeds,
            "pooled_projections": pooled,
            "img_ids": latent_image_ids(*grid),
            "txt_ids": txt_ids,
        }
        if self.transformer.config.guidance_embeds:
            conditions["guidance"] = paddle.full([len(prompt_embeds)], guidance_scale, dtype="float32")
        return conditions

    def _check_callback(self, asked: Sequence[str]) -> None:
        unknown = set(asked) - set(self._callback_tensor_inputs)
        if unknown:
            raise ConfigError(
                f"callback tensors {sorted(unknown)}: only {self._callback_tensor_inputs} can be had"
            )


@dataclass(frozen=True)
class _Away:
    """Classifier-free guidance: its scale, and the text that it leads away from."""

    scale: float
    embeds: paddle.Tensor
    pooled: paddle.Tensor

    @property
    def conditions(self) -> dict[str, paddle.Tensor]:
        """The transformer's arguments that differ."""
        return {"encoder_hidden_states": self.embeds, "pooled_projections": self.pooled}


def _as_list(prompt: str | Sequence[str]) -> list[str]:
    return [prompt] if isinstance(prompt, str) else list(prompt)


def _token_ids(tokenizer: Any, prompts: list[str], length: int) -> paddle.Tensor:
    tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pd")
    return tokens["input_ids"]


def _warn_if_cut(tokenizer: Any, prompts: list[str], ids: paddle.Tensor) -> None:
    """ids: [prompts, length], of which only rows without padding can have been cut."""
    full = [p for p, row in zip(prompts, ids.numpy(), strict=True) if row[-1] != tokenizer.pad_token_id]
    pieces = max((len(tokenizer.tokenize(prompt)) for prompt in full), default=0)
    longest = pieces + tokenizer.num_special_tokens_to_add(pair=False)
    if longest > ids.shape[1]:
        warnings.warn(f"a prompt of {longest} T5 tokens is cut to {ids.shape[1]}", stacklevel=1)


def _seed(seed: int | None, generator: Any) -> int:
    if seed is not None:
        return seed
    if isinstance(generator, paddle.framework.core.Generator):
        return generator.random()
    return int((generator or np.random.default_rng()).integers(2**63))
