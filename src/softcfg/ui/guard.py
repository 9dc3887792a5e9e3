"""What the server lets through: the page and its events, under the names it is known by, and nothing about files.

Gradio's server also has routes that take uploads, hand out cached files, fetch other servers' pages and more; this
page needs none of them, so only the routes on the list below exist for a visitor. What an event carries is read,
checked and written anew (`softcfg.ui.events`), so Gradio sees only what was checked.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import re
import secrets
import urllib.parse
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio
from starlette.requests import HTTPConnection

from softcfg.ui.events import CANCEL, JOIN, PREDICT, RESET, Refused, checked, session_of

if TYPE_CHECKING:
    from softcfg.ui.waiting import Waiting

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

MAX_BODY = 64 * 1024  # bytes of a request; the form's values are a few hundred
BODY_SECONDS = 10.0  # for the whole of a request's body
MAX_OPEN = 128  # requests of one address under way; an open page has two
MAX_UNREAD = 64  # messages that a page has not fetched
COOKIE = "softcfg_visitor"
LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
DATA = "/gradio_api/queue/data"
HEARTBEAT = "/gradio_api/heartbeat/"
READABLE = frozenset(
    ("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt", "/gradio_api/startup-events", DATA)
)
READABLE_UNDER = ("/assets/", "/static/", HEARTBEAT)
WRITABLE = frozenset({JOIN, PREDICT, CANCEL, RESET})
LONGEST_PATH, LONGEST_NAME = 1000, 255  # of what a file can be called
PATH = re.compile(r"[A-Za-z0-9/_.,~@+-]+")
HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+))(?::([0-9]{1,5}))?")
TOKEN = re.compile(r"[A-Za-z0-9_-]{43}")
# Gradio believes these; what they say was taken from the connection, or from them if a proxy is trusted.
UNTRUSTED = (b"x-forwarded-", b"x-gradio-", b"forwarded")
SHOWN = frozenset({403, 422, 429})  # Gradio's page shows the detail of these
HEADERS = {
    # The page loads nothing from elsewhere; its framework evaluates templates, and pictures are in the page.
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "same-origin",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


@dataclass(frozen=True)
class Access:
    """Whom the server answers.

    Attributes:
        hosts: names that it is reached by, lower case, without ports; the address that a connection came in at is
            always one of them.
        behind_proxy: one web server in front of it is trusted to say in X-Forwarded-For, -Host and -Proto whom it
            asks for; otherwise these headers are ignored.
    """

    hosts: frozenset[str] = LOCAL
    behind_proxy: bool = False


class Guard:
    """ASGI middleware: refuses what is on no list, and ties sessions to the visitor's cookie.

    A refusal has one sentence and one of these codes: 404 other routes, 421 other hosts, 403 requests of other sites'
    pages or without the cookie, 408 slow, 413 large and 400, 415 or 422 malformed bodies, 429 too many at once.
    """

    def __init__(self, app: Application, access: Access, waiting: Waiting) -> None:
        self.app = app
        self.access = access
        self.waiting = waiting
        self._open: Counter[str] = Counter()
        self._joining: Counter[str] = Counter()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *added]}
            await send(message)

        try:
            scope = _seen(scope, self.access)
            visitor, path = scope["client"][0], scope["path"]
            with _one_of(self._open, visitor, MAX_OPEN, "Too many requests of this address are under way."):
                _check_source(scope, self.access)
                _check_route(scope)
                token = HTTPConnection(scope).cookies.get(COOKIE, "")
                known = TOKEN.fullmatch(token) is not None
                if scope["method"] == "POST":
                    scope, receive = await self._event(scope, receive, token if known else None)
                elif path == DATA or path.startswith(HEARTBEAT):
                    scope = _of_session(scope, _session(token if known else None, _named_session(scope)))
                elif path == "/" and not known:
                    added.append((b"set-cookie", _new_cookie(scope["scheme"] == "https")))
                    added.append((b"cache-control", b"no-store"))
                if path != JOIN:
                    await self.app(scope, receive, with_headers)
                    return
                # Gradio counts a request as waiting only some time after it was let through.
                left = self.waiting.places - self.waiting.of(visitor)
                few = "You have as many requests waiting as one visitor may have; wait for them first."
                with _one_of(self._joining, visitor, left, few):
                    await self.app(scope, receive, with_headers)
        except Refused as refused:
            await _answer(refused, with_headers)

    async def _event(self, scope: Message, receive: Receive, token: str | None) -> tuple[Message, Receive]:
        """The request with the body that Gradio gets."""
        path = scope["path"]
        headers = dict(scope["headers"])
        if b"content-length" in headers and b"transfer-encoding" in headers:
            raise Refused(400, "A request must not give its length twice.")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 10 or int(length) > MAX_BODY:
            raise Refused(413, f"A request may have at most {MAX_BODY} bytes.")
        if headers.get(b"content-type", b"").partition(b";")[0].strip().lower() != b"application/json":
            raise Refused(415, "An event must be sent as application/json.")
        values = checked(path, await _body(receive), self.waiting.inputs(path))
        if "session_hash" in values:
            values["session_hash"] = session = _session(token, values["session_hash"])
            if path == JOIN and self.waiting.unread(session) > MAX_UNREAD:
                raise Refused(429, "This page does not fetch its answers; load it again.")
            self.waiting.note(scope["client"][0], session)
        body = json.dumps(values).encode()
        kept = [pair for pair in scope["headers"] if pair[0] not in (b"content-length", b"transfer-encoding")]
        unread = True

        async def replay() -> Message:
            nonlocal unread
            if unread:
                unread = False
                return {"type": "http.request", "body": body, "more_body": False}
            return await receive()

        return {**scope, "headers": [*kept, (b"content-length", str(len(body)).encode())]}, replay


def _seen(scope: Message, access: Access) -> Message:
    """The request as it reached this server, or the proxy in front of it; without the headers that only claim so."""
    headers = [pair for pair in scope["headers"] if not pair[0].startswith(UNTRUSTED)]
    address, scheme = (scope.get("client") or ("unknown", 0))[0], scope["scheme"]
    if access.behind_proxy:
        # The last entry is the one that the proxy wrote; what stands before it came from outside.
        said = {name: value.decode("latin-1").rpartition(",")[2].strip() for name, value in scope["headers"]}
        address = said.get(b"x-forwarded-for", address)
        scheme = "https" if str(said.get(b"x-forwarded-proto", scheme)).lower() == "https" else "http"
        if b"x-forwarded-host" in said:
            headers = [pair for pair in headers if pair[0] != b"host"]
            headers.append((b"host", said[b"x-forwarded-host"].encode("latin-1")))
    return {**scope, "headers": headers, "client": (_visitor(address), 0), "scheme": scheme}


def _visitor(address: str) -> str:
    """Whom an address belongs to: one of IPv4, and the 64 bits of IPv6 that one customer gets."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return "unknown"
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is None:
            return str(ipaddress.ip_network((parsed, 64), strict=False))
        parsed = parsed.ipv4_mapped
    return str(parsed)


def _check_source(scope: Message, access: Access) -> None:
    """Refuse other names than the server's, and requests that pages of other sites make."""
    host = _only(scope, b"host")
    found = HOST.fullmatch(host)
    name = (found[1] or found[2]) if found else ""
    here = (scope.get("server") or ("", 0))[0]
    if not name or name not in access.hosts | {here.lower()}:
        raise Refused(421, "This server does not answer to that name; softcfg ui --allowed-host NAME adds one.")
    origin = _only(scope, b"origin")
    if origin and (":" not in origin or _default_port(origin.partition("://")[2]) != _default_port(host)):
        raise Refused(403, "A page of another site asked for this.")


def _only(scope: Message, name: bytes) -> str:
    values = [value.decode("latin-1").lower() for key, value in scope["headers"] if key == name]
    return values[0] if len(values) == 1 else ",".join(values)


def _default_port(host: str) -> str:
    return re.sub(r":(80|443)$", "", host)


def _check_route(scope: Message) -> None:
    path, method = scope["path"], scope["method"]
    known = PATH.fullmatch(path) and ".." not in path and "//" not in path
    known = known and len(path) <= LONGEST_PATH and max(map(len, path.split("/"))) <= LONGEST_NAME
    if method in ("GET", "HEAD"):
        known = known and (path in READABLE or path.startswith(READABLE_UNDER))
    elif method == "POST":
        known = known and path in WRITABLE
    else:
        known = False
    # Gradio reads a saved state of the page from a file that this names.
    if not known or "deep_link" in _query(scope):
        raise Refused(404, "There is nothing here.")
    headers = dict(scope["headers"])
    if method != "POST":
        if headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers:
            raise Refused(413, "This request has no body.")
        if path != DATA:
            scope["query_string"] = b""  # the page's own script reads the settings in it


def _query(scope: Message) -> dict[str, list[str]]:
    return urllib.parse.parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True)


def _named_session(scope: Message) -> str:
    if scope["path"] == DATA:
        return session_of(_query(scope).get("session_hash"))
    return session_of([scope["path"].removeprefix(HEARTBEAT)])


def _of_session(scope: Message, session: str) -> Message:
    if scope["path"] == DATA:
        return {**scope, "query_string": f"session_hash={session}".encode()}
    path = HEARTBEAT + session
    return {**scope, "path": path, "raw_path": path.encode()}


def _session(token: str | None, named: str) -> str:
    """The session of that name that this visitor has: another visitor's of the same name is another session."""
    if token is None:
        raise Refused(403, "The page needs its cookie; allow cookies for this address and load it again.")
    return hashlib.sha256(f"{token}:{named}".encode()).hexdigest()


def _new_cookie(secure: bool) -> bytes:
    value = f"{COOKIE}={secrets.token_urlsafe(32)}; Path=/; HttpOnly; SameSite=Lax"
    return (value + "; Secure" if secure else value).encode()


@contextmanager
def _one_of(counts: Counter[str], visitor: str, limit: int, refusal: str) -> Iterator[None]:
    """Count one more of the visitor while the block runs; refuse it from `limit` on."""
    if counts[visitor] >= limit:
        raise Refused(429, refusal)
    counts[visitor] += 1
    try:
        yield
    finally:
        counts[visitor] -= 1
        if not counts[visitor]:
            del counts[visitor]


async def _body(receive: Receive) -> bytes:
    body = bytearray()
    try:
        with anyio.fail_after(BODY_SECONDS):
            while True:
                message = await receive()
                body += message.get("body", b"")
                if message["type"] == "http.disconnect":
                    raise Refused(400, "The request ended early.")
                if len(body) > MAX_BODY:
                    raise Refused(413, f"A request may have at most {MAX_BODY} bytes.")
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError as error:
        raise Refused(408, f"A request must be complete in {BODY_SECONDS:g} seconds.") from error


async def _answer(refused: Refused, send: Send) -> None:
    text, kind = f"{refused}\n", "text/plain; charset=utf-8"
    if refused.status in SHOWN:
        text, kind = json.dumps({"detail": str(refused), "error": str(refused)}), "application/json"
    # What is left of the body is not waited for.
    headers = [(b"content-type", kind.encode()), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
