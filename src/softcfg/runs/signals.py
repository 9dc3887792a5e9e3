"""SIGTERM, as cluster schedulers send it, becomes an exception like Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Terminated(KeyboardInterrupt):
    """The process was asked to end by SIGTERM."""


@contextlib.contextmanager
def termination_raises() -> Iterator[None]:
    """Within the block, the first SIGTERM raises `Terminated` in the main thread; later ones are ignored.

    Files are written whole or not at all, so that it may be raised anywhere. A block within such a block changes
    nothing, and neither does one in another thread.
    """
    nested = signal.getsignal(signal.SIGTERM) is _end
    if nested or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(signum: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated
