"""Who may ask: of a loopback address no other site, of another address nobody without the token."""

import asyncio

import pytest

from ppcoat.studio.guard import Guard

TOKEN = "a-long-token"


def ask(guard_fields, kind="http", path="/data", query="", body=b"", **headers):
    """What the guard answers: its messages, and what reached the page behind it."""
    reached, sent = [], []

    async def page(scope, receive, send):
        message = await receive()
        while kind == "http" and message.get("more_body"):
            message = await receive()
        reached.append(message["type"])
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        sent.append(message)

    pieces = iter([body[i : i + 4] for i in range(0, len(body), 4)] or [b""])
    left = [len(list(range(0, len(body), 4))) or 1]

    async def receive():
        if kind != "http":
            return {"type": "websocket.connect"}
        left[0] -= 1
        return {"type": "http.request", "body": next(pieces), "more_body": left[0] > 0}

    named = {"host": "127.0.0.1:7860"} | {name.replace("_", "-"): value for name, value in headers.items()}
    sent_headers = [(name.encode(), value.encode()) for name, value in named.items() if value]
    scope = {"type": kind, "path": path, "query_string": query.encode(), "headers": sent_headers}
    guard = Guard(page, **{"token": None, "port": 7860, "most_bytes": 10} | guard_fields)
    asyncio.run(guard(scope, receive, send))
    return reached, sent


def answer(sent):
    return sent[0].get("status") or sent[0].get("code")


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost:8000", "LOCALHOST", "[::1]:7860"])
def test_this_machine_may_ask(kind, host):
    for origin in ("", f"http://{host.lower()}"):
        reached, _ = ask({}, kind, host=host, origin=origin)
        assert reached


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example:7860"},  # a name that was pointed here
        {"host": "127.0.0.1.evil.example"},
        {"host": "127.0.0.1:7860; script-src *"},
        {"host": ""},
        {"host": "127.0.0.1:7860", "origin": "http://evil.example"},
        {"host": "127.0.0.1:7860", "origin": "http://127.0.0.1:9999"},
        {"host": "127.0.0.1:7860", "origin": "null"},
    ],
)
def test_another_site_may_not(kind, headers):
    reached, sent = ask({}, kind, **headers)
    assert not reached and answer(sent) == (403 if kind == "http" else 1008)


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize("cookie", ["", "ppcoat_token_7860=wrong", "ppcoat_token_7861=" + TOKEN, "=;=\x7f"])
def test_without_the_token_nobody_gets_in(kind, cookie):
    reached, sent = ask({"token": TOKEN}, kind, host="10.0.0.7:7860", cookie=cookie)
    assert not reached and answer(sent) == (403 if kind == "http" else 1008)
    reached, sent = ask({"token": TOKEN}, kind, host="10.0.0.7:7860", query="token=wrong")
    assert not reached


def test_the_token_in_the_address_becomes_a_cookie():
    fields = {"token": TOKEN}
    reached, sent = ask(fields, query=f"a=1&token={TOKEN}&b=%2F", path="//evil.example/x", host="box:7860")
    headers = dict(sent[0]["headers"])
    assert not reached and sent[0]["status"] == 303
    assert headers[b"location"] == b"/evil.example/x?a=1&b=%2F"
    cookie = headers[b"set-cookie"].decode()
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
    reached, _ = ask(fields, "websocket", host="box:7860", cookie="x=y; " + cookie.split(";")[0])
    assert reached
    reached, _ = ask(fields, "websocket", host="box:7860", query=f"token={TOKEN}")
    assert not reached


def test_too_much_is_refused():
    reached, sent = ask({}, body=b"x" * 8, content_length="11")
    assert not reached and answer(sent) == 413
    reached, _ = ask({}, body=b"x" * 12)  # without a length: it is cut
    assert reached == ["http.disconnect"]
    assert ask({}, body=b"x" * 10, content_length="10")[0] == ["http.request"]


def test_the_browser_is_held_to_this_server():
    _, sent = ask({})
    policy = dict(sent[0]["headers"])[b"content-security-policy"].decode()
    assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy
    assert "connect-src 'self' ws://127.0.0.1:7860" in policy and "https:" not in policy and "*" not in policy
