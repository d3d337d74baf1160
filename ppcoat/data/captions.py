"""From the caption in a file to the text that is encoded: shuffled and dropped tokens, trigger word, dropout.

Captions are encoded once, before training. So a shuffled caption becomes a fixed set of variants
(caption_variants), and each step draws one of them; a dropped caption becomes the empty one
(dropped_captions).
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

PLACEHOLDERS = ("[trigger]", "[name]")


@dataclass(frozen=True)
class CaptionRules:
    """How the captions of one dataset are changed; the fields are those of config.schema.DatasetConfig.

    put_in_front: put the trigger word before a caption that lacks it (off for regularisation pictures).
    """

    trigger_word: str | None = None
    put_in_front: bool = True
    shuffle_tokens: bool = False
    keep_tokens: int = 0
    token_dropout_rate: float = 0.0
    caption_variants: int = 8


def final_caption(raw: str, trigger_word: str | None = None, put_in_front: bool = True) -> str:
    """Replace `[trigger]` and `[name]` by the trigger word, and put the word in front if it does not occur.

    Without a trigger word the placeholders are removed and gaps are closed ("a [trigger], red" -> "a, red").
    Runs of white space, line ends included, become one space. Only a whole word counts as the trigger word:
    "desks" does not contain "sks". Applying the function twice gives the same as once.
    """
    caption = raw
    had_placeholder = any(placeholder in raw for placeholder in PLACEHOLDERS)
    for placeholder in PLACEHOLDERS:
        caption = caption.replace(placeholder, trigger_word or "")
    caption = " ".join(caption.split())
    if not trigger_word:
        if had_placeholder:  # the punctuation around the gap
            caption = re.sub(r"\s+([,.;:!?])", r"\1", caption).lstrip(",;: ")
        return caption
    if holds_trigger(caption, trigger_word) or not put_in_front:
        return caption
    return f"{trigger_word} {caption}".rstrip()


def holds_trigger(caption: str, trigger_word: str) -> bool:
    """True if the caption contains the trigger word as a whole word, or a placeholder for it."""
    return any(mark in caption for mark in PLACEHOLDERS) or bool(re.search(_alone(trigger_word), caption))


def trigger_parts(caption: str, trigger_word: str | None) -> list[tuple[str, Literal["", "word", "added"]]]:
    """A caption in parts, which joined are what is trained, but for white space: "word" where the trigger
    word, or a placeholder for it, stands; "added" for the word that is put in front of a caption without."""
    if not trigger_word:
        return [(final_caption(caption), "")]
    places = "|".join([*map(re.escape, PLACEHOLDERS), _alone(trigger_word)])
    parts: list[tuple[str, Literal["", "word", "added"]]] = [(text, "") for text in re.split(places, caption)]
    found = parts[:1]
    for part in parts[1:]:
        found += [(trigger_word, "word"), part]
    if len(found) == 1:
        found.insert(0, (f"{trigger_word} ", "added"))
    return [part for part in found if part[0]]


def class_caption(caption: str, trigger_word: str | None, class_word: str) -> str:
    """A final caption that asks for the class instead of what is trained: the trigger word is replaced, or
    removed where class_word is empty. A caption without it stays as it is."""
    if not trigger_word:
        return caption
    marked = re.sub(_alone(trigger_word), PLACEHOLDERS[0], caption)
    return final_caption(marked, class_word.strip() or None, put_in_front=False)


def _alone(trigger_word: str) -> str:
    """A pattern for the trigger word as a whole word."""
    # ASCII letters and digits only: Chinese text has no spaces around a word
    return rf"(?<![A-Za-z0-9_]){re.escape(trigger_word)}(?![A-Za-z0-9_])"


def caption_variants(raw: str, rules: CaptionRules, seed: int) -> tuple[str, ...]:
    """The final captions from which each step draws one; a pure function of its arguments.

    There is one, unless tokens (the parts between commas) are shuffled or dropped: then there are
    rules.caption_variants, some of which may be equal. The first keep_tokens tokens are neither dropped nor
    moved (ai-toolkit protects them from dropout only). A trigger word that is missing, or was dropped with
    its token, is put in front.
    """
    if not rules.shuffle_tokens and rules.token_dropout_rate == 0:
        return (final_caption(raw, rules.trigger_word, rules.put_in_front),)
    digest = hashlib.sha256(raw.encode("utf-8", "surrogatepass")).digest()
    rng = np.random.default_rng([seed, *np.frombuffer(digest, np.uint32)])
    tokens = [token for token in (part.strip() for part in raw.split(",")) if token]
    first, rest = tokens[: rules.keep_tokens], tokens[rules.keep_tokens :]
    variants = []
    for _ in range(rules.caption_variants):
        stay = rng.random(len(rest)) >= rules.token_dropout_rate
        order = rng.permutation(len(rest)) if rules.shuffle_tokens else range(len(rest))
        variant = ", ".join([*first, *(rest[i] for i in order if stay[i])])
        variants.append(final_caption(variant, rules.trigger_word, rules.put_in_front))
    return tuple(variants)


def dropped_captions(count: int, rate: float | np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Which of `count` captions are replaced by the empty one: bool [count], each true with probability
    `rate`, a number for all or an array [count].

    Always draws `count` numbers, so that later draws from rng do not depend on rate.
    """
    return rng.random(count) < rate
