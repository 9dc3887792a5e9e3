"""`softcfg ui` from start to end."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from softcfg import UserError
from softcfg.cli.main import main


@pytest.mark.slow
def test_it_serves_until_it_is_interrupted(model_folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "softcfg", "ui", str(model_folder), "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"softcfg: tiny at (http://127\.0\.0\.1:\d+/) \(Ctrl-C ends it\)\n", line)
        assert found, line + process.stderr.read() if process.stderr else line
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(found[1], timeout=60) as response:
            assert b"softcfg" in response.read()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert errors == "softcfg: interrupted\n"


def test_an_address_that_is_taken(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["ui", str(model_folder), "--port", str(port)]) == 2
    assert capsys.readouterr().err == (
        f"softcfg: error: cannot listen on 127.0.0.1 port {port}: Address already in use; give another --host or "
        "--port\n"
    )


def test_an_address_that_is_none(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ui", str(model_folder), "--host", "nowhere.invalid"]) == 2
    error = capsys.readouterr().err
    assert "cannot listen on nowhere.invalid port 7860: " in error
    assert "while attempting" not in error
    pages = pytest.importorskip("softcfg.ui.page")
    with pytest.raises(UserError, match="host must be an address or a name, got ''"):
        pages.serve(None, "", 0, print)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--port", "70000"], "--port must be in 0..65535, got 70000"),
        (["--max-seconds", "0"], "--max-seconds must be more than 0"),
        (["--max-seconds", "nan"], "--max-seconds must be more than 0"),
        (["--max-queue", "-1"], "--max-queue must be more than 0"),
        (["--max-places", "0"], "--max-places must be more than 0"),
        (["--allowed-host", "https://draw.example"], "--allowed-host must be a name without scheme and port"),
        (["--allowed-host", "abc:80"], "got 'abc:80'"),
        (["fashoin"], "did you mean fashion"),
    ],
)
def test_mistakes(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ui", *words]) == 2
    assert said in capsys.readouterr().err


def test_without_gradio(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [name for name in sys.modules if name == "softcfg.ui.page"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("softcfg.ui.page", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["ui"]) == 2
    assert capsys.readouterr().err == (
        "softcfg: error: the web page needs the package gradio: pip install '.[ui]' in the clone, or "
        "'softcfg-0.1.0-py3-none-any.whl[ui]' from a wheel\n"
    )
