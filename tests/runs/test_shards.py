import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softcfg.files
from made_runs import complete, settings, shard
from softcfg import UserError
from softcfg.runs.export import export_npz
from softcfg.runs.folder import RunFolder
from softcfg.runs.shards import DamagedShardError, glance, read_shard, write_shard


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return complete(tmp_path / "run")


def test_a_shard_comes_back_as_it_was(run: RunFolder) -> None:
    found = run.read(1)
    assert found.indices.tolist() == [4, 5, 6, 7]
    assert found.labels.tolist() == [1, 2, 0, 1]
    assert found.codes.dtype == np.int16
    expected = shard(run, 1)
    assert np.array_equal(found.codes, expected.codes)
    assert np.array_equal(found.pixels, expected.pixels)
    assert glance(run.shard_path(2)) == (run.fingerprint, 2)
    assert run.missing() == []


def test_large_codebooks(run: RunFolder) -> None:
    large = shard(run, 0)
    large.codes[0, 0] = 2**15
    write_shard(run.shard_path(0), large)
    assert run.read(0).codes.dtype == np.int32
    assert run.read(0).codes[0, 0] == 2**15


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    path = complete(tmp_path, size=2, num_samples=2, batch_size=2).shard_path(0)
    content = path.read_bytes()
    found = 0
    for bit in range(0, 8 * len(content), 5):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(DamagedShardError):
            read_shard(path)
        found += 1
    assert found > 800


def test_every_torn_shard_is_found_without_reading_it(run: RunFolder) -> None:
    path = run.shard_path(1)
    content = path.read_bytes()
    for length in {0, 1, 7, 8, 9, *range(0, len(content), 23), len(content) - 1}:
        path.write_bytes(content[:length])
        with pytest.raises(DamagedShardError):
            glance(path)
        with pytest.raises(DamagedShardError):
            read_shard(path)
    assert run.missing() == [1]
    path.write_bytes(content + b"\0")
    assert run.missing() == [1]
    path.write_bytes(content)
    assert run.missing() == []


def test_shards_of_another_run_or_place_do_not_count(run: RunFolder, tmp_path: Path) -> None:
    other = complete(tmp_path / "other", seed=1)
    run.shard_path(0).write_bytes(other.shard_path(0).read_bytes())
    run.shard_path(2).unlink()
    assert run.missing() == [0, 2]
    with pytest.raises(DamagedShardError, match="belongs to another run"):
        run.read(0)
    run.shard_path(0).write_bytes(run.shard_path(1).read_bytes())
    with pytest.raises(DamagedShardError, match="belongs to another run or place"):
        run.read(0)


def test_a_run_that_grows_draws_its_partial_shard_again(run: RunFolder) -> None:
    grown = RunFolder.claim(run.path, settings(num_samples=13, batch_size=None))
    assert grown.plan.batch_size == 4
    assert grown.missing() == [2, 3]
    with pytest.raises(UserError, match="may grow, but not shrink"):
        RunFolder.claim(run.path, settings(num_samples=12))


class Full:
    """A file on a disk with room for some bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, content: bytes) -> int:
        taken = memoryview(content).nbytes
        if taken > self.room:
            self.file.write(memoryview(content).cast("B")[: self.room])
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= taken
        return self.file.write(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> "Full":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def full_disk(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """Every file written from now on has room for so many bytes."""
    monkeypatch.setattr(softcfg.files, "open", lambda *args: Full(open(*args), room), raising=False)  # noqa: SIM115


@pytest.mark.parametrize("room", [0, 10, 500])
def test_a_full_disk_leaves_nothing_half_written(run: RunFolder, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    before = run.shard_path(0).read_bytes()
    run.shard_path(1).unlink()
    full_disk(monkeypatch, room)
    for number in (0, 1):
        with pytest.raises(UserError, match=r"cannot write .*shard-00000.\.safetensors: No space left on device"):
            write_shard(run.shard_path(number), shard(run, number))
    assert sorted(path.name for path in run.shard_path(0).parent.iterdir()) == [
        "shard-000000.safetensors",
        "shard-000002.safetensors",
    ]
    assert run.shard_path(0).read_bytes() == before


def test_a_full_disk_during_the_export(run: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    full_disk(monkeypatch, 300)
    with pytest.raises(UserError, match=r"cannot write .*all\.npz: No space left on device"):
        export_npz(run, tmp_path / "all.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_killed_writers_left_is_removed(run: RunFolder) -> None:
    left = run.shard_path(0).with_name(".shard-000009.safetensors.host.1.tmp")
    left.write_bytes(b"half")
    RunFolder.claim(run.path, settings())
    assert not left.exists()
    assert run.missing() == []
