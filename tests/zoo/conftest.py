from pathlib import Path

import pytest


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkpoints folder; it does not exist yet."""
    path = tmp_path / "some" / "checkpoints"
    monkeypatch.setenv("SOFTCFG_CHECKPOINTS", str(path))
    return path
