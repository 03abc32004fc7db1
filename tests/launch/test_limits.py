# SPDX-License-Identifier: Apache-2.0
"""Which HTTP requests reach the web page."""

import asyncio
import json
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from launch.web import limits
from launch.web.limits import RequestLimits

UPLOAD = "/gradio_api/upload"
JOIN = "/gradio_api/queue/join"


def request(path: str = JOIN, sent: bytes = b"", **headers: str) -> Message:
    named = {"content_length": str(len(sent))} | headers
    pairs = [
        (name.replace("_", "-").encode(), value.encode())
        for name, value in named.items()
        if value
    ]
    return {"type": "http", "path": path, "headers": pairs}


def answer(scope: Message, sent: bytes = b"") -> tuple[int, bytes]:
    """Status and body that a client gets from a page which sends everything back.

    The body travels in pieces of seven bytes.
    """
    pieces = [sent[i : i + 7] for i in range(0, len(sent), 7)] or [b""]
    left = [
        {"type": "http.request", "body": piece, "more_body": i + 1 < len(pieces)}
        for i, piece in enumerate(pieces)
    ]
    answers: list[Message] = []

    async def receive() -> Message:
        return left.pop(0) if left else {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        answers.append(message)

    async def echo(scope: Scope, receive: Receive, send: Send) -> None:
        parts = []
        while (message := await receive())["type"] == "http.request":
            parts.append(message["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"".join(parts)})

    asyncio.run(RequestLimits(echo)(scope, receive, send))
    return answers[0]["status"], answers[1]["body"]


@pytest.mark.parametrize(
    ("path", "sent"),
    [
        ("/", b""),
        (JOIN, json.dumps({"data": ["a red circle", 7, None]}).encode()),
        (JOIN, json.dumps({"data": [{"path": "/uploads/gradio/first.png"}]}).encode()),
        (JOIN, json.dumps({"data": ["see https://example.org"]}).encode()),
        ("/gradio_api/file=/uploads/gradio/first.png", b""),
    ],
)
def test_what_the_page_sends_passes_unchanged(path: str, sent: bytes):
    assert answer(request(path, sent), sent) == (200, sent)


def test_a_file_passes_without_being_read_as_json():
    kind = "multipart/form-data; boundary=x"
    assert answer(request(UPLOAD, b"\x89PNG", content_type=kind), b"\x89PNG")[0] == 200


@pytest.mark.parametrize(
    "value",
    [
        {"path": "http://example.org/first.png"},
        {"path": "FTP://example.org", "meta": {"_type": "gradio.FileData"}},
        [[{"image": {"path": "https://example.org"}}]],
        {"path": {"path": "file:///etc/passwd"}},
    ],
)
def test_addresses_in_place_of_files_are_refused(value: Any):
    sent = json.dumps({"data": [value]}).encode()
    assert answer(request(JOIN, sent), sent) == (
        403,
        b"an address is no file; upload one",
    )
    escaped = sent.replace(b"://", rb"\u003a\u002f\u002f")
    assert answer(request(JOIN, escaped), escaped)[0] == 403


def test_pictures_inside_of_messages_are_refused():
    """Gradio would decode them, whatever their format is and however large they are."""
    uploaded = {"path": "/uploads/gradio/first.png", "url": "data:image/png;base64,AA"}
    sent = json.dumps({"data": [uploaded]}).encode()
    assert answer(request(JOIN, sent), sent)[0] == 403


@pytest.mark.parametrize("sent", [b"{", b"[" * 10**5, b"\xff", b'{"data": [NaN]}'])
def test_what_is_no_json_is_refused(sent: bytes):
    assert answer(request(JOIN, sent), sent) == (400, b"send JSON")


def test_the_page_does_not_fetch_for_its_visitors():
    for address in ("http://127.0.0.1:22/", "https://example.org/x.png"):
        for way in ("file=", "file/", "proxy="):
            refusal = answer(request(f"/gradio_api/{way}{address}"))
            assert refusal == (404, b"nothing is here")


@pytest.mark.parametrize(
    ("path", "length", "kind", "status"),
    [
        (JOIN, limits.MESSAGE, "application/json", 200),
        (JOIN, limits.MESSAGE + 1, "application/json", 413),
        (JOIN, limits.MESSAGE + 1, "multipart/form-data", 413),
        (UPLOAD, limits.UPLOAD, "multipart/form-data", 200),
        (UPLOAD, limits.UPLOAD + limits.ENVELOPE + 1, "multipart/form-data", 413),
        (UPLOAD, limits.MESSAGE + 1, "application/json", 413),
    ],
)
def test_requests_are_bounded(path: str, length: int, kind: str, status: int):
    scope = request(path, content_length=str(length), content_type=kind)
    assert answer(scope)[0] == status


@pytest.mark.parametrize(
    "headers",
    [
        {"transfer_encoding": "chunked"},
        {"content_length": "-1"},
        {"content_length": "x"},
        {"content_length": "9" * 10_000},
    ],
)
def test_requests_of_unknown_length_are_refused(headers: dict[str, str]):
    assert answer(request(JOIN, **headers))[0] == 411


@pytest.mark.parametrize(
    ("origin", "host", "status"),
    [
        ("http://127.0.0.1:7860", "127.0.0.1:7860", 200),
        ("https://videos.example.org", "videos.example.org", 200),
        ("https://example.org", "127.0.0.1:7860", 403),
        ("http://127.0.0.1:80", "127.0.0.1:7860", 403),
        ("http://127.0.0.1:7860.example.org", "127.0.0.1:7860", 403),
        ("http://[", "127.0.0.1:7860", 403),
        ("null", "127.0.0.1:7860", 403),
    ],
)
def test_only_the_page_itself_may_ask(origin: str, host: str, status: int):
    assert answer(request(origin=origin, host=host))[0] == status


def test_a_proxy_may_say_what_the_host_was():
    headers = {"origin": "https://videos.example.org", "host": "127.0.0.1:7860"}
    asked = request(x_forwarded_host="videos.example.org", **headers)
    assert answer(asked)[0] == 200


def test_what_does_not_arrive_is_given_up():
    """What was held of it is free again."""
    limit = RequestLimits(_never, patience=0.05)
    answers: list[Message] = []

    async def receive() -> Message:
        if not answers and limit._held == 0:
            return {"type": "http.request", "body": b"{", "more_body": True}
        return await asyncio.Future()

    async def send(message: Message) -> None:
        answers.append(message)

    asyncio.run(limit(request(content_length="9"), receive, send))
    assert answers[0]["status"] == 408 and limit._held == 0


def test_requests_together_are_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(limits, "HELD", 20)
    assert answer(request(sent=b"1" * 20), b"1" * 20)[0] == 200
    refusal = answer(request(sent=b"1" * 21), b"1" * 21)
    assert refusal == (503, b"too much is sent; try again later")


def test_a_visitor_who_leaves_is_no_error():
    async def receive() -> Message:
        return {"type": "http.disconnect"}

    limit: Any = RequestLimits(_never)
    asyncio.run(limit(request(), receive, None))


async def _never(scope: Scope, receive: Receive, send: Send) -> None:
    raise AssertionError("this request was refused")


def test_what_is_not_http_passes():
    seen: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)

    nothing: Any = None
    asyncio.run(RequestLimits(app)({"type": "lifespan"}, nothing, nothing))
    assert seen == [{"type": "lifespan"}]
