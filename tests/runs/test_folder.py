import json
import multiprocessing
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from made_runs import complete, settings
from softcfg import UserError
from softcfg.runs.folder import RunFolder
from softcfg.runs.lock import Lock, holder


def test_settings_that_differ_are_named(tmp_path: Path) -> None:
    RunFolder.claim(tmp_path, settings())
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(UserError, match=r"another seed \(0 there, 5 here\), batch_size \(4 there, 8 here\); give"):
        RunFolder.claim(tmp_path, settings(seed=5, batch_size=8))
    assert (tmp_path / "run.json").read_bytes() == before


def test_overwriting_discards_the_run(tmp_path: Path) -> None:
    run = complete(tmp_path)
    (tmp_path / "000003.png").write_bytes(b"old")
    (tmp_path / "notes.txt").write_text("mine")
    again = RunFolder.claim(tmp_path, settings(seed=5), overwrite=True)
    assert again.missing() == [0, 1, 2]
    assert not (tmp_path / "000003.png").exists()
    assert (tmp_path / "notes.txt").exists()
    assert not run.shard_path(0).exists()


def test_overwriting_leaves_what_no_run_of_the_folder_made(tmp_path: Path) -> None:
    names = [
        "1.png",
        "0042.png",
        "000003.png",
        "grid.png",
        "comparison.png",
        "\u0663\u0663\u0663\u0663\u0663\u0663.png",
    ]
    for name in names:
        (tmp_path / name).write_bytes(b"mine")
    RunFolder.claim(tmp_path, settings(), overwrite=True)  # there is no run
    assert all((tmp_path / name).read_bytes() == b"mine" for name in names)
    (tmp_path / "000010.png").write_bytes(b"mine")  # the run has 10 images
    RunFolder.claim(tmp_path, settings(seed=1), overwrite=True)
    left = {path.name for path in tmp_path.glob("*.png")}
    assert left == {*names, "000010.png"} - {"000003.png", "grid.png", "comparison.png"}


def test_equal_numbers_are_one_setting(tmp_path: Path) -> None:
    """3 and 3.0 are other texts, and the shards have a hash of those."""
    run = complete(tmp_path)
    again = RunFolder.claim(tmp_path, settings(guidance={"method": "CFG", "guidance_scale": 3}))
    assert again.fingerprint == run.fingerprint
    assert not again.missing()


@pytest.mark.parametrize("name", ["000009.png", "grid.png", "comparison.png"])
def test_pictures_that_no_run_has_made_are_not_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / "000010.png").write_bytes(b"mine")  # the run has 10 images
    RunFolder.claim(tmp_path, settings())
    (tmp_path / "run.json").unlink()
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(
        UserError, match=f"holds {name}, which no run there has made; give another folder, or overwrite"
    ):
        RunFolder.claim(tmp_path, settings())
    assert (tmp_path / name).read_bytes() == b"mine"
    assert not (tmp_path / "run.json").exists()


def test_overwriting_a_run_without_its_settings(tmp_path: Path) -> None:
    run = complete(tmp_path)
    for name in ("000009.png", "000010.png"):
        (tmp_path / name).write_bytes(b"a picture")
    (tmp_path / "run.json").unlink()
    assert RunFolder.claim(run.path, settings(seed=5), overwrite=True).missing() == [0, 1, 2]
    assert [path.name for path in tmp_path.glob("*.png")] == ["000010.png"]


def test_nothing_is_discarded_for_settings_that_are_refused(tmp_path: Path) -> None:
    run = complete(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for changes, message in (({"num_samples": 0}, "num_samples must be"), ({"command": "x" * (1 << 25)}, "32 MiB")):
        with pytest.raises(UserError, match=message):
            RunFolder.claim(run.path, settings(**changes), overwrite=True)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_environments_are_kept(tmp_path: Path) -> None:
    for version in ("1", "1", "2"):
        RunFolder.claim(tmp_path, settings(environment=[{"softcfg": version}]))
    assert RunFolder.open(tmp_path).settings["environment"] == [{"softcfg": "1"}, {"softcfg": "2"}]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"labels": 3}', "\xff"])
def test_settings_that_cannot_be_read(tmp_path: Path, content: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=r"run\.json"):
        RunFolder.open(tmp_path)
    with pytest.raises(UserError, match=r"run\.json is not readable"):
        RunFolder.claim(tmp_path, settings())
    assert path.read_text(encoding="latin-1") == content
    assert RunFolder.claim(tmp_path, settings(), overwrite=True).missing() == [0, 1, 2]


def test_run_json_has_a_line_a_field(tmp_path: Path) -> None:
    RunFolder.claim(tmp_path, settings(labels=list(range(1000)), num_classes=1000))
    text = (tmp_path / "run.json").read_text()
    assert len(text.splitlines()) == len(settings()) + 4  # the braces, the format and the checksum
    assert json.loads(text)["labels"] == list(range(1000))


def test_one_job_at_a_time(tmp_path: Path) -> None:
    assert holder(tmp_path) is None
    with Lock(tmp_path):
        assert "process " in str(holder(tmp_path))
        with pytest.raises(UserError, match=r"is in use by process \d+ on .* \(since .*\); wait for it"):
            Lock(tmp_path)
    assert holder(tmp_path) is None
    Lock(tmp_path).release()


def test_a_look_at_the_lock_keeps_no_job_from_starting(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    Lock(tmp_path).release()
    with (tmp_path / "run.lock").open() as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)  # as `holder` takes it
        end = threading.Timer(0.05, looking.close)
        end.start()
        with Lock(tmp_path):
            assert "process " in str(holder(tmp_path))
        end.join()


def hold(folder: Path, ready: Any) -> None:
    with Lock(folder):
        ready.set()
        time.sleep(60)


def test_a_killed_job_holds_no_lock(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    job = context.Process(target=hold, args=(tmp_path, ready))
    job.start()
    assert ready.wait(60)
    assert str(job.pid) in str(holder(tmp_path))
    job.kill()
    job.join()
    assert holder(tmp_path) is None
    Lock(tmp_path).release()
    assert (tmp_path / "run.lock").exists()
