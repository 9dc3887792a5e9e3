import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from made_runs import complete, settings, shard
from softcfg import CFG, Pipeline, Sampling, UserError
from softcfg.nn.memory import is_out_of_memory
from softcfg.runs.export import write_pngs
from softcfg.runs.folder import RunFolder
from softcfg.runs.processes import Processes
from softcfg.runs.progress import Progress, ProgressBar, ProgressWatch
from softcfg.runs.shards import write_shard
from softcfg.runs.worker import BatchDrawer, make_shards

LABELS = [0, 1, 2, 3, 0]


class Cramped:
    """A pipeline with memory for a few images at once."""

    def __init__(self, pipe: Pipeline, room: int, error: Exception) -> None:
        self.pipe, self.room, self.error = pipe, room, error
        self.generator, self.num_tokens = pipe.generator, pipe.num_tokens
        self.tried: list[int] = []

    def __call__(self, *args: Any, batch_size: int, **settings: Any) -> Any:
        self.tried.append(batch_size)
        if batch_size > self.room:
            raise self.error
        return self.pipe(*args, batch_size=batch_size, **settings)


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS)
def test_out_of_memory_halves_the_batch(pipe: Pipeline, error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    cramped = Cramped(pipe, 2, error)
    drawer = BatchDrawer(cramped, CFG(), Sampling(), 0, 5)  # type: ignore[arg-type]
    drawn = drawer.draw(range(5), LABELS)
    assert cramped.tried == [5, 3, 2]
    assert drawer.batch_size == 2
    assert torch.equal(drawn.tokens, pipe(LABELS, CFG(), temperature=1.0).tokens)
    drawer.draw(range(5), LABELS)
    assert cramped.tried == [5, 3, 2, 2]  # it does not try the larger ones again
    assert "out of memory on cpu; going on with 2 images at once" in capsys.readouterr().err


def test_no_memory_at_all(pipe: Pipeline) -> None:
    drawer = BatchDrawer(Cramped(pipe, 0, ERRORS[0]), CFG(), Sampling(), 0, 4)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="out of memory with one image at a time on cpu"):
        drawer.draw(range(4), LABELS[:4])


def test_other_errors_are_not_for_want_of_memory(pipe: Pipeline) -> None:
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    drawer = BatchDrawer(Cramped(pipe, 0, RuntimeError("shapes")), CFG(), Sampling(), 0, 4)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="shapes"):
        drawer.draw(range(4), LABELS[:4])


@pytest.fixture
def empty(tmp_path: Path, pipe: Pipeline) -> RunFolder:
    return RunFolder.claim(tmp_path / "run", settings(labels=[0, 1, 2, 3], num_classes=4))


def processes(rank: int, world: int) -> Processes:
    group = Processes()
    group.rank, group.world = rank, world
    return group


def test_ranks_share_the_missing_shards(empty: RunFolder, pipe: Pipeline, tmp_path: Path) -> None:
    drawer = BatchDrawer(pipe, CFG(), Sampling(), 0, 4)
    for rank in range(2):
        on_shard = partial(write_pngs, folder=empty.path) if rank == 0 else None
        make_shards(empty, [0, 1, 2], drawer.shards_of(empty), processes(rank, 2), on_shard=on_shard)
        assert empty.missing() == ([1] if rank == 0 else [])
    whole = pipe([n % 4 for n in range(10)], CFG(), batch_size=4, temperature=1.0)
    assert np.array_equal(np.concatenate([shard.pixels for shard in empty.shards()]), whole.pixels)
    assert sorted(path.name for path in empty.path.glob("*.png")) == [f"{n:06d}.png" for n in (0, 1, 2, 3, 8, 9)]


def test_a_smaller_batch_is_on_record(empty: RunFolder, pipe: Pipeline) -> None:
    drawer = BatchDrawer(Cramped(pipe, 2, ERRORS[0]), CFG(), Sampling(), 0, 4)  # type: ignore[arg-type]
    make_shards(empty, [0], drawer.shards_of(empty), Processes())
    assert empty.read(0).drawn_at_once == 2


def test_a_vanished_folder_ends_the_run(empty: RunFolder, pipe: Pipeline) -> None:
    drawer = BatchDrawer(pipe, CFG(), Sampling(), 0, 4)
    empty.path.rename(empty.path.with_name("elsewhere"))
    with pytest.raises(UserError, match=r"cannot write .*shard-000000\.safetensors: No such file"):
        make_shards(empty, [0], drawer.shards_of(empty), Processes())
    with pytest.raises(UserError, match=r"cannot read .*shards"):
        ProgressWatch(empty, [0, 1, 2]).look()


def test_progress_counts_what_all_processes_did(tmp_path: Path) -> None:
    run = complete(tmp_path)
    last = run.shard_path(2)
    content = last.read_bytes()
    last.write_bytes(content[:-1])  # torn, and to be drawn again
    run.shard_path(1).unlink()
    reports: list[Progress] = []
    watch = ProgressWatch(run, [1, 2], reports.append)
    assert (reports[0].done, reports[0].total, reports[0].before, reports[0].ended) == (4, 10, 4, False)
    assert watch.look() == 4
    watch.update(2.5)
    assert reports[-1].done == 6
    last.write_bytes(content)  # by another process
    assert watch.look() == 6
    watch.update(3.9)
    assert reports[-1].done == 9
    write_shard(run.shard_path(1), shard(run, 1))
    watch.wait(processes(0, 2))
    watch.close()
    assert (reports[-1].done, reports[-1].ended) == (10, True)
    assert not any(report.ended for report in reports[:-1])
    assert [report.done for report in reports] == sorted(report.done for report in reports)


@pytest.fixture
def clock_going_backwards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    now = [2e9]

    def earlier() -> float:
        now[0] -= 1000.0
        return now[0]

    monkeypatch.setattr(time, "time", earlier)
    for module in [module for name, module in sys.modules.items() if name.startswith("tqdm")]:
        if hasattr(module, "time"):
            monkeypatch.setattr(module, "time", earlier)
    yield
    assert now[0] < 2e9


@pytest.mark.usefixtures("clock_going_backwards")
def test_a_clock_going_backwards_changes_nothing(empty: RunFolder, pipe: Pipeline) -> None:
    drawer = BatchDrawer(pipe, CFG(), Sampling(), 0, 4)
    reports: list[Progress] = []
    bar = ProgressBar()

    def show(progress: Progress) -> None:
        reports.append(progress)
        bar(progress)

    watch = ProgressWatch(empty, [0, 1, 2], show)
    make_shards(empty, [0, 1, 2], drawer.shards_of(empty), Processes(), watch=watch)
    assert empty.missing() == []
    assert reports[-1].done == 10
    assert reports[-1].seconds > 0
    assert reports[-1].rate > 0
