"""Requests of strangers to the web page: each is refused at once, and the server lives on.

Another input of a known kind is one more line in a table. `REFUSED` goes through the application in this process;
`RAW` are bytes for a server in a process of its own.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from starlette.routing import Mount
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from softcfg.pipeline import Pipeline
from softcfg.ui import guard as guards
from softcfg.ui.guard import COOKIE, LOCAL, MAX_BODY, MAX_UNREAD, Access
from softcfg.ui.page import application
from softcfg.ui.studio import Limits, Studio

JOIN = "/gradio_api/queue/join"
PREDICT = "/gradio_api/run/predict"
FILE = {"path": "/dev/zero", "meta": {"_type": "gradio.FileData"}}


@pytest.fixture(scope="module")
def pipeline(model_folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(model_folder)


@pytest.fixture(scope="module")
def open_client(pipeline: Pipeline) -> Iterator[Callable[..., TestClient]]:
    """Makes a visitor of a server of its own who has loaded the page; options: `access`, `limits`, `client`."""
    clients = []

    def visit(access: Access | None = None, limits: Limits | None = None, **options: Any) -> TestClient:
        studio = Studio({"tiny": pipeline}, limits)
        app = application(studio, access)
        app.state.model = studio.models["tiny"]
        client = TestClient(app, raise_server_exceptions=False, **options)
        clients.append(client.__enter__())
        assert client.get("/").status_code == 200
        return client

    yield visit
    for client in clients:
        client.__exit__(None, None, None)


@pytest.fixture(scope="module")
def client(open_client: Callable[..., TestClient]) -> TestClient:
    return open_client()


def another(known: TestClient, **options: Any) -> TestClient:
    """Another visitor of the same server."""
    other = TestClient(known.app, raise_server_exceptions=False, **options)
    other.portal = known.portal  # the same event loop
    other.get("/")
    return other


def event(client: TestClient, elem_id: str) -> dict[str, Any]:
    """What the page sends when a component is used."""
    config = client.get("/config").json()
    component = next(part["id"] for part in config["components"] if part["props"].get("elem_id") == elem_id)
    for dependency in config["dependencies"]:
        if dependency["backend_fn"] and [component, "click"] in [target[:2] for target in dependency["targets"]]:
            values = {part["id"]: part["props"].get("value") for part in config["components"]}
            return {
                "data": [values[number] for number in dependency["inputs"]],
                "event_data": None,
                "fn_index": dependency["id"],
                "trigger_id": component,
                "session_hash": "page",
            }
    raise AssertionError(elem_id)


def answers(client: TestClient, session: str = "page") -> list[dict[str, Any]]:
    """The messages that a session has to fetch; an unknown session's is one of an error."""
    found = []
    try:
        with client.stream("GET", f"/gradio_api/queue/data?session_hash={session}") as response:
            assert response.status_code == 200
            found = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: ")]
    except RuntimeError:  # Gradio ends the stream of an unknown session so
        pass
    return found


def draw(client: TestClient) -> list[dict[str, Any]]:
    assert client.post(JOIN, json=event(client, "draw")).status_code == 200
    messages = answers(client)
    assert "Drawn in" in json.dumps(messages[-2])
    return messages


OBJECTS: list[Any] = [
    [FILE],
    [[FILE]],
    [{"path": "http://127.0.0.1:1/x", "meta": {"_type": "gradio.FileData"}}],
    [{"path": "https://127.0.0.1:1/x", "url": "https://127.0.0.1:1/x", "meta": {"_type": "gradio.FileData"}}],
    [{"url": "/gradio_api/file=/etc/passwd", "path": "", "meta": {"_type": "gradio.FileData"}}],
    [{"a": FILE}],
    [{"__type__": "update", "value": FILE}],
    [[[[[FILE]]]]],
    [[[]]],
    [{}],
    [["a", {}]],
]
BODIES: dict[str, str | bytes] = {
    "nothing": b"",
    "text": b"data=1",
    "a form": b"------x\r\nContent-Disposition: form-data; name=data\r\n\r\n[]\r\n------x--",
    "not UTF-8": b'{"data": ["\xff"]}',
    "UTF-16": '{"data": []}'.encode("utf-16"),
    "a byte order mark": b'\xef\xbb\xbf{"data": []}',
    "gzip": bytes.fromhex("1f8b0800000000000003"),
    "a list": b"[]",
    "a number": b"1",
    "a string": b'"data"',
    "NaN": b'{"data": [NaN], "fn_index": 0, "session_hash": "x"}',
    "deep lists": b"[" * 60_000,
    "deep objects": b'{"data":' * 8_000,
    "deep inside data": b'{"fn_index":0,"session_hash":"x","data":' + b"[" * 20_000 + b"]" * 20_000 + b"}",
    "two values": b'{"data": []} {"data": []}',
    "a key twice": json.dumps({"data": [FILE], "fn_index": 0, "session_hash": "x"})[:-1] + ', "data": []}',
    "a key twice, escaped": b'{"data": [{}], "d\\u0061ta": [], "fn_index": 0, "session_hash": "x"}',
    "a huge number": b'{"data": [1' + b"0" * 5_000 + b'], "fn_index": 0, "session_hash": "x"}',
}
# What the rest of a sound event is replaced by.
FIELDS: list[dict[str, Any]] = [
    {"fn_index": None},
    {"fn_index": "0"},
    {"fn_index": True},
    {"fn_index": -1},
    {"fn_index": 1.0},
    {"fn_index": 10**30},
    {"fn_index": 10**6},
    {"fn_index": [0]},
    {"fn_index": {"path": "/dev/zero"}},
    {"trigger_id": "x"},
    {"trigger_id": FILE},
    {"trigger_id": 10**30},
    {"session_hash": None},
    {"session_hash": ""},
    {"session_hash": 1},
    {"session_hash": ["x"]},
    {"session_hash": FILE},
    {"session_hash": "../../etc"},
    {"session_hash": "x" * 65},
    {"session_hash": "x\n"},
    {"session_hash": "\x00"},
    {"event_data": FILE},
    {"event_data": [FILE]},
    {"event_data": {"picture": {"path": "/dev/zero"}}},
    {"event_data": {"picture": [1]}},
    {"data": None},
    {"data": {}},
    {"data": "x"},
    {"data": []},
    {"data": [None] * 1000},
    {"data": [1e308 * 10] * 11},
]


class TestEvents:
    """What Gradio must not see."""

    @staticmethod
    def refused(client: TestClient, body: str | bytes, path: str = JOIN, status: int = 422) -> None:
        start = time.monotonic()
        response = client.post(path, content=body, headers={"content-type": "application/json"})
        assert response.status_code == status
        assert len(response.text) < 200
        assert time.monotonic() - start < 2

    @pytest.mark.parametrize("path", [JOIN, PREDICT])
    @pytest.mark.parametrize("values", OBJECTS, ids=lambda values: json.dumps(values)[:60])
    def test_no_objects_among_the_values(self, client: TestClient, values: list[Any], path: str) -> None:
        sound = event(client, "draw" if path == JOIN else "stop")
        # In place of the first value, so that their number is right where there are any.
        data = [*values, *sound["data"][1:]] if sound["data"] else values
        self.refused(client, json.dumps({**sound, "data": data}), path)

    @pytest.mark.parametrize("path", [JOIN, PREDICT, "/gradio_api/cancel", "/gradio_api/reset"])
    @pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
    def test_it_is_json(self, client: TestClient, body: str | bytes, path: str) -> None:
        self.refused(client, body, path)

    @pytest.mark.parametrize("fields", FIELDS, ids=lambda fields: repr(fields)[:60])
    def test_every_field_is_of_its_kind(self, client: TestClient, fields: dict[str, Any]) -> None:
        sound = event(client, "draw")
        self.refused(client, json.dumps({**sound, **fields}))

    @pytest.mark.parametrize("name", ["x/../y", "", None, 1, FILE, "x" * 65])
    def test_cancel_and_reset(self, client: TestClient, name: Any) -> None:
        sound = {"session_hash": "page", "fn_index": 0, "event_id": "a"}
        for path in ("/gradio_api/cancel", "/gradio_api/reset"):
            self.refused(client, json.dumps({**sound, "event_id": name}), path)
            assert client.post(path, json=sound).json() == {"success": True}
        self.refused(client, json.dumps({**sound, "session_hash": name}), "/gradio_api/cancel")

    def test_events_stay_on_their_route(self, client: TestClient) -> None:
        self.refused(client, json.dumps(event(client, "draw")), PREDICT)
        self.refused(client, json.dumps(event(client, "stop")), JOIN)

    @pytest.mark.parametrize(
        "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "json"]
    )
    def test_forms_of_other_sites_are_not_json(self, client: TestClient, kind: str) -> None:
        body = json.dumps(event(client, "draw"))
        assert client.post(JOIN, content=body, headers={"content-type": kind}).status_code == 415

    @pytest.mark.parametrize("extra", [{"simple_format": True}, {"batched": True}, {"event_id": "x"}, {"zzz": FILE}])
    def test_fields_that_the_page_has_no_use_for_do_not_arrive(self, client: TestClient, extra: dict[str, Any]) -> None:
        assert client.post(PREDICT, json={**event(client, "stop"), **extra}).status_code == 200

    def test_a_sound_event_works(self, client: TestClient) -> None:
        messages = draw(client)
        assert "data:image/png" in json.dumps(messages)

    @pytest.mark.parametrize(
        ("place", "value", "said"),
        [
            (1, 99, "The class must be a number from 0 to 3, not 99."),
            (6, ["x"], "There is no method &#x27;x&#x27; here"),
            (7, None, "The scale must be a number from 0 to 20, not None."),
            (11, ["cosine_power"], "There is no schedule [&#x27;cosine_power&#x27;] here"),
            (14, 1.5, "The seed must be a whole number from 0 to 4294967295, not 1.5."),
            (14, -1, "The seed must be a whole number from 0 to 4294967295, not -1."),
        ],
    )
    def test_a_value_that_does_not_suit_is_told_as_it_was_sent(
        self, client: TestClient, capsys: pytest.CaptureFixture[str], place: int, value: Any, said: str
    ) -> None:
        sound = event(client, "draw")
        sound["data"][place] = value
        assert client.post(JOIN, json=sound).status_code == 200
        assert said in json.dumps(answers(client))
        assert "Traceback" not in capsys.readouterr().err

    def test_gradio_itself_opens_no_file_either(self, client: TestClient, tmp_path: Path) -> None:
        """Without the guard, Gradio's own check refuses files that nobody has uploaded."""
        secret = tmp_path / "secret-of-the-host.txt"
        secret.write_text("a secret")
        (mount,) = (route for route in client.app.routes if isinstance(route, Mount))
        inner = TestClient(mount.app, raise_server_exceptions=False)
        inner.portal = client.portal  # the same event loop
        choice = event(client, "draw")
        file = {"path": str(secret), "meta": {"_type": "gradio.FileData"}}
        assert inner.post(
            JOIN, json={**choice, "session_hash": "inner", "data": [file, *choice["data"][1:]]}
        ).is_success
        (last, _) = answers(inner, "inner")[-2:]
        assert last["msg"] == "process_completed"
        assert last["success"] is False
        copies = os.environ.get("GRADIO_TEMP_DIR") or os.path.join(tempfile.gettempdir(), "gradio")
        assert not list(Path(copies).rglob("secret-of-the-host.txt"))


ROUTES = [
    ("POST", "/"),
    ("POST", "/gradio_api/api/predict"),
    ("POST", "/gradio_api/call/draw"),
    ("POST", "/gradio_api/call/v2/draw"),
    ("POST", "/gradio_api/run/draw"),
    ("POST", "/gradio_api/queue/data"),
    ("POST", "/gradio_api/queue/join/"),
    ("POST", "/gradio_api/stream/x"),
    ("POST", "/gradio_api/upload"),
    ("POST", "/gradio_api/component_server"),
    ("POST", "/gradio_api/process_recording"),
    ("POST", "/gradio_api/vibe-code/"),
    ("POST", "/%67radio_api/upload"),
    ("GET", "/%67radio_api/file=/etc/passwd"),
    ("GET", "/gradio_api%2ffile=/etc/passwd"),
    ("GET", "/static/%252e%252e/%252e%252e/etc/passwd"),
    ("GET", "/static/%00"),
    ("GET", "/static/%0d%0ax"),
    ("GET", "/assets/%c3%bc"),
    ("GET", "/gradio_api/queue/join"),
    ("GET", "/gradio_api/app_id"),
    ("GET", "/gradio_api/user"),
    ("GET", "/pwa_icon"),
    ("GET", "/svelte/x"),
    ("GET", "/config?deep_link=x"),
    ("HEAD", "/gradio_api/file=/etc/passwd"),
    ("HEAD", "/gradio_api/proxy=http://127.0.0.1/"),
    ("OPTIONS", JOIN),
    ("PUT", JOIN),
    ("DELETE", "/"),
    ("TRACE", "/"),
    ("CONNECT", "/"),
    ("X", "/"),
]


class TestRoutes:
    @pytest.mark.parametrize(("method", "path"), ROUTES)
    def test_there_is_nothing_else(self, client: TestClient, method: str, path: str) -> None:
        response = client.request(method, path, headers={"content-type": "application/json"})
        assert response.status_code == 404
        assert response.text in ("There is nothing here.\n", "")

    @pytest.mark.parametrize("path", ["/static/", "/assets/", "/static/fonts", "/static/none.css", "/assets/none.js"])
    def test_folders_and_missing_files_are_no_failure(self, client: TestClient, path: str) -> None:
        assert client.get(path).status_code in (400, 403, 404)

    @pytest.mark.parametrize("query", ["?page=x", "?page=../x", "?deep=1", "?%00", "?a=" + "x" * 2000])
    def test_the_query_does_not_reach_gradio(self, client: TestClient, query: str) -> None:
        assert client.get(f"/{query}").status_code == 200

    def test_reading_takes_no_body(self, client: TestClient) -> None:
        assert client.request("GET", "/", content=b"x").status_code == 413
        assert client.request("GET", "/", content=iter([b"x"])).status_code == 413

    @pytest.mark.parametrize("query", ["", "session_hash=", "session_hash=a&session_hash=b", "session_hash=%00", "x=1"])
    def test_a_stream_has_one_session(self, client: TestClient, query: str) -> None:
        assert client.get(f"/gradio_api/queue/data?{query}").status_code == 422

    def test_a_websocket_is_refused(self, client: TestClient) -> None:
        with pytest.raises(WebSocketDisconnect) as caught, client.websocket_connect(JOIN):
            pass
        assert caught.value.code == 1008

    def test_the_page_cannot_be_framed(self, client: TestClient) -> None:
        for path in ("/", "/nowhere"):
            headers = client.get(path).headers
            assert "frame-ancestors 'none'" in headers["content-security-policy"]
            assert headers["x-frame-options"] == "DENY"

    def test_no_font_server_is_named(self, client: TestClient) -> None:
        texts = [client.get(path).text for path in ("/", "/config", "/theme.css")]
        assert not [
            text
            for text in texts
            if re.search(r"fonts\.(googleapis|gstatic)|<script[^>]+https?://(?!testserver)", text)
        ]
        assert not re.findall(r"<link[^>]+https?://[^>]*>|@import[^;]*https?:", "".join(texts))


NAMES = ["localhost", "LOCALHOST:7860", "127.0.0.1", "127.0.0.1:7860", "[::1]", "[::1]:80"]
STRANGE_NAMES = [
    "evil.example", "evil.example:7860", "localhost.evil.example", "127.0.0.1.evil.example", "evil.example#localhost",
    "localhost@evil.example", "evil.example@localhost", "localhost/", "localhost:x", "localhost:80:80", "::1", "",
    "localhost,evil.example", "0.0.0.0", "2130706433", "localhost.",
]  # fmt: skip


class TestNames:
    """Pages of other sites, by DNS rebinding or by their own requests."""

    @pytest.mark.parametrize("host", NAMES)
    def test_its_own_names(self, client: TestClient, host: str) -> None:
        assert client.get("/", headers={"host": host}).status_code == 200

    @pytest.mark.parametrize("host", STRANGE_NAMES)
    @pytest.mark.parametrize("path", ["/", "/config", "/assets/x.js"])
    def test_other_names(self, client: TestClient, host: str, path: str) -> None:
        assert client.get(path, headers={"host": host}).status_code == 421

    @pytest.mark.parametrize(
        "headers",
        [
            {"host": "evil.example", "x-forwarded-host": "localhost"},
            {"host": "evil.example", "forwarded": "host=localhost"},
            {"host": "evil.example", "x-gradio-server": "http://localhost"},
        ],
    )
    def test_a_name_that_is_only_claimed(self, client: TestClient, headers: dict[str, str]) -> None:
        assert client.get("/", headers=headers).status_code == 421

    @pytest.mark.parametrize(
        "headers",
        [
            {"x-forwarded-host": "evil.example"},
            {"x-gradio-server": "http://evil.example"},
            {"x-forwarded-proto": "https", "x-forwarded-host": "evil.example"},
        ],
    )
    def test_the_page_does_not_repeat_a_claim(self, client: TestClient, headers: dict[str, str]) -> None:
        for path in ("/", "/config"):
            text = client.get(path, headers=headers).text
            assert "evil.example" not in text
            assert "https://testserver" not in text

    @pytest.mark.parametrize(
        "origin",
        ["http://evil.example", "null", "http://localhost:3000", "https://testserver.evil.example", "x", "a:b"],
    )
    def test_requests_of_other_sites(self, client: TestClient, origin: str) -> None:
        for path in ("/config", "/gradio_api/queue/data?session_hash=page"):
            assert client.get(path, headers={"origin": origin}).status_code == 403
        response = client.post(JOIN, json=event(client, "draw"), headers={"origin": origin})
        assert response.status_code == 403
        assert "access-control-allow-origin" not in response.headers

    @pytest.mark.parametrize("origin", ["http://testserver", "http://testserver:80", "https://testserver:443"])
    def test_its_own_requests(self, client: TestClient, origin: str) -> None:
        assert client.post(PREDICT, json=event(client, "stop"), headers={"origin": origin}).status_code == 200

    def test_names_that_were_given(self, open_client: Callable[..., TestClient]) -> None:
        client = open_client(Access(LOCAL | {"draw.example"}))
        assert client.get("/", headers={"host": "draw.example:8000"}).status_code == 200
        assert client.get("/", headers={"host": "other.example"}).status_code == 421

    def test_a_proxy_that_is_trusted(self, open_client: Callable[..., TestClient]) -> None:
        client = open_client(Access(LOCAL | {"draw.example"}, behind_proxy=True))
        through = {"x-forwarded-host": "draw.example", "x-forwarded-proto": "https", "x-forwarded-for": "1.2.3.4"}
        response = client.get("/config", headers=through)
        assert response.json()["root"] == "https://draw.example"
        client.cookies.clear()
        assert "; Secure" in client.get("/", headers=through).headers["set-cookie"]
        assert client.get("/", headers={**through, "x-forwarded-host": "evil.example"}).status_code == 421
        assert client.get("/", headers={**through, "x-forwarded-host": "draw.example, evil.example"}).status_code == 421


class TestVisitors:
    """What one visitor cannot take from the others."""

    def test_the_cookie(self, client: TestClient) -> None:
        stranger = TestClient(client.app)
        (cookie,) = stranger.get("/").headers.get_list("set-cookie")
        assert re.fullmatch(rf"{COOKIE}=[\w-]{{43}}; Path=/; HttpOnly; SameSite=Lax", cookie)
        assert "set-cookie" not in stranger.get("/").headers
        assert TestClient(client.app).get("/").headers["set-cookie"] != cookie

    @pytest.mark.parametrize("cookie", [None, "", "x", "x" * 500, "../../x"])
    def test_without_it_nothing_happens(self, client: TestClient, cookie: str | None) -> None:
        stranger = TestClient(client.app, cookies={} if cookie is None else {COOKIE: cookie})
        response = stranger.post(JOIN, json=event(client, "draw"))
        assert response.status_code == 403
        assert "allow cookies" in response.json()["detail"]
        assert stranger.get("/gradio_api/queue/data?session_hash=page").status_code == 403
        assert stranger.get("/gradio_api/heartbeat/page").status_code == 403

    def test_a_sessions_name_is_not_enough(self, client: TestClient) -> None:
        draw(client)
        thief = another(client)
        assert not [message for message in answers(thief) if message["msg"].startswith("process")]
        archives = {}
        for name, visitor in (("owner", client), ("thief", thief)):
            assert visitor.post(JOIN, json=event(client, "download")).status_code == 200
            archives[name] = json.dumps(answers(visitor))
        assert "data:application/zip" in archives["owner"]
        assert "data:application/zip" not in archives["thief"]
        assert "nothing to download yet" in archives["thief"]

    def test_one_visitor_does_not_fill_the_queue(self, open_client: Callable[..., TestClient]) -> None:
        client = open_client(limits=Limits(queue=6, places=2), client=("10.0.0.1", 1))
        neighbour = another(client, client=("10.0.0.2", 1))
        choice = event(client, "draw")
        with client.app.state.model.lock:  # drawings wait for it
            # With other cookies and sessions it is still the same visitor; one is drawn, two wait.
            codes = [
                another(client, client=("10.0.0.1", n)).post(JOIN, json={**choice, "session_hash": f"s{n}"}).status_code
                for n in settled(range(6))
            ]
            assert codes == [200, 200, 200, 429, 429, 429]
            assert neighbour.post(JOIN, json=choice).status_code == 200
        assert "Drawn in" in json.dumps(answers(neighbour))

    @pytest.mark.parametrize(
        ("address", "other", "same"),
        [
            ("10.0.0.1", "10.0.0.2", False),
            ("::ffff:10.0.0.1", "10.0.0.1", True),
            ("2001:db8::1", "2001:db8::2:0:0:1", True),
            ("2001:db8::1", "2001:db8:0:1::1", False),
        ],
    )
    def test_who_is_one_visitor(
        self, open_client: Callable[..., TestClient], address: str, other: str, same: bool
    ) -> None:
        client = open_client(Access(behind_proxy=True), Limits(places=1))
        choice = event(client, "draw")
        with client.app.state.model.lock:  # drawings wait for it
            # What a visitor writes into the header stands before the address that the proxy adds.
            for n, said in zip(settled(range(2)), (address, f"9.9.9.9, {address}"), strict=True):
                sent = client.post(JOIN, json={**choice, "session_hash": f"s{n}"}, headers={"x-forwarded-for": said})
                assert sent.status_code == 200
            sent = client.post(JOIN, json={**choice, "session_hash": "o"}, headers={"x-forwarded-for": other})
            assert sent.status_code == (429 if same else 200)

    def test_requests_under_way(self, client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(guards, "MAX_OPEN", 0)
        assert client.get("/").status_code == 429

    def test_one_visitor_does_not_push_out_the_others(self, pipeline: Pipeline) -> None:
        studio = Studio({"tiny": pipeline}, Limits(sessions=8))
        kept = studio.session("page", "10.0.0.1")
        for n in range(100):
            studio.session(f"s{n}", "10.0.0.2")
        assert studio.session("page", "10.0.0.1") is kept

    def test_invented_sessions_are_forgotten(self, open_client: Callable[..., TestClient]) -> None:
        client = open_client(limits=Limits(sessions=4), client=("10.0.0.1", 1))
        neighbour = another(client, client=("10.0.0.2", 1))
        draw(neighbour)
        (mount,) = (route for route in client.app.routes if isinstance(route, Mount))
        blocks = mount.app.get_blocks()
        for n in range(8):
            assert client.post(PREDICT, json={**event(client, "stop"), "session_hash": f"s{n}"}).status_code == 200
        assert len(blocks.state_holder.session_data) <= 4 + 1
        assert neighbour.post(JOIN, json=event(client, "download")).status_code == 200
        assert "data:application/zip" in json.dumps(answers(neighbour))

    def test_no_event_is_kept(self, client: TestClient) -> None:
        (mount,) = (route for route in client.app.routes if isinstance(route, Mount))
        queue = mount.app.get_blocks()._queue
        for _ in range(3):
            assert client.post(JOIN, json=event(client, "download")).status_code == 200
            answers(client)
        until = time.monotonic() + 5  # the server forgets an event after its answer has gone
        while any(kept := [len(queue), len(queue.event_analytics), len(queue.event_ids_to_events)]):
            assert time.monotonic() < until, kept
            time.sleep(0.02)

    def test_answers_that_nobody_fetches(self, open_client: Callable[..., TestClient]) -> None:
        client = open_client()
        choice = event(client, "download")
        codes = []
        for _ in range(MAX_UNREAD + 5):
            codes.append(client.post(JOIN, json=choice).status_code)
            time.sleep(0.02)
        assert set(codes) <= {200, 429}
        assert codes[-1] == 429


def settled(numbers: range) -> Iterator[int]:
    """With a pause behind each, in which the server takes a request out of the queue if it can."""
    for number in numbers:
        yield number
        time.sleep(0.1)


class Server:
    """`softcfg ui` in a process of its own."""

    def __init__(self, model_folder: Path, *words: str) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "softcfg", "ui", str(model_folder), "--port", "0", *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        assert self.process.stdout is not None
        found = re.search(r":(\d+)/", self.process.stdout.readline())
        assert found
        self.port = int(found[1])

    def send(self, content: bytes, timeout: float = 5.0) -> bytes:
        """The first bytes of the answer to these bytes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout) as connection:
            with contextlib.suppress(ConnectionError):  # answered before all was sent
                connection.sendall(content)
            return connection.recv(4096)

    def alive(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request("GET", "/")
        status = connection.getresponse().status
        connection.close()
        return status == 200

    def end(self) -> str:
        """Ask it to end; returns what it has printed as errors."""
        self.process.send_signal(signal.SIGTERM)
        _, errors = self.process.communicate(timeout=20)
        return errors


@pytest.fixture(scope="module")
def server(model_folder: Path) -> Iterator[Server]:
    server = Server(model_folder, "--allowed-host", "Draw.Example")
    yield server
    if server.process.poll() is None:
        server.process.kill()
        server.process.communicate()


def request(body: bytes, *headers: str, line: str = f"POST {JOIN} HTTP/1.1") -> bytes:
    sized = [] if any("Transfer" in header for header in headers) else [f"Content-Length: {len(body)}"]
    lines = [line, "Host: 127.0.0.1", "Content-Type: application/json", *sized, *headers, "", ""]
    return "\r\n".join(lines).encode() + body


ATTACK = json.dumps({"data": [FILE], "fn_index": 0, "session_hash": "x"}).encode()
CHUNKED = "Transfer-Encoding: chunked"
RAW: dict[str, tuple[bytes, bytes]] = {
    "a device": (request(ATTACK), b"422"),
    "a device, in chunks": (request(b"%x\r\n%s\r\n0\r\n\r\n" % (len(ATTACK), ATTACK), CHUNKED), b"422"),
    "chunks without end": (request((b"10000\r\n" + b" " * 65536 + b"\r\n") * 20, CHUNKED), b"413"),
    "a body without an end": (request(b"").replace(b"Length: 0", b"Length: 1000000000"), b"413"),
    "two lengths": (request(ATTACK, "Content-Length: 5", f"Content-Length: {len(ATTACK)}"), b"400"),
    "length and chunks": (request(ATTACK, CHUNKED, "Content-Length: 5"), b"400"),
    "a length below zero": (request(b"").replace(b"Length: 0", b"Length: -1"), b"400"),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", b"400"),
    "no host, HTTP/1.0": (b"GET / HTTP/1.0\r\n\r\n", b"421"),
    "a name that was given": (b"HEAD / HTTP/1.1\r\nHost: draw.example\r\n\r\n", b"200"),
    "a name that was not": (b"HEAD / HTTP/1.1\r\nHost: evil.example\r\n\r\n", b"421"),
    "two hosts": (b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n\r\n", b"400"),
    "a long header": (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 200_000 + b"\r\n\r\n", b"400"),
    "a long address": (b"GET /?" + b"x" * 200_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", b"400"),
    "many headers": (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: x\r\n" * 50_000 + b"\r\n", b"400"),
    "another server's address": (b"GET http://evil.example/ HTTP/1.1\r\nHost: localhost\r\n\r\n", b"404"),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"400"),
    "a websocket": (
        b"GET /gradio_api/queue/join HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n",
        b"404",
    ),
    "a path up": (b"GET /static/../../../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n", b"404"),
    "a cross-site form": (
        request(ATTACK, "Origin: http://evil.example").replace(b"application/json", b"text/plain"),
        b"403",
    ),
}


class TestServer:
    """The process: it answers at once, lives on, and ends when it is asked to."""

    @pytest.mark.parametrize("name", RAW)
    def test_it_answers_at_once(self, server: Server, name: str) -> None:
        content, status = RAW[name]
        assert server.send(content).split()[1] == status

    def test_it_is_alive_after_all_and_ends(self, server: Server, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "fifo")
        for path in ("/dev/zero", "/dev/stdin", str(tmp_path / "fifo"), "/etc/passwd", "/proc/self/mem"):
            body = json.dumps({"data": [{**FILE, "path": path}], "fn_index": 0, "session_hash": "x"}).encode()
            assert b" 422 " in server.send(request(body))
        slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(20)]
        for connection in slow[:10]:
            connection.sendall(request(b"").replace(b"Length: 0", b"Length: 100"))
        for connection in slow[10:]:
            connection.sendall(b"GET / HTTP/1.1\r\nX: ")
        assert server.alive()
        assert server.end() == ""
        assert server.process.returncode == 128 + signal.SIGTERM
        for connection in slow:
            connection.close()

    def test_a_slow_body_is_given_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(guards, "BODY_SECONDS", 0.2)
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {
            "type": "http",
            "method": "POST",
            "path": JOIN,
            "scheme": "http",
            "query_string": b"",
            "headers": headers,
        }
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            await anyio.sleep(0.02)
            return {"type": "http.request", "body": b" ", "more_body": True}

        async def send(message: Any) -> None:
            sent.append(message)

        async def never(*_: Any) -> None:
            raise AssertionError

        waiting = SimpleNamespace(places=1, inputs=lambda route: {})
        anyio.run(guards.Guard(never, Access(), waiting), scope, receive, send)
        assert sent[0]["status"] == 408

    def test_large_bodies(self, client: TestClient) -> None:
        assert client.post(JOIN, content=b" " * (MAX_BODY + 1)).status_code == 413
