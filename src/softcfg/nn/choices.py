"""What is fastest on this machine: measured once, and kept for all processes that come after.

Processes that choose alike compute the same bits, so the first one to write a choice down decides. The choices are
files in `~/.cache/softcfg/products` (`SOFTCFG_PRODUCTS` names another folder), one each.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch

from softcfg.errors import UserError
from softcfg.files import as_path, make_folder, read_text
from softcfg.nn.limits import cores

FOLDER_VARIABLE = "SOFTCFG_PRODUCTS"
FEWEST, TURNS = 3, 20
SECONDS = 0.05  # after which the fewest turns are enough
HOPELESS = 1.5  # times as long as the fastest side: not tried again
BUSY = 1.2  # times the time of the processor that one thread takes where it has to share a core

MADE: dict[tuple[str, tuple[str, ...]], str] = {}  # in this process: what for, among what -> the choice
Side = TypeVar("Side")
Result = TypeVar("Result")


def choose_once(key: str, names: Collection[str], measure: Callable[[], str]) -> str:
    """What was chosen among the names on this machine, or what a measurement finds now.

    Args:
        key: what it is for, "KIND-...".
    """
    which = key, tuple(sorted(names))
    if which not in MADE:
        kept = _kept(which)
        MADE[which] = kept if kept in names else _keep(which, measure())
    return MADE[which]


def choices(kind: str) -> dict[str, str]:
    """What this process has chosen so far, of the keys that begin with `kind`."""
    return {key: name for (key, _), name in MADE.items() if key.startswith(f"{kind}-")}


def forget_choices() -> None:
    """Measure again from now on: drop what was kept for this machine."""
    MADE.clear()
    for path in _folder().glob(f"{_machine_key()}-*"):
        with contextlib.suppress(OSError):
            path.unlink()


def time_sides(sides: Mapping[Side, Callable[[], object]]) -> dict[Side, float]:
    """Seconds of each side, on one thread or on all, whichever is faster, as steps choose it (`decoding.threads`).

    What steps compute shall not depend on their threads, so one figure stands for both. On one thread it is processor
    time, which other work on the machine hardly changes. Where there is other work, which takes the processor away
    meanwhile, that figure stands alone: chance would decide the others.
    """

    def least(clock: Callable[[], float]) -> dict[Side, float]:
        seconds = dict.fromkeys(sides, float("inf"))
        begun = clock()
        for turn in range(TURNS):  # all sides in each, so that a change of the clock's pace meets them alike
            if turn >= FEWEST and clock() - begun > SECONDS:
                break
            worth = HOPELESS * min(seconds.values())
            for side, run in sides.items():
                if seconds[side] <= worth:
                    started = clock()
                    run()
                    seconds[side] = min(seconds[side], clock() - started)
        return seconds

    begun, used = time.perf_counter(), time.thread_time()
    one = on_threads(1, lambda: least(time.thread_time))
    busy = time.perf_counter() - begun > BUSY * (time.thread_time() - used)
    if busy or cores() == 1:
        return one
    several = on_threads(cores(), lambda: least(time.perf_counter))
    return {side: min(one[side], several[side]) for side in sides}


def on_threads(number: int, run: Callable[[], Result]) -> Result:
    """What `run` returns, run on so many threads, without a gradient."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        with torch.inference_mode():
            return run()
    finally:
        torch.set_num_threads(before)


@cache
def processor() -> str:
    """The name of the processor, as far as the system tells it."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return name


def machine() -> str:
    """Processor, instructions and torch, on which the choices depend."""
    return f"{processor()}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def _folder() -> Path:
    return as_path(os.environ.get(FOLDER_VARIABLE) or "~/.cache/softcfg/products")


def _machine_key() -> str:
    return hashlib.sha256(f"{machine()}, {cores()} cores".encode()).hexdigest()[:12]


def _path(which: tuple[str, tuple[str, ...]]) -> Path:
    """Of the machine, what is chosen, and what there is to choose from: with another one, it is measured anew."""
    key, names = which
    return _folder() / f"{_machine_key()}-{key}-{hashlib.sha256(' '.join(names).encode()).hexdigest()[:6]}"


def _kept(which: tuple[str, tuple[str, ...]]) -> str:
    try:
        return read_text(_path(which), 64).strip()
    except OSError:
        return ""


def _keep(which: tuple[str, tuple[str, ...]], name: str) -> str:
    """Write a choice down and return it; if another process was first, return what that one chose, if it is known."""
    path = _path(which)
    try:
        make_folder(path.parent)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".") as file:
            file.write(name.encode())
            file.flush()
            if _kept(which) not in which[1]:
                path.unlink(missing_ok=True)
            os.link(file.name, path)
    except FileExistsError:
        kept = _kept(which)  # or nothing, if a third one has forgotten it
        return kept if kept in which[1] else name
    except (OSError, UserError):  # a home that cannot be written to: the next process measures again
        return name
    return name
