"""ai-toolkit's two ways to say how a preview is drawn: flags inside a prompt, and a list of samples.

Here all previews share their size, guidance and steps, and their seeds are equal or count up. What the
prompts say one by one is taken where it fits that, and refused where it does not.
"""

from __future__ import annotations

import re
from typing import Any

from ppcoat.config.ai_toolkit_values import Document, Reading
from ppcoat.config.schema import SampleConfig

_FLAG = re.compile(r"(?:^|\s)--(\w+)(?=\s|$)")  # as in "a red dress --w 768 --seed 7"
# flag of a prompt or key of a sample -> our setting; "": FLUX takes no negative prompt
_KEYS = {
    **dict.fromkeys(("w", "width"), "width"),
    **dict.fromkeys(("h", "height"), "height"),
    **dict.fromkeys(("d", "seed"), "seed"),
    **dict.fromkeys(("l", "cfg", "guidance_scale"), "guidance_scale"),
    **dict.fromkeys(("s", "steps", "sample_steps"), "sample_steps"),
    **dict.fromkeys(("m", "network_multiplier"), "network_multiplier"),
    **dict.fromkeys(("n", "n2", "p2", "neg"), ""),
}
_DEFAULTS = {key: SampleConfig.model_fields[key].default
             for key in ("width", "height", "seed", "guidance_scale", "sample_steps")}  # fmt: skip
_DEFAULTS["network_multiplier"] = 1
_Preview = dict[str, Any]  # setting -> value, as one prompt or sample says it


def read_prompts(value: Any, document: Document) -> Reading:
    """Prompts with flags such as `--w 768 --seed 7` -> bare prompts and settings that all previews share."""
    if not isinstance(value, list) or not all(isinstance(prompt, str) for prompt in value):
        return Reading({"sample.prompts": value})
    return _share([_split_flags(prompt) for prompt in value], document)


def read_samples(value: Any, document: Document) -> Reading:
    """`samples: [{prompt: ..., width: ...}]`, the newer form of prompts with flags."""
    if value is None:
        return Reading()
    if not isinstance(value, list) or not all(
        isinstance(sample, dict) and isinstance(sample.get("prompt"), str) for sample in value
    ):
        raise ValueError("wanted a list of sections with a prompt, for example [{prompt: a red dress}]")
    return _share([_split_flags(sample["prompt"]) | _settings(sample) for sample in value], document)


def _split_flags(prompt: str) -> _Preview:
    """ "a dress --w 64" -> {"prompt": "a dress", "width": 64}."""
    bare, *flags = _FLAG.split(prompt)
    if not flags:
        return {"prompt": prompt}
    given = {name: _number(text.strip()) for name, text in zip(flags[::2], flags[1::2], strict=True)}
    return {"prompt": bare.strip()} | _settings(given)


def _settings(given: dict[str, Any]) -> _Preview:
    given = {key: value for key, value in given.items() if key != "prompt"}
    for key in given:
        if key not in _KEYS:
            raise ValueError(f"a preview cannot follow '{key}'; wanted {', '.join(_KEYS)}")
    return {_KEYS[key]: value for key, value in given.items() if value is not None}


def _number(text: str) -> int | float | str:
    """The schema refuses what is no number."""
    if re.fullmatch(r"-?\d{1,18}", text):
        return int(text)
    return float(text) if re.fullmatch(r"-?\d{1,18}\.\d+", text) else text


def _share(previews: list[_Preview], document: Document) -> Reading:
    """What the previews say one by one, as settings for all. Raises ValueError where they differ."""
    settings: dict[str, Any] = {"sample.prompts": [preview["prompt"] for preview in previews]}
    notes = []
    if any(preview.get("") for preview in previews):
        notes.append("its negative prompts have no effect here: FLUX draws without one")
    for key in _DEFAULTS:
        if not any(key in preview for preview in previews):
            continue
        section = document.get("sample", key, _DEFAULTS[key])
        values = [preview.get(key, section) for preview in previews]
        if key == "seed":
            own = [preview.get(key) for preview in previews]
            values, settings["sample.walk_seed"] = _seeds(
                own, section, document.get("sample", "walk_seed", False)
            )
        if key == "network_multiplier":
            if any(value != 1 for value in values):
                raise ValueError("previews show the LoRA at full strength; leave the multiplier out")
            continue
        if any(value != values[0] for value in values):
            raise ValueError(f"all previews share one {key}, these have {values}; set sample.{key} instead")
        if document.says("sample", key) and section != values[0]:
            notes.append(f"its {key} {values[0]} overrules sample.{key} {section}")
        settings[f"sample.{key}"] = values[0]
    return Reading(settings, tuple(notes))


def _seeds(own: list[Any], first: Any, walk: Any) -> tuple[list[Any], bool]:
    """Seed of each preview, None where it has none of its own -> (all seeds, or the first if they count up;
    walk_seed)."""
    if not isinstance(first, int) or not all(seed is None or isinstance(seed, int) for seed in own):
        return own, False  # the schema says what is wrong with them
    seeds = [first + i * bool(walk) if seed is None else seed for i, seed in enumerate(own)]
    if len(seeds) > 1 and seeds == list(range(seeds[0], seeds[0] + len(seeds))):
        return seeds[:1], True
    return seeds, False
