"""How much memory there is, and what happens where it is not enough."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from limited_machine import GIB, LimitedMachine
from softcfg import CFG, Pipeline, Sampling, SoftCFG
from softcfg.cli.main import main
from softcfg.nn import kv_cache, memory
from softcfg.nn.backends import numba_decode
from softcfg.nn.kv_cache import KVCache
from softcfg.nn.memory import free_memory, require_memory
from softcfg.runs.worker import BatchDrawer
from softcfg.zoo import load_generator

CPU = torch.device("cpu")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LimitedMachine:
    return LimitedMachine(tmp_path, monkeypatch)


def of(available: int) -> int:
    """What may be taken of it."""
    return int(0.9 * available)


def test_a_machine_without_limits(machine: LimitedMachine) -> None:
    assert free_memory(CPU) == of(20 * GIB)


def test_a_limit_of_a_container(machine: LimitedMachine) -> None:
    machine.limit(".", 8 * GIB, 3 * GIB, GIB)
    assert free_memory(CPU) == of(6 * GIB)


def test_the_tightest_of_the_limits_around_a_process_counts(machine: LimitedMachine) -> None:
    machine.write("cgroup", "1:cpu:/elsewhere\n0::/jobs/7/step\n")
    machine.limit("jobs/7/step", "max", 0, 0)
    machine.limit("jobs/7", 5 * GIB, 2 * GIB, 0)
    machine.limit("jobs", 4 * GIB, 2 * GIB, 0)
    machine.limit("others", GIB, GIB, 0)
    assert free_memory(CPU) == of(2 * GIB)


def test_groups_of_the_first_version(machine: LimitedMachine) -> None:
    machine.write("cgroup", "3:cpu,memory:/docker/abc\n1:name=systemd:/docker/abc\n0::/\n")
    machine.limit("memory", 4 * GIB, 3 * GIB, 0, version=1)  # the path is that of the host
    assert free_memory(CPU) == of(GIB)
    machine.limit("memory", 9223372036854771712, 3 * GIB, 0, version=1)
    assert free_memory(CPU) == of(20 * GIB)


def test_a_group_beyond_its_limit_has_nothing_left(machine: LimitedMachine) -> None:
    machine.limit(".", GIB, 2 * GIB, 0)
    assert free_memory(CPU) == of(0)


@pytest.mark.parametrize("missing", ["meminfo", "cgroup"])
def test_systems_without_these_files(machine: LimitedMachine, missing: str) -> None:
    (machine.folder / missing).unlink()
    assert free_memory(CPU) == (None if missing == "meminfo" else of(20 * GIB))
    require_memory(GIB, "some numbers")


def test_what_there_is_not_is_refused_before_it_is_written(machine: LimitedMachine) -> None:
    require_memory(19 * GIB, "nine tenths of 20 GiB, and one of swap space")
    sentence = r"out of memory: many numbers take 20\.0 GiB, and 18\.0 GiB are free for them"
    with pytest.raises(MemoryError, match=sentence):
        require_memory(20 * GIB, "many numbers")
    with pytest.raises(MemoryError, match=r"the keys and values of 4096 rows take 96\.0 GiB"):
        KVCache(24, 4096, 16, 64, 128)


def test_a_batch_for_which_a_container_has_no_room_is_halved(
    machine: LimitedMachine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = Pipeline.from_pretrained("fashion-small")
    one_image = pipe.generator.cache_bytes(pipe.generator.condition([0], guided=True))
    machine.write("meminfo", f"MemAvailable: {20 << 20} kB")
    machine.limit(".", 4 * one_image, 0, 0)
    monkeypatch.setattr(memory, "LOOKED_AFTER", 0)
    monkeypatch.setattr(numba_decode, "is_faster", lambda: True)  # to measure it takes more
    drawer = BatchDrawer(pipe, SoftCFG(2.0), Sampling(), 0, 5)
    drawn = drawer.draw(range(5), [0, 1, 2, 3, 4])
    assert drawer.batch_size == 3
    assert len(drawn.tokens) == 5
    assert "out of memory on cpu; going on with 3 images at once" in capsys.readouterr().err
    with pytest.raises(MemoryError, match="the keys and values of 10 rows take"):
        pipe([0, 1, 2, 3, 4], CFG(2.0), batch_size=5)


def test_weights_that_do_not_fit_in_another_dtype_are_refused(
    machine: LimitedMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.write("meminfo", "MemAvailable: 1 kB")
    monkeypatch.setattr(memory, "LOOKED_AFTER", 0)
    with pytest.raises(MemoryError, match=r"the weights of .*fashion-small.* in bfloat16 take 0\.0 GiB, and 0\.0 GiB"):
        load_generator("fashion-small", dtype=torch.bfloat16)
    load_generator("fashion-small")  # which stay in the file


@pytest.mark.parametrize("error", [MemoryError(), MemoryError("out of memory: all of it")])
def test_the_command_line_says_so(
    error: MemoryError, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(size: int, what: str) -> None:
        raise error

    monkeypatch.setattr(kv_cache, "require_memory", refuse)
    run: Callable[[list[str]], int] = main
    assert run(["trace", "fashion-small", "--labels", "1", "--output", "trace.safetensors"]) == 2
    assert capsys.readouterr().err.endswith(f"softcfg: error: {str(error) or 'out of memory'}\n")
