"""Kills, errors of the disk and power cuts at every operation of every saver: what was reported as written is
there, bit for bit.

    python -m pytest tests/storm -s -m "slow or not slow"        all of it, with the tables of counts

In small, every saver meets every kind of fault, but not at every operation.
"""

import errno
import os
import re
import resource
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
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
    a_new_process,
    chosen,
    drafts,
    dying_at,
    in_a_child,
    killed_at,
    named,
    put,
    recorded,
    snapshot,
)
from safetensors.paddle import save_file
from savers import SAVERS, Saver, stand_ins

from ppcoat import atomic
from ppcoat.cli import merge
from ppcoat.cli.main import main
from ppcoat.errors import ConfigError
from ppcoat.lora import LoRAModule, write_lora_file

FLUX = Path(__file__).parents[1] / "fixtures" / "tiny_flux_fp32"

VERSIONS = 3  # the last replaces, and the first is pruned, where a saver does either


@dataclass
class Stage:
    """Where a saver meets its faults. known: what is read after 0, 1, ... saves in a row without a fault;
    verdicts: of what faults left, which version that is, and whether the next saves end as on a calm disk."""

    saver: Saver
    folder: Path
    known: list = field(default_factory=list)
    verdicts: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        calm = self.folder / "calm"
        calm.mkdir()
        self.known.append(self.saver.read(calm))
        for k in range(1, VERSIONS + 2):
            self.saver.save(calm, k)
            self.known.append(self.saver.read(calm))
            if k == VERSIONS - 1:
                shutil.copytree(calm, self.folder / "before", symlinks=True)
        assert drafts(calm) == [] and all(self.known.count(each) == 1 for each in self.known)
        self.names = snapshot(calm).keys()
        self.root = self.folder / "root"

    def begin(self) -> Path:
        """A folder in which all versions but the last were written, for a new process."""
        a_new_process()
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self.folder / "before", self.root, symlinks=True)
        return self.root

    def save(self, disk: Disk) -> Disk:
        with disk.watched():
            self.saver.save(disk.root, VERSIONS)
        return disk

    @property
    def operations(self) -> int:
        return self.save(recorded(self.begin())).count

    def found(self) -> tuple[int | None, bool]:
        """Which version is there, and whether the next save succeeds and leaves what it leaves on a calm
        disk. The same is judged once."""
        state = everything_in(self.root)
        if state not in self.verdicts:
            found = self.saver.read(self.root)
            k = self.known.index(found) if found in self.known else None
            self.verdicts[state] = k, k is not None and self._goes_on(k)
        return self.verdicts[state]

    def _goes_on(self, k: int) -> bool:
        for each in range(k + 1, VERSIONS + 2):
            self.saver.save(self.root, each)
        whole = self.saver.read(self.root) == self.known[-1] and drafts(self.root) == []
        return whole and snapshot(self.root).keys() == self.names


def everything_in(root: Path) -> tuple:
    """All that a save and a reader can see in a folder, however its drafts are called."""
    found = []
    for path in root.rglob("*"):
        name = re.sub(r"\.tmp-[^/]*-[0-9a-f]{8}", ".tmp-", str(path.relative_to(root)))
        found.append((name, path.lstat().st_mode, path.read_bytes() if path.is_file() else None))
    return len(atomic._own), *sorted(found, key=str)


# A fault's case: the least and the last version that may be there, whether all else was as it must be, and
# which case it was.
Case = tuple[int, int, bool, str]


def kills(stage: Stage, every: bool) -> Iterator[Case]:
    for number in chosen(stage.operations, every):
        with pytest.raises(DeadError):
            stage.save(dying_at(stage.begin(), number))
        a_new_process()
        yield VERSIONS - 1, VERSIONS, True, f"operation {number}"


def real_kills(stage: Stage, every: bool) -> Iterator[Case]:
    """DeadError stands for SIGKILL: here the kernel does it."""
    for number in chosen(stage.operations, every):
        root = stage.begin()
        status = in_a_child(partial(stage.save, killed_at(root, number)))
        yield VERSIONS - 1, VERSIONS, status == -signal.SIGKILL, f"operation {number}, status {status}"


def errors(stage: Stage, every: bool) -> Iterator[Case]:
    kinds = [(code, lasting) for code in FORBIDS for lasting in (False, True)]
    places = chosen(stage.operations, every, few=len(kinds))
    for number, (code, lasting) in product(places, kinds) if every else zip(places, kinds, strict=False):
        error, failure = None, Failure(number, code, lasting)
        try:
            stage.save(Disk(stage.begin(), failure))
        except (OSError, ConfigError) as caught:
            error = caught
        if not failure.met:
            continue
        left = drafts(stage.root)
        if failure.met & REMOVING or any(each.endswith(".old") for each in left):
            left = []  # what cannot be removed, or put back, now, the next save or reader does
        clean = error is None or isinstance(error, ConfigError) or named(error)
        least = VERSIONS if error is None else VERSIONS - 1
        told = f"operation {number}, {errno.errorcode[code]}, lasting {lasting}: {error!r}, {left}"
        yield least, VERSIONS, clean and not left, told


def cuts(stage: Stage, every: bool) -> Iterator[Case]:
    reported, root = {}, stage.begin()
    shutil.rmtree(root)
    root.mkdir()
    with recorded(root).watched() as disk:
        for k in range(1, VERSIONS + 1):
            stage.saver.save(root, k)
            reported[len(disk.trace)] = k
    model, last = PowerCut(), 0
    moments = set(chosen(len(disk.trace), every, few=5)) | set(reported)
    for number, operation in enumerate(disk.trace, 1):
        model.apply(operation)
        last = reported.get(number, last)
        for variant in PowerCut.VARIANTS if number in moments else ():
            put(root, model.left(variant))
            a_new_process()
            told = f"after {number}: {operation[:3]}, {variant}, reported {last}"
            yield last, min(last + 1, VERSIONS), True, told


FAULTS = {"kill": kills, "error": errors, "power cut": cuts, "real kill": real_kills}
REAL = ["checkpoint", "LoRA file, diffusers", "quantised copy", "config.yaml"]
SOME = [(name, fault) for name in SAVERS for fault in FAULTS if fault != "real kill" or name == "config.yaml"]
EVERY = [(name, fault) for name in SAVERS for fault in FAULTS if fault != "real kill" or name in REAL]


@pytest.fixture(autouse=True)
def python_writes(monkeypatch):
    """Nobody cuts the power of this machine, so nothing need reach its disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    stand_ins(monkeypatch)


@pytest.fixture(scope="module")
def stages(memory):
    """stages(name), the same for all faults."""
    made: dict[str, Stage] = {}

    def stage(name: str) -> Stage:
        if name not in made:
            (memory / str(len(made))).mkdir()
            made[name] = Stage(SAVERS[name], memory / str(len(made)))
        return made[name]

    return stage


def storm(stage: Stage, name: str, fault: str, every: bool) -> None:
    for least, last, right, told in FAULTS[fault](stage, every):
        k, goes_on = stage.found()
        there = k is not None and least <= k <= last
        judge(name, fault, right and there and goes_on, f"{told}; found {k}, goes on {goes_on}")


@pytest.mark.parametrize(("name", "fault"), SOME)
def test_what_was_reported_is_there_after_a_fault_at_some_operations(name, fault, stages):
    storm(stages(name), name, fault, every=False)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "fault"), EVERY)
def test_what_was_reported_is_there_after_a_fault_at_every_operation(name, fault, stages):
    storm(stages(name), name, fault, every=True)


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


@pytest.mark.parametrize("copy", [shutil.copyfile, shutil.copytree])
def test_a_copy_for_which_is_no_room_names_what_was_to_be_written(tmp_path, monkeypatch, copy):
    """The kernel copies, and Python's error names the source first."""
    monkeypatch.undo()
    source, goal = tmp_path / "model", tmp_path / "out" / "merged"
    source.mkdir()
    (source / "weights").write_bytes(bytes(9000))

    def save():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
        with pytest.raises(OSError) as caught, atomic.whole_folder(goal) as draft:
            one = copy is shutil.copyfile
            copy(source / "weights" if one else source, draft / "weights")
        assert str(caught.value) == f"[Errno {errno.EFBIG}] File too large: {str(goal)!r}"

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


@pytest.fixture
def merging(tmp_path, monkeypatch):
    """The command `merge` on the reference FLUX up to its writing -> the call that writes output_dir."""
    monkeypatch.undo()
    module = LoRAModule(np.ones([2, 64], "float32"), np.ones([64, 2], "float32"), 2.0)
    lora, taken = tmp_path / "lora.safetensors", []
    write_lora_file(lora, {"transformer_blocks.0.attn.to_q": module}, {}, "diffusers")
    with monkeypatch.context() as patch:
        patch.setattr(merge, "write_merged", lambda files, output, *rest: taken.append((files, *rest)) or 0.0)
        assert main(["merge", "--model", str(FLUX), "--lora", str(lora),
                     "--output_dir", str(tmp_path / "out")]) == 0  # fmt: skip
    (files, *rest) = taken[0]
    return lambda output: merge.write_merged(files, output, *rest)


@pytest.mark.slow
def test_a_true_merge_that_is_really_killed_is_there_whole_or_not_at_all(memory, merging):
    """Nothing stands for anything here: a FLUX pipeline, weights that Rust writes, and SIGKILL."""
    root = memory / "merge"
    root.mkdir()
    a_new_process()
    with recorded(root).watched() as disk:
        merging(root / "out")
    whole = snapshot(root)
    assert len(whole) > 10

    def killed(number):
        with killed_at(root, number).watched():
            merging(root / "out")

    for number in range(1, disk.count + 1):
        shutil.rmtree(root)
        root.mkdir()
        a_new_process()
        status = in_a_child(partial(killed, number))
        found = snapshot(root)
        right = status == -signal.SIGKILL and found in ({}, whole)
        a_new_process()
        if not found:
            merging(root / "out")
        atomic.remove_dead_drafts(root)  # as whoever writes there next does
        right = right and snapshot(root) == whole and drafts(root) == []
        judge("merge of a true FLUX pipeline", "real kill", right, f"operation {number}, status {status}")
