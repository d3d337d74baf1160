"""The folder of a run: its checkpoints, which survive a kill at any moment, complete and verified or not
there; and its lock, for two runs in it would overwrite each other's checkpoints without a word.

    <run>/checkpoints/000000250/lora.safetensors ... state.json manifest.json
    <run>/checkpoints/latest                        text: 000000250
    <run>/.lock                                     text: process 4711 on myhost; there while the run is

A checkpoint is a whole_folder (ppcoat/atomic.py), and only when it has its name does `latest` move; old ones
are removed last. manifest.json holds size and sha256 of every file. Only safetensors and JSON are written and
read: loading runs no code from the file. One process writes.

What a run must remember to go on is in run_state.py; save_run brings it here, and resume.py back.

The lock is the system's (flock), not the file: it goes with the process that holds it, however that ends, so
what a killed run left is taken over. Not held where the system has no such locks (Windows, some network file
systems).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import paddle
import safetensors.paddle

from ppcoat.atomic import check_writable, remove_dead_drafts, remove_folder, whole_folder, write_text
from ppcoat.config.schema import RunConfig
from ppcoat.errors import ConfigError
from ppcoat.finite import first_not_finite
from ppcoat.reading import followed, json_value, regular_bytes
from ppcoat.signals import unfinished
from ppcoat.train.ranks import Ranks
from ppcoat.train.run_state import STRICT_FLAG, RunState

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".lock"
FORMAT = "ppcoat-checkpoint-1"
MAX_STATE_BYTES = 64 << 20  # of the JSON of a checkpoint
_COMMITTED = re.compile(r"^[0-9]{9}$")
_FILE_NAME = re.compile(r"^[A-Za-z0-9_]+\.(safetensors|json)$")

_log = logging.getLogger(__name__)

NamedTensors = dict[str, paddle.Tensor]


def in_its_folder(config: RunConfig, file: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of a run whose folder was moved, renamed or copied: where `file` is the config.yaml in a
    folder with checkpoints, and no override says where, the run goes on in the folder of the file."""
    folder = followed(file).parent
    is_own = file.name == "config.yaml" and (folder / "checkpoints").is_dir()
    says_where = any(each.startswith(("output_dir=", "name=")) for each in overrides)
    if not is_own or says_where or followed(config.run_dir) == folder:
        return config
    print(f"this run's folder was {config.run_dir}; it goes on in {folder}")
    return config.model_copy(update={"output_dir": str(folder.parent), "name": folder.name})


def check_run_folder(folder: Path) -> None:
    """Raises ConfigError where a run could not write to its folder; leaves nothing there."""
    try:
        check_writable(folder)
    except OSError as error:
        raise unwritable(folder, error) from None


def unwritable(folder: Path, error: OSError) -> ConfigError:
    """What a user is told of a run folder that this error came from."""
    return ConfigError(
        f"output folder {folder}: cannot be written to ({error.strerror}); choose another "
        "output_dir or make it writable"
    )


@contextmanager
def only_run_in(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Context manager: no other run has `folder`, which is made, and removed if nothing came into it.

    The first of the ranks asks. Raises ConfigError that names the other run, OSError where the folder cannot
    be written to.
    """
    if fcntl is None or not ranks.is_first:
        yield
        return
    descriptor = _locked(folder / LOCK)
    unfinished[descriptor] = lambda: _take_away(folder)
    try:
        yield
    finally:
        _take_away(folder)
        del unfinished[descriptor]
        os.close(descriptor)


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


def save_run(state: RunState, config: RunConfig) -> None:
    """A checkpoint of this step. Raises OSError as save_checkpoint does."""
    keep = config.save.max_step_saves_to_keep
    save_checkpoint(config.run_dir, state.step, state.tensors(), state.state_dict(), keep)


def has_checkpoint(run_dir: Path) -> bool:
    """Whether a run in this folder would go on from a checkpoint, or complain of a damaged one."""
    root = run_dir / "checkpoints"
    return root.is_dir() and ((root / "latest").exists() or bool(_committed(root)))


def named_latest(root: Path) -> str:
    """What `latest` in a folder of checkpoints says. Raises OSError where it cannot be read,
    UnicodeDecodeError for other bytes than ASCII."""
    return regular_bytes(root / "latest", MAX_STATE_BYTES).decode("ascii").strip()


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
        text = named_latest(root)
    except FileNotFoundError:
        return None
    except OSError as error:
        text = f"{error.strerror}"
    except UnicodeDecodeError:
        text = "bytes that are not ASCII"
    if not _COMMITTED.match(text):
        damage = f"{root / 'latest'} holds {text[:40]!r}, wanted a step of nine digits"
        _report(damage, "using the newest step", refusing)
        return None
    return int(text)


def _load(path: Path) -> Checkpoint:
    try:
        manifest = json_value(regular_bytes(path / "manifest.json", MAX_STATE_BYTES))
        if manifest["format"] != FORMAT or manifest["step"] != int(path.name):
            raise _Damaged("manifest.json belongs to another format or step")
        contents = {name: _verified(path, name, facts) for name, facts in manifest["files"].items()}
        state = json_value(contents.pop("state.json"))
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
        content = regular_bytes(path / name, size)
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


def _take_away(folder: Path) -> None:
    with suppress(OSError):  # not empty: a run was here
        (folder / LOCK).unlink()
        folder.rmdir()


def _locked(file: Path) -> int:
    """The descriptor that holds the lock until it is closed."""
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # a run that ended in between took its folder away
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = os.read(descriptor, 200).decode("utf-8", "replace").strip() or "another process"
            os.close(descriptor)
            raise ConfigError(
                f"{file.parent}: {who} is training there; wait for it, stop it, or choose another folder"
            ) from None
        except OSError:  # a file system without locks
            return descriptor
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                with suppress(OSError):  # a full disk: locked all the same, but nobody is told by whom
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                return descriptor
        os.close(descriptor)  # so did one its file
