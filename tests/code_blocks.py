"""The code blocks of Markdown files, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"( *)(```+|~~~+) *([\w-]*)")
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


@dataclass(frozen=True)
class Block:
    """A code block: where it begins, its language ("" where it is indented) and its text."""

    path: Path
    line: int  # of its first line of code, 1-based
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.path.name}:{self.line}"

    def commands(self) -> Iterator[list[str]]:
        """The words of every command of a shell block; `a && b` are two commands, comments are left out."""
        joined = self.text.replace("\\\n", " ")
        for line in joined.splitlines():
            words = shlex.split(line, comments=True)
            while "&&" in words:
                cut = words.index("&&")
                yield words[:cut]
                words = words[cut + 1 :]
            if words:
                yield words


def blocks(path: Path) -> list[Block]:
    """All fenced and indented code blocks of a Markdown file, in their order."""
    lines = path.read_text(encoding="utf-8").splitlines()
    found: list[Block] = []
    at = 0
    while at < len(lines):
        fence = FENCE.match(lines[at])
        begin = at
        if fence:
            indent, marks, language = fence.groups()
            at += 1
            while not lines[at].strip().startswith(marks):  # an unclosed fence is an IndexError
                at += 1
            code = [line.removeprefix(indent) for line in lines[begin + 1 : at]]
            found.append(Block(path, begin + 2, language or "none", "\n".join(code) + "\n"))
        elif lines[at].startswith("    ") and (at == 0 or not lines[at - 1].strip()):
            while at < len(lines) and (lines[at].startswith("    ") or not lines[at].strip()):
                at += 1
            at -= 1
            code = [line[4:] for line in lines[begin : at + 1]]
            found.append(Block(path, begin + 1, "", "\n".join(code).rstrip() + "\n"))
        at += 1
    return found


def inline_code(path: Path) -> list[tuple[int, str]]:
    """The code spans in the prose of a Markdown file, with their line numbers."""
    lines = path.read_text(encoding="utf-8").splitlines()
    inside = {line for block in blocks(path) for line in range(block.line - 1, block.line + block.text.count("\n") + 1)}
    return [
        (number, code) for number, line in enumerate(lines, 1) if number not in inside for code in INLINE.findall(line)
    ]
