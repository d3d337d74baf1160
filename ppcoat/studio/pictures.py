"""Pictures for the page: made small when the browser asks, and kept in memory.

A URL carries the path, written so that any name of a file system survives; each request is held to the roots
like every other path.
"""

from __future__ import annotations

import base64
import binascii
import os
import threading
from collections import OrderedDict
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import Response

from ppcoat.data.folder import thumbnail
from ppcoat.data.sources import BadFile
from ppcoat.errors import ConfigError
from ppcoat.studio.access import Roots

SMALL, LARGE = 320, 1280  # pixels
_AT_ONCE = 2  # decoded at a time: a photograph takes some 100 MB
_KEPT_BYTES = 128 << 20
# What is shown for a picture that cannot be decoded.
_BROKEN = b"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 80 60">\
<rect width="80" height="60" fill="#f1f5f9"/>\
<path d="M26 18h28v24H26zM26 42l28-24" fill="none" stroke="#94a3b8" stroke-width="2"/></svg>"""


def picture_url(path: Path, side: int = SMALL) -> str:
    """Where the page finds a picture, of at most `side` pixels each way (SMALL or LARGE). It changes when the
    file does."""
    try:
        version = f"?v={path.stat().st_mtime_ns:x}"
    except OSError:
        version = ""
    return f"/picture/{side}/{base64.urlsafe_b64encode(os.fsencode(path)).decode().rstrip('=')}{version}"


def add_picture_route(app: FastAPI, roots: Roots) -> None:
    """Serve what picture_url names: 200 with a picture, one that says "broken" for a file that is none, 404
    for what is not inside the roots."""
    kept, turn = _Kept(), threading.Semaphore(_AT_ONCE)
    held = {"cache-control": "private, max-age=86400"}

    @app.get("/picture/{side}/{name}")
    def picture(side: int, name: str) -> Response:  # in a thread of its own: it is no coroutine
        try:
            path = roots.inside(os.fsdecode(base64.urlsafe_b64decode(name + "=" * (-len(name) % 4))))
            key = str(path), path.stat().st_mtime_ns, side
        except (ConfigError, OSError, binascii.Error, ValueError):
            return Response(status_code=404)
        if side not in (SMALL, LARGE) or not path.is_file():
            return Response(status_code=404)
        found = kept.get(key)
        if found is None:
            try:
                with turn:
                    found = thumbnail(path, side)
            except BadFile:
                return Response(_BROKEN, media_type="image/svg+xml")
            kept.put(key, found)
        return Response(found, media_type="image/jpeg", headers=held)


class _Kept:
    """The pictures asked for last, of at most _KEPT_BYTES together."""

    def __init__(self) -> None:
        self._found: OrderedDict[tuple, bytes] = OrderedDict()
        self._bytes, self._lock = 0, threading.Lock()

    def get(self, key: tuple) -> bytes | None:
        with self._lock:
            if key in self._found:
                self._found.move_to_end(key)
            return self._found.get(key)

    def put(self, key: tuple, content: bytes) -> None:
        with self._lock:
            if key not in self._found:
                self._found[key] = content
                self._bytes += len(content)
            while self._bytes > _KEPT_BYTES:
                self._bytes -= len(self._found.popitem(last=False)[1])
