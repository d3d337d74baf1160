"""What the header of an adapter file says: how strong it is meant (alpha, and what it is divided by), its
step.

For the strength are asked in this order: the module's own `.alpha` tensor; PEFT's config, which stands in
adapter_config.json or, as JSON, in diffusers' header field `lora_adapter_metadata` (keys with the model
part before them, nested under it, or bare); alpha and rank in the header as we, NewBie's trainer and kohya
name them; else alpha = rank.

A header comes from anywhere: numbers are checked, and a pattern runs as a regular expression only if it
cannot run for long.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from ppcoat.errors import ConfigError
from ppcoat.reading import json_value

ADAPTER_METADATA = "lora_adapter_metadata"
DORA_RULE = "dora_rule"  # our field: by which of kinds.DORA_RULES the magnitudes are meant
# Fields that speak of the tensors in a file. Whoever writes other tensors writes these anew or not at all.
OF_TENSORS = (
    *("format", "layout", "rank", "alpha", "software", ADAPTER_METADATA, DORA_RULE),
    *("adapter_type", "lora_rank", "lora_alpha"),
    *("ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args"),
    *("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"),
)
# Header fields of alpha and of the rank that it belongs to: ours, NewBie's, kohya's.
_HEADER_FIELDS = (("alpha", "rank"), ("lora_alpha", "lora_rank"), ("ss_network_alpha", "ss_network_dim"))
ROTATIONS = ("OFT", "BOFT")  # peft_type of kinds that have no alpha
PARTS = ("transformer", "text_encoder", "text_encoder_2")  # of a pipeline, that an adapter can change
_LONGEST_PATTERN, _MOST_REPEATS, _MOST_DIGITS = 300, 3, 18


def alpha_of(header: Mapping[str, str], part: str, names: Sequence[str], rank: int) -> float | None:
    """alpha of a module of `rank` as the header says it, for a scale of alpha / rank; None if it says
    nothing.

    names: the module's names that a pattern may match, the file's own and diffusers'. Raises ConfigError for
    what is no number and for patterns that are no regular expressions.
    """
    config = adapter_config(header, part)
    own = "lora_alpha" if "lora_alpha" in config else "alpha"
    if own in config:
        alpha = number(_by_pattern(config.get("alpha_pattern"), names, config[own]), own)
        return alpha * math.sqrt(rank) if config.get("use_rslora") is True else alpha
    for field, rank_field in _HEADER_FIELDS:
        if _is_said(header.get(field)):
            # The header's rank belongs to its alpha; without it, this module's own rank is meant.
            own_rank = header.get(rank_field)
            return (
                number(header[field], field) / number(own_rank if _is_said(own_rank) else rank, "rank") * rank
            )
    return None


def is_kohyas(header: Mapping[str, str], part: str) -> bool:
    """Whether only kohya's fields say an alpha."""
    return not adapter_config(header, part) and not any(
        _is_said(header.get(name)) for name in ("alpha", "lora_alpha")
    )


def full_lokr(header: Mapping[str, str], part: str, names: Sequence[str]) -> tuple[float, float]:
    """Scale of a LoKr of two whole matrices, 1, but alpha / r where PEFT wrote it; and the alpha that is
    said."""
    config, alpha = adapter_config(header, part), alpha_of(header, part, names, 1)
    if config.get("peft_type") != "LOKR" or "r" not in config or alpha is None:
        return 1.0, 1.0 if alpha is None or alpha <= 0 else alpha
    return alpha / number(_by_pattern(config.get("rank_pattern"), names, config["r"]), "rank"), max(
        alpha, 1.0
    )


def states_alpha(header: Mapping[str, str]) -> bool:
    """Whether the header says an alpha at all, or a kind of PEFT's that has none."""
    said = any(_is_said(header.get(field)) for field, _ in _HEADER_FIELDS)
    configs = [adapter_config(header, part) for part in PARTS]
    return said or any(
        {"lora_alpha", "alpha"} & config.keys() or config.get("peft_type") in ROTATIONS for config in configs
    )


def adapter_config(header: Mapping[str, str], part: str) -> dict:
    """The PEFT config of a part of the pipeline from the header; {} if there is none. Raises ConfigError for
    what is no JSON object; an empty text says nothing."""
    text = header.get(ADAPTER_METADATA, "")
    if not text.strip():
        return {}
    try:
        values = json_value(text)
    except ValueError as error:  # of numbers and brackets beyond Python's limits, too
        raise ConfigError(f"LoRA header {ADAPTER_METADATA} is not JSON: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"LoRA header {ADAPTER_METADATA} must be a JSON object")
    own = values.get(part)
    if isinstance(own, str):  # as a text inside of the text
        return adapter_config({ADAPTER_METADATA: own}, "")
    if isinstance(own, dict):
        return own
    found = {
        key.removeprefix(f"{part}."): value for key, value in values.items() if key.startswith(f"{part}.")
    }
    prefixed = any(key.startswith(f"{each}.") or isinstance(values.get(each), dict)
                   for key in values for each in PARTS)  # fmt: skip
    return found if prefixed else values


def number(value: object, name: str) -> float:
    """`value` as a finite number, a rank above 0. Raises ConfigError, which says `name`."""
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found) or (name == "rank" and found <= 0):
        wanted = "a number above 0" if name == "rank" else "a finite number"
        raise ConfigError(
            f"LoRA header {name} must be {wanted}, got {str(value)[:80]!r}: correct or remove it"
        )
    return found


def _is_said(value: object) -> bool:
    """kohya writes the text "None" for what was not set, and "Dynamic" where modules differ and say it
    themselves."""
    return value is not None and str(value).strip() not in ("", "None", "null", "Dynamic")


def _by_pattern(patterns: object, names: Sequence[str], default: object) -> object:
    """PEFT's per-module values: the first key that matches a name from the start or after a dot, to its
    end."""
    for key, value in patterns.items() if isinstance(patterns, dict) else ():
        expression = _expression(key)
        if any(expression.match(name) for name in names):
            return value
    return default


def _expression(key: str) -> re.Pattern:
    try:
        _check_repeats(key)
        return re.compile(rf"(?:.*\.)?(?:{key})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"LoRA header: the pattern {key[:80]!r} cannot be used ({error}); fold alpha into the file"
        ) from None


def _check_repeats(key: str) -> None:
    """Raise re.error for an expression that could take very long: a repeat or a choice inside a repeated
    group, more repeats than a few, or a reference to a group."""
    if len(key) > _LONGEST_PATTERN:
        raise re.error(f"it is longer than {_LONGEST_PATTERN} characters")
    plain = re.sub(r"\\[1-9]|\(\?P=", "\0", key)  # references
    plain = re.sub(r"\\.", "x", plain)
    plain = re.sub(r"\[\^?\]?[^\]]*\]", "x", plain)
    if "\0" in plain or len(re.findall(r"[*+{]", plain)) > _MOST_REPEATS:
        raise re.error("it repeats or refers too much")
    while True:  # innermost groups first; what a group holds stays visible as "R"
        group = re.search(r"\(([^()]*)\)([*+{]?)", plain)
        if group is None:
            return
        holds = re.search(r"[*+{|R]", group[1].removeprefix("?:"))
        if holds and group[2]:
            raise re.error("a repeat inside a repeat")
        plain = plain[: group.start()] + ("R" if holds else "x") + group[2] + plain[group.end() :]


def step_from_header(header: Mapping[str, str]) -> int | None:
    """The training step from `step` or ai-toolkit's training_info; None where there is none that can be
    read.
    """
    text = header.get("step")
    if text is None:
        try:
            info = json_value(header.get("training_info", "null"))
        except ValueError:
            return None
        text = str(info.get("step")) if isinstance(info, dict) else None
    return int(text) if text is not None and text.isdecimal() and len(text) <= _MOST_DIGITS else None
