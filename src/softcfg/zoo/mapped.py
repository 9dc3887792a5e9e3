"""Memory of tensors that are mapped from the files they were read from."""

from __future__ import annotations

import bisect
import ctypes
import mmap
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MAPS = Path("/proc/self/maps")
DONT_NEED = getattr(mmap, "MADV_DONTNEED", None)


def give_back_freed() -> None:
    """Give memory that was freed back to the system; glibc keeps it where it lies between what is used."""
    if MAPS.exists() and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


class MappedFiles:
    """The files that are mapped into the memory of this process, where the system tells.

    Weights that are converted while they are loaded would otherwise be there twice: as they stand in the file, until
    all of it is unmapped, and as they are used.
    """

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []
        if DONT_NEED is None or not MAPS.exists():
            return
        for line in MAPS.read_text().splitlines():
            addresses, rights, _, _, inode, *_ = line.split(maxsplit=5)
            if inode != "0" and rights.endswith("p"):
                start, end = (int(address, 16) for address in addresses.split("-"))
                self._ranges.append((start, end))
        self._ranges.sort()

    def forget(self, tensor: Tensor) -> None:
        """Give the memory of a tensor back if it is mapped from a file; it is read again where it is used again.

        The tensor must be as it was read: changes that were made to it would be lost.
        """
        from softcfg.nn.memory import advise

        if DONT_NEED is None or tensor.device.type != "cpu" or not tensor.is_contiguous():
            return
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        index = bisect.bisect_right(self._ranges, (start, 1 << 64)) - 1
        if index >= 0 and end <= self._ranges[index][1]:
            advise(tensor, DONT_NEED)
