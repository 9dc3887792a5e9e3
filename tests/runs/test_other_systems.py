"""Systems without what Linux has: its modules, its flags and its way with folders are taken away, as on Windows."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from softcfg import Pipeline, RunRequest, UserError, draw_run
from softcfg.files import open_own, write_atomically
from softcfg.runs.lock import Lock, holder

FLAGS = ("O_NONBLOCK", "O_CLOEXEC", "O_NOFOLLOW")


def without_posix(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fcntl, none of its flags, and a folder is no file that can be opened."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    for flag in FLAGS:
        monkeypatch.delattr(os, flag)
    usual = os.open

    def opened(path: Any, *args: Any, **kwargs: Any) -> int:
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return usual(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", opened)


def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a msvcrt, which locks the byte at the place of a descriptor until that is closed."""
    without_posix(monkeypatch)
    held: dict[tuple[int, int], int] = {}

    def is_open(descriptor: int | None, node: int) -> bool:
        try:
            return descriptor is not None and os.fstat(descriptor).st_ino == node
        except OSError:
            return False

    def locking(descriptor: int, mode: int, count: int) -> None:
        byte = os.fstat(descriptor).st_ino, os.lseek(descriptor, 0, os.SEEK_CUR)
        owner = held.get(byte)
        if mode == module.LK_UNLCK:
            if owner != descriptor:
                raise OSError(errno.EACCES, "not locked")
            del held[byte]
            return
        if owner != descriptor and is_open(owner, byte[0]):  # a number is used again once it is closed
            raise OSError(errno.EACCES, "Permission denied")
        held[byte] = descriptor

    module = SimpleNamespace(LK_NBLCK=2, LK_UNLCK=0, locking=locking)
    monkeypatch.setitem(sys.modules, "msvcrt", module)


SYSTEMS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {"windows": windows, "without locks": without_posix}


def test_one_job_at_a_time_on_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    windows(monkeypatch)
    assert holder(tmp_path) is None
    with Lock(tmp_path):
        for _ in range(2):  # to look leaves no lock behind
            assert f"process {os.getpid()} on " in str(holder(tmp_path))
            with pytest.raises(UserError, match=r"is in use by process \d+ on .* \(since .*\); wait for it"):
                Lock(tmp_path)
    assert holder(tmp_path) is None
    assert holder(tmp_path) is None
    Lock(tmp_path).release()


def test_a_system_without_locks_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_posix(monkeypatch)
    monkeypatch.setitem(sys.modules, "msvcrt", None)
    with Lock(tmp_path), Lock(tmp_path):
        assert holder(tmp_path) is None
    assert capsys.readouterr().err.count("cannot be locked (this system has no locks): start no second job on it") == 2


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_run_is_drawn_and_continued(model_folder: Path, tmp_path: Path, system: str) -> None:
    request = RunRequest(Pipeline.from_pretrained(model_folder), labels=[0, 1, 2], num_samples=6, batch_size=2)
    usual = draw_run(request, tmp_path / "usual")
    with pytest.MonkeyPatch.context() as patch:
        SYSTEMS[system](patch)
        other = draw_run(request, tmp_path / "other")
        (other.path / "shards" / other.shard_path(1).name).unlink()
        other = draw_run(request, tmp_path / "other")
    for number in range(3):
        assert np.array_equal(usual.read(number).pixels, other.read(number).pixels)


@pytest.mark.parametrize("system", SYSTEMS)
def test_files_are_written_whole_and_links_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    SYSTEMS[system](monkeypatch)
    write_atomically(tmp_path / "file", b"one\r\n\x1a")
    write_atomically(tmp_path / "file", b"two\n\x1a")
    assert (tmp_path / "file").read_bytes() == b"two\n\x1a"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with pytest.raises(OSError, match="it is a link, not a regular file"):
        open_own(tmp_path / "link")


def test_it_is_imported_without_fcntl() -> None:
    program = """
import sys
sys.modules["fcntl"] = None
import softcfg, softcfg.cli.main, softcfg.runs, softcfg.tuning, softcfg.evaluation, softcfg.inspection, softcfg.pipeline
import softcfg.cli.sample, softcfg.cli.eval, softcfg.cli.runs, softcfg.cli.sweep
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
