"""FLUX from prompt to picture: encode_prompt -> denoise -> decode, on ppdiffusers' pipeline machinery.

The folders are diffusers' (models/loading.py reads, models/writing.py writes). Noise is drawn on the host
from one seed per picture, so a seed gives the same picture on CPU and GPU, alone or within a batch.
"""

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
from ppcoat.models.flux.files import FLUX_COMPONENTS, FluxFiles, Places
from ppcoat.models.flux.lora_methods import LoRAMethods
from ppcoat.models.flux.scheduler import flux_scheduler, set_flux_timesteps
from ppcoat.models.flux.transformer import FluxTransformer2DModel
from ppcoat.models.pictures import (
    LatentPictures,
    check_drawing,
    check_options,
    latent_image_ids,
    noise_of_seeds,
    pack_latents,
    picture_seeds,
    unpack_latents,
)
from ppcoat.models.quantized_base import load_parts

MAX_T5_TOKENS = 512
DEFAULT_SIDE = 1024  # pixels of FLUX.1's own size, where there is no VAE to say it


@dataclass
class FluxPipelineOutput(BaseOutput):
    """images by output_type: "pil" a list of PIL images; "np" float32 [B, height, width, 3] in 0..1;
    "latent" packed latents [B, tokens, channels]."""

    images: list[PIL.Image.Image] | np.ndarray | paddle.Tensor


class FluxPipeline(LoRAMethods, ControlPictures, LatentPictures, DiffusionPipeline):
    """The seven parts of FLUX.1 and the loop over them.

    A scheduler that cannot shift dynamically (ppdiffusers' own, in some versions) is replaced by ours with
    its config. Text encoders and tokenizers may be None if embeddings are given to every call, the
    transformer as long as there is only encoding to do, and the VAE if only latents are wanted.
    """

    _callback_tensor_inputs = ("latents", "prompt_embeds")

    def __init__(
        self,
        scheduler: Any,
        vae: AutoencoderKL | None,
        text_encoder: nn.Layer | None,
        tokenizer: Any,
        text_encoder_2: nn.Layer | None,
        tokenizer_2: Any,
        transformer: FluxTransformer2DModel | None,
    ):
        super().__init__()
        self.register_modules(
            scheduler=flux_scheduler(scheduler),
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            transformer=transformer,
        )
        self.vae_scale_factor = 8 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)

    def __setattr__(self, name: str, value: Any) -> None:
        """`pipeline.scheduler = other`: one that FLUX can be drawn with (`flux_scheduler`)."""
        super().__setattr__(name, flux_scheduler(value) if name == "scheduler" else value)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike | FluxFiles,
        paddle_dtype: str | paddle.dtype | None = None,
        *,
        transformer: FluxTransformer2DModel | None = ...,
        vae: AutoencoderKL | str | os.PathLike | None = ...,
        text_encoder: nn.Layer | None = ...,
        text_encoder_2: nn.Layer | None = ...,
        tokenizer: Any = ...,
        tokenizer_2: Any = ...,
        scheduler: Any = ...,
        text_encoders: Places = None,
        tokenizers: Places = None,
        config: str | os.PathLike | None = None,
        without: Collection[str] = (),
        variant: str | None = None,
        torch_dtype: Any = None,
        quantize: str | None = None,
        offload: bool = False,
        **options: Any,
    ) -> "FluxPipeline":
        """Loads a diffusers-format folder or a file (Black Forest Labs' or diffusers' names, a checkpoint of
        ComfyUI, FP8, GGUF); writes nothing. text_encoders, vae, tokenizers: files or folders for what the
        file lacks, see `FluxFiles.found`; config: a folder whose config.json files say what tensors do not. A
        part given by name is used instead of the folder's, which is not looked at; None leaves the part out,
        as its name in `without` does.
        paddle_dtype, or torch_dtype: dtype of all weights; by default float32 on CPU and bfloat16 on a GPU.
        variant: "fp16" reads files such as model.fp16.safetensors; without it, they are read where there are
        no others. quantize: "fp8", "int8", "nf4" or "fp4" for the transformer's Linears. offload: load to
        host memory, and `enable_model_cpu_offload`. options: others' that have no effect (check_options).
        Raises ConfigError for a dtype that the device does not compute in, an option that asks for something
        else, and for what is missing or inconsistent (loading.check_folder), before any weight is read.
        """
        check_options(options, list(cls.from_pretrained.__kwdefaults__))
        dtype = compute_dtype(torch_dtype if paddle_dtype is None else paddle_dtype)
        place, vae = (vae, ...) if isinstance(vae, str | os.PathLike) else (None, vae)
        beside = {"text_encoders": text_encoders, "vae": place, "tokenizers": tokenizers}
        files = FluxFiles.found(folder, **beside, config=config)
        parts = {"scheduler": scheduler, "tokenizer": tokenizer, "tokenizer_2": tokenizer_2, "vae": vae,
                 "text_encoder": text_encoder, "text_encoder_2": text_encoder_2,
                 "transformer": transformer}  # fmt: skip
        parts = {name: None if part is ... and name in without else part for name, part in parts.items()}
        wanted = [name for name, part in parts.items() if part is ...]
        where = loading.check_folder(files, parts=wanted, variant=variant, control=True)
        return cls(**parts | load_parts(where, wanted, dtype, quantize, offload))._offloaded(offload)

    @classmethod
    def from_single_file(
        cls, file: str | os.PathLike, paddle_dtype: str | paddle.dtype | None = None, **options: Any
    ) -> "FluxPipeline":
        """`from_pretrained` of a file, with its options, under the name that diffusers has for it."""
        return cls.from_pretrained(file, paddle_dtype, **options)

    def save_pretrained(self, folder: str | os.PathLike, dtype: str | None = None) -> None:
        """Writes a folder that diffusers (PyTorch) and `from_pretrained` load; a new one whole or not at all,
        into one that is there file by file, model_index.json last.

        dtype: float32, bfloat16 or float16 (None: as loaded). Raises ConfigError if a part is None or a
        LoRA is on.
        """
        absent = [name for name in FLUX_COMPONENTS if getattr(self, name) is None]
        if absent:
            raise ConfigError(f"the pipeline has no {absent[0]}, and a folder is not complete without it")
        folder = Path(folder)
        with nullcontext(folder) if folder.exists() else whole_folder(folder) as target:
            for name in FLUX_COMPONENTS:
                writing.save_component(getattr(self, name), target / name, dtype)
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
        generator: Any = None,
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
        negative_prompt: str | Sequence[str] | None = None,
        true_cfg_scale: float = 1.0,
        negative_prompt_2: str | Sequence[str] | None = None,
        negative_prompt_embeds: paddle.Tensor | None = None,
        negative_pooled_prompt_embeds: paddle.Tensor | None = None,
        cross_attention_kwargs: dict | None = None,
        control_image: Any = None,
    ) -> FluxPipelineOutput | tuple:
        """Draws pictures; B = prompts * num_images_per_prompt, the pictures of one prompt side by side.

        height, width: pixels, multiples of 16 (default: the VAE's sample_size). timesteps and sigmas
        replace num_inference_steps (see FlowMatchEulerDiscreteScheduler.set_timesteps). seed and generator:
        see `picture_seeds`. latents: packed noise [B, tokens, channels] instead. prompt_embeds and
        pooled_prompt_embeds replace the prompts. max_sequence_length: T5 tokens, by default what tokenizer_2
        allows, 512 at most. true_cfg_scale above 1 is classifier-free guidance away from negative_prompt ("",
        one for all prompts, or as many) or its embeddings, at two passes a step; guidance_scale, the model's
        own distilled guidance, is then best 1. joint_attention_kwargs: {"scale": strength of the LoRAs};
        cross_attention_kwargs is its older name. callback_on_step_end(pipeline, step, timestep, tensors) may
        return a dict of tensors to go on with, and end the drawing by `pipeline._interrupt = True`.
        control_image: what a control LoRA or FLUX.1 Canny or Depth draws after (see `control_tokens`).
        Raises ConfigError for sizes, output types, prompts and callback tensors that are not as described.
        """
        self._check_parts("draw", "transformer", *(() if output_type == "latent" else ("vae",)))
        size = self.vae.config.sample_size if self.vae is not None else DEFAULT_SIDE
        height, width = height or size, width or size
        joint_attention_kwargs = joint_attention_kwargs or cross_attention_kwargs
        check_drawing(height, width, 2 * self.vae_scale_factor, output_type)
        self._check_callback(callback_on_step_end_tensor_inputs)
        with self._lora_scaled(joint_attention_kwargs):
            prompt_embeds, pooled, txt_ids = self.encode_prompt(
                prompt,
                prompt_2,
                num_images_per_prompt or 1,
                prompt_embeds,
                pooled_prompt_embeds,
                max_sequence_length,
            )
        batch = len(prompt_embeds)
        control = self.control_tokens(control_image, height, width, batch)
        rows, columns = grid = tuple(side // (2 * self.vae_scale_factor) for side in (height, width))
        if latents is None:
            channels = self.transformer.out_channels // 4
            seeds = picture_seeds(batch, seed, generator)
            latents = pack_latents(noise_of_seeds(seeds, (channels, 2 * rows, 2 * columns)))
        set_flux_timesteps(self.scheduler, rows * columns, num_inference_steps, timesteps, sigmas)
        conditions = self._conditions(prompt_embeds, pooled, txt_ids, grid, guidance_scale)
        conditions["joint_attention_kwargs"] = joint_attention_kwargs
        negative = (negative_prompt, negative_prompt_2, negative_prompt_embeds, negative_pooled_prompt_embeds)
        away = None
        if true_cfg_scale > 1:
            with self._lora_scaled(joint_attention_kwargs):
                away = self._away(true_cfg_scale, *negative, batch, length=prompt_embeds.shape[1])
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

    def _away(
        self, scale: float, prompt, prompt_2, embeds, pooled, batch: int, length: int
    ) -> "_Away | None":
        """Guidance away from the negative prompts or their embeddings, for `batch` pictures."""
        if prompt is None and embeds is None:  # so does diffusers
            warnings.warn('true_cfg_scale: no effect without a negative_prompt; "" is one', stacklevel=3)
            return None
        count = len(_as_list(prompt) if embeds is None else embeds)
        if not count or batch % count:
            raise ConfigError(f"{count} negative prompts for {batch} pictures: give one, or one a prompt")
        encoded = self.encode_prompt(prompt, prompt_2, batch // count, embeds, pooled, length)
        names = ("encoder_hidden_states", "pooled_projections", "txt_ids")
        return _Away(scale, dict(zip(names, encoded, strict=True)))

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
        self._interrupt = False  # diffusers' name, by which a callback ends the drawing
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
                if self._interrupt:
                    break
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
        device: Any = None,
        lora_scale: float | None = None,
    ) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
        """(prompt_embeds [B, tokens, dim] of T5, pooled [B, dim] of CLIP, text ids [tokens, 3], zeros).

        The embeddings in the transformer's dtype, text ids float32. prompt goes to CLIP, prompt_2 (default:
        prompt) to T5. T5 sees the padding too, as FLUX was trained. lora_scale: strength of the encoders'
        LoRAs. device: diffusers', without effect: Paddle's current one computes. Raises ConfigError for no
        prompt, one of the two embeddings without the other, lists of different lengths, and a
        max_sequence_length beyond MAX_T5_TOKENS.
        """
        if (prompt_embeds is None) != (pooled_prompt_embeds is None):
            raise ConfigError("prompt_embeds and pooled_prompt_embeds belong together: give both or neither")
        if prompt_embeds is None:
            if prompt is None:
                raise ConfigError("no prompt: give prompt, or prompt_embeds and pooled_prompt_embeds")
            self._check_parts("encode a prompt", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
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
            t5_ids = _token_ids(self.tokenizer_2, prompts_2, length)
            _warn_if_cut(self.tokenizer_2, prompts_2, t5_ids)
            with self._lora_scaled(None if lora_scale is None else {"scale": lora_scale}):
                pooled_prompt_embeds = self.text_encoder(clip_ids).pooler_output
                prompt_embeds = self.text_encoder_2(t5_ids)[0]
        dtype = (self.transformer or self.text_encoder_2).dtype
        prompt_embeds = prompt_embeds.astype(dtype).repeat_interleave(num_images_per_prompt, axis=0)
        pooled = pooled_prompt_embeds.astype(dtype).repeat_interleave(num_images_per_prompt, axis=0)
        return prompt_embeds, pooled, paddle.zeros([prompt_embeds.shape[1], 3], dtype="float32")

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

    def _check_parts(self, what: str, *names: str) -> None:
        absent = [name for name in names if getattr(self, name) is None]
        if absent:
            raise ConfigError(
                f"a pipeline without {absent[0]} cannot {what}: without a vae, ask for output_type='latent'; "
                "without text encoders, give prompt_embeds and pooled_prompt_embeds; or load that part, too"
            )

    def _check_callback(self, asked: Sequence[str]) -> None:
        unknown = set(asked) - set(self._callback_tensor_inputs)
        if unknown:
            raise ConfigError(
                f"callback tensors {sorted(unknown)}: only {self._callback_tensor_inputs} can be had"
            )


@dataclass(frozen=True)
class _Away:
    """Classifier-free guidance: its scale, and the transformer's arguments for what it leads away from."""

    scale: float
    conditions: dict[str, paddle.Tensor]


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
