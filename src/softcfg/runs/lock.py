"""One job at a time in a run's folder."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import BinaryIO

from softcfg.errors import UserError
from softcfg.files import lock, open_own, open_regular, writing

NAME = "run.lock"
LONGEST = 1000  # bytes that say who holds the lock
PATIENCE = 0.2  # seconds; a look at the lock holds it for far less
LOCKED_BYTE = 1 << 30  # Windows locks bytes, which nobody else can then read: one far past the text


class Lock:
    """A lock on a folder that the operating system releases when its holder ends, however it ends.

    The file says who holds the lock; it stays when the lock is gone. This works over NFS if the mount has locks, and on
    Windows. On a file system without locks a warning is printed instead.
    """

    def __init__(self, folder: Path) -> None:
        """Take the lock.

        Raises:
            UserError: another job holds it; it is named.
        """
        path = folder / NAME
        with writing(path):
            self._file = open_own(path)
        try:
            free = _lock(self._file)
            until = time.monotonic() + PATIENCE
            while not free and time.monotonic() < until:  # somebody may only be looking, see `holder`
                time.sleep(PATIENCE / 10)
                free = _lock(self._file)
        except OSError as error:
            print(f"softcfg: {path} cannot be locked ({error.strerror}): start no second job on it", file=sys.stderr)
            return
        if not free:
            self._file.close()
            raise UserError(f"{folder} is in use by {holder(folder) or 'another job'}; wait for it or end it first")
        if os.fstat(self._file.fileno()).st_nlink > 1:
            return  # the file has another name as well, and what is in it may be something else's
        who = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        with writing(path):
            try:
                self._file.truncate(0)
                self._file.write(f"{json.dumps(who)}\n".encode())
                self._file.flush()
            except OSError:
                with contextlib.suppress(OSError):
                    self._file.close()
                raise

    def release(self) -> None:
        """Release the lock."""
        self._file.close()

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def holder(folder: Path) -> str | None:
    """Who works in the folder now, for a sentence; None if nobody does."""
    try:
        with open_regular(folder / NAME) as file:
            if _lock(file, probe=True):
                return None
            who = json.loads(file.read(LONGEST) or b"{}")
            return f"process {who['pid']} on {who['host']} (since {who['since']})"
    except (ValueError, KeyError, TypeError, RecursionError):
        return "another job"
    except OSError:
        return None


def _lock(file: BinaryIO, *, probe: bool = False) -> bool:
    """Lock a file that was just opened, until it is closed; return False if somebody else holds the lock.

    Args:
        probe: only see whether it is free; others that look as well do not count.

    Raises:
        OSError: there are no locks here.
    """
    try:
        return lock(file.fileno(), shared=probe)
    except ImportError:
        return _lock_byte(file, probe)


def _lock_byte(file: BinaryIO, probe: bool) -> bool:
    """The same on Windows."""
    try:
        import msvcrt
    except ImportError as error:
        raise OSError(errno.ENOSYS, "this system has no locks") from error
    modes = [msvcrt.LK_NBLCK, *([msvcrt.LK_UNLCK] if probe else [])]  # type: ignore[attr-defined,unused-ignore]
    try:
        for mode in modes:
            os.lseek(file.fileno(), LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(file.fileno(), mode, 1)  # type: ignore[attr-defined,unused-ignore]
    except OSError:
        return False
    finally:
        os.lseek(file.fileno(), 0, os.SEEK_SET)
    return True
