"""What a container or a scheduler leaves to this process of the machine's memory and processors.

On Linux both limit a process by control groups. PyTorch does not look at them: it starts a thread for each processor of
the machine, and takes memory until the system ends the process.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

GROUPS_OF_MINE, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
NO_LIMIT = 1 << 60  # bytes
# By the version of control groups: limit and use of memory, and what of the use is files that would be given up.
MEMORY = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def memory_left() -> int | None:
    """Bytes that are left; None without a limit."""
    found = []
    for version, folder in _folders("memory"):
        limit, usage, files = MEMORY[version]
        with contextlib.suppress(OSError, ValueError):  # also of "max", no limit
            most = int((folder / limit).read_text())
            if most < NO_LIMIT:
                given_up = re.search(rf"^{files} (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
                used = int((folder / usage).read_text()) - (0 if given_up is None else int(given_up[1]))
                found.append(max(0, most - used))
    return min(found, default=None)


@cache
def cores() -> int:
    """How many threads of this process can run at once."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(there, math.ceil(processors() or there)))


def processors() -> float | None:
    """How many processors may be busy all the time, such as 1.5; None without a limit."""
    found = []
    for version, folder in _folders("cpu"):
        with contextlib.suppress(OSError, ValueError):
            if version == 1:
                texts = [(folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")]
            else:
                texts = (folder / "cpu.max").read_text().split()
            quota, period = map(int, texts)
            if quota > 0 and period > 0:  # -1: no limit
                found.append(quota / period)
    return min(found, default=None)


def _folders(controller: str) -> Iterator[tuple[int, Path]]:
    """The version and the folder of each control group around this process, from the innermost outwards."""
    try:
        mine = GROUPS_OF_MINE.read_text(errors="replace")
    except OSError:
        return
    for number, controllers, path in re.findall(r"^(\d+):([^:\n]*):(.*)$", mine, re.MULTILINE):
        if number == "0":
            version, root = 2, GROUPS
        elif controller in controllers.split(","):
            version, root = 1, GROUPS / controller
        else:
            continue
        # In a container the path can be that of the host, which is not there, and the group's files be at the root.
        group = root / path.strip("/")
        for folder in (group, *group.parents):
            yield version, folder
            if folder == root:
                break
