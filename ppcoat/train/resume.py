"""Going on from a checkpoint: what changed since then is refused or told by name.

config/resume.py says what each setting means to a resumed run. Settings, the contents of the base model and
those of pictures and captions are in the checkpoint (Records in run_state.py) and are compared before
anything is loaded; what only a loaded run knows (the Linears that have an adapter) after that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic_core import to_jsonable_python

from ppcoat.atomic import write_text
from ppcoat.config.lightning import LightningConfig
from ppcoat.config.resume import class_of, must_stay, setting_fields, without_number
from ppcoat.config.schema import RunConfig
from ppcoat.data.batches import ResumableBatches
from ppcoat.data.content_keys import content_key, file_digest
from ppcoat.data.examples import Dataset
from ppcoat.errors import ConfigError, printable
from ppcoat.models.tensor_files import PATIENCE, Component
from ppcoat.progress import Progress
from ppcoat.reading import json_value, regular_bytes
from ppcoat.train.base_model import base_identity, fingerprints
from ppcoat.train.checkpoint import MAX_STATE_BYTES, Checkpoint, load_latest, named_latest, unwritable
from ppcoat.train.ranks import Ranks
from ppcoat.train.run_state import ANEW, Records, ResumeWords, RunState

_FP8_SWITCH = "optimizer.fp8"
# Decisive field -> what a user calls it, where that is not its own name.
_NAMES = {_FP8_SWITCH: "FP8 optimizer states (coat.enabled, coat.optimizer.use_fp8, train.optimizer)",
          "optimizer.name": "train.optimizer",
          "network.modules": "network.targets and what else chooses the Linears"}  # fmt: skip
# Decisive fields of earlier versions: names and pieces of the base, and what may change today.
_EARLIER = ("model", "base", "resolution", "batch_size", "ema_decay")
# Settings that the checkpoints of earlier versions lack, whatever they were.
_NOT_KEPT = ("device", "save.dtype", "save.format")
Values = tuple[str, str]  # of a setting, in the checkpoint and now
_PICTURES, _REGULARISATION = "pictures", "regularisation"
_PARTS = ("picture", "caption", "mask", "reference")  # of a row of a data record
_NAMED = 3  # files in a line
MOST_NAMED, _ALL = 200_000, "*"  # pictures in a checkpoint: 12 MB of text
_DIGITS = 12  # of a sha256: enough to see a change
# Record -> what cannot be compared where a checkpoint lacks it.
_UNSEEN = {"settings": "its settings", "weights": "VAE, text encoders and tokenizers",
           "data": "the contents of its pictures"}  # fmt: skip


@dataclass(frozen=True)
class Start:
    """What a run that would go on is made of. compatible: decisive facts, as RunState has them, without the
    modules that have an adapter where these are not known yet."""

    compatible: dict
    batches: ResumableBatches
    records: Records


def data_record(datasets: Sequence[Dataset]) -> dict[str, dict[str, str]]:
    """{"pictures" or "regularisation": {name in its folder: digests of picture, caption, mask and
    references}}, of more than MOST_NAMED one digest together. Reads every file. Raises ConfigError as
    file_digest does."""

    def of(path: Path) -> str:
        return file_digest(path)[:_DIGITS]

    record: dict[str, dict[str, str]] = {}
    seen: set[tuple[str, Path]] = set()
    for each in datasets:
        kind, folder = _REGULARISATION if each.config.is_reg else _PICTURES, Path(each.config.folder_path)
        rows = record.setdefault(kind, {})
        for item in Progress(each.images.items, desc="reading pictures", unit="file", delay=PATIENCE):
            path = item.image_path
            if (kind, path) in seen:  # once, though it is trained at several sizes
                continue
            seen.add((kind, path))
            beside = each.companions.get(path)
            mask = beside.mask if beside else None
            row = [of(path), content_key(item.caption_raw)[:_DIGITS]]
            row.append(of(mask.path) if mask and not mask.from_alpha else "-")
            row += [of(reference.path) for reference in (beside.references if beside else ())]
            rows[_free_name(path.relative_to(folder).as_posix(), rows)] = " ".join(row)
    return {kind: rows if len(rows) <= MOST_NAMED else {_ALL: content_key(*rows, *rows.values())[:_DIGITS]}
            for kind, rows in record.items()}  # fmt: skip


def check_resume(
    config: RunConfig,
    start: Start,
    datasets: Sequence[Dataset],
    parts: Mapping[str, Component],
    ranks: Ranks,
    words: ResumeWords | None = None,
) -> Records:
    """Refuse what `resume_run` would refuse, before anything is loaded, as far as it can be told then. Gives
    the records of `start` with those of pictures (on the first rank, which alone needs them) and model, all
    of which are read.

    parts: the model's, by name. Raises ConfigError as `resume_run`, and where the ranks do not see the same
    model. A checkpoint that cannot be read is left to `resume_run`, which knows those before it.
    """
    words = words if words is not None else ResumeWords()
    if ranks.is_first:
        start = replace(start, records=replace(start.records, data=data_record(datasets)))
        _check_latest(config, start, words)
    with ranks.first_ahead():  # the others find in the run folder what it found
        records = replace(start.records, weights=fingerprints(config, parts))
        if ranks.is_first:  # what a rank on another machine has in its folder does not count
            _check_latest(config, replace(start, records=records), words)
    ranks.agree({f"the content of {name}": digest[:_DIGITS] for name, digest in records.weights.items()})
    return records


def _check_latest(config: RunConfig, start: Start, words: ResumeWords) -> None:
    root = config.run_dir / "checkpoints"
    try:
        facts = json_value(regular_bytes(root / named_latest(root) / "state.json", MAX_STATE_BYTES))
        for place in (facts["compatible"], facts["compatible"].get("network", {})):
            place.pop("modules", None)
        facts["batches"].keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    _compared(facts, start, config, words)


def resume_run(
    state: RunState, config: RunConfig, ranks: Ranks, words: ResumeWords | None = None, settings: str = ""
) -> None:
    """Go on from the latest checkpoint, if there is one, and make all ranks start alike.

    settings: text for config.yaml in the run folder, written last, so that a run which may not go on leaves
    the settings of the one before.

    The number of ranks may differ from the checkpoint's where the global batch does not. What changed and may
    change is told in one line. words: of the command that runs. Raises ConfigError for a checkpoint of other
    settings or another base, a damaged one with save.strict_resume, other pictures without save.restart_data,
    and where the ranks do not see the same pictures. The first rank reads the checkpoint and gives it to the
    others.
    """
    words = words if words is not None else ResumeWords()
    checkpoint = None
    if ranks.is_first:  # it also removes what a killed save left
        checkpoint = load_latest(config.run_dir, config.save.strict_resume, words.strict_flag)
    facts = checkpoint and [str(checkpoint.path), checkpoint.step, checkpoint.state]
    facts, tensors = ranks.hand_over(facts, checkpoint.tensors if checkpoint else {})
    if facts is not None:
        path, step, saved = facts
        told = _go_on(state, config, Checkpoint(Path(path), step, tensors, saved), words)
        if ranks.is_first:
            print(told)
    ranks.agree({"step": state.step, **state.batches.state_dict()})
    ranks.broadcast(state.parameters.values())
    if settings and ranks.is_first:
        try:
            write_text(config.run_dir / "config.yaml", settings)
        except OSError as error:
            raise unwritable(config.run_dir, error) from None


def check_compatible(
    saved: dict, current: dict, anew: str = ANEW, changed: Mapping[str, Values] | None = None
) -> None:
    """Refuse to resume under other settings: the two (nested) dicts of decisive fields must be equal as JSON.

    Raises ConfigError naming the first differing field with both values, the switch of FP8 states before what
    follows from it. anew: what to do instead, for the message. changed: settings from which the fields
    follow.
    """
    before, now, changed = _flatten(saved), _flatten(current), changed or {}
    for field in sorted(before.keys() | now.keys(), key=lambda field: (field != _FP8_SWITCH, field)):
        if before.get(field) == now.get(field) and (field in before) == (field in now):
            continue
        was = _shown(before[field]) if field in before else "not recorded"
        is_now = _shown(now[field]) if field in now else "not set"
        name = _NAMES.get(field, field)
        was, is_now = changed.get(name, (was, is_now))
        why = _listed({key: values for key, values in changed.items() if key != name})
        what = f"{name} was {was} in the checkpoint and is {is_now} now{why}"
        raise ConfigError(f"cannot resume: {what}; set it back, or {anew}")


@dataclass(frozen=True)
class _Changes:
    """Since a checkpoint. moved: what of the order of the pictures, None: nothing. told: all else that may
    change. unseen: what the checkpoint lacks."""

    moved: str | None
    told: list[str]
    unseen: list[str]


def _compared(facts: dict, start: Start, config: RunConfig, words: ResumeWords) -> _Changes:
    """A checkpoint's state beside the run that would go on. Raises ConfigError for what may not change."""
    records, saved, current = start.records, dict(facts["compatible"]), start.compatible
    _check_weights(facts.get("weights"), saved.get("base"), records.weights, config, words)
    before = _earlier_names(facts.get("settings", {}), records.settings)
    changed = _changed_settings(before, records.settings)
    saved = {name: value for name, value in saved.items() if name in current or name not in _EARLIER}
    kept = must_stay(records.settings) if before else {}
    behind = _of_class("same", changed) | {key: changed[key] for key in kept if key in changed}
    check_compatible(saved | must_stay(before), current | kept, words.anew, behind)
    data = _data_changes(facts["data"], records.data) if facts.get("data") and records.data else ""
    moved = start.batches.difference(facts["batches"])
    restart_flag = words.restart_flag
    if moved is not None and not (config.save.restart_data and restart_flag):
        advice = f", add {restart_flag} to go on with a new order of the pictures" if restart_flag else ""
        why = _listed(_of_class("order", changed), data)
        raise ConfigError(
            f"cannot resume the order of the data: {moved}{why}; set it back{advice}, or {words.anew}"
        )
    told = _lines(changed)
    told += [moved] if moved is not None else []
    if data:
        told.append(data)
    elif not facts.get("data") and moved is None and start.batches.has_other_contents(facts["batches"]):
        told.append("captions, names or files of the same number of pictures")
    seen = facts | {"settings": before}
    unseen = [_UNSEEN[name] for name in records.known() if not seen.get(name)]
    return _Changes(moved, told, unseen)


def _go_on(state: RunState, config: RunConfig, checkpoint: Checkpoint, words: ResumeWords) -> str:
    """Bring the checkpoint into the run -> what is left to do, what changed, and what carries over. Raises
    ConfigError as _compared does."""
    start = Start(state.compatible, state.batches, state.records)
    changes = _compared(checkpoint.state, start, config, words)
    restarted = changes.moved is not None
    state.load(checkpoint.step, checkpoint.tensors, checkpoint.state, restart_data=restarted)
    steps, step = config.train.steps, state.step
    left = f"{steps - step} of {steps} steps are" if step < steps else "nothing is"
    lines = [f"resuming from {checkpoint.path}: {left} left"]
    if changes.unseen:
        lines.append(
            "the checkpoint is of an earlier version, and changes of these cannot be seen: "
            + ", ".join(changes.unseen)
        )
    if changes.told:
        anew = ["the order of the pictures"] if restarted else []
        anew += ["the running mean"] if state.ema is not None and "ema" not in checkpoint.tensors else []
        lines.append(
            f"changed since then: {', '.join(changes.told)}; weights, optimizer states and step carry over, "
            f"the learning rate is now {state.schedule.last_lr:g}"
            + (f"; anew: {' and '.join(anew)}" if anew else "")
        )
    return "\n".join(lines)


def _check_weights(
    saved: dict | None, base: str | None, now: Mapping[str, str], config: RunConfig, words: ResumeWords
) -> None:
    """Raises ConfigError naming the component of the base that is another. base: what checkpoints of earlier
    versions have instead."""
    other = [name for name in now if saved and saved.get(name, now[name]) != now[name]]
    if not saved and base is not None and base != base_identity(config.model.name_or_path):
        other = ["transformer"]
    if other:
        raise ConfigError(
            "cannot resume: the weights of the base model are not those that the checkpoint was trained on: "
            f"{', '.join(other)} of {config.model.name_or_path} changed; give the earlier ones, or "
            f"{words.anew}"
        )


def _earlier_names(saved: dict, now: Mapping[str, object]) -> dict[str, object]:
    """The settings of a checkpoint as they are called today; none where it has others than this kind of
    run."""
    before = dict(saved)
    if not now or len(before.keys() & now.keys()) < len(now) / 2:
        return {}
    if before.get("model.quantize") is True:  # so earlier versions called their only format
        before["model.quantize"] = "fp8"
    return before


def _changed_settings(before: Mapping[str, object], now: Mapping[str, object]) -> dict[str, Values]:
    """Of those that matter; one that the checkpoint does not know, because it is newer, had its default."""
    if not before:
        return {}
    folders = [max((int(key.split(".")[1]) + 1 for key in each if key.startswith("datasets.")), default=0)
               for each in (before, now)]  # fmt: skip
    several = tuple(f"{count} entr{'y' if count == 1 else 'ies'}" for count in folders)
    changed = {"datasets": several} if folders[0] != folders[1] else {}
    for key, value in now.items():
        if key.startswith("datasets.") and int(key.split(".")[1]) >= folders[0]:
            continue
        if key in _NOT_KEPT and key not in before:
            continue
        was = before[key] if key in before else _default(key)
        if was != value and class_of(key) != "free":
            changed[key] = _shown(was), _shown(value)
    return changed


def _default(key: str) -> object:
    """Of a setting, as JSON gives it back."""
    fields = setting_fields(RunConfig) | setting_fields(LightningConfig)
    return to_jsonable_python(fields[without_number(key)].default)


def _of_class(wanted: str, changed: Mapping[str, Values]) -> dict[str, Values]:
    return {key: values for key, values in changed.items() if class_of(key) == wanted}


def _data_changes(before: Mapping[str, dict], now: Mapping[str, dict]) -> str:
    """Two data records -> "data: 1 caption changed (a.png), 2 pictures new (b.png, c.png)", or nothing."""
    parts = []
    for kind, of in ((_PICTURES, ""), (_REGULARISATION, "regularisation ")):
        was, rows = before.get(kind, {}), now.get(kind, {})
        if _ALL in was or _ALL in rows:
            parts += [] if was == rows else [f"files of the {of}pictures changed"]
            continue
        found: dict[tuple[str, str], list[str]] = {}
        for name in sorted(was.keys() & rows.keys()):
            for part in _changed_parts(was[name].split(), rows[name].split()):
                found.setdefault((part, "changed"), []).append(name)
        for word, others in (("new", rows.keys() - was.keys()), ("gone", was.keys() - rows.keys())):
            if others:
                found["picture", word] = sorted(others)
        for (part, word), names in found.items():
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            plural = "s" if len(names) > 1 else ""
            shown = ", ".join(map(printable, names[:_NAMED]))
            parts.append(f"{len(names)} {of}{part}{plural} {word} ({shown}{more})")
    return f"data: {', '.join(parts)}" if parts else ""


def _changed_parts(before: list[str], now: list[str]) -> list[str]:
    """Two rows of a data record -> which of _PARTS differ."""
    whole = zip(_PARTS, (*before[:3], before[3:]), (*now[:3], now[3:]), strict=True)
    return [part for part, was, is_now in whole if was != is_now]


def _free_name(name: str, taken: Mapping[str, str]) -> str:
    """The name, or one with the number of the folder in which a picture of that name is, too."""
    number = 2
    while (numbered := name if number == 2 else f"{name} (folder {number - 1})") in taken:
        number += 1
    return numbered


def _lines(changed: Mapping[str, Values]) -> list[str]:
    return [f"{key} {was} -> {now}" for key, (was, now) in changed.items()]


def _listed(changed: Mapping[str, Values], data: str = "") -> str:
    """Settings with their two values, and what changed of the data, in brackets; nothing for none."""
    parts = _lines(changed) + ([data] if data else [])
    return f" ({', '.join(parts)})" if parts else ""


def _shown(value: object) -> str:
    """A value for a message; of a long list, its length."""
    return f"{len(value)} entries" if isinstance(value, list) and len(str(value)) > 60 else repr(value)


def _flatten(fields: dict, prefix: str = "") -> dict[str, object]:
    """Nested dict -> {"a.b": value as JSON would give it back}."""
    flat: dict[str, object] = {}
    for name, value in fields.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = json.loads(json.dumps(value))
    return flat
