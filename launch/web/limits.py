# SPDX-License-Identifier: Apache-2.0
"""What may reach a web page: HTTP requests of bounded size that name no other machine.

Gradio bounds the files that are uploaded to it, but no other request; and it would
download an address that a visitor sends in place of a file.
"""

import json
import re
from collections.abc import Awaitable, Callable
from typing import Any

UPLOAD = 16 * 2**20  # bytes of a file
ENVELOPE = 2**16  # what a request with a file has beside it
MESSAGE = 2**18  # bytes of a request without one

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class Gate:
    """ASGI middleware: answers what is refused, and hands on all other requests."""

    def __init__(self, app: App):
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            refused = head(scope)
            if refused is None and not _has_file(scope):
                sent = await _body(receive)
                receive = _again(sent, receive)
                refused = body(sent)
            if refused is not None:
                await _answer(send, *refused)
                return
        await self.app(scope, receive, send)


def head(scope: Message) -> tuple[int, str] | None:
    """HTTP status and reason, if a request is refused for its headers or address."""
    headers = dict(scope["headers"])
    length = headers.get(b"content-length", b"0")
    if b"transfer-encoding" in headers or not length.isdigit():
        return 411, "say how long the request is"
    longest = UPLOAD + ENVELOPE if _has_file(scope) else MESSAGE
    if int(length) > longest:
        return 413, f"the request has {int(length)} bytes; send at most {longest}"
    if re.search(r"=\s*\w+:/", scope["path"]):
        return 403, "files of other machines are not shown here"
    return None


def body(sent: bytes) -> tuple[int, str] | None:
    """HTTP status and reason, if a request is refused for its JSON.

    Files are objects with a "path", which is no address.
    """
    if not sent:
        return None
    try:
        left = [json.loads(sent)]
    except (ValueError, RecursionError):
        return 400, "send JSON"
    while left:
        value = left.pop()
        if isinstance(value, dict):
            if "://" in str(value.get("path", "")):
                return 403, "an address is no file; upload one"
            left.extend(value.values())
        elif isinstance(value, list):
            left.extend(value)
    return None


def _has_file(scope: Message) -> bool:
    kind = dict(scope["headers"]).get(b"content-type", b"")
    return scope["path"].endswith("/upload") and kind.startswith(b"multipart/")


async def _body(receive: Receive) -> bytes:
    """The body of a request, whose length its headers have said."""
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def _again(sent: bytes, receive: Receive) -> Receive:
    """Receives a body that was read, then what comes after it."""
    first = [{"type": "http.request", "body": sent, "more_body": False}]

    async def next_message() -> Message:
        return first.pop() if first else await receive()

    return next_message


async def _answer(send: Send, status: int, why: str) -> None:
    plain = [(b"content-type", b"text/plain")]
    await send({"type": "http.response.start", "status": status, "headers": plain})
    await send({"type": "http.response.body", "body": why.encode()})
