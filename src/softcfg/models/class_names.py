"""Names of classes: which class a name means, and lists of classes as people write them.

0,3,7-9            numbers and ranges of numbers are always ids
Sneaker,bag        names, in whatever case
"7","maillot, tank suit"   in quotes it is a name, whatever it looks like
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from softcfg.errors import UserError, clean, quote, suggestion

_WORD = re.compile(r"""\s*(?:"([^"]*)"|'([^']*)')\s*(?=,|$)|[^,]*""")
_IDS = re.compile(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", re.ASCII)


class ClassNames:
    """What the classes of a model are called, and how many there are.

    Args:
        names: one per class in the order of their ids, or none.
        count: classes of the model.
        model: its name, for messages.

    Raises:
        UserError: there are not as many names as classes, or a name is no text.
    """

    def __init__(self, names: Sequence[str], count: int, model: str) -> None:
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise UserError(f"the names of classes must be a list of texts, got {quote(names)}")
        if names and len(names) != count:
            raise UserError(f"{model} has {count:,} classes, but {len(names):,} names of classes were given")
        self.names = tuple(names)
        self.count = count
        self.model = model
        self._most_commas = max((name.count(",") for name in names), default=0)
        self._ids: dict[str, list[int]] = {}
        for index, name in enumerate(names):
            self._ids.setdefault(_key(name), []).append(index)

    def title(self, label: int) -> str:
        """The name of a class, with its id where others are called the same; "class 3" without names."""
        if not self.names:
            return f"class {label}"
        name = self.names[label]
        return name if len(self._ids[_key(name)]) == 1 else f"{name} ({label})"

    def id_of(self, name: str) -> int:
        """The id of the class called `name`, in whatever case.

        Raises:
            UserError: no class has this name, or several have it.
        """
        ids = self._ids.get(_key(name), [])
        if len(ids) > 1:  # perhaps they differ in case
            ids = [index for index in ids if self.names[index] == name.strip()] or ids
        if len(ids) > 1:
            called = f"{' and '.join(map(str, ids))} are all" if len(ids) > 2 else f"{ids[0]} and {ids[1]} are both"
            raise UserError(f"classes {called} called {quote(self.names[ids[0]])}: give the number of the one you mean")
        if not ids:
            known = f", called {clean(', '.join(self.names), 500)}" if self.names else ", without names"
            hint = suggestion(name, self.names) or f"{self.model} has classes 0 to {self.count - 1}{known}"
            raise UserError(f"{quote(name)} is no class, and {self.model} does not read prompts; {hint}")
        return ids[0]

    def read(self, text: str) -> list[int]:
        """The ids of a list such as `0-9,Sneaker,"maillot, tank suit"`.

        A name with commas may do without quotes where nothing else could be meant.

        Raises:
            UserError: something that is no class, or that may be read in two ways.
        """
        words = [(found[1] or found[2], found[0]) for found in _words(text)]
        labels: list[int] = []
        position = 0
        while position < len(words):
            quoted, word = words[position]
            length = 1 if quoted is not None else self._words_of_name([plain for _, plain in words[position:]])
            if length > 1:
                name = ",".join(plain for _, plain in words[position : position + length])
                parts = [plain.strip() for _, plain in words[position : position + length]]
                if all(_IDS.fullmatch(part) or _key(part) in self._ids for part in parts):
                    raise UserError(f"{quote(name)} may be one class or {length}: put names with commas in quotes")
                labels.append(self.id_of(name))
            else:
                labels += [self.id_of(quoted)] if quoted is not None else self._ids_of(word.strip())
            position += length
        return labels

    def _words_of_name(self, words: Sequence[str]) -> int:
        """How many of the first words, which commas separated, make up the longest name; 1 if none."""
        longest = min(self._most_commas + 1, len(words))
        return next((n for n in range(longest, 1, -1) if _key(",".join(words[:n])) in self._ids), 1)

    def _ids_of(self, word: str) -> range | list[int]:
        ids = _IDS.fullmatch(word)
        if ids is None:
            return [self.id_of(word)]
        first, last = int(ids[1]), int(ids[2] or ids[1])
        if max(first, last) >= self.count:
            outside = first if first >= self.count else last
            raise UserError(f"label {outside} is out of range: {self.model} has classes 0 to {self.count - 1}")
        if last < first:
            raise UserError(f"the range {word} names no class: write {last}-{first}")
        return range(first, last + 1)


def _words(text: str) -> Iterator[re.Match[str]]:
    """What stands between commas, those in quotes aside; group 1 or 2 is what stands in quotes."""
    position = 0
    while position <= len(text):
        found = _WORD.match(text, position)
        assert found is not None  # it matches nothing, too
        yield found
        position = found.end() + 1


def _key(name: str) -> str:
    """A name without differences of case and of space."""
    return re.sub(r"\s*,\s*", ", ", " ".join(name.split())).casefold()
