"""The results, one line of JSON a point, which any number of processes append to; and who works on which point."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from recipes.study.points import Row, key
from softcfg.errors import UserError
from softcfg.files import make_folder, read_bounded, reading

LARGEST = 1 << 28  # bytes of a file of results


def read(path: Path) -> list[Row]:
    """All rows of a file of results; a line that a kill left torn does not count.

    Raises:
        UserError: a line is no result.
    """
    rows: list[Row] = []
    content = b""
    if path.exists():
        with reading(path):
            content = read_bounded(path, LARGEST)
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
            key(row), row["weights"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}, line {number}, is no result; take it out") from None
        rows.append(row)
    return rows


def rows_of(model: str, path: Path) -> dict[str, Row]:
    """The rows by `key` of the model of that name, as it was when it was last measured; it need not be there."""
    rows = [row for row in read(path) if row.get("model") == model]
    return {key(row): row for row in rows if row["weights"] == rows[-1]["weights"]}


class Results:
    """The file of results, of one model or several; a model is told by the hash of its weights."""

    def __init__(self, path: Path, weights: str) -> None:
        self.path = path
        self.weights = weights
        self.claims = make_folder(path.parent / ".claims")

    def rows(self) -> dict[str, Row]:
        """The rows of this model by their `key`."""
        return {key(row): row for row in read(self.path) if row["weights"] == self.weights}

    def append(self, row: Row) -> None:
        """Add a line, whole."""
        line = json.dumps({**row, "weights": self.weights}, allow_nan=False) + "\n"
        with self.path.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)  # what a kill left torn
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    @contextlib.contextmanager
    def claim(self, settings: Row) -> Iterator[bool]:
        """Whether this process may work on a point: nobody else does, and it is not done.

        The claim is a lock that the operating system takes away with the process that holds it.
        """
        name = hashlib.sha256((self.weights + key(settings)).encode()).hexdigest()[:24]
        with (self.claims / name).open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield key(settings) not in self.rows()
