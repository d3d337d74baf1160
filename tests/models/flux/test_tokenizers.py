"""Damaged tokenizers: named in one line, by file."""

import json
import shutil
from pathlib import Path

import pytest

from ppcoat.errors import ConfigError
from ppcoat.models.flux.tokenizers import check_tokenizer, load_clip_tokenizer, load_t5_tokenizer

BUILT_IN = Path(__file__).parents[3] / "ppcoat/assets/tiny_flux"
NEW = Path(__file__).parents[2] / "fixtures/tiny_flux_diffusers_042"


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(BUILT_IN, tmp_path / "flux", ignore=shutil.ignore_patterns("*.safetensors"))
    return tmp_path / "flux"


def changed(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | values))


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("vocab.json", lambda text: text.replace("0", "-1", 1), "vocab.json: .* has the id -1"),
        ("vocab.json", lambda text: text.replace(": 1,", ": 0,", 1), "vocab.json gives two tokens one id"),
        ("vocab.json", lambda text: "[]", "vocab.json holds no JSON object"),
        ("merges.txt", lambda text: text[: len(text) // 2], "merges.txt"),
        ("merges.txt", lambda text: text.rsplit("\n", 2)[0], "merges.txt has no merge for "),
        ("merges.txt", lambda text: text + "a b c\n", "merges.txt:.*came a b c, wanted two words"),
        ("merges.txt", lambda text: text + "q% %q\n", "merges.txt makes q%%q, which .*vocab.json lacks"),
        ("tokenizer_config.json", lambda text: "[", "tokenizer_config.json is not valid JSON"),
        ("special_tokens_map.json", lambda text: '{"pad_token": 5}', "special_tokens_map.json: pad_token"),
        ("added_tokens.json", lambda text: '{"<new>": 10000000}', "tokenizer cannot be read"),
    ],
)  # fmt: skip
def test_a_damaged_clip_tokenizer_is_named(folder, name, change, said):
    file = folder / "tokenizer" / name
    file.write_text(change(file.read_text("utf-8") if file.exists() else ""), "utf-8")
    with pytest.raises(ConfigError, match=said):
        load_clip_tokenizer(folder / "tokenizer")


@pytest.mark.parametrize("content", [b"", b"abc", bytes(range(256)), None])
def test_a_damaged_sentencepiece_model_is_named(folder, content):
    file = folder / "tokenizer_2/spiece.model"
    file.write_bytes(file.read_bytes()[:-700] if content is None else content)
    with pytest.raises(ConfigError, match="spiece.model|tokenizer_2 cannot be read"):
        load_t5_tokenizer(folder / "tokenizer_2")


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}},
        {"model": {"type": "WordLevel", "vocab": {"<|endoftext|>": 0}, "unk_token": "none"}},
        {"normalizer": {"type": "Nothing"}},
        {"added_tokens": "none"},
    ],
)
def test_what_the_package_tokenizers_cannot_read_is_one_line(tmp_path, change):
    """The second fails at the first word it meets."""
    shutil.copytree(NEW / "tokenizer", tmp_path / "tokenizer")
    changed(tmp_path / "tokenizer/tokenizer.json", **change)
    with pytest.raises(ConfigError, match="tokenizer cannot be read [(]") as caught:
        load_clip_tokenizer(tmp_path / "tokenizer")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_does_not_lead_to_files_elsewhere(folder, tmp_path):
    other = tmp_path / "other.json"
    other.write_text('{"<|endoftext|>": 0}')
    changed(folder / "tokenizer/tokenizer_config.json", vocab_file=str(other), chat_template="{{ 1 }}")
    plain = load_clip_tokenizer(BUILT_IN / "tokenizer")
    assert load_clip_tokenizer(folder / "tokenizer").get_vocab() == plain.get_vocab()


def test_a_length_without_limit_is_the_encoders(folder):
    for value in (10**30, None, 512):
        changed(folder / "tokenizer/tokenizer_config.json", model_max_length=value)
        assert load_clip_tokenizer(folder / "tokenizer").model_max_length == 77


@pytest.mark.parametrize(
    ("part", "load", "change", "said"),
    [
        ("text_encoder", load_clip_tokenizer, {"vocab_size": 100}, "has the id 659 for .* 100"),
        ("text_encoder", load_clip_tokenizer, {"max_position_embeddings": 70}, "length 77, but .* 70"),
        ("text_encoder_2", load_t5_tokenizer, {"vocab_size": 50}, "the vocab_size of .* is 50"),
    ],
)  # fmt: skip
def test_ids_and_lengths_beyond_the_encoder_are_named(folder, part, load, change, said):
    tokenizer = load(folder / part.replace("text_encoder", "tokenizer"))
    check_tokenizer(tokenizer, folder / part, part)
    changed(folder / part / "config.json", **change)
    with pytest.raises(ConfigError, match=said):
        check_tokenizer(tokenizer, folder / part, part)
