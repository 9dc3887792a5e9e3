"""Shard files: the images of one batch, whole or not at all, with a checksum over their content.

A shard is a safetensors file with the entries
    indices, labels   int64 [n]
    tokens            the codes of the images, int16 (int32 for codebooks beyond 32,768 codes) [n, T]
    pixels            uint8 [n, H, W, 3]
and metadata: the number of the shard, the fingerprint of the run, how many images were drawn at once, and the
SHA-256 of everything else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from softcfg.errors import UserError, clean
from softcfg.files import open_regular, write_atomically

FIELDS = ("indices", "labels", "tokens", "pixels")
DTYPES = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "U8": "|u1"}
LONGEST_HEADER = 1 << 16  # bytes
LARGEST = 1 << 30  # bytes of a shard


class DamagedShardError(UserError):
    """A shard file that is torn, altered, or of another run; the text says which."""


@dataclass
class Shard:
    """n images.

    Attributes:
        number: of the shard in its run.
        fingerprint: of the settings of its run.
        drawn_at_once: images in a batch as the model saw it; less than the run's batch size after memory ran out.
        indices, labels: int64 [n].
        codes: what the tokenizer decodes, integers [n, h w]; the entry `tokens` of the file.
        pixels: uint8 [n, H, W, 3].
    """

    number: int
    fingerprint: str
    drawn_at_once: int
    indices: np.ndarray
    labels: np.ndarray
    codes: np.ndarray
    pixels: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        """What is stored, by name, in the types that it is stored in."""
        small = not self.codes.size or self.codes.max() < 2**15
        return {
            "indices": self.indices.astype(np.int64),
            "labels": self.labels.astype(np.int64),
            "tokens": self.codes.astype(np.int16 if small else np.int32),
            "pixels": self.pixels,
        }


def write_shard(path: str | Path, shard: Shard) -> None:
    """Write a shard whole or not at all.

    Raises:
        UserError: the file cannot be written (a full disk, a vanished folder), or is too large to be read again.
    """
    from safetensors.numpy import save

    arrays = {name: np.ascontiguousarray(array) for name, array in shard.arrays().items()}
    metadata = {"shard": str(shard.number), "run": shard.fingerprint, "drawn_at_once": str(shard.drawn_at_once)}
    if (size := sum(array.nbytes for array in arrays.values())) > LARGEST - 2 * LONGEST_HEADER:
        raise UserError(f"a shard of {size:,} bytes is too large: the limit is 1 GiB; take a smaller batch size")
    metadata["sha256"] = _digest(metadata, arrays)
    write_atomically(path, _in_order(save(arrays), metadata), replace=True)


def _in_order(content: bytes, metadata: Mapping[str, str]) -> bytes:
    """Put metadata into a safetensors file, sorted, so that equal shards have equal bytes; the library shuffles it."""
    size = int.from_bytes(content[:8], "little")
    header = {"__metadata__": dict(sorted(metadata.items())), **json.loads(content[8 : 8 + size])}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def read_shard(path: str | Path) -> Shard:
    """Read a shard and check its checksum.

    Raises:
        DamagedShardError: the file is missing, torn or altered.
    """
    with _reading(path), open_regular(path, LARGEST) as file:
        header = _read_header(file)
        arrays = {name: _read_array(file, header, name) for name in FIELDS}
        metadata = dict(header["__metadata__"])
        expected = metadata.pop("sha256")
        if set(header) != {*FIELDS, "__metadata__"} or _digest(metadata, arrays) != expected:
            raise DamagedShardError(f"{path} is altered: its checksum is wrong")
        shapes = [array.shape for array in arrays.values()]
        if [len(shape) for shape in shapes] != [1, 1, 2, 4] or len({shape[0] for shape in shapes}) > 1:
            raise DamagedShardError(f"{path} does not hold images: its arrays have the shapes {shapes}")
        return Shard(
            int(metadata["shard"]), metadata["run"], int(metadata["drawn_at_once"]), *(arrays[name] for name in FIELDS)
        )


def glance(path: str | Path) -> tuple[str, int]:
    """The fingerprint of a shard's run and its number of images, from its header; the data is not read.

    Raises:
        DamagedShardError: the file is missing, or not as long as its header says.
    """
    with _reading(path), open_regular(path, LARGEST) as file:
        header = _read_header(file)
        run, count = header["__metadata__"]["run"], header["indices"]["shape"][0]
        if not isinstance(run, str) or not isinstance(count, int):
            raise DamagedShardError(f"{path} is altered: its header does not describe images")
        return run, count


@contextlib.contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    """Turn what goes wrong when a shard is read into a `DamagedShardError`."""
    try:
        yield
    except DamagedShardError:
        raise
    except OSError as error:
        raise DamagedShardError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        raise DamagedShardError(f"{path} is torn or altered: {clean(error, 80)}") from error


class _Header(dict[str, Any]):
    size = 0  # bytes before the data


def _read_header(file: BinaryIO) -> _Header:
    """The header of a shard whose length it describes."""
    size = int.from_bytes(file.read(8), "little")
    if not 0 < size <= LONGEST_HEADER:
        raise ValueError(f"a header of {size} bytes")
    header = _Header(json.loads(file.read(size)))
    header.size = 8 + size
    length = header.size + max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    if (found := os.fstat(file.fileno()).st_size) != length:
        raise ValueError(f"it has {found} bytes of {length}")
    return header


def _read_array(file: BinaryIO, header: _Header, name: str) -> np.ndarray:
    """Read one array into memory, once."""
    entry = header[name]
    begin, end = entry["data_offsets"]
    shape, dtype = tuple(entry["shape"]), np.dtype(DTYPES[entry["dtype"]])
    if min(shape, default=0) < 0 or begin < 0 or math.prod(shape) * dtype.itemsize != end - begin:
        raise ValueError(f"{name} of {end - begin} bytes")
    array = np.empty(shape, dtype)
    file.seek(header.size + begin)
    if array.size and file.readinto(array.reshape(-1).view(np.uint8).data) != array.nbytes:  # type: ignore[attr-defined]
        raise ValueError(f"{name} ends early")
    return array


def _digest(metadata: Mapping[str, str], arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over the metadata and over every array's name, type, shape and bytes."""
    digest = hashlib.sha256(json.dumps(dict(sorted(metadata.items()))).encode())
    for name in FIELDS:
        array = arrays[name]
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
