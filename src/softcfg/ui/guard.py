"""What the server lets through: the page and its events, and nothing that touches files.

Gradio's server also has routes that take uploads, hand out cached files, fetch other servers' pages and more; this
page needs none of them, so only the routes on the list below exist for a visitor.
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

MAX_BODY = 64 * 1024  # bytes of a request; the form's values are a few hundred
READABLE = frozenset(
    {
        "/",
        "/config",
        "/theme.css",
        "/favicon.ico",
        "/manifest.json",
        "/robots.txt",
        "/gradio_api/startup-events",
        "/gradio_api/queue/data",
    }
)
READABLE_UNDER = ("/assets/", "/static/", "/gradio_api/heartbeat/")
WRITABLE = frozenset({"/gradio_api/queue/join", "/gradio_api/run/predict", "/gradio_api/cancel", "/gradio_api/reset"})
HEADERS = {
    # The page loads nothing from elsewhere; its framework evaluates templates, and pictures are in the page.
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; "
    "object-src 'none'; base-uri 'self'; form-action 'self'",
    "referrer-policy": "same-origin",
    "x-content-type-options": "nosniff",
}


class Guard:
    """ASGI middleware: refuses other routes (404) and large requests (413), and forbids the page to load from other
    servers."""

    def __init__(self, app: Application) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http" or not _allowed(scope):
            await _refuse(scope, send, 404, "There is nothing here.")
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > MAX_BODY:
            await _refuse(scope, send, 413, f"A request may have {MAX_BODY} bytes.")
            return
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            # A body without a length that goes on and on counts as a visitor who left.
            return {"type": "http.disconnect"} if received > MAX_BODY else message

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *added]}
            await send(message)

        await self.app(scope, limited, with_headers)


def _allowed(scope: Message) -> bool:
    path, method = scope["path"], scope["method"]
    if ".." in path or "\\" in path or "//" in path:
        return False
    # Gradio reads a saved state of the page from a file that this names.
    if "deep_link" in urllib.parse.parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True):
        return False
    if method in ("GET", "HEAD"):
        return path in READABLE or path.startswith(READABLE_UNDER)
    return method == "POST" and path.rstrip("/") in WRITABLE


async def _refuse(scope: Message, send: Send, status: int, text: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": f"{text}\n".encode()})
