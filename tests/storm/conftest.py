"""The storm's own modules by name, and the tables of what was tried."""

import os
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the tests here import the modules beside them by name

import counts


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """A test in which `judge` was told of something wrong fails when all its cases were tried."""
    counts.WRONG.clear()
    result = yield
    if counts.WRONG:
        pytest.fail(f"{len(counts.WRONG)} wrong\n" + "\n".join(counts.WRONG[:20]), pytrace=False)
    return result


def pytest_terminal_summary(terminalreporter, config):
    if counts.COUNTS and config.getoption("capture") == "no":
        terminalreporter.write_line("\n" + counts.tables())


@pytest.fixture(scope="module")
def memory():
    """An empty folder; in memory, where a removal takes no time, if there is such a disk."""
    disk = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="storm-", dir=disk) as folder:
        yield Path(folder)
