"""Public names of a package that are imported when they are first used."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy_names(package: dict[str, Any], homes: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """The `__getattr__` of a package.

    Args:
        package: its `globals()`, where a name is kept after its first use.
        homes: the names that each module defines.
    """

    def find(name: str) -> Any:
        for module, names in homes.items():
            if name in names:
                return package.setdefault(name, getattr(importlib.import_module(module), name))
        raise AttributeError(f"module {package['__name__']!r} has no attribute {name!r}")

    return find
