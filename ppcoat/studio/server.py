"""The command `studio`: starts the web page and prints its address.

    python -m ppcoat studio [--root pictures --root output] [--port 7860] [--language zh]

It listens on this machine alone; with --host on others, too, and then only to who has the token in the
address that is printed. NiceGUI brings fonts and scripts along; the browser is told to ask no other server.
"""

from __future__ import annotations

import argparse
import os
import secrets
import socket
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ppcoat.config.flags import add_flags, flag, from_flags
from ppcoat.errors import ConfigError
from ppcoat.studio.access import Roots
from ppcoat.studio.guard import LOOPBACK, Guard
from ppcoat.studio.words import COOKIE, LANGUAGES

if TYPE_CHECKING:
    from ppcoat.studio.frame import Studio

_RECONNECT_SECONDS = 30.0  # a laptop that slept keeps its page
STATE = ".ppcoat_studio"  # in the first root: what the studio keeps for its next start
_YEAR = 365 * 24 * 3600


@dataclass(frozen=True)
class StudioFlags:
    """Settings of the command."""

    port: int = flag("of the address", 7860)
    host: str = flag("address to listen on; on any but this machine's own a token is asked for", LOOPBACK[0])
    root: list[str] = flag("folder that the page may read and write; may be repeated (default: the current "
                           "folder)", ["."], repeated=True, shows_default=False)  # fmt: skip
    language: Literal["en", "zh"] | None = flag("of the page, until another is chosen in it "
                                                "(default: the browser's)", None)  # fmt: skip
    max_upload_mb: int = flag("largest file that the page may send, in MiB", 4096)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, StudioFlags)


def run_command(arguments: argparse.Namespace) -> None:
    """Serve until Ctrl+C. Raises ConfigError for wrong flags, a port that is taken, and without NiceGUI."""
    flags = from_flags(StudioFlags, arguments)
    roots = Roots(flags.root[1:] or flags.root)  # argparse adds to the default
    _check_address(flags)
    token = None if flags.host in LOOPBACK else secrets.token_urlsafe(24)
    # NiceGUI makes its folder when it is imported; nothing of ours is kept there.
    os.environ.setdefault("NICEGUI_STORAGE_PATH", os.path.join(tempfile.gettempdir(), "ppcoat-studio"))
    try:
        from nicegui import app, ui
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.msg}: the studio needs NiceGUI; pip install 'ppcoat[studio]'") from None

    from ppcoat.studio.frame import Studio

    studio = Studio(roots, flags.language, flags.max_upload_mb << 20)
    add_pages(studio)
    app.add_middleware(Guard, token=token, port=flags.port, most_bytes=studio.most_bytes)
    print(f"studio: {address(flags, token)}   (Ctrl+C ends it)", flush=True)
    ui.run(
        host=flags.host,
        port=flags.port,
        title="ppcoat",
        favicon="🎨",
        show=False,
        reload=False,
        show_welcome_message=False,
        reconnect_timeout=_RECONNECT_SECONDS,
    )


def add_pages(studio: Studio) -> None:
    """Register every page and route with NiceGUI."""
    from fastapi.responses import RedirectResponse
    from nicegui import app

    from ppcoat.studio.data_page import data_page
    from ppcoat.studio.draw_page import draw_page
    from ppcoat.studio.files_page import files_page
    from ppcoat.studio.pictures import add_picture_route
    from ppcoat.studio.runs import Queue
    from ppcoat.studio.train_page import train_page

    add_picture_route(app, studio.roots)
    data_page(studio)
    files_page(studio)
    queue = Queue(studio.roots.folders[0] / STATE)
    train_page(studio, queue)
    draw_page(studio, queue)

    @app.get("/")
    def start() -> RedirectResponse:
        return RedirectResponse("/data")

    @app.get("/language/{code}")
    def choose_language(code: str, back: str = "/") -> RedirectResponse:
        """Keep the language in a cookie and go back to a page of ours."""
        ours = back.startswith("/") and not back.startswith(("//", "/\\"))
        answer = RedirectResponse(back if ours else "/", status_code=303)
        if code in LANGUAGES:
            answer.set_cookie(COOKIE, code, max_age=_YEAR, samesite="strict", httponly=True)
        return answer


def address(flags: StudioFlags, token: str | None) -> str:
    """The URL to open; on all addresses of a machine that of its name."""
    host = socket.gethostname() if flags.host in ("0.0.0.0", "::") else flags.host
    host = f"[{host}]" if ":" in host else host
    return f"http://{host}:{flags.port}/" + (f"?token={token}" if token else "")


def _check_address(flags: StudioFlags) -> None:
    """Whether somebody can listen there."""
    if not 0 < flags.port < 65536:
        raise ConfigError(f"--port: came {flags.port}, wanted a number from 1 to 65535")
    if flags.max_upload_mb < 1:
        raise ConfigError(f"--max_upload_mb: came {flags.max_upload_mb}, wanted at least 1")
    try:
        family, kind, *_, where = socket.getaddrinfo(flags.host, flags.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {flags.host} port {flags.port} ({error.strerror}); choose another --port or "
            "--host"
        ) from None
