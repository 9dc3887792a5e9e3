"""Files that are changed at random places: the result is the same, or one sentence says that the file is damaged."""

import os
import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attacks import bounded
from made_runs import complete
from softcfg import Pipeline, UserError
from softcfg.cli.main import main
from softcfg.evaluation import evaluate, open_source
from softcfg.runs.export import export_pngs
from softcfg.runs.folder import RunFolder
from softcfg.tuning import Range, Sweep, SweepConfig
from softcfg.zoo import read_state_dict
from softcfg.zoo.reading import hash_weights
from stand_in import extractor

PLACES = 500
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def mutations(path: Path, places: int = PLACES) -> Iterator[None]:
    """Change `path` at random places, one after the other: a bit, some bytes, a hole, an end."""
    chance = random.Random(0)
    sound = path.read_bytes()
    for _ in range(places):
        content = bytearray(sound)
        at = chance.randrange(len(content))
        kind = chance.choice(["bit", "bit", "bytes", "hole", "end", "zeros"])
        if kind == "bit":
            content[at] ^= 1 << chance.randrange(8)
        elif kind == "bytes":
            content[at : at + 8] = chance.randbytes(8)
        elif kind == "hole":
            del content[at : at + chance.choice([1, 8, 512])]
        elif kind == "zeros":
            content[at : at + 512] = bytes(len(content[at : at + 512]))
        else:
            del content[at:]
        path.write_bytes(content)
        with bounded():
            yield
    path.write_bytes(sound)


def outcome(read: Callable[[], Any]) -> Any:
    """What `read` returns, None if it was refused with a sentence."""
    try:
        return read()
    except UserError:
        return None


def pixels(path: Path) -> np.ndarray:
    return torch.cat(list(open_source(path).batches(64))).numpy()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path: Path, save: Any) -> None:
    path = tmp_path / "a.npz"
    images = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
    save(path, images, np.arange(9))
    refused = 0
    for _ in mutations(path):
        found = outcome(lambda: pixels(path))
        refused += found is None
        assert found is None or np.array_equal(found, images)
    assert refused > PLACES / 2


def test_statistics(tmp_path: Path) -> None:
    path, images = tmp_path / "statistics.npz", np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    evaluate(images, extractor=extractor(), metrics=["inception_score"], save_stats=path)
    expected = evaluate(images[:20], path, extractor(), ["fid"])["fid"]
    for _ in mutations(path):
        found = outcome(lambda: evaluate(images[:20], path, extractor(), ["fid"])["fid"])
        assert found in (None, expected)


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = complete(tmp_path / "run", num_samples=12, batch_size=4)
    export_pngs(run, run.path)
    images = pixels(run.path)
    noticed = 0
    for path in (run.path / "run.json", run.shard_path(1), run.path / "000005.png"):
        for _ in mutations(path):
            found = outcome(lambda: pixels(run.path))
            assert found is None or np.array_equal(found, images)
            code = main(["runs", "verify", str(run.path)])
            assert code in (0, 1, 2)
            noticed += code > 0
            shown = capsys.readouterr()
            assert "Traceback" not in shown.err
            assert "--discard" not in shown.out or path == run.shard_path(1)
            assert found is not None or code > 0
    assert noticed > PLACES
    assert RunFolder.open(run.path).missing() == []


def draw(folder: Path) -> list[int]:
    return Pipeline.from_pretrained(folder)([1], seed=0).tokens.flatten().tolist()


@pytest.mark.parametrize("name", ["model.yaml", "generator.safetensors", "tokenizer.safetensors"])
def test_a_model(model_folder: Path, tmp_path: Path, name: str) -> None:
    """Nothing in a weights file says what it should be; the SHA-256 in run.json is what tells two apart."""
    folder = shutil.copytree(model_folder, tmp_path / "model")
    expected, weights = draw(folder), hash_weights(folder / "generator.safetensors")
    for _ in mutations(folder / name, 100 if name != "model.yaml" else PLACES):
        found = outcome(lambda: draw(folder))
        if found not in (None, expected):
            changed = hash_weights(folder / "generator.safetensors") != weights
            assert changed or name == "model.yaml"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_checkpoint(model_folder: Path, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    state = {
        name: tensor[:4] for name, tensor in list(read_state_dict(model_folder / "generator.safetensors").items())[:5]
    }
    if suffix == ".pth":
        torch.save({name: tensor.clone() for name, tensor in state.items()}, path)
    else:
        from safetensors.torch import save_file

        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    for _ in mutations(path):
        outcome(lambda: read_state_dict(path))


def test_a_sweep(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    reference = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    config = SweepConfig(
        Pipeline.from_pretrained(model_folder), search={"guidance_scale": Range(1.0, 8.0)}, reference=reference,
        extractor=extractor(), num_samples=8, batch_size=4, metrics=["inception_score"],
    )  # fmt: skip
    folder = tmp_path / "sweep"
    sweep = Sweep.open(folder, config)
    sweep.run(3)
    expected = sweep.rows()
    path = folder / "study.db"
    sound = path.read_bytes()
    for n, _ in enumerate(mutations(path)):
        # Opened before it was damaged, or after.
        found = outcome(sweep.rows if n % 2 else lambda: Sweep.open(folder, config).rows())
        assert found is None or [row for row in found if row not in expected] == []
    path.write_bytes(sound)
    with sqlite3.connect(path) as connection:
        assert connection.execute("pragma integrity_check").fetchone() == ("ok",)
