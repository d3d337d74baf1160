"""Every text is there in both languages, and the language is the one that was chosen."""

import re
from pathlib import Path

import pytest

from ppcoat.studio.words import WORDS, Words, language_of

STUDIO = Path(__file__).parents[2] / "ppcoat/studio"


def test_both_languages_say_the_same():
    values = re.compile(r"\{(\w+)\}")
    for key, (english, chinese) in WORDS.items():
        assert english.strip() and chinese.strip(), key
        assert sorted(values.findall(english)) == sorted(values.findall(chinese)), key
        assert not re.search(r"[\u4e00-\u9fff]", english), key


def test_every_text_that_pages_ask_for_is_there():
    asked = set()
    for file in STUDIO.glob("*.py"):
        asked |= set(re.findall(r"\bsay\(\s*\"(\w+)\"", file.read_text("utf-8")))
    assert len(asked) > 20 and asked <= set(WORDS)


def test_every_text_is_asked_for_somewhere():
    source = "".join(file.read_text("utf-8") for file in STUDIO.glob("*.py") if file.name != "words.py")
    parts = re.findall(r"f\"(\w*)\{[^}]*\}(\w*)\"", source)  # say(f"about_{self.name}")
    made = re.compile("|".join(f"{begin}.*{end}" for begin, end in parts if begin or end))
    assert [key for key in WORDS if f'"{key}"' not in source and not made.fullmatch(key)] == []


def test_a_text_takes_its_values():
    assert Words("en")("failed", status=2) == "Ended with status 2"
    assert Words("zh")("data") == "数据"


@pytest.mark.parametrize(
    ("cookie", "accepted", "default", "language"),
    [
        ("zh", "en-US,en;q=0.9", "en", "zh"),
        (None, "zh-CN,zh;q=0.9,en;q=0.8", None, "zh"),
        (None, "fr, zh;q=0.5", None, "zh"),
        (None, "zh", "en", "en"),
        ("<script>", "de", None, "en"),
        (None, None, None, "en"),
    ],
)
def test_the_language_of_a_page(cookie, accepted, default, language):
    assert language_of(cookie, accepted, default) == language
