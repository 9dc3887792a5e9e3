"""How the kernels of a step are launched: a step of few rows takes as long as its launches and the weights it reads."""

from __future__ import annotations

from contextlib import AbstractContextManager
from contextvars import ContextVar

from softcfg.nn.settings import holding

FEW_ROWS = 4  # up to which products have a kernel of their own, and launches are linked
# Where kernels of a CPU write down how they were launched (`nn.replay`); None: nowhere.
recorded: ContextVar[list[tuple[int, ...]] | None] = ContextVar("recorded_launches", default=None)
_linked: ContextVar[bool] = ContextVar("linked_launches", default=False)


def linked_launches() -> AbstractContextManager[None]:
    """Inside, a kernel on few rows may begin while the one before it ends, on GPUs of compute capability 9.0.

    Until that has ended it reads nothing but weights, so what is launched inside must not change any.
    """
    return holding(_linked, True)


def is_linked(rows: int) -> bool:
    """Whether kernels on so many rows are launched so."""
    return _linked.get() and rows <= FEW_ROWS
