"""From the caption in a file to what the text encoders read: shuffle and thinning, trigger word, dropout.

Captions are encoded once, before training, so a shuffled caption is a fixed set of variants
(caption_variants), of which each step draws one; and a dropped caption is the empty one (dropped_captions).
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

import numpy as np

PLACEHOLDERS = ("[trigger]", "[name]")


@dataclass(frozen=True)
class CaptionRules:
    """What is done to the captions of one dataset; the fields are those of config.schema.DatasetConfig.

    put_in_front: put the trigger word in front of a caption without it (not for regularisation pictures).
    """

    trigger_word: str | None = None
    put_in_front: bool = True
    shuffle_tokens: bool = False
    keep_tokens: int = 0
    token_dropout_rate: float = 0.0
    caption_variants: int = 8


def final_caption(raw: str, trigger_word: str | None = None, put_in_front: bool = True) -> str:
    """Replace `[trigger]` and `[name]` by the trigger word; put the word in front where it does not occur.

    Without a trigger word the placeholders vanish and the gap is closed ("a [trigger], red" -> "a, red").
    Runs of white space, line ends included, become one space. The word counts as present where it stands
    alone: "desks" does not hold "sks". Applying the function twice changes nothing.
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
    """Whether a caption has the trigger word, standing alone, or a placeholder for it."""
    # ASCII letters and digits only: Chinese text has no spaces around a word
    alone = rf"(?<![A-Za-z0-9_]){re.escape(trigger_word)}(?![A-Za-z0-9_])"
    return any(mark in caption for mark in PLACEHOLDERS) or bool(re.search(alone, caption))


def caption_variants(raw: str, rules: CaptionRules, seed: int) -> tuple[str, ...]:
    """Final captions of which a step draws one: a pure function of its arguments.

    One, unless tokens (the parts between commas) are shuffled or left out: then rules.caption_variants, which
    may be equal. The first keep_tokens tokens are neither left out nor moved, where ai-toolkit protects them
    from dropout only. A trigger word that falls away with its token, or was in none, comes to the front.
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
    """Which of `count` captions are replaced by the empty one: bool [count], each true with probability rate
    (one for all, or [count]).

    Always draws `count` numbers, so that what comes from rng afterwards does not depend on rate.
    """
    return rng.random(count) < rate
