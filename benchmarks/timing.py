"""Timing of alternatives, alternating in one process."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import torch

from softcfg.decoding.throughput import POSITIONS, TimedStep
from softcfg.nn.choices import machine as processor

Side = TypeVar("Side", bound=Hashable)
TURN = 0.04  # seconds


def parsed(parser: argparse.ArgumentParser, repeats: int) -> argparse.Namespace:
    """The arguments of a benchmark, with --repeats and --threads beside its own; PyTorch uses so many threads then."""
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args


def medians(
    sides: Mapping[Side, Callable[[], object]], repeats: int, warmup: int = 1, in_a_row: int = 1
) -> dict[Side, float]:
    """Median seconds of each side; the sides take turns, so that a change of the machine's pace meets all of them.

    Every other turn goes backwards: what a side leaves in the caches of the processor meets both of its neighbours.

    Args:
        in_a_row: runs of a turn, before a GPU is waited for. Where there are more than one, another goes before them
            that is not counted: it finds what its neighbour has left.
    """
    times: dict[Side, list[float]] = {name: [] for name in sides}
    for turn in range(warmup + repeats):
        for name, run in list(sides.items())[:: -1 if turn % 2 else 1]:
            if in_a_row > 1:
                run()
            _synchronize()
            started = time.perf_counter()
            if isinstance(run, TimedStep):
                run.several(in_a_row)
            else:
                for _ in range(in_a_row):
                    run()
            _synchronize()
            if turn >= warmup:
                times[name].append((time.perf_counter() - started) / in_a_row)
    return {name: statistics.median(values) for name, values in times.items()}


def means_over_sequence(
    sides_at: Callable[[int], Mapping[str, Callable[[], object]]], num_tokens: int, repeats: int, warmup: int = 1
) -> dict[str, float]:
    """Mean over positions of the sequence of the median seconds of each side; `sides_at` makes them for a position.

    A turn of small steps is several of them, as in decoding, where a step finds in the caches what the one before it
    used; else a side would be the faster, the more its neighbour has in common with it.
    """
    collected: dict[str, list[float]] = {}
    for part in POSITIONS:
        sides = sides_at(round(part * num_tokens))
        longest = max(medians(sides, 1).values())
        for name, seconds in medians(sides, repeats, warmup, max(1, round(TURN / longest))).items():
            collected.setdefault(name, []).append(seconds)
    return {name: statistics.fmean(seconds) for name, seconds in collected.items()}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; floats with three significant digits."""

    def text(cell: object) -> str:
        return f"{cell:.3g}" if isinstance(cell, float) else str(cell)

    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(text(cell) for cell in line) + " |" for line in lines)


def machine(device: str = "cuda") -> str:
    """One line on what the figures were measured on: the CPU if there is no GPU."""
    if torch.device(device).type == "cuda" and torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{processor()}, {torch.get_num_threads()} threads"
