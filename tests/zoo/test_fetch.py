import dataclasses
import hashlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from hub import Hub, client_environment, serving
from softcfg import CheckpointError
from softcfg.zoo import MODELS, ModelFile, fetch, files, load_generator, load_tokenizer
from tiny_models import ON_DRIVE, RAR, VQ, on_hub, weights

pytestmark = pytest.mark.usefixtures("folder")


@pytest.fixture
def downloads(tmp_path: Path) -> Path:
    """A folder with the files of a model that has to be downloaded by hand."""
    path = tmp_path / "downloads"
    path.mkdir()
    for part in ON_DRIVE.components:
        torch.save(weights(part), path / part.file.name)
    return path


# ---- files to be downloaded by hand


def test_files_on_drive_are_asked_for(folder: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        fetch("alitok-xl")
    text = str(caught.value)
    for part in MODELS["alitok-xl"].components:
        assert f"{part.file.name} (https://drive.google.com/file/d/{part.file.drive_id}/view)" in text
    assert str(folder) in text
    assert "softcfg fetch alitok-xl --from" in text


def test_files_are_taken_from_a_folder(folder: Path, downloads: Path) -> None:
    (downloads / "unrelated.txt").write_text("x")
    expected = [folder / "tiny_alitok.bin", folder / "tiny_vq.pth"]
    assert fetch(ON_DRIVE, downloads) == expected
    assert sorted(folder.iterdir()) == expected
    assert all(path.read_bytes() == (downloads / path.name).read_bytes() for path in expected)
    assert fetch(ON_DRIVE) == expected
    assert load_tokenizer(ON_DRIVE).num_tokens == 4


def test_one_file_is_taken(folder: Path, downloads: Path) -> None:
    assert fetch(ON_DRIVE, downloads / "tiny_vq.pth") == [folder / "tiny_vq.pth"]
    with pytest.raises(CheckpointError, match=r"tiny_alitok\.bin") as caught:
        fetch(ON_DRIVE)
    assert "tiny_vq.pth" not in str(caught.value)


def test_files_are_linked(folder: Path, downloads: Path) -> None:
    (path,) = fetch(ON_DRIVE, downloads / "tiny_vq.pth", link=True)
    assert path.is_symlink()
    assert path.samefile(downloads / "tiny_vq.pth")


def test_the_checkpoints_folder_may_be_the_source(folder: Path, downloads: Path) -> None:
    fetch(ON_DRIVE, downloads)
    assert len(fetch(ON_DRIVE, folder)) == 2
    assert load_tokenizer(ON_DRIVE).num_tokens == 4


def test_a_file_whose_name_another_model_has(folder: Path, tmp_path: Path) -> None:
    """Two models publish `rar_b.bin`; each of them gets its own, in one folder and in the cache."""
    first = on_hub("someone/tiny", "rar_b.bin")
    part = dataclasses.replace(first.generator, config={**RAR, "codebook_size": 24})
    part = dataclasses.replace(part, file=ModelFile("rar_b.bin", "someone/else", alias="else_rar_b.bin"))
    vq = dataclasses.replace(first.tokenizer, config={**VQ, "codebook_size": 24})
    vq = dataclasses.replace(vq, file=ModelFile("vq.bin", "someone/else"))
    second = dataclasses.replace(first, name="else", generator=part, tokenizer=vq)
    for entry in (first, second):
        downloads = tmp_path / entry.name
        downloads.mkdir()
        for part in entry.components:
            torch.save(weights(part), downloads / part.file.name)
    assert fetch(first, tmp_path / first.name) == [folder / "rar_b.bin", folder / "tiny_vq.bin"]
    assert files.find_file(second.generator.file) is None
    with pytest.raises(CheckpointError, match=r"rar_b\.bin does not fit"):
        fetch(second, folder / "rar_b.bin")
    assert fetch(second, tmp_path / second.name) == [folder / "else_rar_b.bin", folder / "vq.bin"]
    assert fetch(second, folder) == fetch(second) == [folder / "else_rar_b.bin", folder / "vq.bin"]
    assert fetch(first) == [folder / "rar_b.bin", folder / "tiny_vq.bin"]
    assert [load_generator(entry).vocab_size for entry in (first, second)] == [16, 24]


def test_nothing_is_taken_unless_all_of_it_fits(folder: Path, downloads: Path) -> None:
    (downloads / "tiny_vq.pth").write_bytes((downloads / "tiny_alitok.bin").read_bytes())
    with pytest.raises(CheckpointError, match=r"tiny_vq\.pth does not fit .* checkpoint of the alitok generator"):
        fetch(ON_DRIVE, downloads)
    assert not folder.exists()


def test_a_file_put_in_place_by_hand_is_checked(folder: Path, downloads: Path) -> None:
    fetch(ON_DRIVE, downloads)
    os.truncate(folder / "tiny_vq.pth", 1000)
    with pytest.raises(CheckpointError, match="truncated"):
        fetch(ON_DRIVE)


def test_sources_without_the_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither tiny_alitok\.bin nor tiny_vq\.pth"):
        fetch(ON_DRIVE, tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        fetch(ON_DRIVE, tmp_path / "gone")


def test_an_interrupted_copy_leaves_nothing(folder: Path, downloads: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(source: Any, target: Any, _: int) -> None:
        target.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.copyfileobj", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch(ON_DRIVE, downloads)
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path, downloads: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("SOFTCFG_CHECKPOINTS", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="cannot be put into"):
        fetch(ON_DRIVE, downloads)


def test_a_missing_file_says_how_to_get_it(folder: Path) -> None:
    entry = MODELS["rar-b"]
    with pytest.raises(CheckpointError, match=r"rar_b\.bin of rar-b is missing: run `softcfg fetch rar-b`"):
        files.require_file(ModelFile("rar_b.bin", repository="someone/without-cache"), entry)
    with pytest.raises(CheckpointError) as caught:
        files.require_file(ON_DRIVE.generator.file, ON_DRIVE)
    assert str(caught.value) == (
        "tiny_alitok.bin of tiny-drive is missing: download tiny_alitok.bin "
        f"(https://drive.google.com/file/d/alitok-id/view) in a browser and put it into {folder} under this name, "
        "which `softcfg fetch tiny-drive --from PATH` does too"
    )


# ---- the Hugging Face Hub: a stand-in on this machine, asked by the real client


def saved(tensors: dict[str, torch.Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    entry = on_hub("someone/tiny", "tiny_rar.bin")
    generator, tokenizer = (saved(weights(part)) for part in entry.components)
    server = Hub()
    server.add("someone/tiny", "tiny_rar.bin", generator)
    server.add("someone/tiny", "tiny_vq.bin", tokenizer)
    server.add("someone/damaged", "tiny_rar.bin", generator, sha256="0" * 64)
    server.gated.add("someone/gated")
    server.cut["/someone/tiny/resolve/main/tiny_rar.bin"] = 11 << 20
    assert len(generator) > 12 << 20
    with serving(server):
        yield server


def fetch_elsewhere(hub: Hub, home: Path, *models: tuple[str, str], **settings: str) -> list[dict[str, Any]]:
    """Fetch models in a fresh process, since the client reads its settings when it is imported."""
    script = """
import json, sys
from softcfg import CheckpointError
from softcfg.zoo import fetch, load_generator
from tiny_models import on_hub
for repository, file in json.loads(sys.argv[1]):
    entry = on_hub(repository, file)
    try:
        paths = [str(path) for path in fetch(entry)]
        print(json.dumps({"paths": paths, "tokens": load_generator(entry).num_tokens}))
    except CheckpointError as error:
        print(json.dumps({"error": str(error)}))
"""
    environment = client_environment(hub, home, **settings)
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(models)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_hub(hub: Hub, tmp_path: Path, folder: Path) -> None:
    home = tmp_path / "hf"
    good, damaged, no_file, no_repository, gated = fetch_elsewhere(
        hub,
        home,
        ("someone/tiny", "tiny_rar.bin"),
        ("someone/damaged", "tiny_rar.bin"),
        ("someone/tiny", "gone.bin"),
        ("nobody/nothing", "tiny_rar.bin"),
        ("someone/gated", "tiny_rar.bin"),
    )
    # The first download broke off and went on where it was cut, from what was on the disk by then.
    path = "/someone/tiny/resolve/main/tiny_rar.bin"
    spans = [span for method, asked, span in hub.requests if (method, asked) == ("GET", path)]
    assert spans == [None, f"bytes={10 << 20}-"]
    generator, tokenizer = map(Path, good["paths"])
    assert generator.read_bytes() == hub.files[path]
    assert home in generator.parents
    assert home in tokenizer.parents
    assert good["tokens"] == 4
    assert re.search(r"tiny_rar\.bin is damaged, its hash is not the Hub's", damaged["error"])
    assert no_file["error"] == "gone.bin was not downloaded from someone/tiny: the repository has no such file"
    assert "nobody/nothing: there is no such repository, or it is private" in no_repository["error"]
    assert gated["error"] == (
        "tiny_rar.bin was not downloaded from someone/gated: accept its licence at "
        f"http://127.0.0.1:{hub.server_port}/someone/gated first, and log in with `hf auth login`"
    )
    assert not folder.exists()

    # Offline the cache serves, and what is not in it is an error that says why.
    asked = len(hub.requests)
    again, never = fetch_elsewhere(
        hub, home, ("someone/tiny", "tiny_rar.bin"), ("someone/never", "tiny_rar.bin"), HF_HUB_OFFLINE="1"
    )
    assert again == good
    assert "HF_HUB_OFFLINE" in never["error"]
    assert len(hub.requests) == asked


@pytest.mark.parametrize("algorithm", ["sha256", "sha1"])  # the latter is git's, of small files
def test_a_damaged_file_of_the_cache_is_downloaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str
) -> None:
    entry, tries = on_hub("someone/tiny", "tiny_rar.bin"), []
    contents = {part.file.name: saved(weights(part)) for part in entry.components}

    def download(repository: str, name: str, *, force_download: bool) -> str:
        """As the client does, which takes what is in its cache as it is; the connection flips a bit."""
        content = contents[name]
        start = b"blob %d\0" % len(content) if algorithm == "sha1" else b""
        blob, link = tmp_path / hashlib.new(algorithm, start + content).hexdigest(), tmp_path / name
        if force_download or not link.exists():
            tries.append(name)
            flipped = len(tries) in flips
            blob.write_bytes(content[:-1] + bytes([content[-1] ^ flipped]))
            link.unlink(missing_ok=True)
            link.symlink_to(blob)
        return str(link)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    flips = {1, 2}
    with pytest.raises(CheckpointError, match=r"tiny_rar\.bin is damaged, its hash is not the Hub's; fetch it again"):
        fetch(entry)
    fetch(entry)
    assert tries == ["tiny_rar.bin"] * 3 + ["tiny_vq.bin"]
    assert all((tmp_path / name).read_bytes() == content for name, content in contents.items())


def test_files_of_the_hub_may_be_put_in_place_by_hand(folder: Path, tmp_path: Path) -> None:
    entry = on_hub("someone/tiny", "tiny_rar.bin")
    for part in entry.components:
        torch.save(weights(part), tmp_path / part.file.name)
    assert fetch(entry, tmp_path) == [folder / "tiny_rar.bin", folder / "tiny_vq.bin"]
    assert fetch(entry) == [folder / "tiny_rar.bin", folder / "tiny_vq.bin"]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (LocalEntryNotFoundError("An error happened while trying to locate the file"), "https?://.* cannot be reached"),
        (OSError("Consistency check failed:\n\nfile should be\nof size 3"), "Consistency check failed: file should"),
    ],
)
def test_errors_of_the_client_become_one_sentence(monkeypatch: pytest.MonkeyPatch, error: Exception, text: str) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(CheckpointError, match=rf"^rar_b\.bin was not downloaded from yucornetto/RAR: {text}") as caught:
        fetch("rar-b")
    assert "\n" not in str(caught.value)
