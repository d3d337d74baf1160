"""Checkpoints that survive a kill at any moment: complete and verified, or not there.

    <run>/checkpoints/000000250/lora.safetensors ... state.json manifest.json
    <run>/checkpoints/latest                        text: 000000250

A checkpoint is a whole_folder (ppcoat/atomic.py), and only when it has its name does `latest` move; old ones
are removed last. manifest.json holds size and sha256 of every file. Only safetensors and JSON are written and
read: loading runs no code from the file. One process writes.

What a run must remember to go on is in run_state.py; save_run and resume_run bring it here and back.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import paddle
import safetensors.paddle

from ppcoat.atomic import check_writable, remove_dead_drafts, remove_folder, whole_folder, write_text
from ppcoat.config.schema import RunConfig
from ppcoat.data.batches import ResumableBatches
from ppcoat.errors import ConfigError
from ppcoat.finite import first_not_finite
from ppcoat.train.ranks import Ranks
from ppcoat.train.run_state import ANEW, STRICT_FLAG, ResumeWords, RunState

FORMAT = "ppcoat-checkpoint-1"
_COMMITTED = re.compile(r"^[0-9]{9}$")
_FILE_NAME = re.compile(r"^[A-Za-z0-9_]+\.(safetensors|json)$")

_FP8_SWITCH = "optimizer.fp8"
# Decisive field -> what a user calls it, where that is not its own name.
_SETTINGS = {_FP8_SWITCH: "FP8 optimizer states (coat.enabled, coat.optimizer.use_fp8, train.optimizer)",
             "optimizer.name": "train.optimizer",
             "network.modules": "network.targets and what else chooses the Linears"}  # fmt: skip
# Sections whose settings say nothing of how the weights come about.
_ASIDE = ("name", "output_dir", "device", "logging", "sample", "save", "cache_dir", "memory", "vram_gb")
# Where the base model lies, base_identity says which it is; and how long ranks wait.
_PLACES = ("model.name_or_path", "model.text_encoders", "model.vae", "model.tokenizers", "train.rank_timeout")
# Decisive fields of earlier versions: the name of the base's folder, and what may change today.
_EARLIER = ("model", "resolution", "batch_size", "ema_decay")

_log = logging.getLogger(__name__)

NamedTensors = dict[str, paddle.Tensor]


def in_its_folder(config: RunConfig, file: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of a run whose folder was moved, renamed or copied: where `file` is the config.yaml in a
    folder with checkpoints, and no override says where, the run goes on in the folder of the file."""
    folder = file.resolve().parent
    is_own = file.name == "config.yaml" and (folder / "checkpoints").is_dir()
    says_where = any(each.startswith(("output_dir=", "name=")) for each in overrides)
    if not is_own or says_where or config.run_dir.resolve() == folder:
        return config
    print(f"this run's folder was {config.run_dir}; it goes on in {folder}")
    return config.model_copy(update={"output_dir": str(folder.parent), "name": folder.name})


def check_run_folder(folder: Path) -> None:
    """Raises ConfigError where a run could not write to its folder; leaves nothing there."""
    try:
        check_writable(folder)
    except OSError as error:
        raise _unwritable(folder, error) from None


def _unwritable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"output folder {folder}: cannot be written to ({error.strerror}); choose another "
        "output_dir or make it writable"
    )


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: groups of tensors on CPU by name, and the JSON state."""

    path: Path
    step: int
    tensors: dict[str, NamedTensors]
    state: dict


def save_checkpoint(
    run_dir: str | Path, step: int, tensors: dict[str, NamedTensors], state: dict, keep: int
) -> Path:
    """Write checkpoint `step`, move `latest` to it, keep the newest `keep`; returns its folder.

    tensors: {"lora": {...}, "optimizer": {...}}, any shape, one safetensors file each, every dtype
    bit-exact (FP8 too); state: anything JSON can hold (data position, compared fields). Raises OSError (disk
    full, no permission) with the earlier checkpoints and `latest` untouched.
    """
    if keep < 1:
        raise ConfigError(f"checkpoints to keep: came {keep}, wanted at least 1")
    root = Path(run_dir) / "checkpoints"
    name = f"{step:09d}"
    with whole_folder(root / name, replace=True) as draft:
        _write_files(draft, step, tensors, state)
    write_text(root / "latest", f"{name}\n")
    _prune(root, step, keep)
    return root / name


def has_checkpoint(run_dir: Path) -> bool:
    """Whether a run in this folder would go on from a checkpoint, or complain of a damaged one."""
    root = run_dir / "checkpoints"
    return root.is_dir() and ((root / "latest").exists() or bool(_committed(root)))


def load_latest(
    run_dir: str | Path, strict: bool = False, strict_flag: str = STRICT_FLAG
) -> Checkpoint | None:
    """The newest intact checkpoint of a run, or None where the run has none.

    Starts at the one `latest` names; one with a missing file, a wrong size or a wrong sha256 is reported as
    a warning and the one before it is tried. strict: it is an error instead, and so is a `latest` that names
    no step. strict_flag: what the user calls `strict`, for that error. Left-overs of killed saves are
    removed. Raises ConfigError where there are checkpoints but none is intact, and for the first damage where
    strict, naming the file.
    """
    root = Path(run_dir) / "checkpoints"
    if not root.is_dir():
        return None
    remove_dead_drafts(root)
    candidates = _committed(root)
    refusing = strict_flag if strict else None
    newest = _pointed(root, refusing)
    if newest is not None:
        # later ones belong to a history that was given up when training went on from an earlier one
        candidates = [path for path in candidates if int(path.name) <= newest]
        if not candidates or int(candidates[-1].name) != newest:
            lost = root / f"{newest:09d}" / "manifest.json"
            _report(f"{lost} of the checkpoint that 'latest' names is gone", "trying earlier ones", refusing)
    for path in reversed(candidates):
        try:
            return _load(path)
        except _Damaged as damage:
            _report(f"checkpoint {path} is damaged ({damage})", "trying the one before it", refusing)
    if candidates or newest is not None:
        raise ConfigError(
            f"no checkpoint in {root} is intact; restore one, or remove that folder to start over"
        )
    return None


def check_compatible(saved: dict, current: dict, anew: str = ANEW) -> None:
    """Refuse to resume under other settings: the two (nested) dicts of decisive fields must be equal as JSON.

    Raises ConfigError naming the first differing field with both values, the switch of FP8 states before what
    follows from it. anew: what to do instead, for the message.
    """
    before, now = _flatten(saved), _flatten(current)
    for field in sorted(before.keys() | now.keys(), key=lambda field: (field != _FP8_SWITCH, field)):
        if before.get(field) == now.get(field) and (field in before) == (field in now):
            continue
        was = _shown(before[field]) if field in before else "not recorded"
        is_now = _shown(now[field]) if field in now else "not set"
        what = f"{_SETTINGS.get(field, field)} was {was} in the checkpoint and is {is_now} now"
        if field == "base":
            what = "the weights of the base model are not those that the checkpoint was trained on"
        raise ConfigError(f"cannot resume: {what}; set it back, or {anew}")


def settings_of_training(config: RunConfig) -> dict[str, object]:
    """{"train.lr": 0.001, ...}: all settings that matter to the weights, as JSON gives them back."""
    dump = config.model_dump(mode="json")
    flat = _flatten(dump | {"datasets": dict(enumerate(dump["datasets"]))})
    return {
        key: value
        for key, value in flat.items()
        if key.partition(".")[0] not in _ASIDE and not key.startswith(_PLACES)
    }


class _Damaged(Exception):
    """A checkpoint cannot be used; the text is the reason."""


def _write_files(draft: Path, step: int, tensors: dict[str, NamedTensors], state: dict) -> None:
    contents = {"state.json": json.dumps(state, indent=1).encode()}
    for group, named in tensors.items():
        contents[f"{group}.safetensors"] = safetensors.paddle.save(
            {name: tensor.detach().contiguous() for name, tensor in named.items()}
        )
    for name, content in contents.items():
        assert _FILE_NAME.match(name), f"tensor group {name!r} is not a plain word"
        (draft / name).write_bytes(content)
    files = {
        name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in contents.items()
    }
    manifest = {"format": FORMAT, "step": step, "files": files}
    (draft / "manifest.json").write_bytes(json.dumps(manifest, indent=1).encode())


def _committed(root: Path) -> list[Path]:
    """Folders with our manifest, oldest step first. Nothing else is ever loaded or removed."""
    return sorted(path for path in root.iterdir() if _COMMITTED.match(path.name) and _is_ours(path))


def _is_ours(path: Path) -> bool:
    return not path.is_symlink() and (path / "manifest.json").is_file()


def _report(damage: str, instead: str, refusing: str | None) -> None:
    """Refuse to go on where a flag, `refusing`, asks for that; else say loudly what is done instead."""
    if refusing is not None:
        raise ConfigError(
            f"{damage}; restore it, or resume without {refusing} from the newest checkpoint that is intact"
        )
    _log.warning("%s; %s", damage, instead)


def _pointed(root: Path, refusing: str | None) -> int | None:
    """Step that `latest` names; None where there is no pointer or it holds something else."""
    try:
        text = (root / "latest").read_text("ascii").strip()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        text = "bytes that are not ASCII"
    if not _COMMITTED.match(text):
        damage = f"{root / 'latest'} holds {text[:40]!r}, wanted a step of nine digits"
        _report(damage, "using the newest step", refusing)
        return None
    return int(text)


def _load(path: Path) -> Checkpoint:
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        if manifest["format"] != FORMAT or manifest["step"] != int(path.name):
            raise _Damaged("manifest.json belongs to another format or step")
        contents = {name: _verified(path, name, facts) for name, facts in manifest["files"].items()}
        state = json.loads(contents.pop("state.json"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        # every other file has the bytes that the manifest says, or has been named
        raise _Damaged(f"manifest.json: {type(error).__name__}: {error}") from None
    tensors = {
        name.removesuffix(".safetensors"): safetensors.paddle.load(content)
        for name, content in contents.items()
    }
    for group, named in tensors.items():
        if (name := first_not_finite(named)) is not None:
            raise _Damaged(f"{group}.safetensors: {name} holds NaN or infinity")
    return Checkpoint(path, int(path.name), tensors, state)


def _verified(path: Path, name: str, facts: dict) -> bytes:
    if not _FILE_NAME.match(name):
        raise _Damaged(f"manifest.json names {name!r}, which is not a file of a checkpoint")
    try:
        size = (path / name).stat().st_size
        if size != facts["size"]:
            raise _Damaged(f"{name} has {size} bytes, wanted {facts['size']}")
        content = (path / name).read_bytes()
    except OSError as error:
        raise _Damaged(f"{name}: {error.strerror}") from None
    if hashlib.sha256(content).hexdigest() != facts["sha256"]:
        raise _Damaged(f"{name}: sha256 differs from manifest.json")
    return content


def _prune(root: Path, step: int, keep: int) -> None:
    """Keep the newest `keep` checkpoints up to `step`; those beyond it are not part of this history."""
    history = [path for path in _committed(root) if int(path.name) <= step]
    for path in history[:-keep]:
        remove_folder(path)


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


def save_run(state: RunState, config: RunConfig) -> None:
    """A checkpoint of this step. Raises OSError as save_checkpoint does."""
    keep = config.save.max_step_saves_to_keep
    facts = state.state_dict() | {"settings": settings_of_training(config)}
    save_checkpoint(config.run_dir, state.step, state.tensors(), facts, keep)


def resume_run(
    state: RunState, config: RunConfig, ranks: Ranks, words: ResumeWords | None = None, settings: str = ""
) -> None:
    """Go on from the latest checkpoint, if there is one, and make all ranks start alike.

    settings: text for config.yaml in the run folder, written last, so that a run which may not go on leaves
    the settings of the one before.

    The number of ranks may differ from the checkpoint's where the global batch does not. What changed and may
    change is told in one line. words: of the command that runs. Raises ConfigError for a checkpoint of other
    settings, a damaged one with save.strict_resume, other pictures without save.restart_data, and where the
    ranks do not see the same pictures. The first rank reads the checkpoint and gives it to the others.
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
            raise _unwritable(config.run_dir, error) from None


def check_resume(config: RunConfig, compatible: dict, batches: ResumableBatches) -> None:
    """Refuse what `resume_run` would refuse, before anything is loaded, as far as it can be told then.

    compatible: decisive facts, as RunState has them, without network.modules. A checkpoint that cannot be
    read is left to `resume_run`, which knows those before it.
    """
    root = config.run_dir / "checkpoints"
    try:
        facts = json.loads((root / (root / "latest").read_text("ascii").strip() / "state.json").read_bytes())
        facts["compatible"]["network"].pop("modules", None)
        facts["batches"].keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    _what_moved(facts, compatible, batches, config, ResumeWords())


def _what_moved(
    facts: dict, current: dict, batches: ResumableBatches, config: RunConfig, words: ResumeWords
) -> str | None:
    """What of the pictures' order changed since the checkpoint with this state. Raises ConfigError as _go_on
    does."""
    restart_flag = words.restart_flag
    saved = {
        name: value for name, value in facts["compatible"].items() if name in current or name not in _EARLIER
    }
    # a checkpoint of an earlier version knows its base by the name of its folder only
    check_compatible({"base": current["base"]} | saved if "base" in current else saved, current, words.anew)
    moved = batches.difference(facts["batches"])
    if moved is not None and not (config.save.restart_data and restart_flag):
        advice = f", add {restart_flag} to go on with a new order of the pictures" if restart_flag else ""
        raise ConfigError(
            f"cannot resume the order of the data: {moved}; set it back{advice}, or {words.anew}"
        )
    return moved


def _go_on(state: RunState, config: RunConfig, checkpoint: Checkpoint, words: ResumeWords) -> str:
    """Bring the checkpoint into the run -> what is left to do, what changed, and what carries over. Raises
    ConfigError for other decisive fields, and for other pictures without save.restart_data."""
    facts = checkpoint.state
    moved = _what_moved(facts, state.compatible, state.batches, config, words)
    state.load(checkpoint.step, checkpoint.tensors, facts, restart_data=moved is not None)
    steps, step = config.train.steps, state.step
    left = f"{steps - step} of {steps} steps are" if step < steps else "nothing is"
    before, now = dict(facts.get("settings", {})), settings_of_training(config)
    if before.get("model.quantize") is True:  # so earlier versions called their only format
        before["model.quantize"] = "fp8"
    changes = [f"{key} {_shown(before[key])} -> {_shown(now[key])}"
               for key in now if before.get(key, now[key]) != now[key]]  # fmt: skip
    lines = [f"resuming from {checkpoint.path}: {left} left"]
    if moved is not None:
        changes.append(moved)
    elif state.batches.has_other_contents(facts["batches"]):
        changes.append("captions, names or files of the same number of pictures")
    if changes:
        anew = ["the order of the pictures"] if moved is not None else []
        anew += ["the running mean"] if state.ema is not None and "ema" not in checkpoint.tensors else []
        lines.append(
            f"changed since then: {', '.join(changes)}; weights, optimizer states and step carry over, the "
            f"learning rate is now {state.schedule.last_lr:g}"
            + (f"; anew: {' and '.join(anew)}" if anew else "")
        )
    return "\n".join(lines)
