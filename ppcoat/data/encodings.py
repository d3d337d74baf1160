"""Text in an unknown encoding: certain where the bytes say so, else guessed among the 8-bit and East Asian
encodings that people still have on their disks.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable
from functools import lru_cache

_SAMPLE = 64 * 1024  # bytes that a guess is made from; all of a long table would take many seconds
_UNKNOWN = "in no known encoding"
_ENOUGH = 0.3  # score below which a text is not one in that encoding
# The commonest characters of Chinese (both scripts; kanji, too) and of Korean, and words of captions.
_HAN = set(
    "的一是不了在人有我他这個个中来來上大为為和国國地到以说說时時要就出会會可也你对對生能而子那得于着下自之年过過发發後后作里裡用道行所然家种種事成方多"
    "经經么麼去法学學如都同现現当當没沒动動面起看定天分还還进進好小部其些主样樣理心她本前开開但因只从從想实實日军軍者意无無力它与與长長把机機十民第公"
    "此已工使情明性知全三又关關点點正业業外将將两兩高间間由问問很最重并物手应應战戰向头頭文体體政美相见見被利什二等产產或新己制身果加西月话話合回特代内"
    "信表化老给給世位次度门門任常先海通教儿兒原东東声聲提立及比员員解水名真论論处處走义義各入几幾口认認条條平系气氣题題活尔爾更别打女变變四神总總何电電"
    "数數安少报報才结結反受目太量再感建务務做接必场場件计計管期市直德资資命山金指克许許统統区區保至队隊形社便空决決治展马馬科司五基眼书書非则則听聽白却"
    "界达達光放强強即像难難且权權思王象完设設式色路记記南品住告类類求据據程北边邊死张張该該交规規万萬取拉格望觉覺术術领領共确確传傳师師观觀清今切院让讓"
    "识識候带帶导導争爭运運红紅蓝藍绿綠黄黃黑灰粉紫裙衣服装裝穿戴站坐男孩片照图圖背景髮眼睛短花连連布鞋帽赤青色彩"
)  # fmt: skip
_HANGUL = set(
    "이다는의에하가을고지로기사한은도리어나자를대인아해서그시일정들라수있보전스장으주과게만여구제상부모와거성안유원조동무면선마경위우연실용개세화생물소"
    "신된되적년학관내방문식것없때같말국빨간색드레입검흰파란옷남진배머노초록분홍회단순한벌"
)  # fmt: skip
_LATIN_MARKS = set("‘’“”–—…•°£€«»¿¡·´\xa0")
_CONTROL = re.compile("[\0-\x08\x0e-\x1f\x7f-\x9f]")
_BINARY = re.compile("[\0-\x08\x0e-\x1a\x1c-\x1f]")  # in no text: escape sequences of terminals may be
_JIS = re.compile(rb"\x1b\$[@B]")  # where ISO-2022-JP, which is ASCII otherwise, turns to kanji
_UTF8_MARK = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")
_MARKS = ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
          (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))  # fmt: skip


def decode(raw: bytes) -> tuple[str, str]:
    """Bytes of a text -> (text, encoding).

    UTF-8 without control characters is certain, as are UTF-16 and UTF-32 with their mark and ISO-2022-JP;
    others are guessed: the one that decodes all and makes the first 64 KiB from where ASCII ends common
    characters and whole words of its languages. Raises UnicodeError, whose text is the reason, where none
    does, and for UTF-8 in which single bytes are damaged or cut off.
    """
    for mark, name in _MARKS:
        if raw.startswith(mark):
            return raw.decode(name), name
    if _JIS.search(raw):
        return raw.decode("iso2022_jp"), "iso2022_jp"
    try:
        text = raw.decode("utf-8-sig")
        if not _BINARY.search(text):
            return text, "utf-8"
    except UnicodeDecodeError:
        pass
    if b"\0" in raw:  # UTF-16 without its mark: every other byte of Latin text is zero
        name = "utf-16-le" if raw[1::2].count(0) > raw[::2].count(0) else "utf-16-be"
        text = raw.decode(name)
        if _CONTROL.search(text):
            raise UnicodeError(_UNKNOWN)
        return text, name
    sample = _sample(raw)
    scores = {name: _score(sample, name, points) for name, points in _POINTS.items()}
    whole = _share_of_utf8(sample)
    for name in sorted(scores, key=scores.get, reverse=True):  # of equals the first
        if scores[name] < max(_ENOUGH, whole):
            break
        try:
            text = raw.decode(name)
        except UnicodeDecodeError:
            continue
        if not _CONTROL.search(text):
            return text, name
    raise UnicodeError("UTF-8 with damaged bytes" if whole > _ENOUGH else _UNKNOWN)


def _sample(raw: bytes) -> bytes:
    """What a guess looks at: from the word before the first byte above ASCII on. All before that are whole
    characters in every encoding here. Raises UnicodeError where all is ASCII: it holds control characters."""
    above = re.search(rb"[\x80-\xff]", raw)
    if above is None:
        raise UnicodeError(_UNKNOWN)
    start = max(0, above.start() - 32)
    return raw[start : start + _SAMPLE]


def _share_of_utf8(raw: bytes) -> float:
    """How much of the bytes above ASCII are whole characters of UTF-8, 0..1. Other texts have few, and one
    alone says nothing."""
    characters = _UTF8_MARK.findall(raw)
    above = sum(byte > 0x7F for byte in raw)
    return sum(map(len, characters)) / above if len(characters) > 1 else 0.0


def _score(raw: bytes, encoding: str, points: Callable[[str, str], float]) -> float:
    """How much of the bytes above ASCII are usual in a text of this encoding, 0..1; -1: not decodable. The
    last character may be cut."""
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(raw)
    except UnicodeDecodeError:
        return -1.0
    if _CONTROL.search(text):
        return -1.0
    total, weight = 0.0, 0
    for place, mark in enumerate(text):
        if mark > "\x7f":
            size = len(mark.encode(encoding))
            around = text[max(0, place - 1) : place] + text[place + 1 : place + 2]
            broken_word = len(around) == 2 and around.isascii() and around.isalpha()
            total += size * (0.0 if broken_word and size > 1 else points(mark, _word_around(text, place)))
            weight += size
    return total / weight if weight else 0.0


def _word_around(text: str, place: int) -> str:
    start, end = place, place + 1
    while start and text[start - 1].isalpha() and place - start < 20:
        start -= 1
    while end < len(text) and text[end].isalpha() and end - place < 20:
        end += 1
    return text[start:end]


def _han(encoding: str, first: int, last: int) -> Callable[[str, str], float]:
    """Points of Chinese characters, of which those between two lead bytes are the common ones."""

    @lru_cache(maxsize=65536)
    def points(mark: str, word: str = "") -> float:
        if mark in _HAN:
            return 1.0
        if "\u3000" <= mark <= "\u303f" or "\uff01" <= mark <= "\uff5e":
            return 0.7
        code = mark.encode(encoding)
        inside = first <= code[0] <= last and "\u4e00" <= mark <= "\u9fff"
        # in these two a common character may end in an ASCII byte
        return 0.5 if inside and (encoding in ("big5", "cp932") or code[-1] >= 0xA1) else 0.0

    return lambda mark, word: points(mark)


def _japanese(encoding: str, first: int, last: int) -> Callable[[str, str], float]:
    kanji = _han(encoding, first, last)
    return lambda mark, word: 1.0 if "\u3041" <= mark <= "\u30fe" else kanji(mark, word)


def _korean(mark: str, word: str) -> float:
    if not "\uac00" <= mark <= "\ud7a3":
        return 0.0
    first, second = mark.encode("cp949")
    return 1.0 if mark in _HANGUL else 0.5 if first >= 0xB0 and second >= 0xA1 else 0.0


def _latin(mark: str, word: str) -> float:
    """An accented letter is usual alone and in a word with plain letters; `été` has as many as one can."""
    if mark in _LATIN_MARKS:
        return 0.6
    plain = sum(letter.isascii() for letter in word)
    usual = ("À" <= mark <= "ÿ" and mark not in "×÷") or mark in "ŒœŠšŽžŸ"
    return 0.9 if usual and (plain or len(word) == 1) and len(word) <= 3 * plain + 1 else 0.0


def _cyrillic(mark: str, word: str) -> float:
    usual = "Ѐ" <= mark <= "ӿ" and not any(letter.isascii() for letter in word)
    if not usual or len(word) < 2:
        return 0.0
    return 0.9 if word[1:].islower() else 0.6 if word.isupper() else 0.0


# Encoding -> points of a character above ASCII in its word, 0..1; likelier encodings first.
_POINTS: dict[str, Callable[[str, str], float]] = {
    "gb18030": _han("gb18030", 0xB0, 0xD7),
    "cp1252": _latin,
    "cp932": _japanese("cp932", 0x88, 0x97),
    "cp949": _korean,
    "big5": _han("big5", 0xA4, 0xC6),
    "euc_jp": _japanese("euc_jp", 0xB0, 0xCF),
    "cp1251": _cyrillic,
    "koi8_r": _cyrillic,
}
