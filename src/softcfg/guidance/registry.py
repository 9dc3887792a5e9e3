"""Registries: functions and classes by name, to which anyone may add."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

_NAME = re.compile(r"[A-Za-z][\w-]*")


@dataclass(frozen=True)
class _Entry(Generic[T]):
    value: T
    label: str
    description: str


class Registry(MutableMapping[str, T]):
    """Functions or classes by name. Whatever offers a choice of them reads the registry each time.

    An entry may also be added as to a dictionary: its label is then its name, and its description the first line of its
    docstring.

    Attributes:
        kind: what the entries are, in the words of messages.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, _Entry[T]] = {}

    def register(self, name: str, *, label: str = "", description: str = "") -> Callable[[T], T]:
        """Return a decorator that adds what it decorates under `name`.

        Args:
            label: a short title, for figures and the web page; by default the name.
            description: a few words, for help; by default the first line of the docstring.

        Raises:
            ValueError: the name is taken by something else, or is not made of letters, digits, "-" and "_".
        """

        def add(value: T) -> T:
            known = self._entries.get(name)
            if known is not None and _place(known.value) != _place(value):
                raise ValueError(f"there is a {self.kind} named {name!r} already, {_place(known.value)}")
            self._add(name, value, label, description)
            return value

        return add

    def label(self, name: str) -> str:
        """The short title of an entry."""
        return self._entries[name].label

    def description(self, name: str) -> str:
        """An entry in a few words."""
        return self._entries[name].description

    def require(self, name: object, field: str = "") -> T:
        """The entry of that name; raises `ValueError` that lists the known ones. `field` is what the name is for."""
        if not isinstance(name, str) or name not in self._entries:
            raise ValueError(f"{field or self.kind} must be one of {', '.join(self)}, got {name!r}")
        return self[name]

    def name_of(self, value: T) -> str:
        """The name of an entry; raises `ValueError` where it was not registered."""
        for name, entry in self._entries.items():
            if entry.value is value:
                return name
        raise ValueError(f"the {self.kind} {_place(value)} has no name; register it, so that its settings can be kept")

    def __getitem__(self, name: str) -> T:
        return self._entries[name].value

    def __setitem__(self, name: str, value: T) -> None:
        self._add(name, value)

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"<{self.kind}: {', '.join(self)}>"

    def _add(self, name: str, value: T, label: str = "", description: str = "") -> None:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"the name of a {self.kind} must be letters, digits, '-' and '_', got {name!r}")
        first = (value.__doc__ or "").strip().partition("\n")[0].rstrip(".")
        if first.startswith(f"{getattr(value, '__name__', '')}("):  # of a dataclass without a docstring
            first = ""
        self._entries[name] = _Entry(value, label or name, description or first)


class View(Mapping[str, T]):
    """A mapping that is computed at each access."""

    def __init__(self, read: Callable[[], Mapping[str, T]]) -> None:
        self._read = read

    def __getitem__(self, name: str) -> T:
        return self._read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())


def _place(value: object) -> str:
    """Where a function or class is defined, which stays the same when its module is loaded again."""
    name = getattr(value, "__qualname__", type(value).__qualname__)
    return f"{value.__module__}.{name}"
