"""A run written for ai-toolkit -> our schema: the nesting is taken off, every key gets its treatment.

    job: extension                                     name: shirts
    config:                                            network: {linear: 16}
      name: shirts                            ->       ...
      process:
        - {type: sd_trainer, network: {linear: 16}, ...}

Which key gets which treatment stands in ai_toolkit_keys.py. Our own short form may use ai-toolkit's keys too;
only the defaults differ: where a nested file says nothing, ai-toolkit's own defaults hold.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterator
from typing import Any

from ppcoat.config.ai_toolkit_editing import fit_pairs
from ppcoat.config.ai_toolkit_keys import DEFAULTS, KEYS
from ppcoat.config.ai_toolkit_values import Document, Honour, Read, Reading, Refuse, Warn
from ppcoat.config.explain import Location, Origins, dotted, known_instead, schema_keys
from ppcoat.errors import ConfigError, printable
from ppcoat.models.flux import ATTENTION_AND_MLP, MODULATION

_log = logging.getLogger(__name__)
_PROCESS: Location = ("config", "process", 0)
_SECTIONS = {key[:end] for key in KEYS for end in range(len(key)) if key[end] == "."}
_FOREIGN_SECTIONS = _SECTIONS - {"network", "save", "datasets[]", "train", "model", "sample", "logging"}
# The Linears that ai-toolkit adapts and our default does not: modulation, in FLUX.1's 19 + 38 blocks.
_BLOCKS = {"transformer_blocks": 19, "single_transformer_blocks": 38}
_MODULATION = [
    f"transformer.{blocks}.{i}.{part}"
    for blocks, linears in MODULATION.items()
    for (part,) in linears.values()
    for i in range(_BLOCKS[blocks])
]
# Suffixes that name every Linear in FLUX's blocks, each once, and what they name outside of them.
_BLOCK_LINEARS = dict.fromkeys(
    re.sub(r"^(attn|ff|ff_context)\.", "", part)
    for table in (ATTENTION_AND_MLP, MODULATION)
    for linears in table.values()
    for parts in linears.values()
    for part in parts
)
_OUTSIDE = "transformer.proj_out"
_TYPED_WRONG = 0.85  # likeness of two keys, 0..1, from which one is taken for the other with a slip


def is_nested(data: dict[str, Any]) -> bool:
    """Whether a file has ai-toolkit's outer form."""
    return "config" in data or "job" in data


def unnest(data: dict[str, Any], origins: Origins) -> dict[str, Any]:
    """Name, coat, meta and the one process, side by side; notes in origins where they stood.

    Raises ConfigError for another job, no process or several, different coat sections and unknown keys.
    """

    def check(holds: bool, location: Location, wanted: str) -> None:
        if not holds:
            raise ConfigError(printable(f"{origins.where(location)}: {wanted}"))

    config, job = data.get("config"), data.get("job", "extension")
    check(job in ("extension", "train"), ("job",), f"job: came {_short(job)}, wanted extension or train")
    check(isinstance(config, dict), ("config",), "config: wanted a section with name and process")
    processes = config.get("process")
    one = isinstance(processes, list) and len(processes) == 1 and isinstance(processes[0], dict)
    check(one, ("config", "process"), "config.process: wanted a list with exactly one training process")
    process = processes[0]
    check("name" not in process, (*_PROCESS, "name"), "the name of the run is config.name; remove this one")
    levels = {(): data, ("config",): config, _PROCESS: process}
    for at, known in (((), ("job", "config", "coat", "meta")), (("config",), ("name", "process", "coat"))):
        for key in levels[at]:
            wanted = f"unknown key '{dotted((*at, key))}'; wanted {', '.join(known)}"
            check(key in known, (*at, key), wanted)
    places = [(*at, "coat") for at, section in levels.items() if "coat" in section]
    for place in places:
        wanted = f"this coat section is not the one at {origins.where(places[0])}; keep one of them"
        check(levels[place[:-1]]["coat"] == levels[places[0][:-1]]["coat"], place, wanted)
    flat = dict(process)
    origins.moved = {(): _PROCESS}
    for place in (("config", "name"), ("meta",), *places[:1]):
        if place[-1] in levels[place[:-1]]:
            flat[place[-1]] = levels[place[:-1]][place[-1]]
            origins.moved[place[-1:]] = place
    return flat


def without_nesting(key: str) -> str:
    """The dotted key of an override, as it is after `unnest`."""
    for start in ("config.process.0.", "config."):
        key = key.removeprefix(start)
    return key


def drop_other_spellings(data: dict[str, Any], location: Location) -> None:
    """Remove what says the same as the setting at location under another name; for overrides, which win."""
    target = _target(location)
    for other, _ in list(_leaves(data)):
        if other != location and _target(other) == target:
            section: Any = data
            for part in other[:-1]:
                section = section[part]
            del section[other[-1]]


def translate(data: dict[str, Any], nested: bool, origins: Origins) -> dict[str, Any]:
    """Every key of a run without nesting -> what RunConfig takes; notes other spellings in origins.

    Logs one warning per key that has no effect or another one than in ai-toolkit. Raises ConfigError for a
    key that would change the result and cannot be followed. Keys that ai-toolkit does not have are passed on.
    """
    if nested:
        _fill_in_defaults(data)
    document = Document(data, nested)
    ours: dict[str, Any] = {}
    overruling: dict[Location, tuple[Any, Location]] = {}
    order = {key: number for number, key in enumerate(KEYS)}
    refused: dict[Location, ConfigError] = {}
    for location, value in sorted(_leaves(data), key=lambda leaf: order.get(_key(leaf[0]), -1)):
        try:
            settings = _treat(location, value, document, origins, bool(refused))
        except ConfigError as error:
            refused[location] = error
            continue
        for target, setting in settings.items():
            if target == _target(location):
                _put_once(ours, target, setting, location, origins)
            else:
                overruling[target] = setting, location
    if refused:
        (_, first), *others = refused.items()
        more = f" (and {len(others)} more: {', '.join(dotted(each) for each, _ in others)})" if others else ""
        raise ConfigError(f"{first}{printable(more)}")
    for target, (setting, location) in overruling.items():
        origins.spelled[target] = location
        _put(ours, target, setting)
    fit_pairs(ours, nested)
    if nested:
        _fit_network(ours, origins)
        _fit_buckets(ours)
    return ours


def _treat(
    location: Location, value: Any, document: Document, origins: Origins, later: bool
) -> dict[Location, Any]:
    """One key as written -> our settings by location. later: another key was refused before, so that this one
    will be named only; looking for what was meant by it takes milliseconds, and keys may be thousands."""
    rule, where = KEYS.get(_key(location)), printable(origins.where(location))
    said = printable(f"{dotted(location)}: came {_short(value)}")
    if rule is None:
        if _asks_for_nothing(location, value, document):
            _log.warning("%s: %s, an unknown key that asks for nothing: left out", where, said)
            return {}
        _check_section(location, value, origins, later)
        return {} if _key(location) in _FOREIGN_SECTIONS else {location: value}
    if isinstance(rule, Refuse) and not _is_one_of(value, rule.neutral):
        raise ConfigError(f"{where}: {said}, which cannot be followed: {rule.advice}")
    if isinstance(rule, Warn) and not _is_one_of(value, rule.silent):
        _log.warning("%s: %s, which has no effect here: %s", where, said, rule.why)
    if isinstance(rule, Honour):
        return {} if rule.null and value in (None, [], "") else {_target(location): value}
    if not isinstance(rule, Read):
        return {}
    try:
        reading: Reading = rule.read(value, document)
    except ValueError as error:
        raise ConfigError(printable(f"{where}: {said}; {error}")) from None
    for note in reading.notes:
        _log.warning("%s: %s, %s", where, said, printable(note))
    return {_location(name, location): setting for name, setting in reading.settings.items()}


def _asks_for_nothing(location: Location, value: Any, document: Document) -> bool:
    """Whether a key that nobody here knows can be left out: a newer version of ai-toolkit may have it, and
    its value is none. A false that is like a known key may be a mistyped switch that is on by default."""
    if not document.nested or _is_known(location):
        return False
    if value is not False:
        return _is_one_of(value, (None, "", [], {}))
    names = {key.rpartition(".")[2] for key in (*KEYS, *schema_keys())}
    return not difflib.get_close_matches(str(location[-1]), names, n=1, cutoff=_TYPED_WRONG)


def _is_known(location: Location) -> bool:
    """Whether our schema has this key, or ai-toolkit a section of this name."""
    return _key(location) in _SECTIONS or _key(location).replace("[]", ".0") in schema_keys()


def _check_section(location: Location, value: Any, origins: Origins, later: bool) -> None:
    """Refuse unknown keys, and a plain value in the place of a section that only ai-toolkit has."""
    if _key(location) in _FOREIGN_SECTIONS and value not in (None, {}):
        problem = f"{dotted(location)}: came {_short(value)}, wanted a section with keys"
    elif not _is_known(location):
        problem = f"unknown key '{dotted(location)}'{'' if later else f'; {known_instead(location)}'}"
    else:
        return
    raise ConfigError(printable(f"{origins.where(location)}: {problem}"))


def _leaves(value: Any, location: Location = ()) -> Iterator[tuple[Location, Any]]:
    """(location, value) of every key that has a treatment of its own, or is none of ai-toolkit's."""
    if isinstance(value, dict) and (not location or (value and _key(location) in _SECTIONS)):
        for key, inner in value.items():
            yield from _leaves(inner, (*location, key))
    elif isinstance(value, list) and value and location == ("datasets",):
        for number, inner in enumerate(value):
            yield from _leaves(inner, (*location, number))
    else:
        yield location, value


def _key(location: Location) -> str:
    """("datasets", 0, "scale") -> "datasets[].scale", as in KEYS."""
    return "".join("[]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")


def _target(location: Location) -> Location:
    """Where our schema has the setting at location."""
    rule = KEYS.get(_key(location))
    to = rule.to if isinstance(rule, Honour | Read) else ""
    return _location(to, location) if to else location


def _location(name: str, location: Location) -> Location:
    """A dotted name of our schema as a location; its list number is that of `location`."""
    numbers = (part for part in location if isinstance(part, int))
    parts: list[str | int] = []
    for part in name.split("."):
        parts += [part[:-2], next(numbers, 0)] if part.endswith("[]") else [part]
    return tuple(parts)


def _put_once(ours: dict, target: Location, value: Any, location: Location, origins: Origins) -> None:
    """Set it, unless another spelling of it has said something else."""
    first = origins.spelled.get(target)
    if first is not None and _get(ours, target) != value:
        problem = f"{dotted(first)} and {dotted(location)} are one setting and differ; remove one of them"
        raise ConfigError(printable(f"{origins.where(location)}: {problem}"))
    origins.spelled[target] = location
    _put(ours, target, value)


def _put(ours: dict[str, Any], target: Location, value: Any) -> None:
    """Set it, with the sections around it; inside a plain value nothing is set, and the schema says why."""
    here: Any = ours
    part: Any
    for part, following in zip(target, (*target[1:], None), strict=True):
        new = value if following is None else [] if isinstance(following, int) else {}
        if isinstance(here, list):
            here += [{} for _ in range(len(here), part + 1)]
        elif not isinstance(here, dict):
            return
        if following is None or (isinstance(here, dict) and part not in here):
            here[part] = new
        here = here[part]


def _get(ours: Any, target: Location) -> Any:
    part: Any
    for part in target:
        ours = ours[part] if isinstance(ours, dict | list) else None
    return ours


def _is_one_of(value: Any, choices: tuple[Any, ...]) -> bool:
    """Like `in`, but true is not 1."""
    return any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in choices)


def _short(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _fill_in_defaults(data: dict[str, Any]) -> None:
    """Put ai-toolkit's defaults into data where it says nothing."""
    leaves = ((location, _target(location), value) for location, value in _leaves(data))
    present = {
        dotted(target) for location, target, value in leaves if value is not None or target == location
    }
    for name in DEFAULTS.keys() - present:
        section, _, key = name.partition(".")
        if isinstance(data.setdefault(section, {}), dict):
            data[section][key] = DEFAULTS[name]


def _fit_network(ours: dict[str, Any], origins: Origins) -> None:
    """ai-toolkit trains FLUX with alpha = rank and adapts the modulation too: say where we differ."""
    network, where = ours.get("network"), printable(origins.where(("network",)))
    if not isinstance(network, dict):
        return
    if str(network.get("type")).lower() == "lokr":
        network.setdefault("lokr_full_rank", True)
    rank = network.get("linear")
    if isinstance(rank, int):
        alpha = network.setdefault("linear_alpha", float(rank))
        if alpha != rank:
            text = "%s: network.linear_alpha: %s is honoured; ai-toolkit trains FLUX with alpha = rank = %d"
            _log.warning(text, where, _short(alpha), rank)
    only, ignore = network.get("only_if_contains") or [""], network.get("ignore_if_contains") or []
    if "targets" in network or not isinstance(only, list) or not isinstance(ignore, list):
        return
    left_out = [path for path in _MODULATION if any(str(part) in path for part in only)]
    left_out = [path for path in left_out if not any(str(part) in path for part in ignore)]
    if left_out:
        text = (
            "%s: network: the LoRA goes to attention and feed-forward; ai-toolkit also adapts %d modulation "
            "Linears such as %s. To train these here: network.targets: [%s] and "
            "network_kwargs.ignore_if_contains: [%s]; to leave them out there: "
            "network_kwargs.ignore_if_contains: [norm]"
        )
        _log.warning(text, where, len(left_out), left_out[0], ", ".join(_BLOCK_LINEARS), _OUTSIDE)


def _fit_buckets(ours: dict[str, Any]) -> None:
    """Where a dataset says nothing about buckets, sizes are chosen as ai-toolkit does."""
    datasets = ours.get("datasets")
    for entry in datasets if isinstance(datasets, list) else []:
        if isinstance(entry, dict):
            entry.setdefault("bucket_rule", "ai-toolkit")
