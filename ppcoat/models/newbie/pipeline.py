"""NewBie-image from prompt to picture: encode_prompt -> integrate -> decode.

The folder is the one that NewBie's converter writes (files.py). Noise is drawn on the host from one seed per
picture, so a seed gives the same picture on CPU and GPU, alone or within a batch.

The way from noise (t = 0) to latents (t = 1) follows NewBie-image's velocity: a time grid, guidance, two
solvers. Source: the public NewBie-image sampler (ODE of a linear path, after Lumina-Image 2.0's).
Classifier-free guidance is arXiv 2207.12598.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import paddle
import PIL.Image
from ppdiffusers import AutoencoderKL, DiffusionPipeline
from ppdiffusers.utils import BaseOutput

from ppcoat.device import compute_dtype, default_dtype
from ppcoat.errors import ConfigError
from ppcoat.models.newbie.files import (
    LATENT_CHANNELS,
    check_newbie_folder,
    load_gemma3,
    load_jina_clip,
    load_newbie_vae,
    load_nextdit,
    load_quantized_nextdit,
)
from ppcoat.models.newbie.gemma3 import Gemma3TextEncoder
from ppcoat.models.newbie.jina_clip import (
    CaptionTokenizer,
    JinaClipTextModel,
    Tokens,
    load_gemma3_tokenizer,
    load_jina_clip_tokenizer,
)
from ppcoat.models.newbie.nextdit import NextDiT_CLIP
from ppcoat.models.offload import loaded_to_host
from ppcoat.models.pictures import TOKEN_SIDE, LatentPictures, check_drawing, noise_of_seeds, picture_seeds
from ppcoat.nn.convert import check_format
from ppcoat.progress import Progress

_log = logging.getLogger(__name__)

# What Gemma reads before a prompt, with the space at its end: so the base model was trained.
PROMPT_PREFIX = (
    "You are an assistant designed to generate high-quality anime images with the highest degree of "
    "image-text alignment based on textual prompts. <Prompt Start> "
)
DEFAULT_SIDE = 1024
SOLVERS = ("euler", "midpoint")


@dataclass
class NewbiePipelineOutput(BaseOutput):
    """images by output_type: "pil" a list of PIL images; "np" float32 [B, height, width, 3] in 0..1;
    "latent" float32 latents [B, 16, height/8, width/8]."""

    images: list[PIL.Image.Image] | np.ndarray | paddle.Tensor


class NewbiePipeline(LatentPictures, DiffusionPipeline):
    """The six parts of NewBie-image and the way through them; part names as in model_index.json."""

    def __init__(
        self,
        transformer: NextDiT_CLIP | None,
        text_encoder: Gemma3TextEncoder | None,
        tokenizer: CaptionTokenizer | None,
        clip_model: JinaClipTextModel | None,
        clip_tokenizer: CaptionTokenizer | None,
        vae: AutoencoderKL | None,
    ):
        super().__init__()
        self.register_modules(
            transformer=transformer,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            clip_model=clip_model,
            clip_tokenizer=clip_tokenizer,
            vae=vae,
        )

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike,
        paddle_dtype: str | paddle.dtype | None = None,
        *,
        transformer: NextDiT_CLIP | None = None,
        without: Sequence[str] = (),
        quantize: str | None = None,
        offload: bool = False,
    ) -> NewbiePipeline:
        """Loads a NewBie folder; writes nothing into it. transformer: used instead of the folder's. without:
        "transformer" leaves that part None. quantize, offload: as of `FluxPipeline.from_pretrained`.

        paddle_dtype: dtype of all weights but the VAE's, which stay float32; by default float32 on CPU and
        bfloat16 on a GPU. Raises ConfigError for a dtype that the device does not compute in (compute_dtype),
        and for an incomplete or inconsistent folder (check_newbie_folder), before any weight is read.
        """
        folder, dtype = Path(folder), compute_dtype(paddle_dtype) or default_dtype()
        check_format(quantize)
        check_newbie_folder(folder)
        if transformer is None and "transformer" not in without:
            if quantize:
                transformer = load_quantized_nextdit(folder / "transformer", dtype, base=quantize)
            else:
                with loaded_to_host(offload):
                    transformer = load_nextdit(folder / "transformer", dtype)
        with loaded_to_host(offload):
            gemma3 = load_gemma3(folder / "text_encoder", "bfloat16" if dtype == "float16" else dtype)
            jina_clip = load_jina_clip(folder / "clip_model", dtype)
            vae = load_newbie_vae(folder / "vae", "float32")
        return cls(
            transformer=transformer,
            text_encoder=gemma3,
            tokenizer=load_gemma3_tokenizer(folder / "text_encoder"),
            clip_model=jina_clip,
            clip_tokenizer=load_jina_clip_tokenizer(folder / "clip_model"),
            vae=vae,
        )._offloaded(offload)

    @paddle.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str = "",
        height: int = DEFAULT_SIDE,
        width: int = DEFAULT_SIDE,
        num_inference_steps: int = 28,
        guidance_scale: float = 5.0,
        num_images_per_prompt: int = 1,
        seed: int | None = None,
        latents: paddle.Tensor | None = None,
        output_type: str = "pil",
        prefix: str = PROMPT_PREFIX,
        max_sequence_length: int | None = None,
        shift: float = 6.0,
        solver: str = "euler",
        guidance_until: float = 1.0,
        guidance_renorm: float = 0.0,
        callback: Callable[[int, paddle.Tensor], None] | None = None,
        conditions: dict[str, paddle.Tensor] | None = None,
    ) -> NewbiePipelineOutput:
        """Draws pictures; B = prompts * num_images_per_prompt, the pictures of one prompt side by side.

        conditions: what encode_prompt gave for B prompts and then B negative prompts, instead of `prompt`.
        height, width: pixels, multiples of 16. Picture i is drawn from seed + i; latents [B, 16, height/8,
        width/8]: noise instead. prefix, max_sequence_length: see encode_prompt. shift: see time_grid. solver:
        see integrate. guidance_*: see Guidance (until, renorm: the original's cfg_trunc, renorm_cfg).
        callback(step, latents) is called after each step. Raises ConfigError for what is not as described.
        """
        check_drawing(height, width, TOKEN_SIDE, output_type)
        if num_inference_steps < 1:
            raise ConfigError(f"num_inference_steps is {num_inference_steps}: it must be at least 1")
        if (prompt is None) == (conditions is None):
            raise ConfigError("give prompt or conditions, one of them")
        if conditions is None:
            texts = _texts(prompt, negative_prompt, num_images_per_prompt)
            conditions = self.encode_prompt(texts, prefix, max_sequence_length)
        batch = conditions["cap_mask"].shape[0] // 2
        if latents is None:
            seeds = picture_seeds(batch, seed)
            latents = noise_of_seeds(seeds, (LATENT_CHANNELS, height // 8, width // 8))
        guidance = Guidance(guidance_scale, guidance_until, guidance_renorm)
        velocity = partial(guided_velocity, self.transformer, conditions=conditions, guidance=guidance)
        grid = time_grid(num_inference_steps + 1, shift)
        shown = {"desc": "drawing", "unit": "step"} | getattr(self, "_progress_bar_config", {})
        with Progress(total=num_inference_steps, **shown) as progress:
            for step, x in enumerate(integrate(velocity, latents.astype("float32"), grid, solver)):
                if callback is not None:
                    callback(step, x)
                progress.update()
        return NewbiePipelineOutput(images=x if output_type == "latent" else self.pictures(x, output_type))

    @paddle.no_grad()
    def encode_prompt(
        self,
        prompts: Sequence[str],
        prefix: str = PROMPT_PREFIX,
        max_sequence_length: int | None = None,
        warn: bool = True,
    ) -> dict[str, paddle.Tensor]:
        """The transformer's arguments: cap_feats [B, L, dim] and cap_mask int64 [B, L] of Gemma3,
        clip_text_pooled [B, dim] of Jina CLIP.

        Gemma reads prefix + prompt, Jina the prompt alone; an empty prompt stays empty. max_sequence_length:
        Gemma tokens (default 512), prefix included; what is longer is cut, with a warning unless `warn` is
        off.
        """
        tokens = self.tokenizer(with_prefix(prompts, prefix), max_sequence_length)
        if warn:
            warn_of_cut(tokens, prompts, max_sequence_length or self.tokenizer.max_tokens)
        # in training the transformer comes later, in Gemma's dtype
        first = self.text_encoder.embed_tokens.weight if self.transformer is None else self.transformer
        dtype = first.dtype
        ids, mask = paddle.to_tensor(tokens.ids), paddle.to_tensor(tokens.mask)
        clip_ids = paddle.to_tensor(self.clip_tokenizer(prompts).ids)
        return {
            "cap_feats": self.text_encoder(ids, mask).astype(dtype),
            "cap_mask": mask,
            "clip_text_pooled": self.clip_model(clip_ids).astype(dtype),
        }


def _texts(prompt: str | Sequence[str], negative_prompt: str, pictures: int) -> list[str]:
    """Every prompt `pictures` times in a row, then as often the negative prompt."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    prompts = [text for text in prompts for _ in range(pictures)]
    return prompts + [negative_prompt] * len(prompts)


def with_prefix(prompts: Sequence[str], prefix: str) -> list[str]:
    """What Gemma reads: an empty prompt stays empty."""
    return [prefix + prompt if prompt else "" for prompt in prompts]


def warn_of_cut(tokens: Tokens, prompts: Sequence[str], limit: int) -> None:
    """One line that counts the prompts whose end Gemma will not see; none where there are none."""
    if tokens.cut:
        _log.warning(
            "%d of %d captions are longer than %d tokens and were cut, the first is %.60r",
            *(len(tokens.cut), len(prompts), limit, prompts[tokens.cut[0]]),
        )


@dataclass(frozen=True)
class Guidance:
    """v = v_uncond + scale * (v_cond - v_uncond) while t < until, then v_cond alone.

    until: 1 or more is always; noise is at t = 0, so guidance goes off late in the drawing. renorm r: if not
    0, the guided velocity of a picture is at most r times as long as v_cond.
    """

    scale: float = 5.0
    until: float = 1.0
    renorm: float = 0.0

    def __post_init__(self) -> None:
        if not (np.isfinite(self.scale) and self.until >= 0 and self.renorm >= 0):
            raise ConfigError(f"guidance {self}: scale must be finite, until and renorm 0 or more")


def time_grid(points: int, shift: float = 6.0) -> np.ndarray:
    """float32 [points] from 0 to 1: t / (t + shift - shift * t) of evenly spaced t, denser near noise.
    Raises ConfigError for fewer than 2 points or a shift that is not positive."""
    if points < 2 or not shift > 0:
        raise ConfigError(f"{points} time points, shift {shift}: wanted at least 2 and a positive shift")
    t = np.linspace(0, 1, points)
    return (t / (t + shift - shift * t)).astype("float32")


def guided_velocity(
    transformer: paddle.nn.Layer, x: paddle.Tensor, t: float, conditions: dict, guidance: Guidance
) -> paddle.Tensor:
    """Velocity float32 [B, C, h, w] of latents x at time t.

    conditions: cap_feats, cap_mask and clip_text_pooled of 2B rows, first those of the prompts, then of the
    negative prompts.
    """
    batch, dtype = x.shape[0], conditions["cap_feats"].dtype
    on = t < guidance.until and guidance.scale != 1
    if on:
        x = paddle.concat([x, x])
    else:
        conditions = {name: rows[:batch] for name, rows in conditions.items()}
    time = paddle.full([x.shape[0]], t, dtype="float32")
    velocity = transformer(x.astype(dtype), time, **conditions).astype("float32")
    if not on:
        return velocity
    wanted, unwanted = velocity.chunk(2)
    guided = unwanted + guidance.scale * (wanted - unwanted)
    if guidance.renorm:
        length, limit = _length(guided), guidance.renorm * _length(wanted)
        guided = paddle.where(length >= limit, guided * (limit / length), guided)
    return guided


def integrate(
    velocity: Callable[[paddle.Tensor, float], paddle.Tensor],
    x: paddle.Tensor,
    grid: np.ndarray,
    solver: str = "euler",
) -> Iterator[paddle.Tensor]:
    """Yields x, float32 [B, C, h, w], after each of the steps between the times grid [points]; the solver
    "midpoint" evaluates the velocity twice in each, "euler" once. Raises ConfigError for another solver."""
    if solver not in SOLVERS:
        raise ConfigError(f"solver is {solver!r}: choose {' or '.join(SOLVERS)}")
    for t, following in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):
        step = following - t
        slope = velocity(x, t)
        if solver == "midpoint":
            slope = velocity(x + step / 2 * slope, t + step / 2)
        x = x + step * slope
        yield x


def _length(x: paddle.Tensor) -> paddle.Tensor:
    """Euclidean length of each sample, [B, 1, 1, 1]."""
    return x.square().sum(axis=[1, 2, 3], keepdim=True).sqrt()
