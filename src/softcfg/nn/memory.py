"""The memory of devices: how much is free, and whether an error says that there was not enough."""

from __future__ import annotations

import re
from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")  # of Linux


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the machine had no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(sign in str(error) for sign in ("out of memory", "can't allocate memory", "ALLOC_FAILED"))


def in_short(error: BaseException) -> str:
    """The error in a line without the numbers of the moment, so that Python shows a repeated warning once."""
    return "out of memory" if is_out_of_memory(error) else str(error).partition("\n")[0]


def free_memory(device: torch.device) -> int | None:
    """Bytes that new tensors on the device may take; None where there is no telling."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    if device.type == "cpu" and MEMINFO.is_file():
        found = re.search(r"^MemAvailable:\s+(\d+) kB", MEMINFO.read_text(), re.MULTILINE)
        return None if found is None else int(found[1]) * 1024
    return None
