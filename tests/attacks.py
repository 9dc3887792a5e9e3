"""What tests of hostile input share: the bounds that reading it keeps, and nodes that are no files."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from softcfg import UserError

SECONDS = 2.0  # of the processor
MEMORY = 1 << 30  # bytes


def _memory(name: str) -> int:
    match = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return 1024 * int(match[1])


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """The block takes at most two seconds and 1 GB."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before, start = _memory("VmRSS"), time.process_time()
    yield
    assert time.process_time() - start < SECONDS
    assert _memory("VmHWM") - before < MEMORY


@contextlib.contextmanager
def refused(match: str = r"\w") -> Iterator[None]:
    """The block ends within the bounds, with one printable sentence that a user can act on."""
    with bounded(), pytest.raises(UserError, match=match) as caught:
        yield
    text = str(caught.value)
    assert text.isprintable()
    assert 10 < len(text) < 2500
    assert "Traceback" not in text


def fifo(path: Path) -> None:
    """A FIFO that nobody writes to."""
    os.mkfifo(path)


def link_to_zeros(path: Path) -> None:
    """A device that never ends."""
    path.symlink_to("/dev/zero")


def socket_file(path: Path) -> None:
    """A socket."""
    here = os.getcwd()
    os.chdir(path.parent)  # its path may have 108 characters at most
    try:
        with socket.socket(socket.AF_UNIX) as node:
            node.bind(path.name)
    finally:
        os.chdir(here)


NODES: dict[str, Callable[[Path], None]] = {
    "fifo": fifo,
    "zeros": link_to_zeros,
    "socket": socket_file,
    "folder": Path.mkdir,
}
