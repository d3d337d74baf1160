"""Every text of the pages, in English and Chinese, in one table.

What comes from commands and from config's own checks stays in English, as in the terminal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from ppcoat.plan import COMPONENTS

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
    "connecting": ("Connecting …", "正在连接…"),
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
_TRAIN = {
    "new_run": ("New run", "新建训练"),
    "runs": ("Runs", "训练列表"),
    "template": ("Begin with", "模板"),
    "no_template": ("An empty form", "空白表单"),
    "basic": ("Basic", "基本"),
    "all_settings": ("All settings", "全部设置"),
    "search_settings": ("Search settings", "搜索设置"),
    "no_such_setting": ("No setting has that in its name or description", "没有名称或说明含此文字的设置"),
    "as_yaml": ("As YAML", "YAML"),
    "yaml_hint": (
        "The same settings as a config file. What is typed here takes the place of the form.",
        "同样的设置，写成配置文件。此处的内容会替换表单。",
    ),
    "apply_yaml": ("Apply", "应用"),
    "take_out": ("Remove", "删除"),
    "add_entry": ("Add one to {name}", "在 {name} 中添加一项"),
    "not_there": ("There is no such folder or file", "没有这个文件夹或文件"),
    "mistakes": ("Mend what is marked in red, then start", "请先改正标红之处"),
    "start": ("Start", "开始训练"),
    "started": ("{name} is started", "{name} 已开始"),
    "queued": ("{name} waits for the runs before it", "{name} 正在排队"),
    "goes_on": (
        "The folder {folder} holds a run of this name, at step {step}. With the same settings it goes on "
        "from its last checkpoint. Another name begins anew.",
        "文件夹 {folder} 中已有同名训练（第 {step} 步）。设置相同时会从最后的检查点继续；"
        "换个名称则重新开始。",
    ),
    "go_on": ("Go on with it", "继续训练"),
    "section_": ("Run", "训练"),
    "section_model": ("Model", "模型"),
    "section_network": ("Adapter", "适配器"),
    "section_datasets": ("Pictures", "图片"),
    "section_train": ("Training", "训练参数"),
    "section_coat": ("COAT: FP8 states and activations", "COAT：FP8 状态与激活值"),
    "section_save": ("Saving", "保存"),
    "section_sample": ("Previews", "预览"),
    "section_logging": ("Log", "日志"),
    "plan": ("Memory, planned", "显存规划"),
    "plan_waits": ("The plan appears when the form has no mistakes.", "表单没有错误时显示规划。"),
    "plan_mistakes": ("No plan: the form has mistakes.", "表单有错误，无法规划。"),
    "planning": ("Planning …", "规划中…"),
    "plan_source": ("Calculated from shapes, not measured.", "由张量形状计算，并非测量。"),
    "card": ("Card", "显卡"),
    "as_config_says": ("as the settings say", "按设置"),
    "peak": ("Peak {total} GB", "峰值 {total} GB"),
    "fits": ("Fits: {total} of {card} GB", "装得下：{total} / {card} GB"),
    "fits_not": ("Does not fit: {total} of {card} GB", "装不下：{total} / {card} GB"),
    "change_this": ("Change this, and the peak is {total} GB:", "作如下更改，峰值为 {total} GB："),
    "use_these": ("Use these settings", "使用这些设置"),
    "unset": ("(unset)", "（不填）"),
    "estimate": (
        "Estimated: about {time} for {steps} steps, {one} each. A simple model of the time on a card of the "
        "RTX 4090's class, not a measurement.",
        "估计：{steps} 步约 {time}，每步 {one}。按 RTX 4090 级显卡的简单时间模型估算，并非测量。",
    ),
    "no_estimate": ("The time on a CPU is not estimated.", "不估计 CPU 上的用时。"),
    "phase_captions": ("captions", "编码标注"),
    "phase_pictures": ("pictures", "编码图片"),
    "phase_loading": ("loading", "加载"),
    "phase_forward, backward": ("forward, backward", "前向、反向"),
    "phase_update": ("update", "更新"),
    "phase_previews": ("previews", "预览"),
    "no_runs": ("No runs yet: fill in the form and start one.", "还没有训练：填写表单并开始。"),
    "status_running": ("running", "训练中"),
    "status_stopping": ("stopping", "正在停止"),
    "status_waiting": ("waiting", "排队中"),
    "status_finished": ("finished", "已完成"),
    "status_stopped": ("stopped", "已停止"),
    "status_failed": ("failed", "失败"),
    "stop_save": ("Stop and save", "停止并保存"),
    "stop_now": ("Stop at once", "立即停止"),
    "leave_queue": ("Take from the queue", "移出队列"),
    "resume": ("Go on", "继续"),
    "use_settings": ("Use its settings", "使用其设置"),
    "draw_with": ("Draw with it", "用它绘图"),
    "step": ("step", "步"),
    "loss": ("loss", "损失"),
    "loss_smoothed": ("loss, smoothed", "平滑损失"),
    "validation": ("validation loss", "验证损失"),
    "eta": ("left", "剩余"),
    "memory_host": ("host memory", "内存"),
    "memory_card": ("card memory", "显存"),
    "kept": ("kept for backward", "为反向保存"),
    "skipped": ("skipped steps", "跳过的步"),
    "curve": ("Loss", "损失曲线"),
    "smoothing": ("smoothing", "平滑"),
    "previews": ("Previews", "预览"),
    "preview_step": ("step of the previews", "预览的步"),
    "log": ("Log", "日志"),
}
_PARTS = {  # of COMPONENTS, in Chinese
    "context": "上下文与库", "encoders": "文本编码器、VAE", "base": "底模权重", "LoRA": "LoRA",
    "EMA": "其滑动平均", "optimizer": "优化器状态", "gradients": "梯度", "kept": "为反向保存",
    "heads": "判别头", "head states": "判别头的优化器状态", "head gradients": "判别头的梯度",
    "head features": "特征的梯度", "working": "工作内存",
}  # fmt: skip
_TRAIN |= {f"part_{name}": (COMPONENTS[name], chinese) for name, chinese in _PARTS.items()}
_DRAW = {
    "draw_it": ("Draw", "绘图"),
    "draw_model": ("Model: folder, FLUX file, or tiny_flux", "模型：文件夹、FLUX 文件或 tiny_flux"),
    "prompt": ("Prompt", "提示词"),
    "draw_seed": ("Seed", "种子"),
    "draw_steps": ("Steps", "步数"),
    "draw_width": ("Width", "宽"),
    "draw_height": ("Height", "高"),
    "draw_guidance_scale": ("Guidance", "guidance"),
    "draw_vram": ("Fit into GB", "限制显存 GB"),
    "auto": ("auto", "自动"),
    "loras": ("LoRAs", "LoRA"),
    "one_more_lora": ("Add a LoRA", "添加 LoRA"),
    "lora_file": ("LoRA file", "LoRA 文件"),
    "draw_strength_of": ("Strength", "强度"),
    "from_pictures": ("Draw from pictures", "图生图与参考图"),
    "from_pictures_hint": (
        "For FLUX: Kontext edits a picture, Fill paints its mask anew, others draw over it.",
        "仅 FLUX：Kontext 编辑图片，Fill 重画蒙版处，其他模型在图上重绘。",
    ),
    "draw_image": ("Picture to draw from", "原图"),
    "draw_mask": ("Mask, white is drawn anew", "蒙版（白色处重画）"),
    "draw_reference": ("References, with commas between", "参考图（逗号分隔）"),
    "draw_strength": ("How much is drawn anew, 0 to 1", "重画程度，0 到 1"),
    "compare": ("Compare", "对比"),
    "compare_one": ("One picture", "单张"),
    "compare_off": ("Beside it without the LoRA", "与关闭 LoRA 并排"),
    "compare_checkpoints": ("The same seed over the checkpoints of a run", "同一种子，各检查点"),
    "compare_grid": ("Grid: checkpoint by strength", "网格：检查点 × 强度"),
    "compare_steps": ("Grid: denoising steps by strength", "网格：去噪步数 × 强度"),
    "run_of": ("Run", "训练"),
    "no_run": ("(none)", "（无）"),
    "strengths": ("Strengths", "强度"),
    "step_counts": ("Denoising steps", "去噪步数"),
    "drop": ("Drop a picture here to take its settings", "把图片拖到此处读取其设置"),
    "picture_too_large": ("A PNG of at most 64 MiB is read here", "此处只读取不超过 64 MiB 的 PNG"),
    "taken": ("The settings of the picture are in the form", "已读入图片的设置"),
    "take_settings": ("Use its settings", "使用其设置"),
    "download": ("Download", "下载"),
    "drawing": ("Drawing: {there} of {all}", "绘图中：{there} / {all}"),
    "drawn_all": ("Drawn: {all}", "已完成：{all} 张"),
    "drawn_part": ("Ended with {there} of {all} drawn", "已结束，画了 {there} / {all} 张"),
    "earlier": ("Earlier drawings", "以前的绘图"),
    "no_drawings": ("None yet", "还没有"),
}
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
