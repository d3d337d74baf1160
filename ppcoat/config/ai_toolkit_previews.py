"""What ai-toolkit draws and measures while it trains: previews, in its two forms, and validation pictures.

Prompts may carry flags, as in "a red dress --w 768 --seed 7"; `samples` is the newer form of the same. Both
become `sample.samples` of our schema; prompts without flags stay prompts.
"""

from __future__ import annotations

import re
from typing import Any

from ppcoat.config.ai_toolkit_values import Document, Reading, in_updates

_FLAG = re.compile(r"(?:^|\s)--(\w+)(?=\s|$)")
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
# key of validation_config -> our setting and what ai-toolkit takes where it is absent
_VALIDATION = {
    "validation_items": ("items", []),
    "resolution": ("resolution", 512),
    "validate_every_n_steps": ("every", 10),
    "validation_sigmas": ("sigmas", [1.0, 0.75, 0.5, 0.25]),
}
_Preview = dict[str, Any]  # setting -> value, as one prompt or sample says it


def read_prompts(value: Any, document: Document) -> Reading:
    """Prompts; if any has a flag, all become samples with the settings of their flags."""
    if not isinstance(value, list) or not all(isinstance(prompt, str) for prompt in value):
        return Reading({"sample.prompts": value})
    previews = [_split_flags(prompt) for prompt in value]
    if all(len(preview) == 1 for preview in previews):
        return Reading({"sample.prompts": value})
    if document.get("sample", "samples"):
        raise ValueError("sample.samples says it too; put these prompts there")
    return _samples(previews)


def read_samples(value: Any, document: Document) -> Reading:
    """`samples: [{prompt: ..., width: ...}]`; a prompt in it may have flags as well."""
    if value is None:
        return Reading()
    if not isinstance(value, list) or not all(
        isinstance(sample, dict) and isinstance(sample.get("prompt"), str) for sample in value
    ):
        raise ValueError("wanted a list of sections with a prompt, for example [{prompt: a red dress}]")
    return _samples([_split_flags(sample["prompt"]) | _settings(sample) for sample in value])


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


def _samples(previews: list[_Preview]) -> Reading:
    """Without what FLUX cannot follow. Raises ValueError for a LoRA at another strength."""
    notes = []
    if any(preview.get("") for preview in previews):
        notes.append("its negative prompts have no effect here: FLUX draws without one")
    if any(preview.get("network_multiplier", 1) != 1 for preview in previews):
        raise ValueError("previews show the LoRA at full strength; leave the multiplier out")
    left_out = ("", "network_multiplier")
    samples = [{key: value for key, value in each.items() if key not in left_out} for each in previews]
    return Reading({"sample.samples": samples}, tuple(notes))
