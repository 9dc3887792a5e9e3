"""The code blocks of docs/plug.md, run one after the other as a reader would type them."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

PAGE = Path(__file__).parents[2] / "docs" / "plug.md"


def test_every_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a run is drawn there
    text = PAGE.read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    shapes = {}
    torch.manual_seed(0)
    for found in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        lines = text[: found.start(1)].count("\n")
        exec(compile("\n" * lines + found[1], str(PAGE), "exec", dont_inherit=True), names)
        shapes[lines] = tuple(names["tokens"].shape)
    assert [shape for shape, _ in itertools.groupby(shapes.values())] == [(2, 16), (1, 28), (2, 16), (2, 32)]
    assert names["sequences"].shape[1] <= 21
    assert names["images"].shape == (2, 4, 4, 3)
    # The loop of the last block, its confidences and its weights.
    assert ((names["confidence"] > 0) & (names["confidence"] <= 1)).all()
    spent = (1 - names["weights"][2:]).sum(dim=1)
    torch.testing.assert_close(spent, torch.ones(2))
    assert (names["weights"][:2] == 1).all()


def test_the_example_of_emu3_draws_rows_of_codes() -> None:
    text = PAGE.read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[:3]:
        exec(block, names)
    grid = names["tokens"].view(4, 7)
    assert (grid[:, -1] == names["line_end"]).all()
    assert ((grid[:, :-1] >= 20) & (grid[:, :-1] < 84)).all()
