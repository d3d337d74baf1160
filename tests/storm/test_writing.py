"""Kills, errors of the disk and power cuts at every operation of every saver: what was reported as written is
there, bit for bit.

    python -m pytest tests/storm -s -m "slow or not slow"        all of it, with the table of counts

In small, every saver meets every kind of fault, but not at every operation.
"""

import errno
import os
import resource
import shutil
import signal
from itertools import product

import paddle
import pytest
from counts import judge
from disk import (
    FORBIDS,
    REMOVING,
    DeadError,
    Disk,
    Failure,
    PowerCut,
    drafts,
    dying_at,
    put,
    recorded,
    snapshot,
)
from safetensors.paddle import save_file
from savers import SAVERS, stand_ins

from ppcoat import atomic
from ppcoat.errors import ConfigError

EVERY_NAME = pytest.mark.parametrize("name", SAVERS)
VERSIONS = 3  # the last replaces, and the first is pruned, where a saver does either


@pytest.fixture(autouse=True)
def python_writes(monkeypatch):
    stand_ins(monkeypatch)


@pytest.fixture
def versions(tmp_path):
    """versions(name, last) -> what is read after 0, 1, ... last saves in a row without a fault."""

    def read(name: str, last: int = VERSIONS + 1) -> list:
        saver, root = SAVERS[name], tmp_path / "calm"
        root.mkdir()
        found = [saver.read(root)]
        for k in range(1, last + 1):
            saver.save(root, k)
            found.append(saver.read(root))
        assert drafts(root) == [] and all(found.count(each) == 1 for each in found)
        return found

    return read


@pytest.fixture
def begin(tmp_path):
    """begin(name) -> an empty folder in which all versions but the last were written."""

    def fresh(name: str):
        calm = tmp_path / "before"
        if not calm.exists():
            calm.mkdir()
            for k in range(1, VERSIONS):
                SAVERS[name].save(calm, k)
        a_new_process()
        root = tmp_path / "root"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(calm, root)
        return root

    return fresh


def a_new_process() -> None:
    """What a process knows of its own drafts and of synced folders ends with it."""
    atomic._own.clear()
    atomic._on_disk.clear()


def operations(name: str, root) -> int:
    with recorded(root).watched() as disk:
        SAVERS[name].save(root, VERSIONS)
    return disk.count


def goes_on(name: str, root, known: list, k: int) -> bool:
    """Whether the next save succeeds and leaves what it leaves on a calm disk. k: the version that is
    there."""
    for each in range(k + 1, VERSIONS + 2):
        SAVERS[name].save(root, each)
    files = snapshot(root.parent / "calm").keys()
    return SAVERS[name].read(root) == known[-1] and drafts(root) == [] and snapshot(root).keys() == files


def chosen(count: int, every: bool, few: int = 4):
    """Numbers of operations, from 1: all, or some that are spread over them with the last ones."""
    return range(1, count + 1) if every else sorted({1 + i * (count - 1) // (few - 1) for i in range(few)})


def killed_everywhere(name, begin, versions, every):
    known = versions(name)
    for number in chosen(operations(name, begin(name)), every):
        root = begin(name)
        with pytest.raises(DeadError), dying_at(root, number).watched():
            SAVERS[name].save(root, VERSIONS)
        a_new_process()
        found = SAVERS[name].read(root)
        there = [k for k in (VERSIONS - 1, VERSIONS) if found == known[k]]
        judge(name, "kill", bool(there) and goes_on(name, root, known, there[-1]), f"operation {number}")


@EVERY_NAME
def test_killed_at_some_operations(name, begin, versions):
    killed_everywhere(name, begin, versions, every=False)


@pytest.mark.slow
@EVERY_NAME
def test_killed_at_every_operation(name, begin, versions):
    killed_everywhere(name, begin, versions, every=True)


def fails_everywhere(name, begin, versions, every):
    known = versions(name)
    count = operations(name, begin(name))
    kinds = [(code, lasting) for code in FORBIDS for lasting in (False, True)]
    places = chosen(count, every, few=len(kinds))
    cases = product(places, kinds) if every else zip(places, kinds, strict=False)
    for number, (code, lasting) in cases:
        root, error, failure = begin(name), None, Failure(number, code, lasting)
        with Disk(root, failure).watched():
            try:
                SAVERS[name].save(root, VERSIONS)
            except (OSError, ConfigError) as caught:
                error = caught
        if not failure.met:
            continue
        clean = error is None or isinstance(error, ConfigError) or named(error, root)
        left = drafts(root)
        if failure.met & REMOVING or any(each.endswith(".old") for each in left):
            left = []  # what cannot be removed, or put back, now, the next save or reader does
        found = SAVERS[name].read(root)
        there = [k for k in (VERSIONS - 1, VERSIONS) if found == known[k]]
        right = clean and not left and bool(there) and (error is not None or there[-1] == VERSIONS)
        right = right and goes_on(name, root, known, there[-1])
        told = f"operation {number}, {errno.errorcode[code]}, lasting {lasting}: {error!r}, {left}, {there}"
        judge(name, "error", right, told)


def named(error: OSError, root) -> bool:
    """Whether an error says which file, and that is none that the user does not know."""
    return error.errno is not None and ".tmp-" not in str(error.filename) and error.filename is not None


@EVERY_NAME
def test_errors_of_the_disk_at_some_operations(name, begin, versions):
    fails_everywhere(name, begin, versions, every=False)


@pytest.mark.slow
@EVERY_NAME
def test_errors_of_the_disk_at_every_operation(name, begin, versions):
    fails_everywhere(name, begin, versions, every=True)


def cut_everywhere(name, tmp_path, versions, every):
    known, root, reported = versions(name), tmp_path / "root", {}
    root.mkdir()
    a_new_process()
    with recorded(root).watched() as disk:
        for k in range(1, VERSIONS + 1):
            SAVERS[name].save(root, k)
            reported[len(disk.trace)] = k
    model, seen, last = PowerCut(), set(), 0
    after = tmp_path / "after"
    moments = set(chosen(len(disk.trace), every, few=5)) | set(reported)
    for number, operation in enumerate(disk.trace, 1):
        model.apply(operation)
        last = reported.get(number, last)
        for variant in PowerCut.VARIANTS if number in moments else ():
            left = model.left(variant)
            case = (last, tuple(sorted(left.items())))
            right = True
            if case not in seen:
                seen.add(case)
                put(after, left)
                a_new_process()
                found = SAVERS[name].read(after)
                allowed = [k for k in (last, last + 1) if k <= VERSIONS]
                there = [k for k in allowed if found == known[k]]
                right = bool(there) and goes_on(name, after, known, there[-1])
            judge(name, "power cut", right, f"after {number}: {operation[:3]}, {variant}, reported {last}")


@EVERY_NAME
def test_power_cuts_at_some_operations(name, tmp_path, versions):
    cut_everywhere(name, tmp_path, versions, every=False)


@pytest.mark.slow
@EVERY_NAME
def test_power_cuts_at_every_operation(name, tmp_path, versions):
    cut_everywhere(name, tmp_path, versions, every=True)


def in_a_child(action) -> int:
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


def test_a_process_that_is_really_killed_leaves_what_the_storm_says(begin, versions):
    """DeadError stands for SIGKILL everywhere above: here the kernel does it."""
    known, count = versions("config.yaml"), operations("config.yaml", begin("config.yaml"))
    for number in range(1, count + 1):
        root = begin("config.yaml")

        def save(root=root, number=number):
            def before(seen, kind, path):
                if seen == number:
                    os.kill(os.getpid(), signal.SIGKILL)

            with Disk(root, before).watched():
                SAVERS["config.yaml"].save(root, VERSIONS)

        assert in_a_child(save) == -signal.SIGKILL
        found = SAVERS["config.yaml"].read(root)
        assert found in known[VERSIONS - 1 : VERSIONS + 1]
        assert goes_on("config.yaml", root, known, known.index(found))


def test_what_rust_cannot_write_is_an_error_of_the_disk_with_the_files_name(tmp_path, monkeypatch):
    """safetensors writes a component's weights itself, and says what the system said in words of its own."""
    monkeypatch.undo()
    goal = tmp_path / "part" / "model.safetensors"
    tensors = {"a": paddle.zeros([5000])}

    def save():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
        with pytest.raises(OSError) as caught, atomic.whole_file(goal) as draft:
            save_file(tensors, str(draft))
        assert caught.value.errno == errno.EFBIG and caught.value.filename == str(goal)

    assert in_a_child(save) == 0
    assert list(goal.parent.iterdir()) == []


def test_what_copytree_cannot_read_or_write_is_one_error_with_the_files_name(tmp_path, monkeypatch):
    source, goal = tmp_path / "model", tmp_path / "merged" / "out"
    for name in ("a", "b"):
        (source / name).mkdir(parents=True)
        (source / name / "config.json").write_text("{}")

    def copy():
        with pytest.raises(OSError) as caught, atomic.whole_folder(goal) as draft:
            shutil.copytree(source, draft, dirs_exist_ok=True)
        return caught.value.errno, caught.value.filename

    with Disk(goal.parent, Failure(4, errno.ENOSPC, lasting=True)).watched():
        assert copy() == (errno.ENOSPC, str(goal))
    unreadable = str(source / "b" / "config.json")

    def copy2(path, *_):
        if str(path) == unreadable:
            raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(shutil.copytree, "__defaults__", (False, None, copy2, False, False))
    assert copy() == (errno.EACCES, unreadable)
    assert list(goal.parent.iterdir()) == []
