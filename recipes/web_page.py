"""Draw the picture of the web page: `python -m recipes.web_page docs/images/ui.png` (needs Chromium)."""

from __future__ import annotations

import queue
import shutil
import sys
import threading

from playwright.sync_api import sync_playwright

from softcfg.pipeline import Pipeline
from softcfg.ui.page import serve
from softcfg.ui.studio import Studio

MODELS = ("emoji", "fashion", "fashion-small")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def draw(path: str) -> None:
    """Save what the page looks like after an example was drawn and a token chosen."""
    studio = Studio({name: Pipeline.from_pretrained(name) for name in MODELS})
    addresses: queue.Queue[str] = queue.Queue()
    threading.Thread(target=serve, args=(studio, "127.0.0.1", 0, addresses.put), daemon=True).start()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        page = browser.new_page(viewport={"width": 1400, "height": 900}, color_scheme="light")
        page.goto(addresses.get(timeout=60))
        page.get_by_role("button", name="penguin, cartoon style").click()
        page.get_by_text("Drawn in").wait_for(timeout=300_000)
        page.locator(".canvas").nth(2).click(position={"x": 110, "y": 60})
        page.locator(".inspector").wait_for(timeout=60_000)
        page.screenshot(path=path, animations="disabled")
        browser.close()


if __name__ == "__main__":
    draw(sys.argv[1])
