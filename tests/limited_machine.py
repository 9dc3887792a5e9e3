"""A Linux machine that limits its processes: the files in which it says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from softcfg.nn import limits, memory

GIB = 1 << 30


class LimitedMachine:
    """20 GiB of memory are available and one of swap space; nothing is limited yet."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        monkeypatch.setattr(memory, "MEMINFO", folder / "meminfo")
        monkeypatch.setattr(limits, "GROUPS_OF_MINE", folder / "cgroup")
        monkeypatch.setattr(limits, "GROUPS", folder / "groups")
        self.write("meminfo", f"MemTotal: {64 << 20} kB\nMemAvailable: {20 << 20} kB\nSwapFree: {1 << 20} kB\n")
        self.write("cgroup", "0::/\n")

    def write(self, name: str, text: object) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")

    def limit(self, group: str, most: object, used: int, files: int, *, version: int = 2) -> None:
        """Limit the memory of a control group, which uses so many bytes, some of them files."""
        limit, usage, name = limits.MEMORY[version]
        self.write(f"groups/{group}/{limit}", most)
        self.write(f"groups/{group}/{usage}", used)
        self.write(f"groups/{group}/memory.stat", f"active_file {GIB}\n{name} {files}\ntotal_anon 7")
