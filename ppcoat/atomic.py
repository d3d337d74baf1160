"""Crash-safe writing: a file or folder has its name when it is whole and on the disk; until then what was
there before stays as it was. Everything that is written and read again goes through here; logs, which only
grow, do not.

    outputs/lora.safetensors                                       the goal
    outputs/.lora.safetensors.tmp-myhost-4711-9f3a01c2/            a draft folder beside it, of one writer
        lora.safetensors                                           what is being written, or a folder: in it
                                                                   nothing has drafts of its own

Draft, fsync, rename, fsync of the folder that holds the name, removal of the draft folder. Where the writing
fails (a full disk, Ctrl+C) the draft folder goes at once; what a killed process left, the next one that
writes into that folder removes.

A folder that is replaced and its draft exchange their names in one step, and the old one goes with the draft
folder. Only Linux can do that, on most of its file systems; elsewhere the old one is set aside in the draft
folder (lora.old), so that the name is free for a moment, and the next writer puts back one that was set aside
and not replaced.

A symlink is written through. A new file's permissions are those of the umask, a replaced file's stay. Two
writers of one goal are both whole; the last one counts. A full disk or a folder without write permission is
an OSError with `filename`, which commands explain where they know what to do.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from ppcoat.errors import ConfigError
from ppcoat.reading import followed
from ppcoat.signals import unfinished

_FORGOTTEN_SECONDS = 24 * 3600  # without a change: a draft of another machine has no living writer

_PROCESS = r"(?P<pid>[0-9]{1,9})"
_OF_HOST = rf"(?P<host>[A-Za-z0-9]*)-{_PROCESS}"
_DRAFT = re.compile(rf"\.(?P<name>.+)\.tmp-{_OF_HOST}-[0-9a-f]{{8}}")
# What earlier versions left: drafts of checkpoints, logs, LoRA files, cache entries; checkpoints set aside.
_EARLIER = (
    re.compile(rf"([0-9]{{9}}|latest|log\.jsonl|\..+\.safetensors|\.adapter_config\.json)\.tmp-{_PROCESS}"),
    re.compile(rf"([0-9a-f]{{64}}|\.writable)\.tmp-{_OF_HOST}"),
    re.compile(rf"(?P<aside>[0-9]{{9}})\.old-{_PROCESS}"),
)
# How safetensors and shutil.copytree quote the system's error; neither has its number in a field.
_SYSTEM_SAID = re.compile(
    r"\(os error (?P<rust>[0-9]+)\)"
    r"|\[Errno (?P<python>[0-9]+)\][^:\"']*(: '(?P<path>[^']*)'( -> '(?P<to>[^']*)')?)?"
)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)  # EPERM: of a container's filter
_NO_SECOND_NAME = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)
_REFUSED_SYNC = (errno.EINVAL, errno.ENOTSUP)  # of a folder, by some network file systems
_own: set[str] = set()  # names of the draft folders that threads of this process are writing to
_on_disk: set[Path] = set()  # folders whose names this process has synced


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Context manager: the path of an empty draft, with the name of `path`, to be written and checked in the
    body. It becomes `path` when the body ends; where anything raises it is removed, and `path` stays.

    Makes the folders above. Raises OSError (full disk, no permission, `path` is a folder).
    """
    goal = _goal(path)
    if goal.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(goal))
    remove_dead_drafts(goal.parent)
    with _draft(goal, or_goal=True) as draft:
        draft.touch()
        mode = stat.S_IMODE((goal if goal.exists() else draft).stat().st_mode)
        yield draft
        if stat.S_IMODE(draft.stat().st_mode) != mode:  # safetensors makes files that only their owner reads
            draft.chmod(mode)
        if draft == goal:
            return
        _sync(draft)
        os.replace(draft, goal)
        _sync_name(goal)


@contextmanager
def whole_folder(path: str | Path, replace: bool = False, keep: bool = False) -> Iterator[Path]:
    """Context manager: an empty draft folder, with the name of `path`, to be filled and checked in the body.
    It becomes `path`, every file of it synced, when the body ends; where anything raises it is removed.

    replace: whether `path` may be there, with anything in it; it stays until the draft is whole. keep: what
    lies in it under names that the draft has not is in the new one, too; what others add to it just then is
    lost. Makes the folders above. Raises OSError (full disk, no permission, `path` is a file, or is there and
    not empty).
    """
    goal = _goal(path)
    if goal.is_file():  # asked once: another writer may be exchanging the folder
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(goal))
    remove_dead_drafts(goal.parent, goal.name)
    with _draft(goal, or_goal=replace and not keep) as draft:
        draft.mkdir()
        yield draft
        if draft == goal:
            return
        if keep and goal.is_dir():
            _keep(goal, draft)
        for folder, _, files in os.walk(draft, topdown=False):
            for each in (*files, "."):
                _sync(Path(folder, each))
        _put(draft, goal, replace)
        _sync_name(goal)


def write_text(path: str | Path, text: str) -> None:
    """`text` as UTF-8 in `path`. Raises OSError as whole_file does."""
    with whole_file(path) as draft:
        draft.write_text(text, encoding="utf-8")


def remove_folder(path: str | Path) -> None:
    """Remove a folder: it loses its name at once, and what is left of it when the process is killed is a
    draft. Raises OSError (no permission)."""
    with _draft(_goal(path)) as draft:
        os.rename(path, draft)


def can_be_replaced(folder: str | Path) -> bool:
    """Whether whole_folder may replace a folder: not one where a disk is mounted, whose parent others own, or
    in which this process stands, which would go on in the old one."""
    folder = followed(folder)
    with suppress(FileNotFoundError):  # where this process stands was removed
        if Path.cwd().is_relative_to(folder):
            return False
    return not os.path.ismount(folder) and os.access(folder.parent, os.W_OK | os.X_OK)


def is_disk_error(error: Exception) -> bool:
    """Whether the file system raised it: Paddle gives errors of a device the type OSError, too, but no
    number."""
    return isinstance(error, OSError) and error.errno is not None


def check_writable(folder: str | Path) -> None:
    """Make `folder` and a draft in it, and remove what was not there before. Raises OSError where one of them
    cannot be made."""
    folder = Path(folder)
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        with _draft(_goal(folder / "writable")) as draft:
            draft.touch()
    except OSError as error:
        error.filename = str(folder)
        raise
    finally:
        for each in new:
            with suppress(OSError):  # never made, or somebody uses it already
                each.rmdir()


def remove_dead_drafts(folder: str | Path, goal: str | None = None) -> list[Path]:
    """Remove what killed writers left in `folder` -> what was removed; writers call it before they write.

    Only names that whole_file and whole_folder give, and those that earlier versions gave: to known files,
    and to a folder that is called `goal` when it is whole. A draft of this machine is dead when its process
    is; one of another machine when nothing in it has changed for a day. Symlinks, and what cannot be removed,
    stay.
    """
    folder, removed = Path(folder), []
    for name in os.listdir(folder) if folder.is_dir() else ():
        path, found = folder / name, _named_as_draft(folder / name, goal)
        if found is None or path.is_symlink():
            continue
        parts = found.groupdict()
        with suppress(OSError):
            if _is_alive(path, parts.get("host"), int(parts["pid"])):
                continue
            name_of_goal = parts.get("aside") or parts.get("name", name)
            aside = path if "aside" in parts else path / f"{name_of_goal}.old"
            _clear(path, aside, folder / name_of_goal)
            if not path.exists():
                removed.append(path)
    return removed


def is_running(pid: int) -> bool:
    """Whether another living process of this machine has this id; the caller's own is not another."""
    if pid == os.getpid():
        return False
    try:
        with suppress(PermissionError):  # alive, of another user
            os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _goal(path: str | Path) -> Path:
    """Where a symlink leads to, in a folder that is made if it is not there."""
    goal = Path(path)
    goal = followed(goal) if goal.is_symlink() else goal
    _on_disk.difference_update(folder for folder in goal.absolute().parents if not folder.exists())
    goal.parent.mkdir(parents=True, exist_ok=True)
    return goal


@contextmanager
def _draft(goal: Path, or_goal: bool = False) -> Iterator[Path]:
    """A path, with nothing there, in a draft folder of its own, so that whatever a library writes beside it
    goes with it and its ending is the goal's. An OSError without a file's name, or with the draft's, gets the
    goal's; so does a ConfigError with the draft's.

    or_goal: within another draft of this process it is the goal itself, which is removed first: nobody reads
    it before all of that draft is synced and gets its name.
    """
    if or_goal and not _own.isdisjoint(goal.parts):
        _remove(goal)
        with ExitStack() as unless_whole:
            unless_whole.callback(_remove, goal)
            yield goal
            unless_whole.pop_all()
        return
    _check_name(goal)
    name = f".{goal.name}.tmp-{_host()}-{os.getpid()}-{secrets.token_hex(4)}"
    own = goal.with_name(name)
    _own.add(name)
    unfinished[name] = lambda: _clear(own, own / f"{goal.name}.old", goal)
    try:
        own.mkdir()
        yield own / goal.name
    except (SafetensorError, shutil.Error) as error:
        said = _SYSTEM_SAID.search(str(error))
        if said is None:
            raise
        number, path = int(said["rust"] or said["python"]), said["path"] or name
        mine = name in path or (number in _NO_ROOM and said["to"] is not None)
        raise OSError(number, os.strerror(number), str(goal) if mine else path) from error
    except ConfigError as error:
        raise ConfigError(str(error).replace(str(own / goal.name), str(goal))) from error
    except OSError as error:
        copied = error.errno in _NO_ROOM and error.filename2 is not None  # from filename, for which is room
        if error.errno is not None and (error.filename is None or name in str(error.filename) or copied):
            error.filename = str(goal)  # nobody knows the draft
            if error.filename2 is not None:
                del error.filename2  # None would be told as a file of that name
        raise
    finally:
        _clear(own, own / f"{goal.name}.old", goal)
        _own.discard(name)
        del unfinished[name]


def _check_name(goal: Path) -> None:
    """Raises OSError for a name that no file can have: with a zero byte, or half of a character."""
    try:
        named = os.fsencode(goal)
    except UnicodeEncodeError:
        named = b"\0"
    if b"\0" in named:
        raise OSError(errno.EINVAL, "no file can have such a name", str(goal))


def _keep(old: Path, new: Path) -> None:
    """Give a folder what an older one has and it has not, but for drafts, as second names of the same files
    where the file system has those."""

    def left_out(folder: str, names: list[str]) -> list[str]:
        there = set(os.listdir(new)) if Path(folder) == old else ()
        return [name for name in names if name in there or _DRAFT.fullmatch(name)]

    shutil.copytree(old, new, symlinks=True, ignore=left_out, copy_function=_name_again, dirs_exist_ok=True)


def _name_again(file: str | Path, name: str | Path) -> None:
    try:
        os.link(file, name, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_SECOND_NAME:
            raise
        shutil.copy2(file, name, follow_symlinks=False)


def _put(draft: Path, goal: Path, replace: bool) -> None:
    """Rename a folder. One that is there changes places with it or, where that is not possible, is set aside
    first, because a rename cannot replace a folder; it is put back where the second rename fails or never
    comes (_clear)."""
    aside = draft.with_name(f"{goal.name}.old")
    while True:
        if replace:
            try:
                return _exchange(draft, goal)
            except OSError as error:
                if error.errno not in (errno.ENOENT, *_NO_EXCHANGE):
                    raise
            _remove(aside)
            with suppress(FileNotFoundError):
                os.rename(goal, aside)
        try:
            return os.rename(draft, goal)
        except OSError as error:
            # another writer's folder came in between: that is the one to replace
            if not (replace and error.errno in (errno.ENOTEMPTY, errno.EEXIST)):
                raise


def _exchange(one: Path, other: Path) -> None:
    """Two names change places, in one step. Raises OSError: ENOSYS where the system has no such step, EINVAL
    where the file system has not."""
    rename = None if os.name == "nt" else getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(other))
    if rename(here, os.fsencode(one), here, os.fsencode(other), exchange) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(other))


def _clear(draft: Path, aside: Path, goal: Path) -> None:
    """Remove a draft and the folder that its writer set aside, which is put back if nothing replaced it."""
    with suppress(OSError):
        if aside.exists() and not goal.exists():
            os.rename(aside, goal)
        _remove(draft)


def _sync(path: Path) -> None:
    """Bring a file's bytes, or the names in a folder, to the disk: a rename alone does not survive a power
    cut."""
    kind = stat.S_IFMT(path.lstat().st_mode)
    if kind != stat.S_IFREG and not (kind == stat.S_IFDIR and hasattr(os, "O_DIRECTORY")):
        return  # a link, a pipe; Windows opens no folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (kind == stat.S_IFDIR and error.errno in _REFUSED_SYNC):
            raise
    finally:
        os.close(descriptor)


def _sync_name(goal: Path) -> None:
    """Bring the name of `goal` to the disk, and once in a process those of the folders above it, whoever made
    them: a file is as lost without its folder. Not of folders that this user cannot have made."""
    _sync(goal.parent)
    for folder in goal.absolute().parents:
        if folder in _on_disk or os.path.ismount(folder) or not os.access(folder.parent, os.R_OK | os.W_OK):
            break
        _sync(folder.parent)
        _on_disk.add(folder)


def _remove(path: Path) -> None:
    """A file or a folder, as far as possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _named_as_draft(path: Path, goal: str | None) -> re.Match[str] | None:
    """What the name of a draft tells of it, today's or an earlier version's; None for another name."""
    if ".tmp-" not in path.name and ".old-" not in path.name:
        return None
    forms = [*_EARLIER]
    if path.is_dir():
        forms.append(_DRAFT)
        if goal is not None:
            forms.append(re.compile(rf"\.?{re.escape(goal)}\.tmp-{_PROCESS}"))
    return next(filter(None, (form.fullmatch(path.name) for form in forms)), None)


def _is_alive(draft: Path, host: str | None, pid: int) -> bool:
    """Whether somebody may still be writing a draft. host: None where its name tells none."""
    if host is not None and host[-20:] != _host():
        changed = [path.lstat().st_mtime for path in (draft, *draft.rglob("*")) if os.path.lexists(path)]
        return bool(changed) and time.time() - max(changed) < _FORGOTTEN_SECONDS
    return draft.name in _own or is_running(pid)


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9]", "", socket.gethostname())[-20:]  # names of pods differ at their end
