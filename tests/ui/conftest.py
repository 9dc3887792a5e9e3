"""A server of the page, and a real Chromium that opens it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import sync_playwright

from page_server import WAIT, Server
from softcfg.pipeline import Pipeline
from softcfg.ui.studio import Studio

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here; on Debian: apt install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pipeline(model_folder: Path) -> Pipeline:
    pipeline = Pipeline.from_pretrained(model_folder)
    assert pipeline.source is not None
    pipeline.source = replace(pipeline.source, entry=replace(pipeline.source.entry, examples={"Star": 5}))
    return pipeline


@pytest.fixture(scope="module")
def pause(pipeline: Pipeline) -> dict[str, float]:
    """How long a step takes at least."""
    pause = {"seconds": 0.0}
    pipeline.generator.register_forward_pre_hook(lambda *_: time.sleep(pause["seconds"]))
    return pause


@pytest.fixture(scope="module")
def server(pipeline: Pipeline, pause: dict[str, float], prompt_model_folder: Path) -> Iterator[Server]:
    server = Server(Studio({"tiny": pipeline, "words": Pipeline.from_pretrained(prompt_model_folder)}))
    yield server
    server.close()


@pytest.fixture
def open_page(browser: Any, server: Server, pause: dict[str, float]) -> Iterator[Callable[..., Any]]:
    """Opens the page at a query; no page may have had an error, or have asked another server for anything."""
    pause["seconds"] = 0.0
    contexts: list[Any] = []
    problems: list[str] = []
    foreign: list[str] = []

    def visit(query: str = "", **options: Any) -> Any:
        contexts.append(browser.new_context(viewport={"width": 1280, "height": 900}, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(WAIT)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: foreign.append(request.url) if not ours(request.url, server) else None)
        page.goto(server.address + query)
        page.wait_for_selector("#draw")
        return page

    yield visit
    for context in contexts:
        context.close()
    pause["seconds"] = 0.0
    deadline = time.monotonic() + WAIT / 1000
    while server.studio.active:  # what a page that was closed had drawn would keep the next one waiting
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert problems == []
    assert foreign == []


@pytest.fixture
def page(open_page: Callable[..., Any]) -> Any:
    return open_page()


def ours(address: str, server: Server) -> bool:
    return address.startswith((server.address, "data:", "blob:"))
