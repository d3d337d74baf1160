"""Signals: the first is noted, the second acts, handlers come back."""

import os
import signal

import pytest

from ppcoat.train.run_state import FinishStepOnSignal


def handlers():
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.fixture
def usual_ctrl_c():
    """Python's own handler, also where the tests run in the background and SIGINT is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_signal_guard_notes_the_first_signal_and_hands_back_the_handlers(usual_ctrl_c):
    before = handlers()
    with FinishStepOnSignal() as stop:
        assert handlers() != before and not stop.signal
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        assert handlers() == before
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert handlers() == before


def test_signal_guard_hands_back_the_handlers_after_an_error():
    before = handlers()
    with pytest.raises(RuntimeError, match="in a step"), FinishStepOnSignal():
        raise RuntimeError("in a step")
    assert handlers() == before


def test_where_a_launcher_repeats_the_signal_the_first_counts():
    before = handlers()
    with FinishStepOnSignal(second_acts=False) as stop:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)
            assert stop.signal == signal.SIGINT
    assert handlers() == before
