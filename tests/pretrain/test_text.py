"""The tiny tokenizers agree with their fast twins, and the T5 tells "white dots" from "white dress"."""

import numpy as np
import pytest
from tokenizers import Tokenizer

from ppcoat.models.loading import load_clip, load_clip_tokenizer, load_t5, load_t5_tokenizer
from ppcoat.pretrain.text import T5_LENGTH, write_text_parts

CAPTIONS = ["a red dress with white dots", "a white dress with red dots", "sks a blue hat, Ox!"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    write_text_parts(folder)
    return folder


def test_slow_and_fast_t5_tokenizers_agree(folder):
    slow, fast = (
        load_t5_tokenizer(folder / "tokenizer_2"),
        Tokenizer.from_file(str(folder / "tokenizer_2/tokenizer.json")),
    )
    for caption in CAPTIONS:
        assert slow(caption)["input_ids"] == fast.encode(caption).ids
    assert slow.model_max_length == T5_LENGTH


def test_words_of_captions_are_single_clip_tokens_and_the_end_token_has_the_highest_id(folder):
    tokenizer = load_clip_tokenizer(folder / "tokenizer")
    ids = tokenizer(CAPTIONS[0])["input_ids"]
    assert len(ids) == 6 + 2
    assert ids[-1] == max(ids) == len(tokenizer.encoder) - 1


def test_encoders_tell_word_order_apart(folder):
    clip, t5 = load_clip(folder / "text_encoder"), load_t5(folder / "text_encoder_2")
    tokenizer, tokenizer_2 = (
        load_clip_tokenizer(folder / "tokenizer"),
        load_t5_tokenizer(folder / "tokenizer_2"),
    )

    def encode(caption):
        ids = tokenizer_2([caption], padding="max_length", max_length=T5_LENGTH, return_tensors="pd")[
            "input_ids"
        ]
        pooled = clip(
            tokenizer([caption], padding="max_length", return_tensors="pd")["input_ids"]
        ).pooler_output
        return t5(ids)[0].numpy()[0], pooled.numpy()[0]

    (first, pooled_1), (second, _) = encode(CAPTIONS[0]), encode(CAPTIONS[1])
    assert np.isfinite(first).all() and np.isfinite(pooled_1).all()
    # The same words in another order: as a bag of words the outputs would be equal.
    assert np.abs(first.mean(0) - second.mean(0)).max() > 0.05
    assert np.linalg.norm(pooled_1 - encode(CAPTIONS[2])[1]) > 1


def test_the_same_seed_writes_the_same_files(folder, tmp_path):
    write_text_parts(tmp_path)
    for path in sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file()):
        assert (tmp_path / path).read_bytes() == (folder / path).read_bytes(), path
