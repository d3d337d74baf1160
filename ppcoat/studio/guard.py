"""What stands before every request, of pages and of websockets: who may ask, how much may be sent, and what
the browser may load.

On a loopback address a page of another site could reach the server through a name that it points there (DNS
rebinding), or open a websocket, which browsers allow across sites: the Host must be a loopback name and the
Origin, where one is sent, the same host. On any other address a token is asked for, once in the URL, then as
a cookie. The content policy keeps the browser from any other server.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Awaitable, Callable
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_HOST = re.compile(r"(?P<name>\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]+)(:[0-9]{1,5})?")
_COOKIE_DAYS = 30
Scope = dict[str, Any]
Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Guard:
    """An ASGI middleware. token: None on a loopback address. most_bytes: of what one request may send."""

    def __init__(self, app: Callable, token: str | None, port: int, most_bytes: int) -> None:
        self.app, self.token, self.most_bytes = app, token, most_bytes
        self.cookie = f"ppcoat_token_{port}"  # cookies of all ports of a host are one set

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it: 403 for a stranger, 413 for too much, 303 with the cookie for a
        URL with the token."""
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host", "")
        refusal = self._stranger(host, headers.get(b"origin"))
        if refusal:
            return await _answer(scope, send, 403, refusal)
        if self.token is not None and not self._knows_token(headers.get(b"cookie", "")):
            return await self._ask_token(scope, send)
        length = headers.get(b"content-length", "0")
        if length.isdigit() and int(length) > self.most_bytes:
            return await _answer(scope, send, 413, f"more than {self.most_bytes >> 20} MiB")
        await self.app(scope, self._counted(receive), _with_policy(send, host))

    def _stranger(self, host: str, origin: str | None) -> str | None:
        """Why a Host or Origin is refused; None: it is not."""
        found = _HOST.fullmatch(host)
        if not found:
            return "the request names no host"
        if self.token is None and found["name"].strip("[]").lower() not in LOOPBACK:
            return "this host name is not served: open the page as 127.0.0.1 or localhost"
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return "a page of another site asks"
        return None

    def _knows_token(self, cookies: str) -> bool:
        try:
            found = SimpleCookie(cookies).get(self.cookie)
        except CookieError:
            return False
        return found is not None and self._is_token(found.value)

    def _is_token(self, text: str) -> bool:
        return hmac.compare_digest(text.encode("utf-8", "replace"), self.token.encode())

    async def _ask_token(self, scope: Scope, send: Send) -> None:
        """The cookie for who brings the token in the URL, which goes from there; 403 for others."""
        query = parse_qsl(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True)
        brought = any(key == "token" and self._is_token(value) for key, value in query)
        if scope["type"] != "http" or not brought:
            return await _answer(scope, send, 403, "open the address with ?token= that the studio printed")
        rest = urlencode([(key, value) for key, value in query if key != "token"])
        path = "/" + scope["path"].lstrip("/")  # //host would lead to another one
        age = _COOKIE_DAYS * 24 * 3600
        cookie = f"{self.cookie}={self.token}; Path=/; HttpOnly; SameSite=Strict; Max-Age={age}"
        headers = [
            (b"location", (path + ("?" + rest if rest else "")).encode("ascii", "ignore")),
            (b"set-cookie", cookie.encode()),
        ]
        await _answer(scope, send, 303, "", headers)

    def _counted(self, receive: Receive) -> Receive:
        """A body without a length is cut where it grows too long: the server sees the sender gone."""
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                if seen > self.most_bytes:
                    return {"type": "http.disconnect"}
            return message

        return counted


def _with_policy(send: Send, host: str) -> Send:
    """Answers get the headers that keep the browser with this server. Vue compiles in the page, so 'unsafe-
    eval' has to be; names and captions get there as text only."""
    policy = (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' "
        "'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
        f"connect-src 'self' ws://{host} wss://{host}; object-src 'none'; base-uri 'none'; "
        "form-action 'self'; frame-ancestors 'none'"
    )
    added = [
        (b"content-security-policy", policy.encode("latin-1")),
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
    ]

    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = message | {"headers": [*message.get("headers", ()), *added]}
        await send(message)

    return sent


async def _answer(
    scope: Scope, send: Send, status: int, text: str, headers: list[tuple[bytes, bytes]] | None = None
) -> None:
    """A short answer in plain text; a websocket is closed instead."""
    if scope["type"] == "websocket":
        return await send({"type": "websocket.close", "code": 1008})
    start = [(b"content-type", b"text/plain; charset=utf-8"), *(headers or ())]
    await send({"type": "http.response.start", "status": status, "headers": start})
    await send({"type": "http.response.body", "body": text.encode()})
