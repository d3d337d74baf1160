"""A studio that runs, and a browser that looks at it: Chromium without a window, driven by playwright."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

CHROMIUM = os.environ.get("PPCOAT_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
# Without a sandbox, as CI is root; nothing of the browser's own may ask for the net.
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
             "--disable-background-networking", "--disable-component-update"]  # fmt: skip
REPOSITORY = Path(__file__).parents[2]
PATIENCE = 300  # seconds, for a busy machine: what is there is seen at once
LOOP_SECONDS = 0.1  # of the loop in `slowness` on a core of 2020 that does nothing else


@pytest.fixture
def slowness():
    """slowness() -> how many times slower than such a core this machine is now, at least 1: what bounds of
    seconds are multiplied by."""

    def measured():
        began = time.perf_counter()
        sum(range(6_000_000))
        return max(1.0, (time.perf_counter() - began) / LOOP_SECONDS)

    return measured


@pytest.fixture
def start_studio(tmp_path):
    """start_studio(root, *flags) -> the address of a new studio, and its process."""
    started = []

    def start(root=tmp_path, *flags, port=None):
        pytest.importorskip("nicegui", reason="the studio is an extra: pip install ppcoat[studio]")
        if port is None:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
        command = [sys.executable, "-m", "ppcoat", "studio", "--root", str(root), "--port", str(port), *flags]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        environment.pop("PYTEST_CURRENT_TEST")  # with it NiceGUI takes itself for a test
        process = subprocess.Popen(command, env=environment, cwd=root)
        started.append(process)
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and process.poll() is None:
            try:
                urllib.request.urlopen(f"{address}/data", timeout=10).close()
                return address, process
            except urllib.error.HTTPError:  # it asks for the token
                return address, process
            except OSError:
                time.sleep(0.1)
        raise AssertionError(f"no studio at {address}")

    yield start
    for process in started:
        process.terminate()
    for process in started:
        process.wait(timeout=PATIENCE)


@pytest.fixture(scope="session")
def chromium():
    """A browser for all tests."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium here: install Debian's, or name one in PPCOAT_CHROMIUM")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium):
    """open_page(url, width=1280, **settings) -> a page of a new user. At the end it must have asked no other
    server, and its scripts must have raised nothing."""
    contexts, outside, errors = [], [], []

    def opened(url, width=1280, **settings):
        height = 844 if width < 500 else 900
        context = chromium.new_context(
            viewport={"width": width, "height": height}, **{"locale": "en-US"} | settings
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(1000 * PATIENCE)
        ours = (url.split("/")[2], "")
        page.on("request", lambda request: outside.append(request.url)
                if request.url.split("/")[0] in ("http:", "https:", "ws:", "wss:")
                and request.url.split("/")[2] not in ours else None)  # fmt: skip
        page.on("websocket", lambda socket: outside.append(socket.url)
                if socket.url.split("/")[2] not in ours else None)  # fmt: skip
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("dialog", lambda dialog: errors.append(f"dialog: {dialog.message}"))
        page.goto(url)
        page.wait_for_selector(".studio")  # it is shown once the page is connected
        return page

    yield opened
    for context in contexts:
        context.close()
    assert outside == [] and errors == []
