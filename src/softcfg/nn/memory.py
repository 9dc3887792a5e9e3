"""Memory: how much a device has free, whether an error says that it was not enough, and what a parameter holds."""

from __future__ import annotations

import ctypes
import functools
import mmap
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from softcfg.nn import limits

HUGE_PAGE = 2 << 20  # bytes, on most processors
MOST_KEPT = (32 << 20) - (64 << 10)  # bytes of a tensor that glibc keeps, with some to spare for its alignment
LOOKED_AFTER = 64 << 20  # bytes from which on it is asked whether they are free
KEPT = 0.1  # of what a CPU has free, for all that comes beside
MEMINFO = Path("/proc/meminfo")  # of Linux


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the machine had no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(sign in str(error) for sign in ("out of memory", "can't allocate memory", "ALLOC_FAILED"))


def in_short(error: BaseException) -> str:
    """The error in a line without the numbers of the moment, so that Python shows a repeated warning once."""
    return "out of memory" if is_out_of_memory(error) else str(error).partition("\n")[0]


def in_huge_pages(tensor: Tensor) -> Tensor:
    """The tensor, which has just been allocated; on Linux its memory, once it is written, lies in huge pages.

    Of those a processor knows the addresses of far more memory than of small ones, so a large tensor is read faster.
    Where the system has none, nothing happens.
    """
    if sys.platform == "linux" and type(tensor) is Tensor and tensor.is_cpu and tensor.nbytes > HUGE_PAGE:
        advise(tensor, mmap.MADV_HUGEPAGE)
    return tensor


def advise(tensor: Tensor, advice: int) -> None:
    """Tell the system, by `madvise`, how the whole pages of a CPU tensor that lies in one piece are used."""
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if first < last:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), advice)


@functools.cache
def keep_freed() -> None:
    """Have the C library keep the memory of tensors that are freed, where it is glibc, for those that come.

    It does so for tensors up to the largest that was ever freed, of at most 32 MiB. Larger ones, and all of them
    before, are new memory each time, which is slow when it is first written.
    """
    torch.empty(MOST_KEPT, dtype=torch.uint8, device="cpu")  # never written: it takes no memory


def free_memory(device: torch.device) -> int | None:
    """Bytes that new tensors on the device may take; None where there is no telling.

    On a CPU the limits of a container or a scheduler count, and a tenth of what is free stays so.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    if device.type == "cpu":
        available = _of_machine("MemAvailable")
        left = [each for each in (available, limits.memory_left()) if each is not None]
        return int((1 - KEPT) * min(left)) if left else None
    return None


def require_memory(size: int, what: str) -> None:
    """Raise `MemoryError` if `what`, tensors on the CPU of so many bytes, take more than there is.

    A system that gives memory away before it is written ends the process when it is, without a word.
    """
    if size < LOOKED_AFTER:
        return
    free = free_memory(torch.device("cpu"))
    if free is not None and size > free + (_of_machine("SwapFree") or 0):
        raise MemoryError(
            f"out of memory: {what} take {size / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free for them"
        )


def _of_machine(name: str) -> int | None:
    """Bytes of a line of `MEMINFO`; None where there is none."""
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", MEMINFO.read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if found is None else int(found[1]) * 1024


def is_shared(tensor: Tensor) -> bool:
    """Whether other tensors, or other processes, have the same memory, as far as PyTorch tells."""
    return tensor.is_shared() or _users(tensor) > _users(torch.empty(1, device=tensor.device))


def _users(tensor: Tensor) -> int:
    """How many hold the memory of a tensor."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    return 0 if count is None else int(count(tensor.untyped_storage()._cdata))


def replace_contents(parameter: Tensor, make: Callable[[], Tensor]) -> None:
    """Give a parameter other contents: an inference tensor if it is one itself, as a mixture of the two fails later."""
    with torch.inference_mode(parameter.is_inference()), torch.no_grad():
        parameter.data = make()
