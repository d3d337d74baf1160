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
_DATA = {
    "folder": ("Folder of pictures", "图片文件夹"),
    "resolution": ("Resolution", "分辨率"),
    "trigger_word": ("Trigger word", "触发词"),
    "caption_ext": ("Ending of caption files", "标注文件扩展名"),
    "control_path": ("Folder of references", "参考图文件夹"),
    "mask_path": ("Folder of masks", "蒙版文件夹"),
    "more": ("More", "更多"),
    "open": ("Open", "打开"),
    "read_again": ("Read again", "重新读取"),
    "welcome": (
        "Choose a folder of pictures to see them as they will be trained: crops, captions, and what is odd.",
        "选择一个图片文件夹，查看训练时的实际裁剪、标注以及需要留意的问题。",
    ),
    "checking": ("Looking at every picture …", "正在检查每张图片…"),
    "pictures": ("{count} pictures", "{count} 张图片"),
    "all": ("All {count}", "全部 {count}"),
    "search": ("Search captions and names", "搜索标注或文件名"),
    "found": ("{count} of {all}", "{count} / {all}"),
    "nothing_found": ("No picture fits.", "没有符合条件的图片。"),
    "no_caption": ("No caption", "缺少标注"),
    "duplicate": ("Same file as {detail}", "与 {detail} 重复"),
    "small": ("Small: {detail}", "尺寸过小：{detail}"),
    "cropped": ("{detail} cropped", "裁掉 {detail}"),
    "guessed": ("Not UTF-8, read as {detail}", "非 UTF-8，按 {detail} 读取"),
    "other": ("{detail}", "{detail}"),
    "no_caption_count": ("No caption {count}", "缺少标注 {count}"),
    "duplicate_count": ("Duplicate {count}", "重复 {count}"),
    "small_count": ("Small {count}", "过小 {count}"),
    "cropped_count": ("Cropped {count}", "裁剪较多 {count}"),
    "guessed_count": ("Not UTF-8 {count}", "非 UTF-8 {count}"),
    "other_count": ("Other {count}", "其他 {count}"),
    "left_out": ("Files left out: {count}", "未使用的文件：{count}"),
    "write_caption": ("Write a caption", "添加标注"),
    "save": ("Save", "保存"),
    "saved": ("Saved", "已保存"),
    "undo": ("Undo", "撤销"),
    "undone": ("Captions taken back: {count}", "已撤销 {count} 条标注"),
    "bulk": ("Change many captions", "批量修改标注"),
    "bulk_scope": ("Of all captions that the search finds", "作用于搜索到的所有标注"),
    "prepend": ("Put in front", "添加到开头"),
    "append": ("Put at the end", "添加到末尾"),
    "replace": ("Replace", "查找"),
    "by": ("by", "替换为"),
    "would_change": ("Captions that change: {count}", "将修改 {count} 条标注"),
    "apply": ("Apply", "应用"),
    "changed": ("Captions changed: {count}", "已修改 {count} 条标注"),
    "picture": ("Picture", "图片"),
    "reference": ("Reference", "参考图"),
    "mask": ("Mask", "蒙版"),
    "trained_at": ("{width} × {height}, trained at {bucket}", "{width} × {height}，训练尺寸 {bucket}"),
}
_FILES = {
    "inspect": ("Inspect", "查看"),
    "convert": ("Convert", "转换"),
    "resize": ("Resize", "调整秩"),
    "merge": ("Merge", "合并"),
    "about_inspect": (
        "What a LoRA file holds: format, ranks, strength, header. Of a base model in one file: its parts.",
        "显示 LoRA 文件的内容：格式、秩、强度和文件头；也能列出单文件底模的各个组件。",
    ),
    "about_convert": (
        "Write it for another program, with the same effect.",
        "转换为其他程序使用的格式，效果不变。",
    ),
    "about_resize": (
        "Cut to a smaller rank, or make a LoRA of a LoKr or LoHa.",
        "降低 LoRA 的秩，或把 LoKr、LoHa 转成 LoRA。",
    ),
    "about_merge": (
        "Add LoRAs to the weights of a FLUX model; a new folder is written.",
        "把 LoRA 合并进 FLUX 模型的权重，写入新文件夹。",
    ),
    "lora": ("LoRA file or folder", "LoRA 文件或文件夹"),
    "lora_or_upload": ("or send one from this device", "或从本机上传"),
    "uploaded": ("Stored as {path}", "已保存为 {path}"),
    "too_large": (
        "Not sent: wanted a .safetensors file of at most {most} MiB",
        "未上传：需要不超过 {most} MiB 的 .safetensors 文件",
    ),
    "output": ("Write to", "输出到"),
    "format": ("Format", "格式"),
    "dtype": ("Type of the numbers", "数据类型"),
    "as_in_file": ("as in the file", "与原文件相同"),
    "rank": ("Largest rank", "最大秩"),
    "energy": ("Share to keep, 0–1 (optional)", "保留比例 0–1（可选）"),
    "model": ("FLUX model: folder or file", "FLUX 模型：文件夹或文件"),
    "strength": ("Strength", "强度"),
    "add_lora": ("Add a LoRA", "添加 LoRA"),
    "remove": ("Remove", "移除"),
}
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
