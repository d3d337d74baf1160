"""The text tower of Jina CLIP v2: token ids -> one vector per caption, the mean over its tokens. And the
tokenizers of both encoders of NewBie-image, Gemma3 and Jina CLIP.

XLM-RoBERTa with norms after each sum, rotary positions instead of absolute ones, and exact GELU. The task
LoRA ("retrieval.query") that the original always computes is folded into the weights when they are loaded
(files.py), so nothing of it is seen here.

Source: the public code of jinaai/jina-clip-v2 and jina-embeddings-v3 (names as there). Linears are [in, out].

Captions become ids by tokenizer.json alone. Padding stands on the right whatever the tokenizer's own settings
say (Gemma's say left): NextDiT counts caption tokens from the first one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn
from tokenizers import Tokenizer

from ppcoat.errors import ConfigError
from ppcoat.models.tensor_files import read_by_library
from ppcoat.nn.attention import (
    attention,
    attention_bias,
    half_split_angles,
    rotate_halves,
)
from ppcoat.reading import VOCABULARY_BYTES, read_bytes, shown

JINA_PAD_ID = 1
# The text model whose sizes a config.json may leave out by naming it.
_BASE_MODEL = "jinaai/jina-embeddings-v3"

GEMMA_PAD_ID = 0
MAX_GEMMA_TOKENS, MAX_JINA_TOKENS = 512, 2048
# The training code pads Gemma's captions to a multiple of this.
GEMMA_MULTIPLE = 8


@dataclass(frozen=True)
class JinaClipConfig:
    """The defaults are the sizes of jina-embeddings-v3. The task LoRA is multiplied by lora_alpha / lora_rank
    when it is folded; neither has a default, for a wrong one would only show in the pictures."""

    vocab_size: int = 250002
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    type_vocab_size: int = 1
    layer_norm_eps: float = 1e-5
    rotary_emb_base: float = 20000.0
    lora_rank: int | None = None
    lora_alpha: float | None = None

    @classmethod
    def from_dict(cls, config: dict) -> JinaClipConfig:
        """From config.json of a Jina CLIP. Raises ConfigError if sizes are absent and the base model is not
        the one whose sizes we know, or if a value asks for something not implemented."""
        text = config.get("text_config", {})
        sizes = text.get("hf_model_config_kwargs", {})
        names = cls.__dataclass_fields__
        absent = [name for name in names if name not in sizes and not name.startswith("lora_")]
        if absent and text.get("hf_model_name_or_path") != _BASE_MODEL:
            raise ConfigError(
                f"Jina CLIP config: text_config.hf_model_config_kwargs has no {absent[0]}, and only for "
                f"{_BASE_MODEL} is it known: add it"
            )
        for key, wanted in (
            ("hidden_act", "gelu"),
            ("position_embedding_type", "rotary"),
            ("pad_token_id", 1),
        ):
            if sizes.get(key, wanted) != wanted:
                raise ConfigError(f"Jina CLIP config: {key} is {sizes[key]!r}, wanted {wanted!r}")
        if text.get("pooler_type", "mean_pooler") != "mean_pooler":
            raise ConfigError(
                f"Jina CLIP config: pooler_type is {text['pooler_type']!r}, wanted 'mean_pooler'"
            )
        return cls(**{name: sizes[name] for name in names if name in sizes})


class JinaClipTextModel(nn.Layer):
    """Parameter names are the original's after `text_model.transformer.roberta.`."""

    def __init__(self, config: JinaClipConfig):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.emb_ln = nn.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps)
        self.encoder = Encoder(config)

    def forward(self, input_ids: paddle.Tensor) -> paddle.Tensor:
        """clip_text_pooled [B, hidden_size], not normalised: the mean over all tokens, <s> and </s> included.

        input_ids int64 [B, L], padded on the right with JINA_PAD_ID; padding changes nothing.
        """
        mask = (input_ids != JINA_PAD_ID).astype("float32").unsqueeze(-1)
        hidden = self.hidden_states(input_ids)
        pooled = (hidden.astype("float32") * mask).sum(axis=1) / mask.sum(axis=1)
        return pooled.astype(hidden.dtype)

    def hidden_states(self, input_ids: paddle.Tensor) -> paddle.Tensor:
        """input_ids int64 [B, L] -> the last layer's output [B, L, hidden_size] in the dtype of the weights;
        rows of padding hold numbers without meaning."""
        config = self.config
        x = self.emb_ln(self.embeddings(input_ids))
        head_dim = config.hidden_size // config.num_attention_heads
        cos, sin = half_split_angles(input_ids.shape[1], head_dim, config.rotary_emb_base)
        bias = attention_bias((input_ids.numpy() != JINA_PAD_ID)[:, None])
        for layer in self.encoder.layers:
            x = layer(x, cos, sin, bias)
        return x


class Embeddings(nn.Layer):
    """Word and token type; all tokens are of type 0."""

    def __init__(self, config: JinaClipConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)

    def forward(self, input_ids):
        return self.word_embeddings(input_ids) + self.token_type_embeddings.weight[0]


class Encoder(nn.Layer):
    """Only a name between the model and its layers."""

    def __init__(self, config: JinaClipConfig):
        super().__init__()
        self.layers = nn.LayerList([EncoderLayer(config) for _ in range(config.num_hidden_layers)])


class EncoderLayer(nn.Layer):
    """Attention and feed-forward; the norm comes after each sum."""

    def __init__(self, config: JinaClipConfig):
        super().__init__()
        dim, epsilon = config.hidden_size, config.layer_norm_eps
        self.mixer = Mixer(dim, config.num_attention_heads)
        self.norm1 = nn.LayerNorm(dim, epsilon=epsilon)
        self.mlp = JinaClipFeedForward(dim, config.intermediate_size)
        self.norm2 = nn.LayerNorm(dim, epsilon=epsilon)

    def forward(self, x, cos, sin, bias):
        x = self.norm1(self.mixer(x, cos, sin, bias) + x)
        return self.norm2(self.mlp(x) + x)


class Mixer(nn.Layer):
    """Attention both ways; `Wqkv` holds queries, keys and values in this order."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.Wqkv = nn.Linear(dim, 3 * dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x, cos, sin, bias):
        q, k, v = self.Wqkv(x).reshape([0, 0, 3, self.heads, -1]).unbind(axis=2)
        q, k = rotate_halves(q, cos, sin), rotate_halves(k, cos, sin)
        return self.out_proj(attention(q, k, v, bias).flatten(2))


class JinaClipFeedForward(nn.Layer):
    """Linear, exact (erf) GELU, Linear."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


@dataclass(frozen=True)
class Tokens:
    """ids and mask (1 for tokens), int64 [B, L]; cut: indices of the texts whose end was cut off."""

    ids: np.ndarray
    mask: np.ndarray
    cut: list[int]


class CaptionTokenizer:
    """Texts -> Tokens, padded on the right to the longest, cut at max_tokens (special tokens included)."""

    def __init__(self, file: str | Path, pad_id: int, max_tokens: int, multiple: int | None = None):
        content = read_bytes(Path(file), "take it from the original model folder", VOCABULARY_BYTES)
        self.file, self.max_tokens = file, max_tokens
        self._pad_id, self._multiple = pad_id, multiple
        with read_by_library(file):
            self._tokenizer = Tokenizer.from_buffer(content)
            self._tokenizer.no_padding()
            tried = self(["a red shirt"])
        if not tried.ids.size:
            raise ConfigError(f"{file} makes no tokens of a caption: fetch it again")

    def check_ids(self, vocabulary: int) -> None:
        """Raises ConfigError for ids that a text encoder with a table of `vocabulary` rows lacks."""
        token, highest = max(self._tokenizer.get_vocab().items(), key=lambda item: item[1])
        if highest >= vocabulary:
            raise ConfigError(
                f"{self.file} has the id {highest} for {shown(token)}, but the vocab_size in the config.json "
                f"beside it is {vocabulary}: take both from one model"
            )

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
