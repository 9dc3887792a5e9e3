"""Runs whose processes are killed at random moments: nothing lost, nothing doubled, nothing half-written."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from launching import Job
from softcfg.cli.main import main
from softcfg.runs.folder import RunFolder
from softcfg.runs.lock import holder

pytestmark = pytest.mark.slow

IMAGES, BATCH = 50, 3
KILLS = 36


def words(model: Path, out: Path, *more: str) -> list[str]:
    return [
        "sample", str(model), "--output-dir", str(out), "--num-samples", str(IMAGES), "--batch-size", str(BATCH),
        "--labels", "random", "--no-compare", "--npz", *more,
    ]  # fmt: skip


def images(npz: Path) -> np.ndarray:
    with np.load(npz) as content:
        return content["arr_0"]


@pytest.fixture(scope="module")
def undisturbed(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert main(words(model_folder, folder)) == 0
    return images(folder.with_suffix(".npz"))


def state(run: RunFolder, expected: np.ndarray) -> dict[str, tuple[int, int]]:
    """The identity of every shard file there is; all of them are whole, and hold what they should."""
    files = {path.name: path for path in (run.path / "shards").glob("shard-*")}
    for name in files:
        number = int(name[6:12])
        shard = run.read(number)
        assert np.array_equal(shard.pixels, expected[number * BATCH : (number + 1) * BATCH])
    return {name: (path.stat().st_ino, path.stat().st_mtime_ns) for name, path in files.items()}


def wait_for_progress(job: Job, out: Path, before: int, chance: random.Random) -> None:
    """Wait for a moment of the start, or in the middle of a shard some way on, whatever the machine's pace."""
    more = chance.choice([0, 0, 1, 2, 4, 8])
    while more and job.alive() and len(list(out.glob("shards/shard-*"))) < before + more:
        time.sleep(0.002)
    time.sleep(chance.uniform(0, 0.05 if more else 0.8))


@pytest.mark.timeout(600)
def test_killed_runs_lose_nothing_and_double_nothing(
    model_folder: Path, tmp_path: Path, undisturbed: np.ndarray
) -> None:
    chance = random.Random(0)
    kills = in_the_middle = folders = 0
    while kills < KILLS:
        out = tmp_path / f"run-{folders}"
        folders += 1
        kept: dict[str, tuple[int, int]] = {}
        complete = False
        while not complete:
            world = chance.choice([1, 2, 3])
            job = Job(world, words(model_folder, out))
            wait_for_progress(job, out, len(kept), chance)
            hit = job.kill(chance.sample(range(world), chance.randint(1, world)))
            kills += hit > 0
            if (out / "run.json").exists():
                run = RunFolder.open(out)
                now = state(run, undisturbed)
                assert {name: now.get(name) for name in kept} == kept  # nothing lost, nothing drawn again
                in_the_middle += hit > 0 and kept.keys() < now.keys() and len(now) < run.plan.num_shards
                complete = len(now) == run.plan.num_shards
                kept = now
            assert holder(out) is None
        assert set(Job(chance.choice([1, 2, 3]), words(model_folder, out)).join()) == {0}
        assert state(run, undisturbed) == kept
        assert np.array_equal(images(out.with_suffix(".npz")), undisturbed)
        assert sorted(path.name for path in out.glob("*.png") if path.stem.isdigit()) == [
            f"{n:06d}.png" for n in range(IMAGES)
        ]
        assert not list(out.rglob(".*.tmp"))
    assert in_the_middle >= 10  # the kills were no formality


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_processes_gives_the_same_bits(
    model_folder: Path, tmp_path: Path, undisturbed: np.ndarray, world: int
) -> None:
    assert Job(world, words(model_folder, tmp_path / "run")).join() == [0] * world
    assert np.array_equal(images(tmp_path / "run.npz"), undisturbed)


def test_many_processes_wait_for_torn_shards_to_be_redrawn(
    model_folder: Path, tmp_path: Path, undisturbed: np.ndarray
) -> None:
    out = tmp_path / "run"
    assert Job(2, words(model_folder, out, "--no-npz")).join() == [0, 0]
    run = RunFolder.open(out)
    for number in (3, 9, 16):
        path = run.shard_path(number)
        path.write_bytes(path.read_bytes()[:-7])
    assert Job(3, words(model_folder, out)).join() == [0, 0, 0]
    assert np.array_equal(images(tmp_path / "run.npz"), undisturbed)


def test_errors_of_one_process_reach_all(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{")
    assert Job(2, words(model_folder, tmp_path / "run")).join() == [2, 2]


def test_torchrun_and_its_sigterm(model_folder: Path, tmp_path: Path, undisturbed: np.ndarray) -> None:
    out = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "softcfg"]
    with subprocess.Popen(
        [*torchrun, *words(model_folder, out, "--num-samples", "5000", "--no-npz", "--no-png")],
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        until = time.monotonic() + 60
        while len(list(out.glob("shards/shard-*"))) < 4 and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        error = process.communicate(timeout=60)[1]
    assert process.returncode != 0
    assert "of 5000 images are done and kept; continue with: softcfg sample" in error
    run = RunFolder.open(out)
    missing = run.missing()
    assert 0 < len(missing) <= run.plan.num_shards - 4
    for number in {*range(run.plan.num_shards)} - {*missing}:
        run.read(number)
    assert subprocess.run([*torchrun, *words(model_folder, tmp_path / "small")], check=False).returncode == 0
    assert np.array_equal(images(tmp_path / "small.npz"), undisturbed)
