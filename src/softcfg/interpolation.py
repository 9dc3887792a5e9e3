"""`${...}` in configurations, as OmegaConf reads it, in which released samplers keep their settings.

`${a.b}` is another entry, `${.b}` one of the same section, `${..b}` one of the section around it, `${oc.env:NAME}` or
`${oc.env:NAME,default}` a variable of the environment; `\\${` stands for `${` itself. A text that is one interpolation
and nothing else has the value and the type of what it stands for.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from softcfg.errors import UserError, quote

MISSING = "???"  # OmegaConf's mark of an entry that must be given
MOST_STEPS, MOST_ENTRIES = 1000, 100_000  # of one value
LONGEST = 100_000  # characters of a text
_INNERMOST = re.compile(r"(?<!\\)\$\{([^${}]*)\}")
_RELATIVE = re.compile(r"(\.*)(.*)")

Keys = tuple[str | int, ...]


def interpolated(config: Mapping[str, Any], name: str) -> Any:
    """The value of the entry `name` ("model.generator.seed") of nested mappings, with what `${...}` stands for.

    Raises:
        UserError: something that is not there, stands for itself or is of another kind than those above.
    """
    return _Resolver(config).value(tuple(name.split(".")))


class _Resolver:
    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.open: list[Keys] = []  # what is being resolved
        self.steps = self.entries = 0

    def value(self, keys: Keys) -> Any:
        """The value at `keys`."""
        node: Any = self.config
        place: Keys = ()
        for key in keys:
            if isinstance(node, str) and "${" in node:  # a section that stands for another one
                node = self._of(node, place)
            if isinstance(node, Mapping):
                node = node.get(key, node.get(int(key), _ABSENT) if str(key).isdecimal() else _ABSENT)
            elif isinstance(node, Sequence) and not isinstance(node, str) and str(key).isdecimal():
                node = node[int(key)] if int(key) < len(node) else _ABSENT
            else:
                node = _ABSENT
            if node is _ABSENT:
                raise UserError(f"there is no {_dotted(keys)}")
            place = (*place, key)
        return self._of(node, keys)

    def _of(self, node: Any, keys: Keys) -> Any:
        if isinstance(node, (Mapping, list)):
            self.entries += len(node)
            if self.entries > MOST_ENTRIES:
                raise UserError(f"{_dotted(keys)} has more than {MOST_ENTRIES:,} entries, the limit")
        if isinstance(node, Mapping):
            return {key: self._of(value, (*keys, key)) for key, value in node.items()}
        if isinstance(node, list):
            return [self._of(value, (*keys, index)) for index, value in enumerate(node)]
        if not isinstance(node, str) or "${" not in node:
            return node
        if keys in self.open:
            raise UserError(f"{_dotted(keys)} stands for itself")
        self.open.append(keys)
        try:
            return self._text(node, keys)
        finally:
            self.open.pop()

    def _text(self, text: str, keys: Keys) -> Any:
        kept: list[str] = []  # what was put in is not read again
        while found := _INNERMOST.search(text):
            self.steps += 1
            if self.steps > MOST_STEPS or len(text) > LONGEST:
                raise UserError(f"{_dotted(keys)} stands for too much")
            value = self._one(_restored(found[1], kept), keys)
            if found[0] == text:
                return value
            if isinstance(value, (Mapping, list)):
                raise UserError(f"{_dotted(keys)}: {quote(found[0])} is a section, which cannot be part of a text")
            kept.append(str(value))
            text = f"{text[: found.start()]}\0{len(kept) - 1}\0{text[found.end() :]}"
        if re.search(r"(?<!\\)\$\{", text):
            raise UserError(f"{_dotted(keys)}: a ${{ is not closed in {quote(_restored(text, kept))}")
        return _restored(text.replace("\\${", "${"), kept)

    def _one(self, inside: str, keys: Keys) -> Any:
        """What `${inside}` stands for in the entry at `keys`."""
        resolver, colon, argument = inside.partition(":")
        if colon:
            if resolver.strip() != "oc.env":
                raise UserError(f"{_dotted(keys)}: ${{{inside}}} is not understood; only entries and oc.env: are")
            name, comma, default = (part.strip() for part in argument.partition(","))
            if name in os.environ:
                return os.environ[name]
            if not comma:
                raise UserError(f"{_dotted(keys)}: the environment has no variable {quote(name)}")
            if len(default) > 1 and default[0] == default[-1] and default[0] in "'\"":
                return default[1:-1]
            return None if default == "null" else default
        dots, rest = _RELATIVE.fullmatch(inside.strip()).groups()  # type: ignore[union-attr]
        if len(dots) > len(keys) or not re.fullmatch(r"[\w-]+(\.[\w-]+|\[[\w-]+\])*", rest):
            raise UserError(f"{_dotted(keys)}: ${{{inside}}} is not understood; only entries and oc.env: are")
        path = tuple(re.findall(r"[\w-]+", rest))
        try:
            value = self.value((*keys[: len(keys) - len(dots)], *path) if dots else path)
        except UserError as error:
            raise UserError(f"{_dotted(keys)}: ${{{inside}}}: {error}") from error
        if value == MISSING:
            raise UserError(f"{_dotted(keys)}: ${{{inside}}} has no value yet ({MISSING})")
        return value


_ABSENT = object()


def _restored(text: str, kept: Sequence[str]) -> str:
    return re.sub("\0(\\d+)\0", lambda found: kept[int(found[1])], text)


def _dotted(keys: Keys) -> str:
    return ".".join(map(str, keys))
