"""The tables of what was tried."""

from contextlib import contextmanager

import counts
import pytest


@contextmanager
def others():
    """The counts of this run stay as they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counts, "COUNTS", {})
        patch.setattr(counts, "WRONG", [])
        yield


def test_rows_that_share_a_column_share_a_table():
    with others():
        for row, column, right in [
            ("LoRA file", "kill", True), ("config", "input", True), ("LoRA file", "power cut", False),
            ("merge", "kill", True), ("merge", "kill", True),
        ]:  # fmt: skip
            counts.judge(row, column, right, "after 7")
        assert counts.WRONG == ["LoRA file, power cut: after 7"]
        lines = counts.tables().splitlines()
    assert lines == [
        "| what was tried | input |",
        "|---|---|",
        "| config | 1 / 1 / 0 |",
        "| all | 1 / 1 / 0 |",
        "",
        "| what was tried | kill | power cut |",
        "|---|---|---|",
        "| LoRA file | 1 / 1 / 0 | 1 / 0 / 1 |",
        "| merge | 2 / 2 / 0 |  |",
        "| all | 3 / 3 / 0 | 1 / 0 / 1 |",
    ]


def test_what_was_wrong_fails_its_test_after_the_last_case(pytestconfig):
    plugins = pytestconfig.pluginmanager.get_plugins()
    with others():
        call = next(each for each in plugins if hasattr(each, "counts")).pytest_runtest_call(item=None)
        next(call)
        counts.judge("LoRA file", "kill", False, "operation 7")
        with pytest.raises(pytest.fail.Exception, match="1 wrong\nLoRA file, kill: operation 7"):
            call.send(None)
