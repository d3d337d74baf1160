"""From the caption in a file to the caption the text encoders read: trigger word, then dropout."""

from __future__ import annotations

import re

import numpy as np

PLACEHOLDERS = ("[trigger]", "[name]")


def final_caption(raw: str, trigger_word: str | None = None) -> str:
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
    # ASCII letters and digits only: Chinese text has no spaces around a word
    alone = rf"(?<![A-Za-z0-9_]){re.escape(trigger_word)}(?![A-Za-z0-9_])"
    return caption if re.search(alone, caption) else f"{trigger_word} {caption}".rstrip()


def dropped_captions(count: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Which of `count` captions are replaced by the empty one: bool [count], each true with probability rate.

    Always draws `count` numbers, so that what comes from rng afterwards does not depend on rate.
    """
    return rng.random(count) < rate
