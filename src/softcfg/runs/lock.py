"""One job at a time in a run's folder."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sys
import time
from pathlib import Path

from softcfg.errors import UserError
from softcfg.files import open_own, open_regular

NAME = "run.lock"
LONGEST = 1000  # bytes that say who holds the lock


class Lock:
    """A lock on a folder that the operating system takes away when its holder ends, however it ends.

    The file says who holds the lock; it stays when the lock is gone. It works over NFS where the mount has
    locks. On a file system without any, a warning takes their place.
    """

    def __init__(self, folder: Path) -> None:
        """Take the lock.

        Raises:
            UserError: another job holds it; it is named.
        """
        path = folder / NAME
        try:
            self._file = open_own(path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise UserError(
                f"{folder} is in use by {holder(folder) or 'another job'}; wait for it or end it first"
            ) from error
        except OSError as error:
            print(f"softcfg: {path} cannot be locked ({error.strerror}): start no second job on it", file=sys.stderr)
            return
        if os.fstat(self._file.fileno()).st_nlink > 1:
            return  # the file has another name as well, and what is in it may be something else's
        who = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        try:
            self._file.truncate(0)
            self._file.write(f"{json.dumps(who)}\n".encode())
            self._file.flush()
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.close()
            raise UserError(f"cannot write {path}: {error.strerror}") from error

    def release(self) -> None:
        """Let the next job in."""
        self._file.close()

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def holder(folder: Path) -> str | None:
    """Who works in the folder now, for a sentence; None if nobody does."""
    try:
        with open_regular(folder / NAME) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return None
            except BlockingIOError:
                pass
            who = json.loads(file.read(LONGEST) or b"{}")
            return f"process {who['pid']} on {who['host']} (since {who['since']})"
    except (ValueError, KeyError, TypeError, RecursionError):
        return "another job"
    except OSError:
        return None
