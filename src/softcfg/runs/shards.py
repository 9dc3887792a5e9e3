"""Shard files: the images of one batch, whole or not at all, with a checksum over all they mean.

A shard is a safetensors file with the entries
    indices, labels   int64 [n]
    tokens            the codes of the images, int16 (int32 for codebooks beyond 32,768 codes) [n, T]
    pixels            uint8 [n, H, W, 3]
and metadata: the number of the shard, the fingerprint of the run, how many images were drawn at once, and the
SHA-256 of everything else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from softcfg.errors import UserError
from softcfg.files import write_atomically

FIELDS = ("indices", "labels", "tokens", "pixels")
LONGEST_HEADER = 1 << 16


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
        UserError: the file cannot be written (a full disk, a vanished folder).
    """
    from safetensors.numpy import save

    arrays = {name: np.ascontiguousarray(array) for name, array in shard.arrays().items()}
    metadata = {"shard": str(shard.number), "run": shard.fingerprint, "drawn_at_once": str(shard.drawn_at_once)}
    metadata["sha256"] = _digest(metadata, arrays)
    write_atomically(path, save(arrays, metadata))


def read_shard(path: str | Path) -> Shard:
    """Read a shard and check its checksum.

    Raises:
        DamagedShardError: the file is missing, torn or altered.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DamagedShardError(f"{path} cannot be read: {error.strerror}") from error
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        metadata = dict(header["__metadata__"])
        arrays = load(content)
        expected = metadata.pop("sha256")
        if set(arrays) != set(FIELDS) or _digest(metadata, arrays) != expected:
            raise DamagedShardError(f"{path} is altered: its checksum is wrong")
        return Shard(
            int(metadata["shard"]), metadata["run"], int(metadata["drawn_at_once"]), *(arrays[name] for name in FIELDS)
        )
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        if isinstance(error, DamagedShardError):
            raise
        raise DamagedShardError(f"{path} is torn or altered: {' '.join(str(error).split())[:80]}") from error


def glance(path: Path) -> tuple[str, int]:
    """The fingerprint of a shard's run and its number of images, from its header; the data is not read.

    Raises:
        DamagedShardError: the file is missing, or not as long as its header says.
    """
    try:
        with path.open("rb") as file:
            header = _read_header(file)
        length = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        if path.stat().st_size != header.size + length:
            raise DamagedShardError(f"{path} is torn: it has {path.stat().st_size} bytes of {header.size + length}")
        return header["__metadata__"]["run"], header["indices"]["shape"][0]
    except OSError as error:
        raise DamagedShardError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        if isinstance(error, DamagedShardError):
            raise
        raise DamagedShardError(f"{path} is torn: its header cannot be read") from error


class _Header(dict[str, Any]):
    size = 0  # bytes before the data


def _read_header(file: BinaryIO) -> _Header:
    size = int.from_bytes(file.read(8), "little")
    if not 0 < size <= LONGEST_HEADER:
        raise ValueError(f"a header of {size} bytes")
    header = _Header(json.loads(file.read(size)))
    header.size = 8 + size
    return header


def _digest(metadata: Mapping[str, str], arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over the metadata and over every array's name, type, shape and bytes."""
    digest = hashlib.sha256(json.dumps(dict(sorted(metadata.items()))).encode())
    for name in FIELDS:
        array = arrays[name]
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
