"""Trainings in tests: on one thread and in float32, so that one that was interrupted ends with the same bits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from recipes import training


@pytest.fixture(autouse=True)
def reproducible(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(training, "fast_bfloat16", lambda: False)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
