"""What the server lets through, asked over its own interface."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from softcfg.pipeline import Pipeline
from softcfg.ui.guard import MAX_BODY
from softcfg.ui.page import application
from softcfg.ui.studio import Studio


@pytest.fixture(scope="module")
def client(model_folder: Path) -> Iterator[TestClient]:
    studio = Studio({"tiny": Pipeline.from_pretrained(model_folder)})
    with TestClient(application(studio)) as client:
        yield client


def test_the_page_is_there_and_loads_nothing_from_elsewhere(client: TestClient) -> None:
    response = client.get("/?seed=3")
    assert response.status_code == 200
    assert "default-src 'self'" in response.headers["content-security-policy"]
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "https://fonts." not in response.text
    assert client.get("/theme.css").status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=pyproject.toml",
        "/gradio_api/file/etc/passwd",
        "/gradio_api/proxy=http://127.0.0.1/",
        "/gradio_api/upload_progress?upload_id=1",
        "/gradio_api/stream/a/b/c/playlist.m3u8",
        "/gradio_api/runs",
        "/gradio_api/openapi.json",
        "/gradio_api/deep_link?session_hash=a",
        "/gradio_api/vibe-code/",
        "/monitoring",
        "/docs",
        "/openapi.json",
        "/static/../../../../etc/passwd",
        "/static/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "/static//etc/passwd",
        "/assets/..%5c..%5cetc/passwd",
        "/static/" + 300 * "a",
        "/assets/" + 2500 * "a/",
        "/?deep_link=../../secret",
        "/?deep_link=",
    ],
)
def test_files_and_foreign_servers_are_out_of_reach(client: TestClient, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 404
    assert response.text == "There is nothing here.\n"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
@pytest.mark.parametrize(
    "path", ["/gradio_api/upload", "/gradio_api/component_server", "/gradio_api/vibe-edit", "/login"]
)
def test_nothing_is_written(client: TestClient, method: str, path: str) -> None:
    assert client.request(method, path, files={"files": b"x"} if method == "POST" else None).status_code == 404


def test_large_requests_are_refused(client: TestClient) -> None:
    big = json.dumps({"data": ["x" * MAX_BODY], "fn_index": 0, "session_hash": "a"})
    response = client.post("/gradio_api/queue/join", content=big, headers={"content-type": "application/json"})
    assert response.status_code == 413
    assert response.text == f"A request may have at most {MAX_BODY} bytes.\n"


def test_large_requests_of_unknown_length_are_cut_off(client: TestClient) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * MAX_BODY

    response = client.post("/gradio_api/queue/join", content=endless(), headers={"content-type": "application/json"})
    assert response.status_code >= 400


def test_the_functions_behind_the_page_cannot_be_listed(client: TestClient) -> None:
    assert client.get("/gradio_api/info").status_code == 404
    config = client.get("/config").json()
    assert len(config["dependencies"]) > 8
    assert all(
        dependency.get("api_visibility") == "private"
        for dependency in config["dependencies"]
        if dependency["backend_fn"]
    )
