"""For commands that start processes, and that run jobs at the same time."""

import multiprocessing
import os
import signal
import sys
from types import SimpleNamespace

import pytest

from ppcoat import device


@pytest.fixture
def one_process(monkeypatch):
    """one_process(module): the module's jobs run one after the other in this process, as on one core, so that
    what a test put in place of something is seen by them."""

    def patch(module):
        monkeypatch.setattr(module, "run_parallel", lambda jobs, *_: [job() for job in jobs])

    return patch


@pytest.fixture(scope="session")
def fork_children():
    """fork_children(monkeypatch): processes of a command are forks, which need not import Paddle anew. That
    it starts them with a new Python is tested in test_parallel_jobs.py."""

    def patch(monkeypatch):
        context, works = multiprocessing.get_context("fork"), []

        def play(pipe, _):
            signal.pthread_sigmask(signal.SIG_SETMASK, ())  # as child_main
            # of the process, not pytest's
            sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))
            function, arguments = works[-1]
            function(pipe, *arguments)

        monkeypatch.setattr(device.multiprocessing, "get_context", lambda _: context)
        pickler = SimpleNamespace(dumps=lambda work: works.append(work) or b"")
        monkeypatch.setattr(device, "ForkingPickler", pickler)
        monkeypatch.setattr(device, "child_main", play)

    return patch


@pytest.fixture
def forked(monkeypatch, fork_children):
    """In one test."""
    fork_children(monkeypatch)
