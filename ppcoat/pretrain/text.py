"""Tokenizers and frozen text encoders of the built-in tiny FLUX, in Hugging Face's file layout.

The encoders are not trained: their weights are random, but with the structure that FLUX needs. FLUX gives
text tokens no position; so each head of the T5 attends to one fixed neighbour, by which "white dots" differs
from "white dress". Everything is a pure function of the seed.
"""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import sentencepiece
from safetensors.numpy import save_file
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from ppcoat.atomic import whole_folder
from ppcoat.data import garments

CLIP_WIDTH, CLIP_LAYERS, CLIP_HEADS, CLIP_LENGTH = 64, 2, 4, 77
T5_WIDTH, T5_LAYERS, T5_HEADS, T5_HEAD_DIM, T5_FF, T5_LENGTH = 64, 2, 8, 16, 128, 12
T5_BUCKETS, T5_MAX_DISTANCE = 32, 128
HEAD_OFFSETS = (-1, 1, -2, 2, -3, 3, 0, 0)  # the neighbour that each T5 head attends to

OPENINGS = ("", "a photo of ", "a picture of ", "a drawing of ", "one ", "the image shows ")
ENDINGS = ("", ", high quality", ", on a wall", ", studio light", ", simple", ", fashion", " on the floor")


def reword_caption(caption: str, rng: np.random.Generator) -> str:
    """The caption with a random opening and ending that say nothing about the picture, as captions of users
    have them."""
    return OPENINGS[rng.integers(len(OPENINGS))] + caption + ENDINGS[rng.integers(len(ENDINGS))]


def write_text_parts(folder: str | Path, seed: int = 0) -> None:
    """Write tokenizer/, tokenizer_2/, text_encoder/ and text_encoder_2/ of a FLUX pipeline folder."""
    folder = Path(folder)
    corpus = [o + g.caption + e for g in garments.all_garments()[::7] for o in OPENINGS for e in ENDINGS]
    corpus += ["a gold star", "sks", "the quick brown fox jumps over the lazy dog", "0 1 2 3 4 5 6 7 8 9"]
    with whole_folder(folder / "tokenizer", replace=True) as draft:
        clip_vocab = _write_clip_tokenizer(draft, corpus)
    with whole_folder(folder / "tokenizer_2", replace=True) as draft:
        t5_vocab = _write_t5_tokenizer(draft, corpus)
    rng = np.random.default_rng(seed)
    with whole_folder(folder / "text_encoder", replace=True) as draft:
        _write_model(draft, _clip_config(clip_vocab), _clip_weights(clip_vocab, rng))
    with whole_folder(folder / "text_encoder_2", replace=True) as draft:
        _write_model(draft, _t5_config(t5_vocab), _t5_weights(t5_vocab, rng))


def _write_clip_tokenizer(folder: Path, corpus: list[str]) -> int:
    """vocab.json + merges.txt: byte alphabet, the alphabet at word ends, merges, then the two special
    tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.pre_tokenizer = pre_tokenizers.Whitespace()
    trained.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=4096, end_of_word_suffix="</w>"))
    merges = [tuple(m) for m in json.loads(trained.to_str())["model"]["merges"]]
    tokens = alphabet + [c + "</w>" for c in alphabet]
    tokens += [a + b for a, b in merges] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    _write_json(folder / "vocab.json", vocab)
    lines = ["#version: 0.2"] + [f"{a} {b}" for a, b in merges]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    }
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(
        folder / "tokenizer_config.json",
        special
        | {
            "model_max_length": CLIP_LENGTH,
            "errors": "replace",
            "tokenizer_class": "CLIPTokenizer",
            "add_prefix_space": False,
            "do_lower_case": True,
        },
    )
    return len(vocab)


def _write_t5_tokenizer(folder: Path, corpus: list[str]) -> int:
    """spiece.model (slow tokenizers) and the same vocabulary as tokenizer.json (fast ones)."""
    model = _sentencepiece_model(corpus)
    (folder / "spiece.model").write_bytes(model)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(
        folder / "tokenizer_config.json",
        special
        | {
            "model_max_length": T5_LENGTH,
            "extra_ids": 0,
            "additional_special_tokens": [],
            "legacy": True,
            "tokenizer_class": "T5Tokenizer",
        },
    )
    fast = Tokenizer(
        models.Unigram([(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(len(pieces))], 2)
    )
    fast.normalizer = normalizers.Sequence([normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()])
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    fast.decoder = decoders.Metaspace(prepend_scheme="always")
    fast.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in ("<pad>", "</s>", "<unk>")]
    )
    fast.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    fast.save(str(folder / "tokenizer.json"))
    return len(pieces)


def _sentencepiece_model(corpus: list[str]) -> bytes:
    """A unigram model in which every word of the corpus is one piece."""
    words = sorted({word for line in corpus for word in re.findall("[a-z]{3,}", line)})
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=model,
        vocab_size=400,
        hard_vocab_limit=False,
        model_type="unigram",
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        normalization_rule_name="identity",
        required_chars="abcdefghijklmnopqrstuvwxyz0123456789,.-'!?",
        user_defined_symbols=["\u2581" + word for word in words],
        minloglevel=2,
        num_threads=1,
    )
    return model.getvalue()


def _clip_config(vocab_size: int) -> dict:
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": vocab_size,
        "hidden_size": CLIP_WIDTH,
        "intermediate_size": 2 * CLIP_WIDTH,
        "projection_dim": CLIP_WIDTH,
        "num_hidden_layers": CLIP_LAYERS,
        "num_attention_heads": CLIP_HEADS,
        "hidden_act": "quick_gelu",
        "max_position_embeddings": CLIP_LENGTH,
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "torch_dtype": "float32",
    }


def _t5_config(vocab_size: int) -> dict:
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "vocab_size": vocab_size,
        "d_model": T5_WIDTH,
        "d_kv": T5_HEAD_DIM,
        "d_ff": T5_FF,
        "num_layers": T5_LAYERS,
        "num_decoder_layers": T5_LAYERS,
        "num_heads": T5_HEADS,
        "relative_attention_num_buckets": T5_BUCKETS,
        "relative_attention_max_distance": T5_MAX_DISTANCE,
        "dropout_rate": 0.0,
        "layer_norm_epsilon": 1e-6,
        "initializer_factor": 1.0,
        "feed_forward_proj": "gated-gelu",
        "dense_act_fn": "gelu_new",
        "is_gated_act": True,
        "is_encoder_decoder": True,
        "use_cache": True,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "torch_dtype": "float32",
    }


def _clip_weights(vocab_size: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Torch layout [out, in]. Attention is nearly uniform, so the pooled end token is like a mean of all
    words."""
    w = CLIP_WIDTH
    tensors = {
        "embeddings.token_embedding.weight": _normal(rng, 1.0, vocab_size, w),
        "embeddings.position_embedding.weight": _normal(rng, 0.1, CLIP_LENGTH, w),
        "final_layer_norm.weight": np.ones(w),
        "final_layer_norm.bias": np.zeros(w),
    }
    for i in range(CLIP_LAYERS):
        layer = f"encoder.layers.{i}."
        for name, scale in (("q_proj", 0.5), ("k_proj", 0.5), ("v_proj", 1.5), ("out_proj", 1.5)):
            tensors[f"{layer}self_attn.{name}.weight"] = _normal(rng, scale * w**-0.5, w, w)
            tensors[f"{layer}self_attn.{name}.bias"] = np.zeros(w)
        tensors[f"{layer}mlp.fc1.weight"] = _normal(rng, w**-0.5, 2 * w, w)
        tensors[f"{layer}mlp.fc2.weight"] = _normal(rng, (2 * w) ** -0.5, w, 2 * w)
        tensors[f"{layer}mlp.fc1.bias"], tensors[f"{layer}mlp.fc2.bias"] = np.zeros(2 * w), np.zeros(w)
        for norm in ("layer_norm1", "layer_norm2"):
            tensors[f"{layer}{norm}.weight"], tensors[f"{layer}{norm}.bias"] = np.ones(w), np.zeros(w)
    return {"text_model." + name: value for name, value in tensors.items()}


def _t5_weights(vocab_size: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Torch layout [out, in]. Queries and keys are zero: only its relative bias decides where a head
    attends."""
    w, inner = T5_WIDTH, T5_HEADS * T5_HEAD_DIM
    tensors = {
        "shared.weight": _normal(rng, 1.0, vocab_size, w),
        "encoder.final_layer_norm.weight": np.ones(w),
    }
    for i in range(T5_LAYERS):
        attention, feed = f"encoder.block.{i}.layer.0.", f"encoder.block.{i}.layer.1."
        tensors[attention + "SelfAttention.q.weight"] = np.zeros((inner, w))
        tensors[attention + "SelfAttention.k.weight"] = np.zeros((inner, w))
        tensors[attention + "SelfAttention.v.weight"] = _normal(rng, w**-0.5, inner, w)
        tensors[attention + "SelfAttention.o.weight"] = _normal(rng, inner**-0.5, w, inner)
        tensors[attention + "layer_norm.weight"] = np.ones(w)
        for name in ("wi_0", "wi_1"):
            tensors[feed + f"DenseReluDense.{name}.weight"] = _normal(rng, w**-0.5, T5_FF, w)
        tensors[feed + "DenseReluDense.wo.weight"] = _normal(rng, T5_FF**-0.5, w, T5_FF)
        tensors[feed + "layer_norm.weight"] = np.ones(w)
    bias = np.zeros((T5_BUCKETS, T5_HEADS))
    for head, offset in enumerate(
        HEAD_OFFSETS
    ):  # bidirectional buckets: 0..15 for the past, 16..31 for the future
        bias[abs(offset) + (T5_BUCKETS // 2 if offset > 0 else 0), head] = 8.0
    tensors["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = bias
    return tensors


def _normal(rng: np.random.Generator, deviation: float, *shape: int) -> np.ndarray:
    return rng.normal(0, deviation, shape)


def _write_model(folder: Path, config: dict, weights: dict[str, np.ndarray]) -> None:
    _write_json(folder / "config.json", config)
    tensors = {name: np.ascontiguousarray(value, np.float32) for name, value in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
