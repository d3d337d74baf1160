"""One writer: whatever happens, a goal is whole or as it was; the dead's drafts go, all else stays."""

import ast
import errno
import os
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ppcoat import atomic
from ppcoat.atomic import check_writable, is_running, remove_dead_drafts, whole_file, whole_folder, write_text

DEAD = 2**22 + 1  # beyond the largest process number of Linux
PACKAGE = Path(__file__).parents[1] / "ppcoat"
HOST = "".join(c for c in socket.gethostname() if c.isascii() and c.isalnum())[-20:]


def write_file(path, content):
    with whole_file(path) as draft:
        draft.write_text(content)


def write_folder(path, content):
    with whole_folder(path, replace=True) as draft:
        (draft / "sub").mkdir()
        (draft / "sub" / "a").write_text(content)
        (draft / "b").write_text(content)


def content_of(path):
    files = [path] if path.is_file() else [path / "sub" / "a", path / "b"]
    (content,) = {file.read_text() for file in files}
    return content


BOTH = pytest.mark.parametrize("write", [write_file, write_folder], ids=["file", "folder"])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def draft_name(goal, pid=DEAD, host=HOST):
    return f".{goal}.tmp-{host}-{pid}-{secrets.token_hex(4)}"


def draft_of(folder, goal, **told):
    """A draft folder as a writer that is gone left it."""
    draft = folder / draft_name(goal, **told)
    draft.mkdir()
    (draft / goal).write_text("half")
    return draft


@pytest.fixture
def two_renames(monkeypatch):
    """As where two names cannot change places."""

    def refused(one, other):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(atomic, "_exchange", refused)


class Disk:
    """Records the calls that decide what survives, and raises at the number-th one if it is told to."""

    def __init__(self, monkeypatch, fail_at=None, error=None):
        self.calls, self.fail_at, self.error = [], fail_at, error
        for name in ("fsync", "rename", "replace"):
            monkeypatch.setattr(os, name, self._watched(name, getattr(os, name)))
        monkeypatch.setattr(atomic, "_exchange", self._watched("exchange", atomic._exchange))

    def _watched(self, name, real):
        def call(*args):
            told = (
                [os.readlink(f"/proc/self/fd/{args[0]}")] if name == "fsync" else [os.fspath(a) for a in args]
            )
            self.calls.append((name, *(Path(path).name for path in told)))
            if len(self.calls) == self.fail_at:
                raise self.error
            return real(*args)

        return call


@BOTH
def test_a_goal_has_its_name_when_it_is_whole_and_nothing_else_is_left(tmp_path, write):
    goal = tmp_path / "new" / "goal"
    write(goal, "one")
    write(goal, "two")
    assert content_of(goal) == "two" and names(goal.parent) == ["goal"]


def test_a_draft_lies_in_a_hidden_folder_beside_its_goal_and_has_its_ending(tmp_path):
    with whole_file(tmp_path / "a.png") as draft:
        assert (
            draft.name == "a.png"
            and draft.parent.parent == tmp_path
            and draft.parent.name.startswith(".a.png")
        )
        assert not (tmp_path / "a.png").exists()
        (draft.parent / ".tmpX").write_text("what a library writes beside it")
    assert names(tmp_path) == ["a.png"]


def test_everything_is_synced_before_the_rename_and_the_name_after_it(tmp_path, monkeypatch):
    write_file(tmp_path / "first", "x")  # with the names of the folders above
    disk = Disk(monkeypatch)
    write_file(tmp_path / "f", "x")
    assert disk.calls == [("fsync", "f"), ("replace", "f", "f"), ("fsync", tmp_path.name)]
    disk.calls.clear()
    write_folder(tmp_path / "d", "x")
    synced = [("fsync", "a"), ("fsync", "sub"), ("fsync", "b"), ("fsync", "d")]
    new = [("exchange", "d", "d"), ("rename", "d", "d.old"), ("rename", "d", "d"), ("fsync", tmp_path.name)]
    assert disk.calls == [*synced, *new]
    disk.calls.clear()
    write_folder(tmp_path / "d", "y")
    assert disk.calls == [*synced, ("exchange", "d", "d"), ("fsync", tmp_path.name)]


def test_the_names_of_new_folders_are_synced_once_whoever_made_them(tmp_path, monkeypatch):
    write_file(tmp_path / "first", "x")
    (tmp_path / "a").mkdir()
    disk, above = Disk(monkeypatch), [("fsync", "a"), ("fsync", tmp_path.name)]
    write_file(tmp_path / "a" / "b" / "f", "x")
    assert disk.calls[-3:] == [("fsync", "b"), *above]
    write_file(tmp_path / "a" / "b" / "f", "y")
    assert disk.calls[-2:] == [("replace", "f", "f"), ("fsync", "b")]
    shutil.rmtree(tmp_path / "a" / "b")
    write_file(tmp_path / "a" / "b" / "f", "z")
    assert disk.calls[-2:] == [("fsync", "b"), ("fsync", "a")]


@BOTH
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_at_any_point_leaves_a_whole_goal_and_no_draft(tmp_path, monkeypatch, write, error):
    goal, seen = tmp_path / "goal", []
    for number in range(1, 20):
        write(goal, "before")
        with monkeypatch.context() as patch:
            disk, failed = Disk(patch, number, error), False
            try:
                write(goal, "after")
            except type(error):
                failed = True
        assert names(tmp_path) == ["goal"]
        seen.append(content_of(goal))
        if not failed:
            break
    # the last call syncs the folder above: the goal has its name by then
    assert len(seen) == len(disk.calls) + 1 >= 4 and seen == ["before"] * (len(seen) - 2) + ["after"] * 2


@BOTH
def test_what_fails_while_it_is_written_leaves_the_old_and_names_the_file(tmp_path, monkeypatch, write):
    goal = tmp_path / "goal"
    write(goal, "before")

    def full(self, content, *_, **__):
        with open(self, "w") as file:
            file.write(content[:1])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left.*goal") as raised:
        patch.setattr(Path, "write_text", full)
        write(goal, "after")
    assert raised.value.errno == errno.ENOSPC and raised.value.strerror == "No space left on device"
    assert content_of(goal) == "before" and names(tmp_path) == ["goal"]


def killed(action):
    """Run `action` in a fork that it kills itself; the id of the dead process."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    return child


def kill_self(*_):
    os.kill(os.getpid(), signal.SIGKILL)


@BOTH
@pytest.mark.parametrize("moment", ["write", "fsync", "rename"])
def test_a_killed_writer_leaves_the_old_and_the_next_one_removes_its_draft(tmp_path, write, moment):
    goal = tmp_path / "goal"
    write(goal, "before")

    def action():
        if moment == "write":
            Path.write_text = lambda self, content: (self.touch(), kill_self())
        for name in {"fsync": ["fsync"], "rename": ["rename", "replace"]}.get(moment, []):
            setattr(os, name, kill_self)
        if moment == "rename":
            atomic._exchange = kill_self
        write(goal, "after")

    pid = killed(action)
    (draft,) = [name for name in names(tmp_path) if name != "goal"]
    assert draft.startswith(f".goal.tmp-{HOST}-{pid}-")
    assert content_of(goal) == "before"
    write_text(tmp_path / "other", "")
    assert content_of(goal) == "before" and names(tmp_path) == ["goal", "other"]


def test_a_folder_that_was_set_aside_and_not_replaced_is_put_back(tmp_path, two_renames):
    goal = tmp_path / "goal"
    write_folder(goal, "before")

    def action():
        real = os.rename
        os.rename = lambda *args: (real(*args), kill_self())
        write_folder(goal, "after")

    killed(action)
    assert not goal.exists()
    assert len(remove_dead_drafts(tmp_path)) == 1
    assert content_of(goal) == "before" and names(tmp_path) == ["goal"]


def test_a_folder_is_put_back_even_where_that_fails_at_first(tmp_path, monkeypatch, two_renames):
    goal, real = tmp_path / "goal", os.rename
    write_folder(goal, "before")
    calls = []

    def only_once(*args):
        calls.append(args)
        if len(calls) > 1:
            raise OSError(errno.EIO, "Input/output error")
        real(*args)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output"):
        patch.setattr(os, "rename", only_once)
        write_folder(goal, "after")
    assert not goal.exists() and len(names(tmp_path)) == 1
    remove_dead_drafts(tmp_path)
    assert content_of(goal) == "before" and names(tmp_path) == ["goal"]


def test_drafts_of_the_living_stay(tmp_path):
    other = draft_of(tmp_path, "a", pid=os.getppid())
    with whole_file(tmp_path / "a") as mine:
        mine.write_text("x")
        thread = threading.Thread(target=write_text, args=(tmp_path / "a", "of a thread"))
        thread.start()
        thread.join()
        assert mine.exists() and (tmp_path / "a").read_text() == "of a thread"
    assert (tmp_path / "a").read_text() == "x" and names(tmp_path) == [other.name, "a"]


def test_a_draft_of_an_earlier_process_with_our_number_is_removed(tmp_path):
    """In a container every run may have the same process number."""
    draft = draft_of(tmp_path, "a", pid=os.getpid())
    assert remove_dead_drafts(tmp_path) == [draft]


def test_a_draft_of_another_machine_stays_for_a_day(tmp_path):
    draft, yesterday = draft_of(tmp_path, "a", host="elsewhere"), time.time() - 25 * 3600
    assert remove_dead_drafts(tmp_path) == []
    os.utime(draft, (0, yesterday))
    assert remove_dead_drafts(tmp_path) == []  # what is in it is still being written
    os.utime(draft / "a", (0, yesterday))
    assert remove_dead_drafts(tmp_path) == [draft]


EARLIER = ["000000020.tmp-{}", "latest.tmp-{}", "log.jsonl.tmp-{}", ".lora_000000001.safetensors.tmp-{}",
           ".adapter_config.json.tmp-{}", f"{'0' * 64}.tmp-{HOST}-{{}}",
           f".writable.tmp-{HOST}-{{}}"]  # fmt: skip
EARLIER_FOLDERS = [".goal.tmp-{}", "goal.tmp-{}"]


def test_drafts_of_earlier_versions_are_removed_too(tmp_path):
    for pattern in EARLIER:
        for pid in (DEAD, os.getppid()):
            (tmp_path / pattern.format(pid)).write_text("half")
    for pattern in EARLIER_FOLDERS:
        for pid in (DEAD, os.getppid()):
            (tmp_path / pattern.format(pid)).mkdir()
    write_folder(tmp_path / "goal", "x")
    stay = [pattern.format(os.getppid()) for pattern in (*EARLIER, *EARLIER_FOLDERS)]
    assert names(tmp_path) == sorted([*stay, "goal"])


def test_a_checkpoint_that_an_earlier_version_set_aside_is_put_back(tmp_path):
    for name, replaced in (("000000010", False), ("000000020", True)):
        write_folder(tmp_path / f"{name}.old-{DEAD}", "before")
        if replaced:
            write_folder(tmp_path / name, "after")
    remove_dead_drafts(tmp_path)
    assert names(tmp_path) == ["000000010", "000000020"]
    assert [content_of(tmp_path / name) for name in names(tmp_path)] == ["before", "after"]


def test_a_users_files_of_such_names_are_never_removed(tmp_path):
    mine = ["goal.tmp", "goal.tmp-1", ".goal.tmp-1", "notes.tmp-4194305", ".notes.tmp-4194305", "goal.tmp-x",
            "log.jsonl.old-20240101", "latest.old-4194305", "goal.old-4194305", "0001.tmp-4194305",
            "lora.safetensors.tmp-4194305", f"goal.tmp-{HOST}-{DEAD}-0a1b2c3d", f".goal.tmp-{HOST}-{DEAD}",
            f".goal.tmp-{HOST}-{DEAD}-0a1b2c3d", f".goal.tmp-{HOST}-{DEAD}-0a1b2c3d.bak"]  # fmt: skip
    for name in mine:
        (tmp_path / name).write_text("precious")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / draft_name("link")).symlink_to("elsewhere")
    before = names(tmp_path)
    write_folder(tmp_path / "goal", "x")
    write_file(tmp_path / "file", "x")
    check_writable(tmp_path)
    assert names(tmp_path) == sorted([*before, "goal", "file"])


def test_permissions_are_those_of_the_umask_and_of_the_file_before(tmp_path):
    def mode(path):
        return stat.S_IMODE(path.stat().st_mode)

    old = os.umask(0o027)
    try:
        for wanted in (0o640, 0o604):
            with whole_file(tmp_path / "a") as draft:
                draft.unlink()  # as safetensors does, which makes a file of its own
                draft.write_text("x")
                draft.chmod(0o600)
            assert mode(tmp_path / "a") == wanted
            (tmp_path / "a").chmod(0o604)
        write_folder(tmp_path / "d", "x")
        assert (mode(tmp_path / "d"), mode(tmp_path / "d/b")) == (0o750, 0o640)
    finally:
        os.umask(old)


@BOTH
def test_a_symlink_is_written_through(tmp_path, write):
    (tmp_path / "disk").mkdir()
    write(tmp_path / "disk" / "goal", "before")
    (tmp_path / "link").symlink_to("disk/goal")
    write(tmp_path / "link", "after")
    assert (tmp_path / "link").is_symlink() and content_of(tmp_path / "disk" / "goal") == "after"
    assert names(tmp_path / "disk") == ["goal"] and names(tmp_path) == ["disk", "link"]


def test_a_folder_is_replaced_only_where_that_is_asked_for(tmp_path):
    write_folder(tmp_path / "goal", "before")
    with pytest.raises(OSError, match="not empty"), whole_folder(tmp_path / "goal") as draft:
        (draft / "x").touch()
    assert content_of(tmp_path / "goal") == "before" and names(tmp_path) == ["goal"]
    with pytest.raises(IsADirectoryError, match="goal"), whole_file(tmp_path / "goal"):
        pytest.fail("written")
    with pytest.raises(NotADirectoryError, match="b"), whole_folder(tmp_path / "goal/b", replace=True):
        pytest.fail("written")


def test_of_two_writers_of_one_folder_each_is_whole_and_one_remains(tmp_path, two_renames):
    """The second comes between the first one's two renames."""
    goal, real = tmp_path / "goal", os.rename
    write_folder(goal, "before")

    def rename(source, target):
        real(source, target)
        if Path(target).name == "goal.old":
            os.rename = real
            write_folder(goal, "second")

    os.rename = rename
    try:
        write_folder(goal, "first")
    finally:
        os.rename = real
    assert content_of(goal) == "first" and names(tmp_path) == ["goal"]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_folder_that_is_replaced_always_has_its_name(tmp_path, moment):
    goal, exchange = tmp_path / "goal", atomic._exchange
    write_folder(goal, "before")

    def action():
        atomic._exchange = lambda *given: (moment == "after" and exchange(*given), kill_self())
        write_folder(goal, "after")

    killed(action)
    assert content_of(goal) == moment
    (draft,) = remove_dead_drafts(tmp_path)
    assert content_of(goal) == moment and names(tmp_path) == ["goal"]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM])
def test_where_names_cannot_change_places_a_folder_is_set_aside(tmp_path, monkeypatch, number):
    def refused(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(atomic, "_exchange", refused)
    write_folder(tmp_path / "goal", "before")
    write_folder(tmp_path / "goal", "after")
    assert content_of(tmp_path / "goal") == "after" and names(tmp_path) == ["goal"]


def test_a_file_systems_refusal_of_an_exchange_is_an_error_with_its_number(tmp_path):
    (tmp_path / "a").mkdir()
    for name, number in (("missing", errno.ENOENT), ("a", errno.EINVAL)):  # a folder and one in it
        (tmp_path / "a" / "b").mkdir(exist_ok=True)
        with pytest.raises(OSError) as caught:
            atomic._exchange(tmp_path / "a" / "b", tmp_path / name)
        assert caught.value.errno == number


@pytest.mark.parametrize("by_copy", [False, True])
def test_what_a_replaced_folder_has_beside_is_kept_where_that_is_asked_for(tmp_path, monkeypatch, by_copy):
    goal = tmp_path / "goal"
    write_folder(goal, "before")
    (goal / "mine" / "deep").mkdir(parents=True)
    (goal / "mine" / "deep" / "a").write_text("mine")
    (goal / "sub" / "old").write_text("of a name that is replaced")
    (goal / "link").symlink_to("b")
    goal.chmod(0o711)

    def no_second_name(*_, **__):
        raise OSError(errno.EPERM, "Operation not permitted")

    if by_copy:
        monkeypatch.setattr(os, "link", no_second_name)
    else:
        os.mkfifo(goal / "mine" / "pipe")  # nobody would ever write to it
    with whole_folder(goal, replace=True, keep=True) as draft:
        (draft / "sub").mkdir()
        (draft / "sub" / "a").write_text("after")
        (draft / "b").write_text("after")
    assert content_of(goal) == "after" and names(tmp_path) == ["goal"]
    assert names(goal) == ["b", "link", "mine", "sub"] and names(goal / "sub") == ["a"]
    assert (goal / "mine" / "deep" / "a").read_text() == "mine" and (goal / "link").is_symlink()
    assert by_copy or (goal / "mine" / "pipe").is_fifo()
    assert stat.S_IMODE(goal.stat().st_mode) == 0o711


def test_a_folder_can_be_replaced_where_its_place_is_ours(tmp_path, monkeypatch):
    assert atomic.can_be_replaced(tmp_path / "a")
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    assert not atomic.can_be_replaced("..") and not atomic.can_be_replaced(tmp_path / "a" / "b")
    assert not atomic.can_be_replaced("/proc")
    (tmp_path / "a" / "b").rmdir()
    assert atomic.can_be_replaced(tmp_path / "a")
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert not atomic.can_be_replaced(tmp_path / "c")


def test_in_a_folder_that_is_being_written_files_and_folders_need_no_drafts(tmp_path, monkeypatch):
    with whole_folder(tmp_path / "goal") as draft:
        for content in ("before", "after"):
            write_file(draft / "deep" / "a", content)
            write_folder(draft / "d", content)
            (draft / "d" / content).touch()
            with whole_folder(draft / "kept", replace=True, keep=True) as inner:
                write_file(inner / content, content)
            assert names(draft) == ["d", "deep", "kept"] and names(draft / "deep") == ["a"]
            assert names(draft / "d") == sorted(["b", content, "sub"])
        with pytest.raises(OSError, match="not empty"), whole_folder(draft / "d"):
            pass
        with pytest.raises(OSError, match="goal"), whole_file(draft / "half") as half:
            half.write_text("x")
            raise OSError(errno.ENOSPC, "No space left on device", str(half))
        assert not half.exists()
    assert content_of(tmp_path / "goal" / "d") == "after" and names(tmp_path) == ["goal"]
    assert names(tmp_path / "goal" / "kept") == ["after", "before"]


def test_what_cannot_be_removed_never_stays_in_a_folder_that_is_whole(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", refuse)
        with whole_folder(tmp_path / "goal") as draft:
            write_text(draft / "a", "x")
            write_folder(draft / "d", "x")
    assert len(names(tmp_path)) == 2 and names(tmp_path / "goal") == ["a", "d"]
    remove_dead_drafts(tmp_path)
    assert names(tmp_path) == ["goal"]


WRITE_OFTEN = """
import sys
sys.path.insert(0, sys.argv[1])
from alone import whole_folder, write_text
for _ in range(40):
    write_text(sys.argv[2] + "/f", sys.argv[3] * 1000)
    with whole_folder(sys.argv[2] + "/d", replace=True) as draft:
        (draft / "x").write_text(sys.argv[3])
"""


def test_many_processes_may_write_one_goal(tmp_path):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "alone.py").write_text(Path(atomic.__file__).read_text())  # without Paddle
    out = tmp_path / "out"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITE_OFTEN, str(tmp_path / "lib"), str(out), each])
        for each in "ab"
    ]
    seen = False
    while any(writer.poll() is None for writer in writers):
        if (out / "f").exists():
            assert (out / "f").read_text() in ("a" * 1000, "b" * 1000)
        if seen or (out / "d").exists():
            seen = True  # and never goes
            assert (out / "d").exists()
    assert [writer.returncode for writer in writers] == [0, 0]
    assert names(out) == ["d", "f"] and (out / "d" / "x").read_text() in "ab"


def test_a_folder_that_refuses_to_be_synced_is_no_failure(tmp_path, monkeypatch):
    real = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_file(tmp_path / "a", "x")
    write_folder(tmp_path / "d", "x")
    assert names(tmp_path) == ["a", "d"]


def test_another_process_runs_until_it_has_ended(monkeypatch):
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    assert is_running(child.pid)
    child.communicate()
    assert not is_running(child.pid) and not is_running(os.getpid())

    def of_another_user(*_):
        raise PermissionError

    monkeypatch.setattr(os, "kill", of_another_user)
    assert is_running(child.pid)


MAY = {
    ("bench/accuracy.py", "tempfile"): "data of a measurement, nothing of which is kept",
    ("bench/kernel_static.py", "tempfile"): "what a compiling process complains of, read once",
    ("bench/sass.py", "tempfile"): "machine code that NVIDIA's disassembler reads from a file",
    ("fp8/driver_triton.py", "tempfile"): "C code of a trial build",
    ("studio/files_page.py", "tempfile"): "an upload until it is known to be a LoRA",
    ("studio/server.py", "tempfile"): "a folder that NiceGUI asks for, and leaves empty",
}
FORBIDDEN = ("os.replace", "os.rename", "os.renames", "os.fsync", "os.link", "shutil.move")


def written_otherwise(tree):
    """What a module renames, syncs or makes temporary files with. A method `replace` of one argument is a
    path's: a string's has two."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] + [getattr(node, "module", None)]
            found += ["tempfile" for module in modules if module == "tempfile"]
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in FORBIDDEN:
            found.append(ast.unparse(node))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name, arguments = node.func.attr, len(node.args) + len(node.keywords)
            if name == "rename" or (name == "replace" and arguments == 1 and not node.keywords):
                found.append(f".{name}()")
    return found


def test_only_this_module_renames_syncs_or_makes_temporary_files():
    found = set()
    for file in sorted(PACKAGE.rglob("*.py")):
        name = file.relative_to(PACKAGE).as_posix()
        if name != "atomic.py":
            found |= {(name, what) for what in written_otherwise(ast.parse(file.read_text("utf-8")))}
    assert found == MAY.keys()


@pytest.mark.parametrize(
    "source",
    ["os.replace(a, b)", "os.rename(a, b)", "draft.rename(b)", "draft.replace(b)", "os.fsync(1)",
     "import tempfile", "from tempfile import mkdtemp"],
)  # fmt: skip
def test_the_guard_sees_what_breaks_the_rule(source):
    assert written_otherwise(ast.parse(source))
    assert not written_otherwise(ast.parse("text.replace('a', 'b')\nreplace(config, x=1)\nimport os"))


def test_trying_to_write_leaves_nothing_and_names_the_folder(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as caught:
        check_writable(tmp_path / "file" / "b")
    assert caught.value.filename == str(tmp_path / "file" / "b")


def test_errors_name_the_goal_and_not_the_draft(monkeypatch, tmp_path):
    make = Path.mkdir

    def refuse(path, *arguments, **options):
        if ".tmp-" in path.name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        make(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(PermissionError) as caught, whole_file(tmp_path / "x.json"):
        pass
    assert caught.value.filename == str(tmp_path / "x.json")


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_a_name_that_no_file_can_have_is_an_error_of_the_disk(tmp_path, name):
    with pytest.raises(OSError, match="no file can have such a name"), whole_file(tmp_path / name):
        pass
    assert not any(tmp_path.iterdir())
