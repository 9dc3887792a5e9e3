"""What becomes of a command whose output streams are closed, full, or read no further."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import numpy as np
import pytest

from softcfg.cli.main import main

EXTRACTOR = "--reference {images} --extractor stand_in:factory"
SLOW = {"sweep", "plot"}  # to whom nobody listens: the others show it
# Commands that print: their words, and a file that they leave behind.
COMMANDS = {
    "sample": ("sample {model} --labels all --num-samples 6 --batch-size 2 --npz --output-dir {new}", "new.npz"),
    "decode": ("decode {run} --output-dir {new} --npz", "new.npz"),
    "status": ("runs status {run}", ""),
    "verify": ("runs verify {run}", ""),
    "export": ("runs export {run} --npz {new}.npz", "new.npz"),
    "eval": (f"eval {{images}} {EXTRACTOR} --no-cache --output {{new}}.json", "new.json"),
    "sweep": (f"sweep {{model}} --search guidance_scale=1,4 --sampler grid --num-samples 4 --batch-size 4 {EXTRACTOR} "
              "--cache-dir {cache} --output-dir {new}", "new/results.json"),
    "compare": ("compare {model} --methods cfg,softcfg --labels 0 --num-samples 2 --output-dir {new}",
                "new/comparison.json"),
    "trace": ("trace {model} --labels 0 --output {new}.safetensors", "new.safetensors"),
    "plot": ("plot {model} --labels 0 --output-dir {new}", "new/weights.png"),
    "models": ("models", ""),
    "bench": ("bench {model} --batch-sizes 1 --repeats 1", ""),
    "help": ("sample --help", ""),
}  # fmt: skip


def gone() -> TextIO:
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w")


def full() -> TextIO:
    return open("/dev/full", "w")


def closed() -> TextIO:
    with open(os.devnull, "w") as stream:
        return stream


def absent() -> None:
    """What Python has in place of a stream that was closed before it started."""


@pytest.fixture(scope="module")
def places(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("streams")
    images = folder / "images.npz"
    np.savez(images, np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8))
    run = folder / "run"
    assert main(["sample", str(model_folder), "--labels", "0", "--num-samples", "2", "--output-dir", str(run)]) == 0
    return {"model": model_folder, "images": images, "run": run, "cache": folder / "cache"}


@pytest.mark.parametrize(
    ("name", "stream", "code"),
    [
        *(pytest.param(name, gone, 0, marks=pytest.mark.slow if name in SLOW else ()) for name in COMMANDS),
        *((name, full, 2) for name in COMMANDS),
        *((name, stream, 0) for name in ("sample", "status") for stream in (closed, absent)),
    ],
)
def test_output_that_goes_nowhere(
    places: dict[str, Path],
    name: str,
    stream: Callable[[], TextIO | None],
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words, left = COMMANDS[name]
    output = stream()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", output)
        try:
            found = main(words.format(new=tmp_path / "new", **places).split())
        except SystemExit as end:  # of argparse
            found = int(end.code or 0)
        if output is not None:
            output.close()
    said = capsys.readouterr().err
    assert found == code, said
    assert ("softcfg: error: cannot print: No space left on device" in said) == bool(code)
    assert (tmp_path / left).exists()


@pytest.mark.parametrize("stream", [gone, closed, absent, full])
@pytest.mark.parametrize(("name", "code"), [("sample", 0), ("eval", 0), ("absent", 2)])
def test_errors_that_go_nowhere(
    places: dict[str, Path],
    name: str,
    code: int,
    stream: Callable[[], TextIO | None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a stream for errors and bars, commands do their work, and the exit code says how it ended."""
    words, left = COMMANDS.get(name, ("runs status {new}", ""))
    errors = stream()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", errors)
        assert main(words.format(new=tmp_path / "new", **places).split()) == code
        if errors is not None:
            errors.close()
    assert (tmp_path / left).exists()


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
@pytest.mark.parametrize(
    ("redirected", "code"),
    [
        ("| head -n 1", 0),
        pytest.param("<&- >&- 2>&-", 0, marks=pytest.mark.slow),
        pytest.param("> /dev/full 2> /dev/full", 2, marks=pytest.mark.slow),
    ],
)
def test_in_a_shell(places: dict[str, Path], redirected: str, code: int, tmp_path: Path) -> None:
    words = COMMANDS["sample"][0].format(new=tmp_path / "new", **places)
    script = f"'{sys.executable}' -m softcfg {words} {redirected}\nexit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "SOFTCFG_PRODUCT": "plain"}  # nothing is measured
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    with np.load(tmp_path / "new.npz") as file:
        assert file["arr_0"].shape == (6, 8, 8, 3)
