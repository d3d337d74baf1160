"""What may become of a key of ai-toolkit: honoured, read, warned about, refused, or idle; and its values that
need more than another name: what each says in the terms of our schema.

A reader gets the value and the whole run as written, and gives our settings. It raises ValueError for what
cannot be done; values of a wrong type it passes on, for the schema to refuse. At the end are those of
validation pictures and previews: prompts with flags ("a dress --w 768") and `samples` become `sample.samples`
of our schema; prompts without flags stay prompts.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ppcoat.config.base import base_format

_FLAG = re.compile(r"(?:^|\s)--(\w+)(?=\s|$)")
# flag of a prompt or key of a sample -> our setting; "": FLUX takes no negative prompt
_PREVIEW_KEYS = {
    **dict.fromkeys(("w", "width"), "width"),
    **dict.fromkeys(("h", "height"), "height"),
    **dict.fromkeys(("d", "seed"), "seed"),
    **dict.fromkeys(("l", "cfg", "guidance_scale"), "guidance_scale"),
    **dict.fromkeys(("s", "steps", "sample_steps"), "sample_steps"),
    **dict.fromkeys(("m", "network_multiplier"), "network_multiplier"),
    **dict.fromkeys(("n", "n2", "p2", "neg"), ""),
}
# of a film: there is nothing to follow, and nothing is asked of FLUX
_FILM_KEYS = ("fps", "num_frames", "ctrl_idx")
# pictures that a preview is drawn after; mask_img is our own
_REFERENCES, _MASK = ("ctrl_img", "ctrl_img_1", "ctrl_img_2", "ctrl_img_3"), "mask_img"
# key of validation_config -> our setting and what ai-toolkit takes where it is absent
_VALIDATION = {
    "validation_items": ("items", []),
    "resolution": ("resolution", 512),
    "validate_every_n_steps": ("every", 10),
    "validation_sigmas": ("sigmas", [1.0, 0.75, 0.5, 0.25]),
}
_Preview = dict[str, Any]  # setting -> value, as one prompt or sample says it


@dataclass(frozen=True)
class Document:
    """A run as written, without ai-toolkit's nesting. nested: it had one, so ai-toolkit's defaults hold."""

    data: dict[str, Any]
    nested: bool

    def get(self, section: str, key: str, default: Any = None) -> Any:
        """One value as written, or `default` where the section or the key is absent."""
        inside = self.data.get(section)
        return inside.get(key, default) if isinstance(inside, dict) else default

    @cached_property
    def samples(self) -> Reading:
        """sample.samples as read: once, for a seed below 0 is drawn and told while it is read."""
        return _read_samples(self.get("sample", "samples"), self)


@dataclass(frozen=True)
class Reading:
    """Our settings by dotted name, and notes for the user on what differs from ai-toolkit."""

    settings: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


Reader = Callable[[Any, Document], Reading]


@dataclass(frozen=True)
class Honour:
    """Taken as it is, under the name `to` in our schema ("": its own). null: None, an empty list and an empty
    text stand for the default."""

    to: str = ""
    null: bool = False


@dataclass(frozen=True)
class Read:
    """Taken in another form. to: the setting that it is another spelling of."""

    read: Reader
    to: str = ""


@dataclass(frozen=True)
class Warn:
    """Accepted with a warning that says why it makes no difference here; values in `silent` need none: those
    that ask for nothing, and what ai-toolkit's web interface always writes."""

    why: str
    silent: tuple[Any, ...] = (None, False)


@dataclass(frozen=True)
class Refuse:
    """An error, because leaving it out would change the result; values in `neutral` ask for nothing."""

    advice: str
    neutral: tuple[Any, ...] = (None, False)


@dataclass(frozen=True)
class Idle:
    """Accepted in silence: it says something only where the key `switch` is on, which is dealt with there."""

    switch: str


Treatment = Honour | Read | Warn | Refuse | Idle
_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "float": "float32"}


def read_device(value: Any, document: Document) -> Reading:
    """cuda:1 -> gpu:1. cuda:0 stands in every published example: the first GPU, if there is one."""
    if value in ("cuda", "cuda:0"):
        note = "read as auto: the first GPU, or the CPU where Paddle sees none"
        return Reading({"device": "auto"}, (note,))
    cuda = re.fullmatch(r"cuda:(\d+)", value) if isinstance(value, str) else None
    return Reading({"device": f"gpu:{cuda[1]}" if cuda else value})


def read_save_dtype(value: Any, document: Document) -> Reading:
    """fp16, bf16 and fp32 are short for the names of our schema."""
    return Reading({"save.dtype": _DTYPES.get(value, value) if isinstance(value, str) else value})


def read_model_dtype(value: Any, document: Document) -> Reading:
    """As in our schema, with ai-toolkit's short names."""
    return Reading({"model.dtype": _DTYPES.get(value, value) if isinstance(value, str) else value})


def read_train_dtype(value: Any, document: Document) -> Reading:
    """bf16 -> auto, which is bfloat16 on a GPU and float32 on a CPU, where Paddle cannot compute in bf16."""
    dtype = _DTYPES.get(value, value) if isinstance(value, str) else value
    if dtype == "float16":
        raise ValueError("float16 overflows in FLUX; wanted bf16 or fp32")
    return Reading({"model.dtype": "auto" if dtype == "bfloat16" else dtype})


def read_trigger_word(value: Any, document: Document) -> Reading:
    """The word of one dataset. Where all have it and the run has none, it is the run's, for the previews."""
    value = None if value == "" else value
    datasets = document.data.get("datasets")
    datasets = datasets if isinstance(datasets, list) else []
    shared = all(isinstance(each, dict) and each.get("trigger_word") == value for each in datasets)
    settings = {"datasets[].trigger_word": value}
    if value is not None and shared and document.data.get("trigger_word") is None:
        settings["trigger_word"] = value
    return Reading(settings)


def read_buckets(value: Any, document: Document) -> Reading:
    """true: sizes by ai-toolkit's rule; false: squares."""
    if value is not None and not isinstance(value, bool):
        raise ValueError("wanted true or false")
    return Reading({} if value is None else {"datasets[].bucket_rule": "ai-toolkit" if value else "square"})


def read_square_crop(value: Any, document: Document) -> Reading:
    """true: squares, whatever buckets says."""
    if value is not None and not isinstance(value, bool):
        raise ValueError("wanted true or false")
    return Reading({"datasets[].bucket_rule": "square"} if value else {})


def read_accumulated_steps(value: Any, document: Document) -> Reading:
    """The older key, under which every forward pass is a step: all counts of steps are divided by it.

    gradient_accumulation is the key under which a step is an update.
    """
    if value in (None, 1) and not isinstance(value, bool):
        return Reading()
    if value == -1:
        raise ValueError("one update per epoch is not possible; wanted a number of forward passes")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError("wanted a whole number from 1")
    if document.get("train", "gradient_accumulation", 1) != 1:
        raise ValueError("train.gradient_accumulation says it too; remove one of them")
    steps = document.get("train", "steps", 1000)
    if isinstance(steps, int) and steps < value:
        raise ValueError(f"{steps} steps of one forward pass each are not one whole update")
    settings = {"train.steps": steps // value} if isinstance(steps, int) else {}
    for section, key in (("save", "save_every"), ("sample", "sample_every"), ("logging", "log_every")):
        every = document.get(section, key)
        if every is not None:
            settings[f"{section}.{key}"] = in_updates(every, document)
    counts = ", ".join(f"{key} {count}" for key, count in settings.items())
    note = f"every forward pass counts as a step; counted in updates: {counts}"
    return Reading(settings | {"train.gradient_accumulation": value}, (note,))


def read_disable_sampling(value: Any, document: Document) -> Reading:
    """No previews: sample_every 0."""
    if value not in (None, True, False):
        raise ValueError("wanted true or false")
    return Reading({"sample.sample_every": 0} if value else {})


def read_qtype(value: Any, document: Document) -> Reading:
    """A way to store the frozen base, for which model.quantize asks."""
    if isinstance(value, str) and "|" in value:
        raise ValueError("an accuracy recovery adapter is not loaded; leave out the part from '|' on")
    if not document.get("model", "quantize") or value in (None, ""):
        return Reading()
    known = base_format(str(value))
    own = known or ("fp4" if "4" in str(value) else "fp8")
    return Reading({"model.quantize": own}, () if known else (f"the base is stored in {own} instead",))


def in_updates(count: Any, document: Document) -> Any:
    """Forward passes -> optimizer updates where train.gradient_accumulation_steps makes a difference."""
    passes = document.get("train", "gradient_accumulation_steps", 1)
    whole = all(isinstance(each, int) and not isinstance(each, bool) for each in (count, passes))
    return max(1, round(count / passes)) if whole and passes > 1 and count > 0 else count


def read_prompts(value: Any, document: Document) -> Reading:
    """Prompts; if any has a flag, all become samples with the settings of their flags, before `samples`."""
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(prompt, str) for prompt in value):
        return Reading({"sample.prompts": value})
    notes: list[str] = []
    previews = [_split_flags(prompt, notes) for prompt in value]
    if all(preview.keys() == {"prompt"} for preview in previews):
        return Reading({"sample.prompts": [preview["prompt"] for preview in previews]}, tuple(notes))
    others = document.samples.settings.get("sample.samples", [])
    return Reading({"sample.samples": previews + others}, tuple(notes))


def read_samples(value: Any, document: Document) -> Reading:
    """`samples: [{prompt: ..., width: ...}]`; a prompt in it may have flags as well."""
    return document.samples


def _read_samples(value: Any, document: Document) -> Reading:
    if value is None:
        return Reading()
    if not isinstance(value, list):
        raise ValueError("wanted a list of sections with a prompt, for example [{prompt: a red dress}]")
    notes: list[str] = []
    samples = [each for each in value if isinstance(each, dict) and isinstance(each.get("prompt"), str)]
    if len(samples) < len(value):
        notes.append("those without a prompt are left out")
    previews = [
        _split_flags(sample["prompt"], notes) | _settings(sample, notes, strict=not document.nested)
        for sample in samples
    ]
    return Reading({"sample.samples": previews}, tuple(notes))


def preview_setting(name: str) -> Reader:
    """The reader of sample.<name>, a setting of all previews. In an ai-toolkit file, one that cannot be drawn
    with is left out; in our own form, it is refused."""

    def read(value: Any, document: Document) -> Reading:
        notes: list[str] = []
        if not document.nested:
            return Reading({f"sample.{name}": _strict(name, value, notes)}, tuple(notes))
        fitting = None if value is None else _fitting(name, value, notes)
        return Reading({} if fitting is None else {f"sample.{name}": fitting}, tuple(notes))

    return read


def read_validation_config(value: Any, document: Document) -> Reading:
    """The section under its older names, with ai-toolkit's defaults."""
    if value is None:
        return Reading()
    if not isinstance(value, dict):
        raise ValueError(f"wanted a section with {', '.join(_VALIDATION)}")
    unknown = [key for key in value if key not in _VALIDATION]
    if unknown:
        raise ValueError(f"there is no '{unknown[0]}' in it; wanted {', '.join(_VALIDATION)}")
    ours = {name: value.get(key, default) for key, (name, default) in _VALIDATION.items()}
    return Reading({"train.validation": ours | {"every": in_updates(ours["every"], document)}})


def _split_flags(prompt: str, notes: list[str]) -> _Preview:
    """ "a dress --w 64" -> {"prompt": "a dress", "width": 64}. Without words before its flags, a prompt is
    taken as text."""
    bare, *flags = _FLAG.split(prompt)
    if flags and not bare.strip():
        notes.append(f"its '--{flags[0]}' is taken as text")
    if not flags or not bare.strip():
        return {"prompt": prompt}
    given = dict(zip(flags[::2], (text.strip() for text in flags[1::2]), strict=True))
    return {"prompt": bare.strip()} | _settings(given, notes)


def _settings(given: dict[str, Any], notes: list[str], strict: bool = False) -> _Preview:
    """What a preview can follow. notes: gets the rest; a preview must not stop a training. strict: what has
    our own name is left to the schema."""
    empty = [key for key in (*_REFERENCES, _MASK) if given.get(key) == ""]
    notes += [f"its '{key}' names no file: it is drawn without one" for key in empty]
    given_as = [given[key] for key in _REFERENCES if given.get(key)]
    references = [path for each in given_as for path in (each if isinstance(each, list) else [each])]
    settings: _Preview = {"ctrl_img": references} if references else {}
    settings |= {_MASK: given[_MASK]} if given.get(_MASK) else {}
    for key, value in given.items():
        name = _PREVIEW_KEYS.get(key)
        if key in ("prompt", *_FILM_KEYS, *_REFERENCES, _MASK) or value is None or (name == "" and not value):
            continue
        if name is None:
            notes.append(f"'{key}' is nothing that a preview can follow and is left out")
        elif name == "":
            notes.append("its negative prompts have no effect here: FLUX draws without one")
        elif name == "network_multiplier":
            if _number(value) != 1:
                notes.append("previews show the LoRA at full strength")
        elif strict and key == name:
            settings[name] = _strict(name, value, notes)
        elif (fitting := _fitting(name, value, notes)) is not None:
            settings[name] = fitting
    return settings


def _strict(name: str, value: Any, notes: list[str]) -> Any:
    """A preview's setting as our own form says it: what the schema refuses, it refuses, but a seed of -1 is
    any. Raises ValueError for a side that is no multiple of 16, with the nearest that are."""
    side = name in ("width", "height") and isinstance(value, int) and not isinstance(value, bool)
    if side and value > 16 and value % 16:
        below = value // 16 * 16
        raise ValueError(f"wanted a multiple of 16; the nearest are {below} and {below + 16}")
    return _fitting(name, value, notes) if name == "seed" and value == -1 else value


def _fitting(name: str, value: Any, notes: list[str]) -> int | float | None:
    """The value that a preview is drawn with: sides are rounded to 16, a seed below 0 is drawn, as there."""
    number = _number(value)
    usable = isinstance(number, int | float) and not isinstance(number, bool) and abs(number) < 2**32
    if usable and name in ("width", "height"):
        side = min(max(16, round(number / 16) * 16), 8192)
        if side != number:
            notes.append(f"{name} becomes {side}, a multiple of 16")
        return side
    if usable and name == "seed" and number < 0:
        seed = secrets.randbelow(2**32)
        notes.append(f"any seed is {seed}")
        return seed
    whole = usable and number == int(number)
    least, most = {"seed": (0, 2**32 - 1), "sample_steps": (1, 1000)}.get(name, (0, 2**32))
    if usable and least <= number <= most and (whole or name == "guidance_scale"):
        return float(number) if name == "guidance_scale" else int(number)
    notes.append(f"{name} {value!r} cannot be drawn with and is left out")
    return None


def _number(value: Any) -> Any:
    """A number that was written as text; anything else as it is."""
    text = value.strip() if isinstance(value, str) else ""
    if re.fullmatch(r"-?\d{1,18}", text):
        return int(text)
    return float(text) if re.fullmatch(r"-?\d{1,18}\.\d+", text) else value
