"""How many threads the steps of a batch take."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from softcfg import CFG, Pipeline, SoftCFG
from softcfg.decoding import threads
from softcfg.decoding.threads import StepThreads, step_threads
from softcfg.nn.linear import prepared_linear_layers
from softcfg.nn.products import use_product


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    for name in threads.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "DEFAULT", 2)
    monkeypatch.setattr(threads, "busy", threads.Pause())
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """On any machine, products of which the number of threads may be chosen."""
    monkeypatch.setattr("softcfg.nn.linear.keeps_bits", lambda *_: True)


class Machine:
    """On which a step takes as long as `seconds` says for its number of threads; a call can run so many at once."""

    def __init__(self, seconds: Callable[[int], float], at_once: int = 1) -> None:
        self.seconds, self.at_once, self.now, self.used, self.asked = seconds, at_once, 0.0, [], []

    def step(self, most: int) -> int:
        steps = min(most, self.at_once)
        self.asked.append(most)
        self.used.append(torch.get_num_threads())
        self.now += steps * self.seconds(self.used[-1])
        return steps

    def run(self, steps: int, runner: StepThreads) -> list[int]:
        self.used = []
        for _ in range(steps):
            runner.run(self.step)
        return self.used


def test_an_idle_machine_uses_all_threads() -> None:
    machine = Machine(lambda count: 1 / count)
    used = machine.run(600, StepThreads(2, lambda: machine.now))
    assert used == [1] * 3 + [2] * 597


def test_a_busy_machine_uses_one_and_seldom_tries_all() -> None:
    machine = Machine(lambda count: 1.0 if count == 1 else 10.0)
    used = machine.run(600, StepThreads(2, lambda: machine.now))
    assert used[:4] == [1] * 3 + [2]  # which is hopeless
    assert used[4:36] == [1] * 32
    assert sum(count == 2 for count in used) == 5  # trials at the start and after 32, 64, 128, 256 more
    assert used.index(2, 36) == 39


def test_a_machine_on_which_one_thread_is_a_little_faster() -> None:
    machine = Machine(lambda count: 1.0 if count == 1 else 1.5)
    used = machine.run(600, StepThreads(2, lambda: machine.now))
    assert used[:6] == [1] * 3 + [2] * 3
    assert sum(count == 2 for count in used) == 3 * 5
    assert machine.run(10, StepThreads(2, lambda: machine.now))[:6] == [1] * 3 + [2] * 3  # another batch may be larger


def test_the_next_batch_knows_that_the_machine_is_busy() -> None:
    machine = Machine(lambda count: 1.0 if count == 1 else 10.0)
    machine.run(20, StepThreads(2, lambda: machine.now))  # of 32 steps on one thread 16 are left
    assert machine.run(20, StepThreads(2, lambda: machine.now)) == [1] * 19 + [2]
    machine.seconds = lambda count: 1 / count
    assert machine.run(70, StepThreads(2, lambda: machine.now)) == [1] * 67 + [2] * 3
    assert machine.run(9, StepThreads(2, lambda: machine.now)) == [1] * 3 + [2] * 6


def test_a_machine_that_gets_busy_and_idle_again() -> None:
    machine = Machine(lambda count: 1 / count)
    runner = StepThreads(2, lambda: machine.now)
    assert machine.run(100, runner)[-1] == 2
    machine.seconds = lambda count: 1.0 if count == 1 else 10.0
    assert machine.run(10, runner) == [2] + [1] * 3 + [2] + [1] * 5  # one step tells, and one of the trial
    machine.seconds = lambda count: 1 / count
    assert machine.run(100, runner)[-1] == 2


def test_steps_that_grow_with_the_sequence_are_no_sign_of_other_work() -> None:
    machine = Machine(lambda count: (1 + len(machine.used) / 50) / count)
    assert set(machine.run(500, StepThreads(2, lambda: machine.now))[6:]) == {2}


def test_as_many_steps_are_run_at_once_as_take_a_moment() -> None:
    machine = Machine(lambda count: 1 / 1024, at_once=1000)
    machine.run(3, StepThreads(2, lambda: machine.now, free=False))
    assert machine.asked == [1, 20, 20]
    machine.asked.clear()
    machine.seconds = lambda count: 1.0
    machine.run(3, StepThreads(2, lambda: machine.now, free=False))
    assert machine.asked == [1] * 3


def test_steps_on_all_threads_are_looked_at_one_by_one() -> None:
    machine = Machine(lambda count: 1 / 4096 / count, at_once=1000)
    machine.run(20, StepThreads(2, lambda: machine.now))
    assert machine.used[-1] == 2
    assert machine.asked == [1] * 20


def test_steps_that_are_run_at_once_count_before_all_threads_are_tried_again() -> None:
    machine = Machine(lambda count: 1 / 4096 if count == 1 else 1.0, at_once=24)
    used = machine.run(12, StepThreads(2, lambda: machine.now))
    assert machine.asked == [1] * 4 + [32, 8] + [1] * 4 + [64, 40]
    assert used == [1] * 3 + [2] + [1] * 5 + [2] + [1] * 2


def test_a_number_that_is_left_alone_is_not_set() -> None:
    runner = StepThreads(2, free=False)
    torch.set_num_threads(1)
    assert runner.run(lambda most: most) == 1
    assert torch.get_num_threads() == 1


@pytest.mark.usefixtures("same_bits")
def test_an_error_in_a_step_leaves_the_number_as_it_was() -> None:
    generator = Pipeline.from_pretrained("fashion-small").generator
    counts = []

    def steps() -> None:
        with use_product("onednn"), prepared_linear_layers(generator, 4), step_threads(generator) as run:
            for _ in range(4):
                run(lambda _: counts.append(torch.get_num_threads()) or 1)
            run(fail)

    def fail(most: int) -> int:
        raise KeyError

    with pytest.raises(KeyError):
        steps()
    assert counts == [1] * 3 + [2]
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("same_bits")
@pytest.mark.parametrize("how", ["variable", "by hand", "bits"])
def test_the_number_is_left_alone(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Pipeline.from_pretrained("fashion-small").generator
    if how == "variable":
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
    elif how == "by hand":
        monkeypatch.setattr(threads, "DEFAULT", 3)
        monkeypatch.setattr(threads, "cores", lambda: 3)
    else:
        monkeypatch.setattr("softcfg.nn.linear.keeps_bits", lambda *_: False)
    used = []
    with use_product("onednn"), prepared_linear_layers(generator, 4), step_threads(generator) as run:
        for _ in range(10):
            run(lambda _: used.append(torch.get_num_threads()) or 1)
    assert used == [2] * 10


@pytest.mark.parametrize(
    ("guidance", "jacobi"),
    [
        (SoftCFG(3.0), False),
        (CFG(3.0), True),
        pytest.param(CFG(3.0), False, marks=pytest.mark.slow),
        pytest.param(SoftCFG(3.0), True, marks=pytest.mark.slow),
    ],
)
def test_images_do_not_depend_on_the_threads(guidance: CFG, jacobi: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline.from_pretrained("fashion-small")
    drawn = []
    for count in (1, 2):
        torch.set_num_threads(count)
        drawn.append(pipeline(list(range(6)), guidance, seed=1, speculative_jacobi=8 if jacobi else 0).tokens)
    assert torch.equal(*drawn)
