"""Run folders that were altered, by accident or on purpose: the right file is blamed, and nothing is lost."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from attacks import NODES, fifo, refused
from made_runs import complete, settings, shard
from softcfg import UserError
from softcfg.cli.main import main
from softcfg.evaluation import Extractor, Features, extract, open_source
from softcfg.runs.export import altered_pngs, export_npz, export_pngs
from softcfg.runs.folder import RunFolder
from softcfg.runs.lock import Lock
from softcfg.runs.pictures import write_grid
from softcfg.runs.plan import fingerprint
from softcfg.runs.shards import write_shard

pytestmark = pytest.mark.timeout(60)

Change = Callable[[dict[str, Any]], None]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = complete(tmp_path / "run", num_samples=12, batch_size=4)
    export_pngs(run, run.path)
    return run


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def alter(run: RunFolder, change: Change, *, checksum: bool) -> None:
    """Change run.json, as an editor would; without `checksum` it is one of the time before there was any."""
    path = run.path / "run.json"
    found = json.loads(path.read_text())
    change(found)
    if not checksum:
        found.pop("sha256", None)
        found.pop("format", None)
    path.write_text(json.dumps(found))


def set_to(**values: Any) -> Change:
    return lambda found: found.update(values)


def without(name: str) -> Change:
    return lambda found: found.pop(name)


# ---- run.json

CHANGES: dict[str, Change] = {
    "another seed": set_to(seed=1),
    "fewer images": set_to(num_samples=6),
    "a few fewer images": set_to(num_samples=11),
    "negative batches": set_to(batch_size=-3),
    "smaller batches": set_to(batch_size=3),
    "other labels": set_to(labels=[2, 1, 0]),
    "labels of another kind": set_to(labels="all"),
    "labels out of range": set_to(labels=[0, 99]),
    "no labels": set_to(labels=[]),
    "half an image": set_to(num_samples=1.5),
    "very many images": set_to(num_samples=10**15),
    "true": set_to(num_samples=True),
    "text for a number": set_to(seed="0"),
    "no seed": without("seed"),
    "no number of classes": without("num_classes"),
    "no environment": set_to(environment=None),
    "no model": set_to(model=None),
    "an escape sequence": set_to(model=["\x1b[2J"]),
    "guidance of no kind": set_to(guidance=3),
    "prompts of no kind": set_to(prompts=3),
    "a tokenizer of no kind": set_to(tokenizer=[]),
    "a command of no kind": set_to(command={}),
}


@pytest.mark.parametrize("checksum", [True, False], ids=["checksum", "before checksums"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_run_json_is_blamed_and_nothing_lost(
    run: RunFolder, capsys: pytest.CaptureFixture[str], change: Change, checksum: bool
) -> None:
    alter(run, change, checksum=checksum)
    before = content(run.path)
    for words in (["status"], ["verify"], ["verify", "--discard"], ["export"]):
        assert main(["runs", words[0], str(run.path), *words[1:]]) == 2
        shown = capsys.readouterr()
        assert "run.json" in shown.err
        assert shown.err.rstrip("\n").isprintable()
        assert "--discard" not in shown.err + shown.out
    with refused(r"run\.json"):
        open_source(run.path)
    with refused(r"run\.json"):
        RunFolder.claim(run.path, settings(num_samples=12))
    after = content(run.path)
    after.pop("run.lock", None)
    assert after == before
    assert not run.path.with_name("run.npz").exists()


@pytest.mark.parametrize("name", ["command", "environment", "dtype"])
def test_settings_that_change_no_shard_are_checked_too(run: RunFolder, name: str) -> None:
    alter(run, without(name), checksum=True)
    with refused(r"run\.json was altered: its checksum is wrong"):
        RunFolder.open(run.path)


def test_every_flipped_bit_of_run_json_is_found(run: RunFolder) -> None:
    path = run.path / "run.json"
    sound = path.read_bytes()
    expected = RunFolder.open(run.path).settings
    found = 0
    for bit in range(0, 8 * len(sound), 3):
        flipped = bytearray(sound)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            assert RunFolder.open(run.path).settings == expected  # the bit was in white space
        except UserError:
            found += 1
    assert found > 0.9 * 8 * len(sound) / 3


def test_runs_of_the_time_before_checksums_go_on(run: RunFolder) -> None:
    alter(run, lambda found: None, checksum=False)
    assert RunFolder.open(run.path).missing() == []
    again = RunFolder.claim(run.path, settings(num_samples=16))
    assert again.missing() == [3]
    assert "sha256" in json.loads((run.path / "run.json").read_text())
    assert again.fingerprint == run.fingerprint


def test_the_checksum_is_no_setting(run: RunFolder) -> None:
    found = json.loads((run.path / "run.json").read_text())
    assert fingerprint(found) == fingerprint(settings()) == run.fingerprint


def test_newer_runs_are_named_as_such(run: RunFolder) -> None:
    alter(run, set_to(format=2), checksum=True)
    with refused("format 2, that of a newer version of softcfg than this"):
        RunFolder.open(run.path)
    alter(run, set_to(format=1, environment=[{"softcfg": "99.1"}]), checksum=True)
    with refused(r"softcfg 99\.1 worked on the run, which is newer than this"):
        RunFolder.open(run.path)


def test_shards_without_their_run_json(run: RunFolder) -> None:
    (run.path / "run.json").unlink()
    before = content(run.path)
    with refused(r"holds shards of a run without its run\.json"):
        open_source(run.path)
    with refused(r"holds shards of a run with other settings, and no run\.json"):
        RunFolder.claim(run.path, settings(num_samples=12, seed=5))
    assert content(run.path) == before
    assert RunFolder.claim(run.path, settings(num_samples=12)).missing() == []


def test_a_run_without_its_tokenizer_is_not_decoded(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["decode", str(run.path), "--output-dir", str(run.path.with_name("new"))]) == 2
    assert "does not say with which tokenizer" in capsys.readouterr().err


# ---- shards


def flip(run: RunFolder) -> None:
    path = run.shard_path(1)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def foreign(run: RunFolder) -> None:
    other = complete(run.path.with_name("other"), num_samples=12, batch_size=4, seed=9)
    shutil.copy(other.shard_path(1), run.shard_path(1))


def misplaced(run: RunFolder) -> None:
    shutil.copy(run.shard_path(0), run.shard_path(1))


def shuffled(run: RunFolder) -> None:
    made = shard(run, 1)
    made.indices = made.indices[::-1]
    write_shard(run.shard_path(1), made)


def without_pixels(run: RunFolder) -> None:
    made = shard(run, 1)
    made.pixels = made.pixels[:2]
    write_shard(run.shard_path(1), made)


def smaller(run: RunFolder) -> None:
    write_shard(run.shard_path(1), shard(run, 1, size=2))


def node(kind: str) -> Callable[[RunFolder], None]:
    def place(run: RunFolder) -> None:
        run.shard_path(1).unlink()
        NODES[kind](run.shard_path(1))

    return place


def nested(run: RunFolder) -> None:
    text = b'{"__metadata__":' + b"[" * 60_000
    run.shard_path(1).write_bytes(len(text).to_bytes(8, "little") + text)


SHARDS: dict[str, Callable[[RunFolder], None]] = {
    "missing": lambda run: run.shard_path(1).unlink(),
    "flipped": flip,
    "torn": lambda run: os.truncate(run.shard_path(1), 300),
    "empty": lambda run: os.truncate(run.shard_path(1), 0),
    "foreign": foreign,
    "misplaced": misplaced,
    "shuffled": shuffled,
    "fewer pixels": without_pixels,
    "nested": nested,
    **{kind: node(kind) for kind in NODES},
}


@pytest.mark.parametrize("damage", SHARDS.values(), ids=SHARDS)
def test_damaged_shards(
    run: RunFolder, capsys: pytest.CaptureFixture[str], damage: Callable[[RunFolder], None]
) -> None:
    others = [run.shard_path(number).read_bytes() for number in (0, 2)]
    damage(run)
    with refused():
        for _ in open_source(run.path).batches(64):
            pass
    with refused():
        export_npz(run, run.path.with_name("all.npz"))
    assert not run.path.with_name("all.npz").exists()
    assert main(["runs", "status", str(run.path)]) == 0
    assert main(["runs", "verify", str(run.path)]) == 1
    assert "2 of 3 shards of 4 images sound" in capsys.readouterr().out
    if not run.shard_path(1).is_dir():
        assert main(["runs", "verify", str(run.path), "--discard"]) == 1
        assert not os.path.lexists(run.shard_path(1))
        assert run.missing() == [1]
        write_shard(run.shard_path(1), shard(run, 1))
        assert main(["runs", "verify", str(run.path)]) in (0, 1)  # 1: the PNG files went with the shard
    else:
        assert main(["runs", "verify", str(run.path), "--discard"]) == 2
        assert "cannot be removed" in capsys.readouterr().err
    assert [run.shard_path(number).read_bytes() for number in (0, 2)] == others


def test_images_of_several_sizes(run: RunFolder) -> None:
    smaller(run)
    with refused(r"differ in image size: the first has 4 x 4, shard 1 has 2 x 2"):
        for _ in open_source(run.path).batches(64):
            pass


def test_features_of_an_altered_run_are_not_taken_from_the_cache(run: RunFolder, tmp_path: Path) -> None:
    extractor = Extractor("mean", lambda pixels: Features(pixels.float().mean(dim=(2, 3))), "0")
    extract(extractor, open_source(run.path), cache=tmp_path / "cache")
    flip(run)
    with refused("its checksum is wrong"):
        extract(extractor, open_source(run.path), cache=tmp_path / "cache")


def test_equal_runs_have_equal_shards(tmp_path: Path) -> None:
    one, other = (complete(tmp_path / name) for name in "ab")
    for _ in range(5):
        write_shard(other.shard_path(0), shard(other, 0))
        assert one.shard_path(0).read_bytes() == other.shard_path(0).read_bytes()
    assert content(one.path / "shards") == content(other.path / "shards")


def test_other_programs_read_shards(run: RunFolder) -> None:
    from safetensors import safe_open

    with safe_open(run.shard_path(0), "np") as file:
        assert np.array_equal(file.get_tensor("pixels"), run.read(0).pixels)
        assert set(file.metadata()) == {"shard", "run", "drawn_at_once", "sha256"}


# ---- pictures

PNGS: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""),
    "torn": lambda path: os.truncate(path, 50),
    "another image": lambda path: Image.new("RGB", (4, 4)).save(path),
    "another size": lambda path: Image.new("RGB", (5, 4)).save(path),
    "no picture": lambda path: path.write_bytes(b"text"),
    "FIFO": lambda path: (path.unlink(), fifo(path)),
    "device": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
}


@pytest.mark.parametrize("damage", PNGS.values(), ids=PNGS)
def test_damaged_pictures_are_found_and_mended(
    run: RunFolder, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], Any]
) -> None:
    path = run.path / "000005.png"
    sound = path.read_bytes()
    assert main(["runs", "verify", str(run.path)]) == 0
    damage(path)
    capsys.readouterr()
    assert main(["runs", "verify", str(run.path)]) == 1
    assert "000005.png does not show the image in its shard" in capsys.readouterr().out
    export_pngs(run, run.path, absent_only=True)  # as `softcfg sample` does in the end
    assert path.read_bytes() == sound
    assert not path.is_symlink()
    assert main(["runs", "verify", str(run.path)]) == 0


def test_sample_mends_pictures(model_folder: Path, tmp_path: Path) -> None:
    words = [
        "sample", str(model_folder), "--labels", "0,1", "--num-samples", "4", "--output-dir", str(tmp_path / "out"),
        "--no-compare",
    ]  # fmt: skip
    assert main(words) == 0
    sound = content(tmp_path / "out")
    (tmp_path / "out" / "000002.png").write_bytes(b"")
    Image.new("RGB", (8, 8)).save(tmp_path / "out" / "000003.png")
    assert main(words) == 0
    for name in ("000002.png", "000003.png"):
        assert (tmp_path / "out" / name).read_bytes() == sound[name]


def test_a_folder_in_place_of_a_picture(run: RunFolder) -> None:
    (run.path / "000005.png").unlink()
    (run.path / "000005.png").mkdir()
    assert altered_pngs(run.read(1), run.path) == ["000005.png"]
    with refused("cannot write .*000005.png: Is a directory"):
        export_pngs(run, run.path, absent_only=True)


# ---- links and the lock


def test_the_lock_follows_no_link(run: RunFolder, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (run.path / "run.lock").symlink_to(victim)
    with refused("it is a link"):
        Lock(run.path)
    (run.path / "run.lock").unlink()
    os.link(victim, run.path / "run.lock")
    Lock(run.path).release()
    assert victim.read_text() == "precious"


def test_a_full_disk_at_the_lock(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    (run.path / "run.lock").symlink_to("/dev/full")
    with refused():
        Lock(run.path)


def test_links_in_the_folder_of_a_run_are_replaced_not_followed(run: RunFolder, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in ("000005.png", "run.json", "shards/shard-000001.safetensors", "grid.png"):
        (run.path / name).unlink(missing_ok=True)
        (run.path / name).symlink_to(victim)
    (run.path / "run.json").unlink()
    RunFolder.claim(run.path, settings(num_samples=12))
    write_shard(run.shard_path(1), shard(run, 1))
    export_pngs(run, run.path)
    write_grid(run)
    assert victim.read_text() == "precious"
    assert RunFolder.open(run.path).missing() == []


def test_overwriting_discards_behind_a_link(run: RunFolder, tmp_path: Path) -> None:
    large = tmp_path / "large disk"
    (run.path / "shards").rename(large)
    (large / "notes.txt").write_text("mine")
    (run.path / "shards").symlink_to(large)
    assert RunFolder.open(run.path).missing() == []
    again = RunFolder.claim(run.path, settings(num_samples=12), overwrite=True)
    assert again.missing() == [0, 1, 2]
    assert (run.path / "shards").is_symlink()
    assert [path.name for path in large.iterdir()] == ["notes.txt"]


# ---- the cache of features


def test_every_flipped_bit_in_the_cache_of_features_is_found(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 2, 2, 3), dtype=np.uint8)
    extractor = Extractor("mean", lambda pixels: Features(pixels.float().mean(dim=(2, 3))), "0")
    expected = extract(extractor, open_source(images), cache=tmp_path).pooled
    (path,) = tmp_path.iterdir()
    sound = path.read_bytes()
    for bit in range(0, 8 * len(sound), 7):
        flipped = bytearray(sound)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert extract(extractor, open_source(images), cache=tmp_path).pooled.equal(expected)
    assert path.read_bytes() == sound


def test_a_picture_of_fewer_images_does_not_outlive_a_kill(model_folder: Path, tmp_path: Path) -> None:
    """Shards of a growth that ended before its pictures were made; and a picture that was torn."""

    def draw(count: int, folder: str, *more: str) -> None:
        words = ["sample", str(model_folder), "--labels", "0,1", "--batch-size", "2", "--num-samples", str(count)]
        assert main([*words, "--output-dir", str(tmp_path / folder), *more]) == 0

    draw(4, "grown")
    draw(8, "grown", "--no-compare")
    draw(8, "grown")
    draw(8, "whole")
    grown, whole = tmp_path / "grown" / "comparison.png", tmp_path / "whole" / "comparison.png"
    assert grown.read_bytes() == whole.read_bytes()
    grown.write_bytes(grown.read_bytes()[:1000])
    assert main(["runs", "verify", str(grown.parent)]) == 1
    draw(8, "grown")
    assert grown.read_bytes() == whole.read_bytes()
