import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from softcfg.cli.main import main
from softcfg.zoo import MODELS, Component, ModelEntry, ModelFile, registry
from tiny_models import ON_DRIVE, weights


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "checkpoints"
    monkeypatch.setenv("SOFTCFG_CHECKPOINTS", str(path))
    monkeypatch.setitem(MODELS, "tiny-drive", ON_DRIVE)
    return path


@pytest.fixture
def downloads(tmp_path: Path) -> Path:
    path = tmp_path / "downloads"
    path.mkdir()
    for part in ON_DRIVE.components:
        torch.save(weights(part), path / part.file.name)
    return path


def test_the_table(capsys: pytest.CaptureFixture[str], folder: Path, downloads: Path) -> None:
    folder.mkdir()
    (downloads / "tiny_vq.pth").rename(folder / "tiny_vq.pth")
    assert main(["models"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert " ".join(header.split()) == "MODEL GENERATOR TOKENIZER SCALE POWER TEMP. FID PUBLISHED FILES HERE"
    by_name = {row.split()[0]: " ".join(row.split()) for row in rows}
    assert list(by_name) == list(MODELS)
    assert by_name["rar-l"].startswith("rar-l rar 462M maskgit-vq 55M 15.5 2.5 1.02 1.70 Hugging Face")
    assert by_name["alitok-xl"].startswith("alitok-xl alitok 662M alitok 390M 13.0 1.4 1.0 1.35 Google Drive missing")
    assert by_name["tiny-drive"].endswith("Google Drive missing tiny_alitok.bin")
    (downloads / "tiny_alitok.bin").rename(folder / "tiny_alitok.bin")
    main(["models"])
    assert " ".join(capsys.readouterr().out.splitlines()[-1].split()).endswith("Google Drive all")


def test_a_damaged_index_hides_no_other_model(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = folder / MODELS["janus-pro-7b"].generator.file.local_name
    index.parent.mkdir(parents=True)
    index.write_text('{"weight_map": {"a":')
    assert main(["models"]) == 0
    by_name = {row.split()[0]: row for row in capsys.readouterr().out.splitlines()}
    assert f"damaged: {index} is damaged or no JSON file; get it again" in by_name["janus-pro-7b"]
    assert by_name["fashion"].endswith("all")
    monkeypatch.setattr("softcfg.doctor.choices", lambda device: {})
    assert main(["doctor", "--device", "cpu", "--no-test"]) == 0
    rows = [" ".join(row.split()) for row in capsys.readouterr().out.splitlines()]
    assert any(row.startswith(f"janus-pro-7b damaged: {index} is") for row in rows)
    assert any(re.fullmatch(r"fashion .* largest batch \d+", row) for row in rows)


def test_one_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "alitok-xl"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "hidden_size 1280" in text
    assert "662,141,696 parameters" in text
    assert "guidance_scale 13.0" in text
    assert "alitok_xl.bin is missing: https://drive.google.com/file/d/1Vu0UsQfqzZ8HMKFqE2tIGdAcJ6zPXvFd/view" in text
    assert "`softcfg fetch alitok-xl --from PATH`" in text


def test_json(capsys: pytest.CaptureFixture[str], folder: Path, downloads: Path) -> None:
    main(["fetch", "tiny-drive", "--from", str(downloads / "tiny_vq.pth")])
    capsys.readouterr()
    assert main(["models", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in listed] == list(MODELS)
    assert main(["models", "tiny-drive", "--json"]) == 0
    entry = json.loads(capsys.readouterr().out)
    assert entry == listed[-1]
    assert entry["generator"]["config"]["hidden_size"] == 32
    assert (entry["generator"]["path"], entry["tokenizer"]["path"]) == (None, str(folder / "tiny_vq.pth"))


def test_listing_models_is_quick() -> None:
    code = "import sys; from softcfg.cli.main import main; main(['models']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_unknown_models(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("models", "fetch"):
        assert main([command, "rar-xxxl"]) == 2
        assert capsys.readouterr().err.startswith(
            "softcfg: error: there is no model named 'rar-xxxl'; did you mean rar-xxl"
        )


def test_fetching_from_a_folder(capsys: pytest.CaptureFixture[str], folder: Path, downloads: Path) -> None:
    assert main(["fetch", "tiny-drive"]) == 2
    assert "put them into" in capsys.readouterr().err
    assert main(["fetch", "tiny-drive", "--from", str(downloads), "--link"]) == 0
    assert capsys.readouterr().out.split() == [str(folder / "tiny_alitok.bin"), str(folder / "tiny_vq.pth")]
    assert (folder / "tiny_vq.pth").is_symlink()


def test_links_need_files_to_link_to(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", "tiny-drive", "--link"]) == 2
    assert capsys.readouterr().err == "softcfg: error: --link needs --from, the files to link to\n"


def test_fetching_a_part_says_what_is_missing(
    capsys: pytest.CaptureFixture[str], folder: Path, downloads: Path
) -> None:
    assert main(["fetch", "tiny-drive", "--from", str(downloads / "tiny_vq.pth")]) == 2
    out, err = capsys.readouterr()
    assert out.split() == [str(folder / "tiny_vq.pth")]
    assert "tiny_alitok.bin of tiny-drive is missing: download" in err


def test_files_are_not_taken_where_they_have_no_place(
    downloads: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for model, text in (
        ("fashion-small", "fashion-small is bundled with softcfg and takes no files from elsewhere: leave out --from"),
        (str(model_folder), f"tiny is the folder {model_folder} and takes no files from elsewhere: leave out --from"),
        ("some-user/some-name", "some-user/some-name is downloaded from Hugging Face, as a whole: leave out --from"),
    ):
        assert main(["fetch", model, "--from", str(downloads)]) == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert text in output.err


def test_bundled_models_need_no_fetching(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "bundled" / "shapes"
    home.mkdir(parents=True)
    parts = [
        Component(part.family, part.config, ModelFile(part.file.name, folder=home)) for part in ON_DRIVE.components
    ]
    for part in parts:
        torch.save(weights(part), home / part.file.name)
    monkeypatch.setattr(registry, "BUNDLED", home.parent)
    monkeypatch.setitem(MODELS, "shapes", ModelEntry("shapes", *parts, "two shapes"))
    assert main(["fetch", "shapes"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines() == [
        "shapes is bundled with softcfg: there is nothing to fetch",
        str(home / "tiny_alitok.bin"),
        str(home / "tiny_vq.pth"),
    ]
    main(["models"])
    assert "bundled" in capsys.readouterr().out.splitlines()[-1]
