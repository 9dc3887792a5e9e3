"""How many processors a container or a scheduler leaves, and what follows from it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from limited_machine import LimitedMachine
from softcfg import CFG, Pipeline
from softcfg.decoding import threads
from softcfg.nn import limits


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LimitedMachine]:
    limits.cores.cache_clear()
    yield LimitedMachine(tmp_path, monkeypatch)
    limits.cores.cache_clear()


def test_no_limit(machine: LimitedMachine) -> None:
    assert limits.processors() is None
    machine.write("groups/cpu.max", "max 100000")
    assert limits.processors() is None
    machine.write("cgroup", "2:cpu,cpuacct:/docker/abc")
    machine.write("groups/cpu/cpu.cfs_quota_us", -1)
    machine.write("groups/cpu/cpu.cfs_period_us", 100000)
    assert limits.processors() is None


def test_the_tightest_limit_around_a_process_counts(machine: LimitedMachine) -> None:
    machine.write("cgroup", "0::/kubepods/pod1/container")
    machine.write("groups/kubepods/cpu.max", "6400000 100000")
    machine.write("groups/kubepods/pod1/cpu.max", "150000 100000")
    machine.write("groups/kubepods/pod1/container/cpu.max", "max 100000")
    assert limits.processors() == 1.5


def test_groups_of_the_first_version(machine: LimitedMachine) -> None:
    machine.write("cgroup", "2:cpu,cpuacct:/docker/abc")
    machine.write("groups/cpu/cpu.cfs_quota_us", 50000)
    machine.write("groups/cpu/cpu.cfs_period_us", 100000)
    assert limits.processors() == 0.5


@pytest.mark.parametrize("text", ["", "much of it", "100000 0", "-5 100000"])
def test_files_that_say_nothing(machine: LimitedMachine, text: str) -> None:
    machine.write("groups/cpu.max", text)
    assert limits.processors() is None


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system has no affinity")
@pytest.mark.parametrize(("quota", "cores"), [(150000, 2), (100000, 1), (10000, 1), (400000, 3), ("max", 3)])
def test_cores_are_no_more_than_a_container_allows(
    machine: LimitedMachine, monkeypatch: pytest.MonkeyPatch, quota: object, cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 5})
    machine.write("groups/cpu.max", f"{quota} 100000")
    assert limits.cores() == cores


@pytest.mark.parametrize("chosen", [None, "variable", "by hand"])
def test_a_call_runs_on_as_many_threads_as_it_may(chosen: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves the number as it was; whoever has set it gets it."""
    for name in threads.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "cores", lambda: 1)
    monkeypatch.setattr(threads, "DEFAULT", 3 if chosen == "by hand" else 2)
    if chosen == "variable":
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        pipe = Pipeline.from_pretrained("fashion-small")
        pipe([0], CFG(2.0), on_tokens=lambda _: seen.append(torch.get_num_threads()), progress=False)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(seen) == ({1} if chosen is None else {2})
