# SPDX-License-Identifier: Apache-2.0
"""Limits on the HTTP requests that reach a web page, and on the use of its answers.

Gradio answers more than this page asks for: it proxies other machines, downloads an
address that a visitor sends in place of a file, decodes a "data:" address with every
decoder that Pillow has, and waits for a slow request for ever. Only what the page asks
for passes, and only from the page itself.
"""

import asyncio
import json
import re
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

UPLOAD = 16 * 2**20  # bytes of a file
ENVELOPE = 2**16  # bytes that a request with a file has beside it
MESSAGE = 2**18  # bytes of a request without one
HELD = 2**28  # bytes of all requests that are being read
PATIENCE = 120.0  # seconds for a request to arrive

ADDRESSES = re.compile(
    r"/|/config|/favicon\.ico|/manifest\.json|/theme\.css"
    r"|/(assets|static)/[\w./-]{1,200}"
    r"|/gradio_api/(cancel|reset|startup-events|upload|upload_progress"
    r"|queue/(join|data)|run/predict|heartbeat/\w{1,64}|file=/.+)"
)
QUERY = 2000  # bytes of an address after its "?"
FILES = "/gradio_api/file="
_RANGE = re.compile(rb"bytes=\d{1,18}-\d{0,18}")
# A file of a visitor is never a page of this site, and no other site shows this one.
ANSWER = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "SAMEORIGIN",
    "cross-origin-resource-policy": "same-origin",
}
FILE_ANSWER = ANSWER | {"content-security-policy": "sandbox"}


class RequestLimits:
    """ASGI middleware that answers what is refused, and hands on all other requests.

    Requests are handed on when they have arrived as a whole.
    """

    def __init__(
        self,
        app: ASGIApp,
        patience: float = PATIENCE,
        addresses: re.Pattern[str] = ADDRESSES,
    ):
        self.app, self.patience, self.addresses = app, patience, addresses
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request, body = Request(scope, receive), bytearray()
        try:
            refusal = await self._refusal(request, body)
            unread = [{"type": "http.request", "body": bytes(body)}]

            async def receive_again() -> Message:
                return unread.pop() if unread else await receive()

            if refusal is not None:
                answer = PlainTextResponse(refusal.detail, refusal.status_code)
                await answer(scope, receive, send)
            else:
                await self.app(_needed(scope), receive_again, _guarded(scope, send))
        except ClientDisconnect:
            pass
        finally:
            self._held -= len(body)

    async def _refusal(self, request: Request, body: bytearray) -> HTTPException | None:
        """Reads a request, and says why it is refused, if it is."""
        try:
            check_head(request, self.addresses)
            async with asyncio.timeout(self.patience):
                async for part in request.stream():
                    if self._held + len(part) > HELD:
                        raise HTTPException(503, "too much is sent; try again later")
                    self._held += len(part)
                    body += part
            if not _has_file(request):
                check_body(bytes(body))
        except HTTPException as refusal:
            return refusal
        except TimeoutError:
            return HTTPException(408, f"not all came within {self.patience:g} s")
        return None


def check_head(request: Request, addresses: re.Pattern[str] = ADDRESSES) -> None:
    """Refuses a request for its headers or its address, unless it is one of these.

    Raises:
        HTTPException: with the status and the reason.
    """
    headers = request.headers
    if not addresses.fullmatch(request.scope["path"]):
        raise HTTPException(404, "nothing is here")
    if len(request.scope.get("query_string", b"")) > QUERY:
        raise HTTPException(414, f"the address has more than {QUERY} bytes after ?")
    # A proxy may change the host; pages of other sites can't send its header.
    hosts = headers.get("host"), headers.get("x-forwarded-host")
    if "origin" in headers and headers["origin"].partition("://")[2] not in hosts:
        raise HTTPException(403, "this was sent by another site; open the page itself")
    length = headers.get("content-length", "0")
    if "transfer-encoding" in headers or not re.fullmatch("[0-9]{1,18}", length):
        raise HTTPException(411, "say how long the request is")
    longest = UPLOAD + ENVELOPE if _has_file(request) else MESSAGE
    if int(length) > longest:
        raise HTTPException(
            413, f"the request has {int(length)} bytes; send at most {longest}"
        )


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


def _needed(scope: Scope) -> Scope:
    """A request with what Gradio needs of it; for files it sends other headers back."""
    if not scope["path"].startswith(FILES):
        return scope
    kept = [
        (name, value)
        for name, value in scope["headers"]
        if name == b"host" or (name == b"range" and _RANGE.fullmatch(value))
    ]
    return {**scope, "headers": kept}


def _guarded(scope: Scope, send: Send) -> Send:
    """Adds to an answer what browsers may not do with it."""
    added = FILE_ANSWER if scope["path"].startswith(FILES) else ANSWER

    async def send_guarded(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(added)
        await send(message)

    return send_guarded
