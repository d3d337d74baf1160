"""FLUX from prompt to picture (drawing.py), on ppdiffusers' pipeline machinery.

The folders are diffusers' (models/loading.py reads, models/writing.py writes). Noise is drawn on the host
from one seed per picture, so a seed gives the same picture on CPU and GPU, alone or within a batch.
"""

import os
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import paddle
import paddle.nn as nn
from ppdiffusers import AutoencoderKL, DiffusionPipeline

from ppcoat.atomic import can_be_replaced, whole_folder
from ppcoat.device import compute_dtype
from ppcoat.errors import ConfigError
from ppcoat.models import loading, writing
from ppcoat.models.flux.drawing import DrawingCall, DrawingLoop, FluxPipelineOutput
from ppcoat.models.flux.files import FLUX_COMPONENTS, FluxFiles, Places
from ppcoat.models.flux.lora_methods import LoRAMethods
from ppcoat.models.flux.picture_inputs import PictureInputs
from ppcoat.models.flux.scheduler import flux_scheduler
from ppcoat.models.flux.transformer import FluxTransformer2DModel
from ppcoat.models.pictures import LatentPictures, check_options
from ppcoat.models.quantized_base import load_parts


class FluxPipeline(DrawingLoop, LoRAMethods, PictureInputs, LatentPictures, DiffusionPipeline):
    """The seven parts of FLUX.1 and the loop over them.

    A scheduler that cannot shift dynamically (ppdiffusers' own, in some versions) is replaced by ours with
    its config. Text encoders and tokenizers may be None if embeddings are given to every call, the
    transformer as long as there is only encoding to do, and the VAE if only latents are wanted.
    """

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
        """Writes a folder that diffusers (PyTorch) and `from_pretrained` load, whole or not at all: one of an
        earlier pipeline is replaced, and what it has beside that stays. In a folder of other things, and in
        one that cannot be replaced (see `can_be_replaced`), each component is, and model_index.json is last.

        dtype: float32, bfloat16 or float16 (None: as loaded). Raises ConfigError if a part is None or a
        LoRA is on, OSError (full disk; it takes room for the old and the new one).
        """
        absent = [name for name in FLUX_COMPONENTS if getattr(self, name) is None]
        if absent:
            raise ConfigError(f"the pipeline has no {absent[0]}, and a folder is not complete without it")
        folder = Path(folder)
        whole = not folder.is_dir()
        if not whole and ((folder / "model_index.json").exists() or not any(folder.iterdir())):
            whole = can_be_replaced(folder)
        with whole_folder(folder, replace=True, keep=True) if whole else nullcontext(folder) as target:
            for name in FLUX_COMPONENTS:
                writing.save_component(getattr(self, name), target / name, dtype)
            name = writing.class_that_draws(self.transformer, type(self).__name__)
            index = {**writing.MODEL_INDEX, "_class_name": name}
            writing.write_json(target / "model_index.json", index)

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
        joint_attention_kwargs = joint_attention_kwargs or cross_attention_kwargs
        height, width = self._size(height, width)
        return self._draw(DrawingCall.of(locals()))
