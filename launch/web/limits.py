# SPDX-License-Identifier: Apache-2.0
"""Limits on the HTTP requests that reach a web page: their size, and what they name.

Gradio bounds the files that are uploaded to it, but no other request; it downloads an
address that a visitor sends in place of a file, and decodes a "data:" address with
every decoder that Pillow has.
"""

import json
import re
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

UPLOAD = 16 * 2**20  # bytes of a file
ENVELOPE = 2**16  # bytes that a request with a file has beside it
MESSAGE = 2**18  # bytes of a request without one


class RequestLimits:
    """ASGI middleware that answers what is refused, and hands on all other requests."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        unread: list[Message] = []

        async def receive_again() -> Message:
            return unread.pop() if unread else await receive()

        request = Request(scope, receive)
        try:
            check_head(request)
            if not _has_file(request):
                body = await request.body()
                check_body(body)
                unread.append({"type": "http.request", "body": body})
        except HTTPException as refusal:
            answer = PlainTextResponse(refusal.detail, refusal.status_code)
            await answer(scope, receive, send)
        except ClientDisconnect:
            pass
        else:
            await self.app(scope, receive_again, send)


def check_head(request: Request) -> None:
    """Refuses a request for its headers or its address.

    Raises:
        HTTPException: with the status and the reason.
    """
    length = request.headers.get("content-length", "0")
    if "transfer-encoding" in request.headers or not length.isdecimal():
        raise HTTPException(411, "say how long the request is")
    longest = UPLOAD + ENVELOPE if _has_file(request) else MESSAGE
    if int(length) > longest:
        raise HTTPException(
            413, f"the request has {int(length)} bytes; send at most {longest}"
        )
    if re.search(r"=\s*\w+:/", request.scope["path"]):
        raise HTTPException(403, "files of other machines are not shown here")


def check_body(body: bytes) -> None:
    """Refuses a request for its JSON, in which files are objects with a "path".

    Raises:
        HTTPException: with the status and the reason.
    """
    try:
        json.loads(body or "null", object_hook=_check_file, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "send JSON") from error


def _check_file(value: dict[str, Any]) -> dict[str, Any]:
    path, url = str(value.get("path", "")), str(value.get("url", ""))
    if "://" in path or url.startswith("data:"):
        raise HTTPException(403, "an address is no file; upload one")
    return value


def _refuse(constant: str) -> None:
    """Refuses NaN, which would pass the limits of widgets, and is no JSON."""
    raise ValueError(constant)


def _has_file(request: Request) -> bool:
    kind = request.headers.get("content-type", "")
    path: str = request.scope["path"]
    return path.endswith("/upload") and kind.startswith("multipart/")
