"""Every promise of the page on reliability has a test that is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text()
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py(?:::\w+)+)`", PAGE)))


def test_every_promise_names_its_test() -> None:
    rows = [row for row in re.findall(r"^\| (.+) \|$", PAGE, re.MULTILINE) if not row.startswith(("---", "promise"))]
    assert len(rows) > 5
    assert [row for row in rows if "::test_" not in row] == []


@pytest.mark.parametrize("named", NAMED)
def test_the_test_is_there(named: str) -> None:
    file, *names = named.split("::")
    body: list[ast.stmt] = ast.parse((ROOT / file).read_text()).body
    for name in names:
        found = [node for node in body if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name]
        assert len(found) == 1
        body = found[0].body
