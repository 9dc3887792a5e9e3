"""The benchmark for GPUs runs on a CPU in small, and keeps what it has found when a part fails."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from softcfg import doctor


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(doctor, "TESTS", {"sound": lambda device: (True, "fine")})
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    yield
    for backend, allowed in zip(backends, before, strict=True):
        backend.allow_tf32 = allowed


def run(tmp_path: Path, *words: str) -> tuple[int, dict[str, list[dict[str, Any]]]]:
    output = tmp_path / "gpu.jsonl"
    code = gpu.main(["--small", "--output", str(output), *words])
    found: dict[str, list[dict[str, Any]]] = {}
    for line in output.read_text().splitlines():
        result = json.loads(line)
        found.setdefault(result.pop("kind"), []).append(result)
    return code, found


def test_it_measures_all_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = run(tmp_path)
    assert code == 0
    assert "failed" not in found
    assert "left out" not in found
    assert found["check"] == [{"name": "sound", "ok": True, "detail": "fine"}]
    assert [(row["batch"], row["cache"]) for row in found["steps"]] == [(1, "float32"), (2, "float32"), (2, "int8")]
    (profile,) = found["profile"]
    assert [whole.get("pixels") for whole in found["images"]] == [None, "bfloat16"]
    for whole in found["images"]:
        assert whole["images/s"] == pytest.approx(2 / whole["SoftCFG, s a batch"])
    assert profile["kernels"] > len(profile["longest"]) > 0
    for row in found["steps"]:
        assert row["SoftCFG"] > 0
        assert row["bound"] > 0
        assert row["of bound"] == pytest.approx(row["bound"] / row["SoftCFG"])
        assert ("released CFG" in row) == (row["cache"] == "float32")
        seconds = 1e-3 * (row["SoftCFG"] * 64 / row["batch"] + row["pixels, ms"])
        assert row["images/s"] == pytest.approx(1 / seconds)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "all checks passed"
    assert sum(line.startswith("| fashion-small") for line in lines) == 3


@pytest.mark.parametrize(
    ("error", "kind", "why"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "left out", "out of memory"),
        (RuntimeError("a kernel failed\nmore"), "failed", "a kernel failed"),
    ],
)
def test_a_part_that_fails_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: str, why: str
) -> None:
    steps = gpu.steps

    def failing(generator: Any, baseline: Any, batch: int, repeats: int) -> dict[str, Any]:
        if batch == 1:
            raise error
        return steps(generator, None, batch, repeats)

    monkeypatch.setattr(gpu, "steps", failing)
    code, found = run(tmp_path, "--only", "steps")
    assert code == 0
    (left,) = found[kind]
    assert left["why"] == why
    assert "in failing\n" in left["traceback"]
    assert [row["batch"] for row in found["steps"]] == [2, 2]


def test_what_there_is_no_time_for_is_said(tmp_path: Path) -> None:
    code, found = run(tmp_path, "--limit", "0")
    assert code == 0
    assert [left["why"] for left in found["left out"]] == ["no time is left"] * (3 + len(gpu.Plan.small().points))
    assert "steps" not in found


def test_a_check_that_is_off_or_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: torch.device) -> tuple[bool, str]:
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(doctor, "TESTS", {"sound": lambda device: (False, "off")})
    assert run(tmp_path, "--only", "check")[0] == 1
    monkeypatch.setattr(doctor, "TESTS", {"broken": broken})
    code, found = run(tmp_path, "--only", "check")
    assert code == 1
    assert found["failed"][0]["why"] == "a kernel failed"


def test_it_goes_on_with_what_was_not_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, "--only", "steps fashion-small float32 1")
    _, found = run(tmp_path, "--only", "steps", "--resume")
    assert [(row["batch"], row["cache"]) for row in found["steps"]] == [(1, "float32"), (2, "float32"), (2, "int8")]
    assert sum(line.startswith("| fashion-small") for line in capsys.readouterr().out.splitlines()) == 1 + 3


def test_it_wants_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "there is no GPU" in capsys.readouterr().err
