"""Settings of a thread that hold while a context is open."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

Value = TypeVar("Value")


@contextmanager
def holding(setting: ContextVar[Value], value: Value) -> Iterator[None]:
    """Give a setting a value in this thread while the context is open."""
    token = setting.set(value)
    try:
        yield
    finally:
        setting.reset(token)
