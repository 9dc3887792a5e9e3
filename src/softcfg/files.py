"""Writing files so that a file is there whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from softcfg.errors import UserError

TEMPORARY = ".tmp"


def write_atomically(path: str | Path, content: bytes, *, durable: bool = True) -> None:
    """Write `content` to a temporary file beside `path` and rename it.

    Args:
        durable: flush the file and its folder to the disk, so that the file also survives a crash of the machine.

    Raises:
        UserError: the file cannot be written; nothing is left behind.
    """
    with open_atomically(path, durable=durable) as file:
        file.write(content)


@contextlib.contextmanager
def open_atomically(path: str | Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`; it is renamed to `path` when the block ends without an error.

    Raises:
        UserError: the file cannot be written; nothing is left behind.
    """
    path = Path(path)
    # Processes on several machines may write into one folder.
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}{TEMPORARY}")
    try:
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
            if durable:
                _flush_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def remove_temporary(folder: Path) -> None:
    """Remove what writers that were killed left in `folder`."""
    for path in folder.glob(f".*{TEMPORARY}"):
        path.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    """Make a rename durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: str | Path) -> Path:
    """Create `path` and its parents and make sure that files can be written there; raises `UserError` if not."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"cannot write into folder {path}: {error.strerror or error}") from error
    return path


def hash_file(path: str | Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
