"""Captions to token ids for Gemma3 and Jina CLIP, from tokenizer.json alone.

Padding stands on the right whatever the tokenizer's own settings say (Gemma's say left): NextDiT counts
caption tokens from the first one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from ppcoat.errors import ConfigError
from ppcoat.models.jina_clip import PAD_ID as JINA_PAD_ID

GEMMA_PAD_ID = 0
MAX_GEMMA_TOKENS, MAX_JINA_TOKENS = 512, 2048
# The training code pads Gemma's captions to a multiple of this.
GEMMA_MULTIPLE = 8


@dataclass(frozen=True)
class Tokens:
    """ids and mask (1 for tokens), int64 [B, L]; cut: indices of the texts whose end was cut off."""

    ids: np.ndarray
    mask: np.ndarray
    cut: list[int]


class CaptionTokenizer:
    """Texts -> Tokens, padded on the right to the longest, cut at max_tokens (special tokens included)."""

    def __init__(self, file: str | Path, pad_id: int, max_tokens: int, multiple: int | None = None):
        if not Path(file).is_file():
            raise ConfigError(f"{file} is missing: take it from the original model folder")
        self.max_tokens = max_tokens
        self._pad_id, self._multiple = pad_id, multiple
        self._tokenizer = Tokenizer.from_file(str(file))
        self._tokenizer.no_padding()

    def __call__(self, texts: Sequence[str], max_tokens: int | None = None) -> Tokens:
        """max_tokens: instead of the tokenizer's own."""
        self._tokenizer.enable_truncation(max_tokens or self.max_tokens)
        encodings = self._tokenizer.encode_batch(list(texts))
        longest = max(len(encoding.ids) for encoding in encodings)
        if self._multiple:
            longest = -(-longest // self._multiple) * self._multiple
        ids = np.full((len(encodings), longest), self._pad_id, dtype="int64")
        mask = np.zeros_like(ids)
        for i, encoding in enumerate(encodings):
            ids[i, : len(encoding.ids)], mask[i, : len(encoding.ids)] = encoding.ids, 1
        return Tokens(ids, mask, [i for i, encoding in enumerate(encodings) if encoding.overflowing])


def load_gemma3_tokenizer(folder: str | Path) -> CaptionTokenizer:
    """From the text_encoder folder: <bos> first, nothing at the end, 512 tokens at most."""
    file = Path(folder) / "tokenizer.json"
    return CaptionTokenizer(file, GEMMA_PAD_ID, MAX_GEMMA_TOKENS, GEMMA_MULTIPLE)


def load_jina_clip_tokenizer(folder: str | Path) -> CaptionTokenizer:
    """From the clip_model folder: <s> ... </s>, 2048 tokens at most."""
    return CaptionTokenizer(Path(folder) / "tokenizer.json", JINA_PAD_ID, MAX_JINA_TOKENS)
