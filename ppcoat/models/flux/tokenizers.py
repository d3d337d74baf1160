"""The tokenizers of FLUX.1, CLIP's and T5's, from the files of their folders.

paddlenlp and the package tokenizers read them, after settings and vocabulary were checked here. What these
libraries cannot read is told in one line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ppcoat.errors import ConfigError
from ppcoat.models.limits import TokenizerSettings, within
from ppcoat.models.tensor_files import Component, read_by_library, sizes_of
from ppcoat.reading import TABLE_BYTES, VOCABULARY_BYTES, read_bytes, read_json, shown

# What the tokenizers' own classes read; transformers 5 writes tokenizer.json instead.
_FILES = {"tokenizer": ("vocab.json", "merges.txt"), "tokenizer_2": ("spiece.model",)}
_TRIED = "a red shirt"


def load_clip_tokenizer(folder: str | Path) -> Any:
    """paddlenlp's CLIPTokenizer from vocab.json and merges.txt, or else what tokenizer.json says."""
    from ppdiffusers.transformers import CLIPTokenizer

    return _load(CLIPTokenizer, Path(folder), _FILES["tokenizer"], "<|endoftext|>", 77)


def load_t5_tokenizer(folder: str | Path) -> Any:
    """paddlenlp's T5Tokenizer from spiece.model, or else what tokenizer.json says."""
    from ppdiffusers.transformers import T5Tokenizer

    return _load(T5Tokenizer, Path(folder), _FILES["tokenizer_2"], "<pad>", 512)


def check_tokenizer(tokenizer: Any, encoder: Component, part: str) -> None:
    """Raises ConfigError for ids or lengths of a tokenizer that its text encoder, the component `part`, has
    no rows for."""
    sizes = sizes_of(encoder, part)
    token, highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if highest >= sizes.vocab_size:
        raise ConfigError(
            f"{tokenizer.init_kwargs['name_or_path']} has the id {highest} for {shown(token)}, but the "
            f"vocab_size of {encoder} is {sizes.vocab_size}: take both from one model"
        )
    positions = getattr(sizes, "max_position_embeddings", tokenizer.model_max_length)
    if tokenizer.model_max_length > positions:
        raise ConfigError(
            f"{tokenizer.init_kwargs['name_or_path']} has model_max_length {tokenizer.model_max_length}, but "
            f"the max_position_embeddings of {encoder} is {positions}: take both from one model"
        )


def _load(slow: type, folder: Path, files: Sequence[str], pad: str, length: int) -> Any:
    """slow: the class that reads `files`. pad, length: where tokenizer_config.json does not say them."""
    settings = _settings(folder)
    own = _has_files(folder, files)
    with read_by_library(folder):
        tokenizer = _slow(slow, folder) if own else _fast(folder, settings, pad)
        tokenizer.model_max_length = int(min(settings.model_max_length or length, length))
        tried = tokenizer([_TRIED], padding="max_length", max_length=8, truncation=True)["input_ids"]
    if len(tried[0]) != 8 or not all(isinstance(each, int) and each >= 0 for each in tried[0]):
        raise ConfigError(f"{folder} makes {shown(tried)} of a caption: take all its files from one model")
    return tokenizer


def _settings(folder: Path) -> TokenizerSettings:
    """tokenizer_config.json, and the files of special tokens checked, which paddlenlp reads by itself."""
    for name in ("special_tokens_map.json", "added_tokens.json"):
        if (folder / name).exists():
            within(TokenizerSettings, read_json(folder / name, limit=TABLE_BYTES), folder / name)
    file = folder / "tokenizer_config.json"
    return within(TokenizerSettings, read_json(file, limit=TABLE_BYTES) if file.exists() else {}, file)


def _slow(slow: Any, folder: Path) -> Any:
    """By paddlenlp's own class, from the files of the folder: not from those that tokenizer_config.json may
    name elsewhere."""
    if (folder / "vocab.json").is_file():
        _check_merges(folder)
    names = {key: str(folder / name) for key, name in slow.resource_files_names.items()}
    there = {key: file for key, file in names.items() if Path(file).is_file()}
    tokenizer = slow.from_pretrained(str(folder), **there, chat_template=None)
    if not isinstance(tokenizer, slow):  # False for a file that sentencepiece cannot read
        raise ConfigError(f"{', '.join(there.values())}: cannot be read, take it from the original model")
    return tokenizer


def _fast(folder: Path, settings: TokenizerSettings, pad: str) -> Any:
    """By tokenizer.json."""
    from paddlenlp.transformers import PretrainedTokenizerFast

    file, token = folder / "tokenizer.json", settings.pad_token or pad
    token = token if isinstance(token, str) else token.content
    if not isinstance(read_json(file, limit=VOCABULARY_BYTES).get("model"), dict):
        raise ConfigError(f"{file} has no vocabulary: fetch it again")
    core = Tokenizer.from_file(str(file))
    if core.token_to_id(token) is None:
        raise ConfigError(f"{file} has no {shown(token)}, the pad_token: take all files from one model")
    return PretrainedTokenizerFast(tokenizer_object=core, pad_token=token, name_or_path=str(folder))


def _check_merges(folder: Path) -> None:
    """Raises ConfigError unless vocab.json and merges.txt of CLIP belong together: each entry is a letter,
    a special token, or made by a merge, and each merge makes an entry."""
    file, merges = folder / "vocab.json", folder / "merges.txt"
    vocabulary: Mapping[str, Any] = read_json(file, limit=VOCABULARY_BYTES)
    for token, number in vocabulary.items():
        if type(number) is not int or not 0 <= number < 1 << 20:
            raise ConfigError(f"{file}: {shown(token)} has the id {shown(number)}: fetch it again")
    if len(set(vocabulary.values())) < len(vocabulary):
        raise ConfigError(f"{file} gives two tokens one id: fetch it again")
    try:
        lines = read_bytes(merges, limit=VOCABULARY_BYTES).decode("utf-8").strip().split("\n")[1:]
    except UnicodeDecodeError as error:
        raise ConfigError(f"{merges} is no text ({error.reason}): fetch it again") from error
    made = {left + right for left, right in _pairs(merges, lines)}
    wrong = next((token for token in made if token not in vocabulary), None)
    if wrong is not None:
        raise ConfigError(f"{merges} makes {shown(wrong)}, which {file} lacks: take both from one model")
    rest = [token for token in vocabulary if len(token.removesuffix("</w>")) > 1 and token not in made]
    lost = [token for token in rest if not token.startswith("<|")]
    if lost:
        raise ConfigError(f"{merges} has no merge for {shown(lost[0])} of {file}: fetch it again")


def _pairs(merges: Path, lines: Sequence[str]) -> list[list[str]]:
    pairs = [line.split() for line in lines]
    wrong = next((i for i, pair in enumerate(pairs) if len(pair) != 2), None)
    if wrong is not None:
        raise ConfigError(
            f"{merges}:{wrong + 2}: came {shown(lines[wrong])}, wanted two words: fetch it again"
        )
    return pairs


def _has_files(folder: Path, names: Sequence[str]) -> bool:
    """Whether these files of a tokenizer are there. Raises ConfigError if tokenizer.json is missing, too."""
    missing = [name for name in names if not (folder / name).is_file()]
    if missing and not (folder / "tokenizer.json").is_file():
        raise ConfigError(
            f"{folder / missing[0]} is missing, and tokenizer.json, which would do: take them from the "
            "original model folder"
        )
    return not missing
