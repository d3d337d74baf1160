"""A disk that fails on purpose: what stands between Python and the file system while a saver runs.

Every create, write, fsync, rename, exchange, link, removal, mkdir and chmod below one folder is counted, and
can be the last that happens (`dying_at`, `killed_at`), fail (`Failure`), or be written down, from which
`PowerCut` builds the disk that a power cut at any moment may leave. Files that C or Rust code writes are not
seen: savers.py has stand-ins for those.
"""

import builtins
import errno
import io
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ppcoat import atomic

WRITING = {"create", "write", "fsync", "rename", "exchange", "link", "mkdir", "chmod"}
REMOVING = {"unlink", "rmdir"}
# What an error of the disk forbids. A full disk can still be cleared; a folder without permission cannot.
FORBIDS = {
    errno.ENOSPC: WRITING - {"chmod"},
    errno.EIO: WRITING,
    errno.EROFS: WRITING | REMOVING,
    errno.EACCES: {"create", "rename", "exchange", "link", "mkdir", "chmod"} | REMOVING,
}


class DeadError(BaseException):
    """The process is gone: from the number-th operation on, none happens."""


class _File(io.FileIO):
    """A file open for writing whose every write is told to the disk."""

    def __init__(self, disk: "Disk", path: Path, mode: str) -> None:
        self._disk, self._path = disk, path
        super().__init__(path, mode)

    def write(self, data) -> int:
        data = bytes(data)
        start = os.fstat(self.fileno()).st_size if "a" in self.mode else self.tell()

        def half() -> None:
            super(_File, self).write(data[: len(data) // 2])

        with self._disk.operation("write", self._path, start, data, partly=half):
            done = 0
            while done < len(data):
                done += super().write(data[done:])
        return len(data)


@dataclass
class Disk:
    """Counts what happens below `root`. before: called with number, kind and path of each operation
    before it happens; what it raises is what the saver meets, a write then being half done."""

    root: Path
    before: Callable[[int, str, Path], None] = lambda number, kind, path: None
    count: int = 0
    trace: list[tuple] = field(default_factory=list)

    @contextmanager
    def operation(self, kind: str, path: Path, *told, partly=lambda: None) -> Iterator[None]:
        self.count += 1
        try:
            self.before(self.count, kind, path)
        except BaseException:
            partly()
            raise
        yield
        self.trace.append((kind, path.relative_to(self.root), *told))

    def mine(self, path, dir_fd=None) -> Path | None:
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        path = Path(os.fspath(path) if not isinstance(path, bytes) else os.fsdecode(path))
        if dir_fd is not None and not path.is_absolute():
            path = Path(os.readlink(f"/proc/self/fd/{dir_fd}")) / path
        path = Path(os.path.abspath(path))
        return path if path.is_relative_to(self.root) else None

    @contextmanager
    def watched(self) -> Iterator["Disk"]:
        """Context manager: the operations of this process below `root` go through here."""
        with pytest.MonkeyPatch.context() as patch:
            for name in ("mkdir", "unlink", "remove", "rmdir", "chmod", "fsync", "rename", "replace", "link"):
                patch.setattr(os, name, self._patched(name, getattr(os, name)))
            patch.setattr(atomic, "_exchange", self._patched("exchange", atomic._exchange))
            patch.setattr(os, "open", self._patched_os_open(os.open))
            patch.setattr(io, "open", self._patched_open(io.open))
            patch.setattr(builtins, "open", io.open)
            patch.setattr(shutil, "_USE_CP_SENDFILE", False)
            yield self

    def _patched(self, name: str, real: Callable) -> Callable:
        kind = {"remove": "unlink", "replace": "rename"}.get(name, name)

        def call(path, *args, dir_fd=None, **kwargs):
            if dir_fd is not None:
                kwargs["dir_fd"] = dir_fd
            own = self.mine(path, dir_fd)
            if own is None:
                return real(path, *args, **kwargs)
            told = ()
            if kind in ("rename", "exchange", "link"):
                told = (self.mine(args[0]).relative_to(self.root),)
            if kind in ("rename", "unlink", "rmdir") and not os.path.lexists(own):
                return real(path, *args, **kwargs)  # it fails, and changes nothing
            if kind == "exchange" and not os.path.lexists(args[0]):
                return real(path, *args, **kwargs)
            if kind == "mkdir" and os.path.lexists(own):
                return real(path, *args, **kwargs)
            with self.operation(kind, own, *told):
                # nobody cuts the power of this machine, so nothing need reach its disk
                return None if kind == "fsync" else real(path, *args, **kwargs)

        return call

    def _patched_os_open(self, real: Callable) -> Callable:
        def call(path, flags, *args, **kwargs):
            own = self.mine(path, kwargs.get("dir_fd")) if flags & os.O_CREAT else None
            if own is None:
                return real(path, flags, *args, **kwargs)
            with self.operation("create", own, bool(flags & os.O_TRUNC)):
                return real(path, flags, *args, **kwargs)

        return call

    def _patched_open(self, real: Callable) -> Callable:
        def call(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, *args, **kwargs):
            own = None if isinstance(file, int) or not set(mode) & set("wax+") else self.mine(file)
            if own is None:
                return real(file, mode, buffering, encoding, errors, newline, *args, **kwargs)
            with self.operation("create", own, "w" in mode):
                raw = _File(self, own, mode.replace("b", "").replace("t", ""))
            if "b" in mode and buffering == 0:
                return raw
            stream = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            if "b" in mode:
                return stream
            return io.TextIOWrapper(
                stream, encoding or "utf-8", errors, newline, line_buffering=buffering == 1
            )

        return call


def recorded(root: Path) -> Disk:
    """A disk that only writes down."""
    return Disk(root)


def dying_at(root: Path, number: int) -> Disk:
    """The process dies before the number-th operation, in the middle of it where it is a write."""

    def before(count: int, kind: str, path: Path) -> None:
        if count >= number:
            raise DeadError

    return Disk(root, before)


def killed_at(root: Path, number: int) -> Disk:
    """The same, by the kernel."""

    class Killed(Disk):
        def operation(self, kind: str, path: Path, *told, partly=lambda: None):
            if self.count + 1 == number:
                partly()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().operation(kind, path, *told, partly=partly)

    return Killed(root)


@dataclass
class Failure:
    """What `before` of a disk is that gives an errno at the number-th operation, if that can fail so, and at
    all later ones if it is `lasting`. met: kinds of the operations that failed."""

    number: int
    code: int
    lasting: bool
    met: set[str] = field(default_factory=set)

    def __call__(self, count: int, kind: str, path: Path) -> None:
        due = count >= self.number if self.lasting else count == self.number
        if due and kind in FORBIDS[self.code]:
            self.met.add(kind)
            # as the system does: an open file has no name
            name = () if kind in ("write", "fsync") else (str(path),)
            raise OSError(self.code, os.strerror(self.code), *name)


class _Node:
    """A file or a folder of PowerCut: what it holds, and what of that is on the disk for certain."""

    def __init__(self, is_folder: bool) -> None:
        self.now, self.synced = ({}, {}) if is_folder else (b"", b"")

    @property
    def is_folder(self) -> bool:
        return isinstance(self.now, dict)

    def sync(self) -> None:
        self.synced = dict(self.now) if self.is_folder else self.now


class PowerCut:
    """A disk that is built from a trace, operation by operation.

    On it for certain are a file's bytes once the file was synced, and the names in a folder once the folder
    was synced. Of the rest anything may be there; tried are nothing ("dropped"), and all names with none of
    the bytes ("names", as after a journal of names only).
    """

    VARIANTS = ("dropped", "names")

    def __init__(self) -> None:
        self._root = _Node(is_folder=True)

    def apply(self, operation: tuple) -> None:
        kind, path, *told = operation
        folder, name = self._at(path.parent) if path.parts else None, path.name
        if kind in ("mkdir", "create"):
            if name not in folder.now:
                folder.now[name] = _Node(kind == "mkdir")
            if kind == "create" and told[0]:
                folder.now[name].now = b""
        elif kind == "write":
            start, data = told
            node = folder.now[name]
            node.now = node.now[:start].ljust(start, b"\0") + data + node.now[start + len(data) :]
        elif kind == "fsync":
            self._at(path).sync()
        elif kind == "rename":
            self._at(told[0].parent).now[told[0].name] = folder.now.pop(name)
        elif kind == "link":
            self._at(told[0].parent).now[told[0].name] = folder.now[name]
        elif kind == "exchange":
            other, its_name = self._at(told[0].parent), told[0].name
            folder.now[name], other.now[its_name] = other.now[its_name], folder.now[name]
        elif kind in REMOVING:
            del folder.now[name]

    def _at(self, path: Path) -> _Node:
        node = self._root
        for part in path.parts:
            node = node.now[part]
        return node

    def left(self, variant: str) -> dict[str, bytes | None]:
        """{path: bytes, None for a folder} as a cut at this moment leaves the disk."""
        found: dict[str, bytes | None] = {}

        def walk(node: _Node, path: str) -> None:
            for name, child in (node.now if variant == "names" else node.synced).items():
                found[f"{path}{name}"] = None if child.is_folder else child.synced
                if child.is_folder:
                    walk(child, f"{path}{name}/")

        walk(self._root, "")
        return found


def put(root: Path, content: dict[str, bytes | None]) -> None:
    """Make the files and folders of `left` in `root`, which is emptied."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    for path, data in content.items():
        if data is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(data)


def is_draft(path: Path) -> bool:
    return any(".tmp-" in part or ".old-" in part for part in path.parts)


def snapshot(root: Path) -> dict[str, bytes]:
    """{path: bytes} of all files that are no drafts."""
    files = ((path.relative_to(root), path) for path in sorted(root.rglob("*")) if path.is_file())
    return {str(name): path.read_bytes() for name, path in files if not is_draft(name)}


def drafts(root: Path) -> list[str]:
    """What should have been cleaned."""
    return [str(path) for path in root.rglob("*") if is_draft(path.relative_to(root))]


def a_new_process() -> None:
    """What a process knows of its own drafts and of synced folders ends with it."""
    atomic._own.clear()
    atomic._on_disk.clear()


def chosen(count: int, every: bool, few: int = 4):
    """Numbers of operations, from 1: all, or some that are spread over them with the last ones."""
    return range(1, count + 1) if every else sorted({1 + i * (count - 1) // (few - 1) for i in range(few)})


def in_a_child(action: Callable[[], object]) -> int:
    """The status of a fork that runs `action`; 0 where it returns, 1 where it raises."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def named(error: OSError) -> bool:
    """Whether an error says which file, and that is none that the user does not know."""
    return error.errno is not None and ".tmp-" not in str(error.filename) and error.filename is not None
