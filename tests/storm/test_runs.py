"""A true training on a disk that fails, dies or loses its power: the same command goes on, and ends bit for
bit as a run that nothing hit."""

import errno
import os
import signal
from functools import partial
from itertools import cycle
from types import SimpleNamespace

import pytest
from counts import judge
from disk import (
    Disk,
    Failure,
    PowerCut,
    a_new_process,
    chosen,
    drafts,
    in_a_child,
    killed_at,
    named,
    put,
    recorded,
    snapshot,
)
from safetensors.numpy import load_file
from savers import read_run

from ppcoat.config.load import load_config
from ppcoat.errors import ConfigError
from ppcoat.train import trainer
from ppcoat.train.checkpoint import load_latest
from ppcoat.train.run import train_lora

ERRORS = [
    (errno.ENOSPC, True),
    (errno.EIO, False),
    (errno.EROFS, True),
    (errno.ENOSPC, False),
    (errno.EACCES, True),
]
LOGS = ("log.jsonl", ".lock")


@pytest.fixture
def run(tmp_path, memory, monkeypatch, encoders_read_once, write_run, drawings):
    """train() is the run, in `root`; trace: of its operations; reported: {length of the trace: step} of the
    checkpoints that it said it had saved; outcome() what it left."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    drawings(tmp_path / "data", 4)
    sample = {"sample_every": 3, "sample_steps": 1, "prompts": ["a hat"], "width": 32, "height": 32}
    train = {"steps": 4, "batch_size": 2, "lr": 1e-2}
    sections = {"train": train, "save": {"save_every": 2}, "sample": sample}
    file = write_run(tmp_path, tmp_path / "data", coat={"optimizer": {"block_size": 16}}, **sections)
    root = memory / "disk"
    config = load_config(file, [f"output_dir={root / 'out'}", "datasets.0.cache_latents_to_disk=true"])

    def train():
        a_new_process()
        train_lora(config)

    def outcome():
        lora = load_file(config.run_dir / "run.safetensors")
        return {name: value.tobytes() for name, value in lora.items()}, read_run(root)

    put(root, {})
    reported, save_run = {}, trainer.save_run

    def saved(state, config):
        save_run(state, config)
        reported[len(disk.trace)] = state.step

    with monkeypatch.context() as patch, recorded(root).watched() as disk:
        patch.setattr(trainer, "save_run", saved)
        train()
    facts = SimpleNamespace(root=root, folder=config.run_dir, train=train, outcome=outcome, calm=outcome())
    return SimpleNamespace(**vars(facts), trace=disk.trace, reported=reported, count=disk.count)


def goes_on(run) -> bool:
    run.train()
    return run.outcome() == run.calm and not drafts(run.root)


def test_what_a_run_reported_is_there_when_the_power_goes_at_its_end(run):
    model, there = PowerCut(), snapshot(run.root)
    for operation in run.trace:
        model.apply(operation)
    for variant in PowerCut.VARIANTS:
        left = {name: data for name, data in model.left(variant).items() if data is not None}
        lost = [name for name, data in there.items() if left.get(name) != data and not name.endswith(LOGS)]
        judge("a FLUX run", "power cut", not lost, f"at the end, {variant}: {lost}")


@pytest.mark.slow
def test_a_run_that_is_really_killed(run):
    def killed(number):
        with killed_at(run.root, number).watched():
            run.train()

    for number in chosen(run.count, every=False, few=32):
        put(run.root, {})
        status = in_a_child(partial(killed, number))
        judge("a FLUX run", "real kill", status == -signal.SIGKILL and goes_on(run), f"operation {number}")


@pytest.mark.slow
def test_a_run_on_a_disk_that_fails(run):
    for number, (code, lasting) in zip(chosen(run.count, every=False, few=40), cycle(ERRORS), strict=False):
        put(run.root, {})
        error, failure = None, Failure(number, code, lasting)
        try:
            with Disk(run.root, failure).watched():
                run.train()
        except (OSError, ConfigError) as caught:
            error = caught
        clean = error is None or isinstance(error, ConfigError) or named(error)
        told = f"operation {number}, {errno.errorcode[code]}, lasting {lasting}: {error!r}"
        judge("a FLUX run", "error", clean and (error or run.outcome() == run.calm) and goes_on(run), told)


@pytest.mark.slow
def test_a_run_after_a_power_cut(run):
    model, last = PowerCut(), 0
    moments = set(chosen(len(run.trace), every=False, few=16)) | set(run.reported)
    for number, operation in enumerate(run.trace, 1):
        model.apply(operation)
        last = run.reported.get(number, last)
        for variant in PowerCut.VARIANTS if number in moments else ():
            put(run.root, model.left(variant))
            found = load_latest(run.folder)
            right = last == 0 or (found is not None and found.step >= last)
            judge(
                "a FLUX run", "power cut", right and goes_on(run), f"after {number}, {variant}, step {last}"
            )
