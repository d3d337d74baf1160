"""For commands that run jobs at the same time."""

import pytest


@pytest.fixture
def one_process(monkeypatch):
    """one_process(module): the module's jobs run one after the other in this process, as on one core, so that
    what a test put in place of something is seen by them."""

    def patch(module):
        monkeypatch.setattr(module, "run_parallel", lambda jobs, *_: [job() for job in jobs])

    return patch
