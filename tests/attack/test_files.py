"""The mechanisms by which files are opened and written, and text of others is quoted."""

import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from attacks import NODES
from made_runs import complete
from softcfg import Pipeline
from softcfg.errors import UserError, clean, quote
from softcfg.evaluation import evaluate, open_source
from softcfg.files import (
    as_path,
    hash_file,
    is_file,
    is_folder,
    make_folder,
    open_atomically,
    open_own,
    open_regular,
    read_bounded,
    read_text,
    remove_temporary,
    reopened,
    write_atomically,
)
from softcfg.runs import RunRequest, draw_run
from softcfg.runs.export import export_npz
from softcfg.runs.folder import RunFolder
from softcfg.zoo import resolve


@pytest.mark.timeout(20)
@pytest.mark.parametrize("node", NODES.values(), ids=NODES)
@pytest.mark.parametrize("opener", [open_regular, open_own])
def test_only_regular_files_are_opened(tmp_path: Path, node: Callable[[Path], None], opener: Callable) -> None:
    node(tmp_path / "node")
    with pytest.raises(OSError, match=r"not a regular file|Is a directory|No such device"):
        opener(tmp_path / "node")


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "\udc80" * 300, "", "a/" * 3000])
def test_names_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    path = f"{tmp_path}/{name}"
    with pytest.raises(OSError, match=r"."):
        read_bounded(path, 10)
    with pytest.raises(UserError) as caught:
        write_atomically(path, b"x")
    assert str(caught.value).isprintable()
    assert not is_file(path)
    assert not is_folder(path) or not name
    assert list(tmp_path.iterdir()) == []


def test_an_empty_path_is_not_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipe: Pipeline
) -> None:
    run = complete(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    for use in (
        lambda: make_folder(""),
        lambda: draw_run(RunRequest(pipe, [0]), ""),
        lambda: pipe.save_pretrained(""),
        lambda: export_npz(run, ""),
        lambda: RunFolder.open(""),
        lambda: resolve(""),
        lambda: open_source(""),
        lambda: evaluate(np.zeros((2, 4, 4, 3), np.uint8), save_stats=""),
        lambda: Pipeline.from_pretrained("fashion", generator_checkpoint=""),
        lambda: as_path(3),  # type: ignore[arg-type, return-value]
    ):
        with pytest.raises(UserError, match=r"path"):
            use()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_sizes_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_bounded(path, 5) == b"12345"
    for limit in (0, 4):
        with pytest.raises(OSError, match="larger than"):
            read_bounded(path, limit)
    with pytest.raises(OSError, match="larger than"):
        read_bounded("/proc/self/maps", 10)  # a file of unknown size


def test_texts_are_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"\xef\xbb\xbfgr\xc3\xbcn")
    assert read_text(path, 100) == "grün"
    path.write_bytes(b"gr\xfcn")
    with pytest.raises(OSError, match="no UTF-8 text"):
        read_text(path, 100)


def test_the_very_file_is_reopened(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("first")
    with open_regular(path) as file:
        path.unlink()
        path.write_text("second")
        assert Path(reopened(file)).read_text() == "first"


def test_hashes_of_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: No such file"):
        hash_file(tmp_path / "gone")


# ---- writing


def test_a_link_is_written_through_and_stays(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "target"
    for before in (None, b"old"):
        link = tmp_path / f"link-{before}"
        link.symlink_to(target)
        if before:
            target.write_bytes(before)
        write_atomically(link, b"new")
        assert link.is_symlink()
        assert target.read_bytes() == b"new"
        assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_in_our_own_folders_a_link_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / "link").symlink_to("victim")
    write_atomically(tmp_path / "link", b"new", replace=True)
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "victim").read_bytes() == b"precious"
    assert (tmp_path / "link").read_bytes() == b"new"


def test_a_fifo_is_written_to(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(path.read_bytes()))
    reader.start()
    write_atomically(path, b"content")
    reader.join(10)
    assert read == [b"content"]
    assert stat.S_ISFIFO(path.stat().st_mode)
    assert [path.name for path in tmp_path.iterdir()] == ["fifo"]


def test_a_device_is_written_to(tmp_path: Path) -> None:
    path = tmp_path / "null"
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))  # like /dev/null
        path.write_bytes(b"")
    except PermissionError:
        pytest.skip("devices cannot be made here")
    write_atomically(path, b"content")
    assert stat.S_ISCHR(path.stat().st_mode)
    assert [path.name for path in tmp_path.iterdir()] == ["null"]


def test_temporary_names_cannot_be_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    replace = os.replace
    monkeypatch.setattr("os.replace", lambda one, other: names.append(Path(one).name) or replace(one, other))
    for _ in range(3):
        write_atomically(tmp_path / "file", b"x")
    assert len(set(names)) == 3
    assert not any(str(os.getpid()) in name.split(".") for name in names)


def test_a_planted_temporary_file_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secrets.token_hex", lambda _: "0" * 16)
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / f".file.{'0' * 16}.tmp").symlink_to("victim")
    with pytest.raises(UserError, match="cannot write"):
        write_atomically(tmp_path / "file", b"x")
    assert (tmp_path / "victim").read_bytes() == b"precious"


def test_only_what_writers_left_is_removed(tmp_path: Path) -> None:
    left = [f".a.json.{'0f' * 8}.tmp", ".a.json.host.123.tmp"]
    kept = [".mine.tmp", "a.tmp", ".a.json.tmp"]
    for name in (*left, *kept):
        (tmp_path / name).write_text("x")
    (tmp_path / f".folder.{'0f' * 8}.tmp").mkdir()
    remove_temporary(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, f".folder.{'0f' * 8}.tmp"])


def test_the_mode_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


# ---- quoting

FOREIGN = [
    ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
    ("two\nlines\r", r"two\nlines\r"),
    ("\u202egnp.exe", r"\u202egnp.exe"),
    ("half \ud800", r"half \ud800"),
    ("nul\0", r"nul\x00"),
    ("\x9b31m", r"\x9b31m"),
    ("grün 猫", "grün 猫"),
]


@pytest.mark.parametrize(("text", "shown"), FOREIGN)
def test_foreign_text_is_shown_by_escapes(text: str, shown: str) -> None:
    assert clean(text) == shown
    assert shown.rstrip("'\"") in quote(text)
    assert str(UserError(f"a file named {text}")) == f"a file named {shown}"


def test_foreign_text_is_cut() -> None:
    assert clean("x" * 5000, 10) == "xxxxxxxxxx... (5,000 characters)"
    assert len(str(UserError("x" * 10**6))) < 2100
    laughs: list = ["ha"] * 10
    for _ in range(20):
        laughs = [laughs] * 10
    for value in (laughs, 10**10_000, dict.fromkeys(range(999), "x" * 999), "x" * 10**7, b"x" * 10**6):
        assert len(quote(value)) < 600
    assert quote(-1) == "-1"
    assert quote("a") == "'a'"


# ---- what writers leave that are killed


KILLED = """
import os, signal, sys
from pathlib import Path
from softcfg.files import open_atomically
with open_atomically(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_next_writer_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    for name in ("images.npz", "images.npz.npz"):
        assert (
            subprocess.run([sys.executable, "-c", KILLED, tmp_path / name], check=False).returncode == -signal.SIGKILL
        )
    left = sorted(path.name for path in tmp_path.iterdir())
    assert len(left) == 2
    with open_atomically(tmp_path / "images.npz") as file:
        file.write(b"whole")
    assert [path for path in tmp_path.iterdir() if path.name in left] == [tmp_path / left[1]]  # of another file
    remove_temporary(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["images.npz"]


def test_what_is_being_written_is_not_taken_for_left_behind(tmp_path: Path) -> None:
    with open_atomically(tmp_path / "file") as first:
        first.write(b"first")
        first.flush()
        with open_atomically(tmp_path / "file") as second:
            second.write(b"second")
        remove_temporary(tmp_path)
        assert len(list(tmp_path.iterdir())) == 2
    assert (tmp_path / "file").read_bytes() == b"first"
