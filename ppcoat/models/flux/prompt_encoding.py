"""From prompts to what FLUX's transformer reads: CLIP's pooled vector and T5's tokens, of what is wanted and
of what guidance leads away from."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import paddle

from ppcoat.errors import ConfigError

MAX_T5_TOKENS = 512
LETTERS_OF_A_TOKEN = 32
MOST_COUNTED = 16  # of the prompts that are cut, to tell how long they are


@dataclass(frozen=True)
class Away:
    """Classifier-free guidance: its scale, and the transformer's arguments for what it leads away from."""

    scale: float
    conditions: dict[str, paddle.Tensor]


class PromptEncoding:
    """For a pipeline of FLUX's parts, each of which may be None, and LoRAMethods."""

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

    def _check_parts(self, what: str, *names: str) -> None:
        absent = [name for name in names if getattr(self, name) is None]
        if absent:
            raise ConfigError(
                f"a pipeline without {absent[0]} cannot {what}: without a vae, ask for output_type='latent'; "
                "without text encoders, give prompt_embeds and pooled_prompt_embeds; or load that part, too"
            )

    def _encoded(self, call: Any) -> tuple[dict[str, paddle.Tensor], Away | None]:
        """The transformer's arguments for the prompts of a DrawingCall, and its guidance away from the
        negative ones, if it asks for that."""
        with self._lora_scaled(call.joint_attention_kwargs):
            given = (call.prompt_embeds, call.pooled_prompt_embeds, call.max_sequence_length)
            conditions = _named(
                self.encode_prompt(call.prompt, call.prompt_2, call.num_images_per_prompt or 1, *given)
            )
            batch, length = conditions["encoder_hidden_states"].shape[:2]
            away = self._away(call, batch, length) if call.true_cfg_scale > 1 else None
        return conditions, away

    def _away(self, call: Any, batch: int, length: int) -> Away | None:
        """Guidance away from the negative prompts or their embeddings, for `batch` pictures."""
        prompt, embeds = call.negative_prompt, call.negative_prompt_embeds
        if prompt is None and embeds is None:  # so does diffusers
            warnings.warn('true_cfg_scale: no effect without a negative_prompt; "" is one', stacklevel=4)
            return None
        count = len(_as_list(prompt) if embeds is None else embeds)
        if not count or batch % count:
            raise ConfigError(f"{count} negative prompts for {batch} pictures: give one, or one a prompt")
        given = (embeds, call.negative_pooled_prompt_embeds, length)
        encoded = self.encode_prompt(prompt, call.negative_prompt_2, batch // count, *given)
        return Away(call.true_cfg_scale, _named(encoded))


def _named(encoded: tuple[paddle.Tensor, ...]) -> dict[str, paddle.Tensor]:
    names = ("encoder_hidden_states", "pooled_projections", "txt_ids")
    return dict(zip(names, encoded, strict=True))


def _as_list(prompt: str | Sequence[str]) -> list[str]:
    return [prompt] if isinstance(prompt, str) else list(prompt)


def _token_ids(tokenizer: Any, prompts: list[str], length: int) -> paddle.Tensor:
    starts = [_start(prompt, length) for prompt in prompts]
    tokens = tokenizer(starts, padding="max_length", max_length=length, truncation=True, return_tensors="pd")
    return tokens["input_ids"]


def _start(prompt: str, length: int) -> str:
    """As much of a prompt as `length` tokens come from: a piece of T5 has at most 16 letters, one of CLIP
    may be a long hashtag, and tokenizers in Python take seconds for 64 KiB."""
    letters = end = LETTERS_OF_A_TOKEN * length
    while end < len(prompt) and sum(map(len, prompt[:end].split())) < letters:
        end += letters  # white space is no letter
    return prompt[:end]


def _warn_if_cut(tokenizer: Any, prompts: list[str], ids: paddle.Tensor) -> None:
    """ids: [prompts, length], of which only rows without padding can have been cut."""
    full = [p for p, row in zip(prompts, ids.numpy(), strict=True) if row[-1] != tokenizer.pad_token_id]
    some = sorted(full, key=len)[-MOST_COUNTED:]
    starts = [_start(prompt, ids.shape[1]) for prompt in some]
    pieces = max((len(tokenizer.tokenize(start)) for start in starts), default=0)
    longest = pieces + tokenizer.num_special_tokens_to_add(pair=False)
    if longest > ids.shape[1]:
        more = "more than " if starts != some else ""
        warnings.warn(f"a prompt of {more}{longest} T5 tokens is cut to {ids.shape[1]}", stacklevel=1)
