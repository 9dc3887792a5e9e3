"""One job at a time in a run's folder."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
import time
from pathlib import Path

from softcfg.errors import UserError

NAME = "run.lock"


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
            self._file = path.open("a+", encoding="utf-8")
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
        who = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        self._file.truncate(0)
        self._file.write(json.dumps(who) + "\n")
        self._file.flush()

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
        with (folder / NAME).open(encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return None
            except BlockingIOError:
                pass
            who = json.loads(file.read() or "{}")
            return f"process {who['pid']} on {who['host']} (since {who['since']})"
    except (ValueError, KeyError, TypeError):
        return "another job"
    except OSError:
        return None
