"""Arrays in .npz files, read as streams and never unpickled; what a header claims is checked against limits first."""

from __future__ import annotations

import contextlib
import io
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from softcfg import files
from softcfg.errors import UserError, clean
from softcfg.files import open_regular

LONGEST_HEADER = 10_000  # bytes of an array's header
LARGEST_DIRECTORY = 1 << 24  # bytes of the list of arrays
TAIL = 1 << 17  # bytes at the end of a zip file where the place of its list stands


@dataclass
class Member:
    """One array of an .npz file.

    Attributes:
        stream: its bytes, after the header.
        fortran: whether they are in Fortran order.
    """

    path: Path
    name: str
    stream: IO[bytes]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool

    def read(self, largest: int) -> NDArray[Any]:
        """Read the array, of at most `largest` bytes.

        Raises:
            UserError: it is larger, holds objects or is damaged.
        """
        size = math.prod(self.shape) * self.dtype.itemsize
        if size > largest:
            raise UserError(f"{self.name} of {self.path} has {size:,} bytes, more than {largest:,}, the limit")
        if self.dtype.hasobject:
            raise UserError(f"{self.name} of {self.path} cannot be read: it holds Python objects, which could run code")
        with reading(self.path, self.name):
            data = bytearray(size)
            fill(self.stream, data)
            finish(self.stream)
            return np.frombuffer(data, self.dtype).reshape(self.shape, order="F" if self.fortran else "C")


def is_npz(path: Path) -> bool:
    """Whether there is a regular file that looks like an .npz file; raises `UserError` if it cannot be read."""
    with files.reading(path), open_regular(path) as file:
        return zipfile.is_zipfile(file)


def names(path: Path) -> list[str]:
    """The names of the arrays in an .npz file."""
    with _archive(path) as archive:
        return [member.removesuffix(".npy") for member in archive.namelist() if member.endswith(".npy")]


@contextlib.contextmanager
def open_member(path: Path, name: str) -> Iterator[Member]:
    """Open an array of an .npz file.

    Raises:
        UserError: there is none of that name, or the file is damaged.
    """
    with _archive(path) as archive:
        if f"{name}.npy" not in archive.namelist():
            held = clean(", ".join(member.removesuffix(".npy") for member in archive.namelist()[:20]), 200)
            raise UserError(f"{path} has no array {name}, the images; it holds {held or 'nothing'}")
        with reading(path, name):
            stream = archive.open(f"{name}.npy")
            member = Member(path, name, stream, *_read_header(stream))
        with stream:
            yield member


def read_member(path: Path, name: str, largest: int) -> NDArray[Any]:
    """Read an array, of at most `largest` bytes, of an .npz file; raises `UserError` like `Member.read`."""
    with open_member(path, name) as member:
        return member.read(largest)


@contextlib.contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open_regular(path))
            if _directory_size(file) > LARGEST_DIRECTORY:
                raise UserError(f"{path} holds too many arrays: their list has more than {LARGEST_DIRECTORY:,} bytes")
            archive = stack.enter_context(zipfile.ZipFile(file))
        except (zipfile.BadZipFile, OSError, ValueError, struct.error, NotImplementedError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} is not an .npz file, or is truncated ({clean(error, 200)})") from error
        yield archive


def _directory_size(file: IO[bytes]) -> int:
    """The size that the list of members has by the end of a zip file; 0 where none is stated."""
    file.seek(max(0, file.seek(0, io.SEEK_END) - TAIL))
    tail = file.read()
    size = 0
    for mark, form, offset in ((b"PK\5\6", "<I", 12), (b"PK\6\6", "<Q", 40)):
        at = tail.rfind(mark)
        if at >= 0 and len(tail) >= at + offset + struct.calcsize(form):
            (stated,) = struct.unpack_from(form, tail, at + offset)
            size = max(size, 0 if stated == 0xFFFFFFFF else stated)
    return size


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any], bool]:
    """Shape, dtype and whether in Fortran order; `ValueError` for anything else, or a header that is too long."""
    version = np.lib.format.read_magic(stream)
    form = "<H" if version == (1, 0) else "<I"
    packed = stream.read(struct.calcsize(form))
    (length,) = struct.unpack(form, packed)
    if length > LONGEST_HEADER:
        raise ValueError(f"a header of {length:,} bytes; the limit is {LONGEST_HEADER:,}")
    header = io.BytesIO(packed + stream.read(length))
    # Version 3 differs from 2 in the encoding of field names alone, and our arrays have no fields.
    parse = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = parse(header)
    if any(not isinstance(side, int) or side < 0 for side in shape):
        raise ValueError(f"a shape of {shape}")
    return shape, dtype, fortran


def fill(stream: IO[bytes], data: bytearray) -> None:
    """Read into all of `data`."""
    view = memoryview(data)
    while view:
        read = stream.readinto(view)  # type: ignore[attr-defined]
        if not read:
            raise EOFError("it ends early")
        view = view[read:]


def finish(stream: IO[bytes]) -> None:
    """Make sure that all of an array was read, with which its checksum is compared."""
    if stream.read(1):
        raise ValueError("it is longer than its header says")


@contextlib.contextmanager
def reading(path: Path, name: str) -> Iterator[None]:
    """Turn errors of reading an array into one sentence."""
    try:
        yield
    except UserError:
        raise
    except (
        zipfile.BadZipFile, zlib.error, EOFError, ValueError, TypeError, SyntaxError, OSError, struct.error,
        RuntimeError, NotImplementedError, RecursionError, MemoryError, KeyError, OverflowError,
    ) as error:  # fmt: skip
        raise UserError(f"{path} is damaged: its array {name} cannot be read ({clean(error, 200)})") from error
