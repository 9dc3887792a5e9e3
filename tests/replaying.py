"""The steps of a batch that are nothing but a launch of kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor

from softcfg.nn.context import AttentionContext
from softcfg.nn.replay import Surroundings, _Program


def launched_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Their numbers, in turn, from now on."""
    found: list[int] = []
    replay, ahead = _Program.replay, _Program.ahead

    def noted(program: _Program, x: Tensor, context: AttentionContext, around: Surroundings | None = None) -> Tensor:
        if around is not None:
            found.append(around.number)
        return replay(program, x, context, around)

    def noted_ahead(program: _Program, of: Callable[[], Surroundings | None], most: int) -> int:
        around, steps = of(), ahead(program, of, most)
        if around is not None:
            found.extend(range(around.number, around.number + steps))
        return steps

    monkeypatch.setattr(_Program, "replay", noted)
    monkeypatch.setattr(_Program, "ahead", noted_ahead)
    return found
