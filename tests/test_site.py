"""The documentation as a site."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OFFLINE = "import socket; socket.socket.connect = None; from mkdocs.__main__ import cli; cli()"


@pytest.mark.slow
def test_builds_strictly_and_without_a_network(tmp_path: Path) -> None:
    command = [sys.executable, "-c", OFFLINE, "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "INFO" in found.stderr, "where nothing is logged, no warning counts"
    assert " ".join(command[3:5]) in (ROOT / "Makefile").read_text()
    pages = list((tmp_path / "site").rglob("*.html"))
    assert {page.stem for page in pages} >= {"index", "start", "method", "models", "cluster", "evaluation", "released"}

    reference = (tmp_path / "site" / "api" / "guidance.html").read_text()
    for text in ("Step Normalisation", "guidance_scale_pow", "Raises"):
        assert text in reference
    loaded = re.compile(r'(?:<script[^>]* src|<link[^>]* rel="stylesheet"[^>]* href|<img[^>]* src)="(https?://[^"]+)"')
    assert not [address for page in pages for address in loaded.findall(page.read_text())]
