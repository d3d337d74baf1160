"""Every text of the pages, in English and Chinese, in one table.

What comes from commands and from config's own checks stays in English, as in the terminal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = get_args(Language)
NAMES = {"en": "English", "zh": "中文"}
COOKIE = "ppcoat_language"

_FRAME = {
    "data": ("Data", "数据"),
    "train": ("Train", "训练"),
    "draw": ("Draw", "绘图"),
    "files": ("Files", "文件"),
    "copy": ("Copy", "复制"),
    "copied": ("Copied", "已复制"),
    "as_command": ("The same as a command", "等效命令"),
    "choose": ("Choose", "选择"),
    "cancel": ("Cancel", "取消"),
    "close": ("Close", "关闭"),
    "browse": ("Browse", "浏览"),
    "up": ("Up", "上一级"),
    "no_entries": ("Nothing to choose here", "此处没有可选项"),
    "this_folder": ("Choose this folder", "选择此文件夹"),
    "run": ("Run", "运行"),
    "stop": ("Stop", "停止"),
    "running": ("Running …", "运行中…"),
    "done": ("Done", "完成"),
    "failed": ("Ended with status {status}", "已结束，状态码 {status}"),
    "upload": ("Upload", "上传"),
    "lost": ("Connection lost; trying again", "连接已断开，正在重试"),
}
_DATA: dict[str, tuple[str, str]] = {}
_FILES: dict[str, tuple[str, str]] = {}
_TRAIN: dict[str, tuple[str, str]] = {}
_DRAW: dict[str, tuple[str, str]] = {}
WORDS: Mapping[str, tuple[str, str]] = _FRAME | _DATA | _FILES | _TRAIN | _DRAW


class Words:
    """The texts in one language: say("failed", status=2)."""

    def __init__(self, language: Language) -> None:
        self.language = language

    def __call__(self, key: str, **values: object) -> str:
        """The text of a key, with values in its braces."""
        return WORDS[key][LANGUAGES.index(self.language)].format(**values)


def language_of(cookie: str | None, accepted: str | None, default: Language | None) -> Language:
    """The language of a page: that chosen in it (its cookie), else that of --language, else the first of ours
    that the browser accepts, else English. accepted: the header Accept-Language."""
    if cookie in LANGUAGES:
        return cookie
    if default is not None:
        return default
    for part in (accepted or "").split(","):
        code = part.partition(";")[0].strip().lower().partition("-")[0]
        if code in LANGUAGES:
            return code
    return "en"
