"""The documentation as a site."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from softcfg.zoo import MODELS

ROOT = Path(__file__).parents[1]
OFFLINE = "import socket; socket.socket.connect = None; from mkdocs.__main__ import cli; cli()"


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def test_every_model_is_listed() -> None:
    page = (ROOT / "docs" / "models.md").read_text()
    assert [name for name in MODELS if f"`{name}`" not in page] == []


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly and without a network."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-c", OFFLINE, "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "INFO" in found.stderr, "where nothing is logged, no warning counts"
    assert " ".join(command[3:5]) in (ROOT / "Makefile").read_text()
    return folder


@pytest.mark.slow
def test_pages(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert {page.stem for page in pages} >= {"index", "start", "method", "models", "cluster", "evaluation", "released"}

    reference = (site / "api" / "guidance.html").read_text()
    for text in ("Step Normalisation", "guidance_scale_pow", "Raises"):
        assert text in reference
    loaded = re.compile(r'(?:<script[^>]* src|<link[^>]* rel="stylesheet"[^>]* href|<img[^>]* src)="(https?://[^"]+)"')
    assert not [address for page in pages for address in loaded.findall(page.read_text())]
    for page in ("start.html", "imagenet.html", "api/index.html"):
        for link in ("md-footer__link--prev", "md-footer__link--next"):
            assert link in (site / page).read_text(), (page, link)


@pytest.mark.slow
def test_in_a_browser_from_the_disk(site: Path) -> None:
    """The search finds pages, and no table runs off the screen of a phone."""
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium here; on Debian: apt install chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for name in ("index.html", "api/guidance.html"):
            page = browser.new_page(viewport={"width": 1400, "height": 900})
            page.goto(f"file://{site / name}")
            page.click("input.md-search__input")
            page.keyboard.type("perturbation", delay=20)
            page.wait_for_selector(".md-search-result__item", state="attached", timeout=30_000)
        phone = browser.new_page(viewport={"width": 390, "height": 844})
        wide = []
        for path in sorted(site.rglob("*.html")):
            phone.goto(f"file://{path}")
            widths = phone.evaluate("[...document.querySelectorAll('.md-typeset table')].map(t => t.scrollWidth)")
            wide += [(path.name, width) for width in widths if width > 390]
        assert wide == []
        browser.close()
