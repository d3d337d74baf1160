import json
from pathlib import Path

import numpy as np
import pytest

from ppcoat.errors import ConfigError
from ppcoat.models.newbie.jina_clip import CaptionTokenizer, load_gemma3_tokenizer, load_jina_clip_tokenizer

FOLDER = Path(__file__).parents[2] / "fixtures" / "tiny_newbie"


@pytest.fixture(scope="module")
def gemma():
    return load_gemma3_tokenizer(FOLDER / "text_encoder")


@pytest.fixture(scope="module")
def jina():
    return load_jina_clip_tokenizer(FOLDER / "clip_model")


def test_ids_of_a_batch_are_those_of_transformers(gemma, jina, refs, texts):
    tokens = gemma([texts["prefix"] + caption for caption in texts["captions"]])
    np.testing.assert_array_equal(tokens.ids, refs["gemma_ids"])
    np.testing.assert_array_equal(tokens.mask, refs["gemma_mask"])
    tokens = jina(texts["captions"])
    np.testing.assert_array_equal(tokens.ids, refs["jina_ids"])
    np.testing.assert_array_equal(tokens.mask, refs["jina_mask"])


def test_empty_and_long_texts(gemma, jina, refs, texts):
    np.testing.assert_array_equal(gemma([""]).ids, refs["gemma_empty_ids"])
    np.testing.assert_array_equal(jina([""]).ids, refs["jina_empty_ids"])
    np.testing.assert_array_equal(jina([texts["long_caption"]]).ids, refs["jina_long_ids"])
    np.testing.assert_array_equal(
        gemma([texts["prefix"] + texts["long_caption"]]).ids, refs["gemma_long_ids"]
    )


def test_what_is_cut_is_counted(gemma, refs, texts):
    tokens = gemma(["short", texts["prefix"] + texts["trunc_caption"]])
    np.testing.assert_array_equal(tokens.ids[1:], refs["gemma_trunc_ids"])
    assert tokens.cut == [1]
    assert gemma(["short"]).cut == []


def test_another_limit_is_for_one_call(gemma, texts):
    text = texts["prefix"] + texts["captions"][0]
    assert gemma([text], 16).ids.shape == (1, 16)
    assert gemma([text]).cut == []


def test_settings_inside_the_file_do_not_matter(refs, texts, tmp_path):
    file = tmp_path / "tokenizer.json"
    settings = json.loads((FOLDER / "text_encoder" / "tokenizer.json").read_text(encoding="utf-8"))
    settings["padding"] = {"strategy": {"Fixed": 99}, "direction": "Left", "pad_to_multiple_of": None}
    settings["padding"] |= {"pad_id": 5, "pad_type_id": 0, "pad_token": "<eos>"}
    settings["truncation"] = {"direction": "Left", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    file.write_text(json.dumps(settings), encoding="utf-8")
    tokens = CaptionTokenizer(file, 0, 512, 8)([texts["prefix"] + text for text in texts["captions"]])
    np.testing.assert_array_equal(tokens.ids, refs["gemma_ids"])
    np.testing.assert_array_equal(tokens.mask, refs["gemma_mask"])


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="tokenizer.json is missing"):
        load_gemma3_tokenizer(tmp_path)
