"""Run folders that an earlier version drew are continued: their settings mean the same, and their shards stay."""

import json
import shlex
import shutil
from pathlib import Path

import pytest

from softcfg.cli.main import main
from softcfg.runs.folder import RunFolder

FOLDERS = Path(__file__).parent / "folders"  # of 4 images each, in one shard
MODELS = Path(__file__).parent / "models"  # that are not bundled
REPLACED = Path(__file__).parent / "before-emoji-was-replaced"  # drawn by weights that are gone
# Name -> fingerprint of the settings, as the version that drew the folder computed it.
FINGERPRINTS = {
    "softcfg": "da1e57e2a49ca944fa46a6ab9f8bc50025cef37232d00bc85b6ef6b65b905c96",
    "cfg-interval": "61520950bca62270bf56cd44fd158f10c5c5862afc36d979d6fe57efc99a5d6e",
    "jacobi": "35af630a4564dacd309b07d0fcda6ec357897a9d7f01a4780bff7c8d0c021b71",
    "prompts": "a463a114f16b2feaff96ce387a740caee06a1386fcba874891571570f7b26b58",
    "int8-cache": "6721d96565759ad6b2678e0c7fb9bf40920cbd5b07c24b4159e45caff38a06bc",
}


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_a_folder_of_an_earlier_version_is_continued(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(MODELS)
    folder = shutil.copytree(FOLDERS / name, tmp_path / "run")
    shard = folder / "shards" / "shard-000000.safetensors"
    before = shard.read_bytes()
    words = shlex.split(json.loads((folder / "run.json").read_text())["command"])[1:]
    words[words.index("--output-dir") + 1] = str(folder)

    def sample(images: int) -> str:
        words[words.index("--num-samples") + 1] = str(images)
        assert main(words) == 0
        assert RunFolder.open(folder).fingerprint == FINGERPRINTS[name]
        assert shard.read_bytes() == before
        return capsys.readouterr().out

    assert "the run is finished: all of its 4 images are there" in sample(4)
    assert "4 of 8 images are there already" in sample(8)
    assert "the run is finished: all of its 8 images are there" in sample(8)
    assert len(list((folder / "shards").iterdir())) == 2
    assert main(["runs", "verify", str(folder)]) == 0
    assert "2 of 2 shards of 4 images sound, 0 damaged, 0 missing" in capsys.readouterr().out


def test_a_folder_drawn_by_other_weights_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(REPLACED, tmp_path / "run")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    words = shlex.split(json.loads((folder / "run.json").read_text())["command"])[1:]
    words[words.index("--output-dir") + 1] = str(folder)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert f"{folder} holds a run with another generator.sha256, tokenizer.sha256, text.sha256, " in error
    assert "give another --output-dir, or --overwrite to replace it" in error
    assert "config" not in error
    assert {path: path.read_bytes() for path in before} == before


def test_every_folder_is_continued() -> None:
    assert {path.name for path in FOLDERS.iterdir()} == set(FINGERPRINTS)
