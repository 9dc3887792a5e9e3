"""How many threads the steps of a batch take on a CPU, all of them or one, and how many steps are run at once.

A second thread makes a small step a fifth faster on an idle machine, and ten times slower on a busy one, where each of
its hundred operations waits for the slower thread to be given a core. So steps are timed both ways, now and then. What
they compute is the same to the bit.

A step can be shorter than the Python around it. Where one call can run several (`nn.replay`), it runs as many as take
`AT_ONCE` seconds.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from softcfg.models.base import Generator
from softcfg.nn.limits import cores
from softcfg.nn.linear import Linear

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
DEFAULT = torch.get_num_threads()
TRIED = 3  # steps of either kind in a trial; the fastest counts
FIRST_PAUSE, LONGEST_PAUSE = 32, 512  # steps on one thread before all are tried again
AT_ONCE = 0.02  # seconds of steps that are run by one call: a tenth of what a person notices when pressing Ctrl-C
SLOWER = 2.0  # a step on all threads that takes this many times as long as usual calls for a new trial
HOPELESS = 4.0  # and one of a trial that takes this many times as long as on one thread ends it


@dataclass
class Pause:
    """Steps on one thread.

    Attributes:
        length: of the next one.
        left: of this one.
    """

    length: int = FIRST_PAUSE
    left: int = 0


busy = Pause()  # because the machine had other work, for all batches of this process


class StepThreads:
    """Runs steps on `most` threads or on one, whichever is faster.

    Args:
        free: whether the number may be chosen; else it is left alone.

    Attributes:
        threads: of the next step.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.perf_counter, *, free: bool = True) -> None:
        self.most = self.threads = most
        self._clock = clock
        self._free = free
        self._usual = self._last = 0.0
        self._pause = busy if free and busy.left > 0 else Pause()
        self._trial: dict[int, list[float]] | None = None
        if free:
            self.threads = 1
            if self._pause.left <= 0:
                self._try()

    def run(self, steps: Callable[[int], int]) -> int:
        """Run some steps and note how long they take; how many they were.

        Args:
            steps: runs at least one step, and at most as many as it is given; returns how many.
        """
        if self._free and torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        started = self._clock()
        done = steps(self._at_once())
        self._last = (self._clock() - started) / done
        if self._free:
            self._note(self._last, done)
        return done

    def _at_once(self) -> int:
        """How many steps may come before the next look at the clock, and at Ctrl-C."""
        if self._trial is not None or not self._last or (self._free and self.threads > 1):
            return 1  # a machine that gets busy shall be seen after one step on all threads
        steps = int(AT_ONCE / self._last)
        return max(1, min(steps, self._pause.left) if self._free else steps)

    def _try(self) -> None:
        """Begin a trial."""
        self.threads, self._trial = 1, {1: [], self.most: []}

    def _note(self, seconds: float, steps: int) -> None:
        if self._trial is not None:
            self._trial[self.threads].append(seconds)
            one, several = self._trial[1], self._trial[self.most]
            if len(one) < TRIED:
                return
            if len(several) < TRIED and not (several and min(several) > HOPELESS * min(one)):
                self.threads = self.most
                return
            self._decide(min(one), min(several))
        elif self.threads > 1:
            if seconds > SLOWER * self._usual:
                self._try()
            self._usual += 0.1 * (seconds - self._usual)
        else:
            self._pause.left -= steps
            if self._pause.left <= 0:
                self._try()

    def _decide(self, one: float, several: float) -> None:
        """End a trial in which a step took so many seconds on one thread and on all."""
        self._trial, self._last = None, min(one, several)
        if several < one:
            self.threads, self._usual, self._pause = self.most, several, Pause()
            return
        pause = Pause(min(2 * self._pause.length, LONGEST_PAUSE), self._pause.length)
        self.threads, self._pause = 1, pause
        if several > SLOWER * one:
            busy.length, busy.left = pause.length, pause.left
            self._pause = busy


@contextmanager
def step_threads(*generators: Generator) -> Iterator[Callable[[Callable[[int], int]], int]]:
    """Give a function that runs the steps of a batch (`StepThreads.run`); then the number of threads is what it was.

    The number is left alone on other devices, where somebody has set it (by `torch.set_num_threads` after the import,
    OMP_NUM_THREADS or MKL_NUM_THREADS), and where it could change the bits of a result. Use it inside
    `prepared_linear_layers`.
    """
    most = torch.get_num_threads()
    alone = most == 1 or _are_chosen() or any(each.device.type != "cpu" or not _same_bits(each) for each in generators)
    try:
        yield StepThreads(most, free=not alone).run
    finally:
        if not alone:
            torch.set_num_threads(most)


@contextmanager
def fitting_threads() -> Iterator[None]:
    """Inside, PyTorch runs on no more threads than a container has processors for, unless somebody has set the number.

    With more of them the system stops all for the rest of a tenth of a second as soon as their time is used up.
    """
    before = torch.get_num_threads()
    if before <= cores() or _are_chosen():
        yield
        return
    torch.set_num_threads(cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _are_chosen() -> bool:
    """Whether somebody has set the number of threads."""
    usual = torch.get_num_threads() in (DEFAULT, min(DEFAULT, cores()))
    return not usual or any(os.environ.get(name) for name in VARIABLES)


def _same_bits(generator: Generator) -> bool:
    return all(layer.keeps_bits for layer in generator.modules() if isinstance(layer, Linear))
