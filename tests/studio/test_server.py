"""The command: what it refuses before it starts, and the address that it prints."""

import socket
import subprocess
import sys

import pytest

from ppcoat.cli.main import run
from ppcoat.studio.server import StudioFlags, address


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--port", "0"], "--port: came 0, wanted a number from 1 to 65535"),
        (["--port", "70000"], "--port: came 70000"),
        (["--root", "/nowhere at all"], "--root: came /nowhere at all, wanted a folder that is there"),
        (["--max_upload_mb", "0"], "--max_upload_mb: came 0"),
        (["--host", "256.1.1.1"], "cannot listen on 256.1.1.1"),
    ],
)
def test_a_mistake_is_one_line(flags, said, capsys):
    assert run("studio", flags) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_port_that_is_taken_is_told(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert run("studio", ["--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in capsys.readouterr().err


def test_the_address_that_is_printed():
    assert address(StudioFlags(), None) == "http://127.0.0.1:7860/"
    assert address(StudioFlags(host="::1"), None) == "http://[::1]:7860/"
    assert address(StudioFlags(host="10.0.0.7", port=80), "t") == "http://10.0.0.7:80/?token=t"
    assert socket.gethostname() in address(StudioFlags(host="0.0.0.0"), "t")


def test_the_pages_are_there_without_paddle():
    """It would take seconds, and memory as long as the page is open."""
    pytest.importorskip("nicegui", reason="the studio is an extra")
    code = """
__command__ = "studio"
import sys
import ppcoat.studio.server, ppcoat.studio.data_page, ppcoat.studio.files_page, ppcoat.studio.pictures
found = {"paddle", "ppdiffusers", "paddlenlp", "matplotlib", "triton"} & set(sys.modules)
assert not found, found
"""
    subprocess.run([sys.executable, "-c", code], check=True)
