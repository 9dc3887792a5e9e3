"""Random numbers that depend on nothing but the seed and the image's index.

Image n of seed s reads the Philox-4x64 stream with key (s, n): a counter-based generator, so any image's
numbers can be made alone, on any machine, in any batch and by any number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from softcfg.errors import UserError, quote, require_uint64
from softcfg.models.ids import IdsLike
from softcfg.nn.precision import has_float64

BITS = 53  # of a uniform number


def image_uniforms(seed: int, indices: Sequence[int], count: int) -> Tensor:
    """Uniform numbers in [0, 1): float64 [len(indices), count], row r from the stream (seed, indices[r]).

    Raises:
        UserError: the seed or an index is not in 0 .. 2^64 - 1.
    """
    return ImageStreams(seed, indices).uniforms(count)


class ImageStreams:
    """The streams of several images, for decoding that does not know ahead how many numbers it needs.

    Raises:
        UserError: the seed or an index is not in 0 .. 2^64 - 1.
    """

    def __init__(self, seed: int, indices: Sequence[int]) -> None:
        seed = require_uint64(seed, "seed")
        self._streams = [philox(seed, require_uint64(index, "image index")) for index in indices]

    def __len__(self) -> int:
        return len(self._streams)

    def uniforms(self, count: int) -> Tensor:
        """The next `count` numbers in [0, 1) of every image, float64 [len(self), count]."""
        rows = np.empty((len(self._streams), count), dtype=np.float64)
        for row, stream in zip(rows, self._streams, strict=True):
            # The upper 53 bits of a word make a double.
            row[:] = (stream.random_raw(count) >> np.uint64(64 - BITS)) * 2.0**-BITS
        return torch.from_numpy(rows)


def image_indices(indices: IdsLike | None, count: int, what: str) -> list[int]:
    """The indices of `count` images, by default those from 0 on.

    Args:
        what: there must be as many of, "labels" for example.

    Raises:
        UserError: they are not so many, or one is not in 0 .. 2^64 - 1.
    """
    if indices is None:
        return list(range(count))
    # Objects, for no dtype of integers holds all that a list may: those of torch end at 2^63 - 1.
    listed = np.asarray(indices.tolist() if isinstance(indices, Tensor) else indices, dtype=object)
    if listed.ndim != 1:
        raise UserError(f"indices must be a list, got {quote(indices)}")
    if len(listed) != count:
        raise UserError(f"indices must be as many as {what}, {count}, got {len(listed)}")
    return [require_uint64(index, "image index") for index in listed]


def on_device(uniforms: Tensor, device: torch.device) -> Tensor:
    """Move uniform numbers to a device: as they are or, where it has no float64, as int64 in units of 2^-53.

    Raises:
        UserError: they are not in [0, 1) (checked on the CPU only, where nothing has to wait for it).
    """
    if uniforms.device.type == "cpu" and uniforms.is_floating_point() and not ((uniforms >= 0) & (uniforms < 1)).all():
        raise UserError("uniforms must be numbers in [0, 1)")
    if not has_float64(device):
        uniforms = (uniforms.cpu().double() * 2.0**BITS).long() if uniforms.is_floating_point() else uniforms
    return uniforms.to(device)


def as_fractions(uniforms: Tensor) -> Tensor:
    """Uniform numbers as floats in [0, 1): those in units of 2^-53 as float32."""
    return uniforms if uniforms.is_floating_point() else (uniforms >> (BITS - 24)).float() * 2.0**-24


def philox(seed: int, index: int, block: int = 0) -> np.random.Philox:
    """The stream of image `index` of `seed`, from its counter `block` on.

    Its raw 64-bit words are frozen by NumPy's compatibility policy.
    """
    return np.random.Philox(key=np.array([seed, index], dtype=np.uint64), counter=block)
