"""Published layouts of one model: the tensors of each, under the names of our parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

Value = TypeVar("Value")


def rename(
    tensors: Mapping[str, Value], *, prefixes: Sequence[str] = (), patterns: Sequence[tuple[str, str]] = ()
) -> dict[str, Value]:
    """Return what one part of a model needs of a checkpoint, under other names.

    Args:
        tensors: names to tensors (or to anything else), of the whole model or of the part alone.
        prefixes: what the names of the part's tensors may begin with. If some names begin with one of them, the first
            that does is dropped from these names, and all other tensors are left out.
        patterns: regular expressions and their replacements, applied to every name in this order.
    """
    prefix = next((prefix for prefix in prefixes if any(name.startswith(prefix) for name in tensors)), "")

    def renamed(name: str) -> str:
        name = name.removeprefix(prefix)
        for pattern, replacement in patterns:
            name = re.sub(pattern, replacement, name)
        return name

    return {renamed(name): value for name, value in tensors.items() if name.startswith(prefix)}
