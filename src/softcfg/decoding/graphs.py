"""Repeating a step of constant shapes: on a GPU as one captured CUDA graph.

A decoding step of a small batch is hundreds of kernels of a few microseconds each, which a CPU cannot launch as fast
as the GPU runs them. A CUDA graph launches all of them at once, and replays them on the same memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from softcfg.nn.memory import in_short

WARM_UP = 2  # steps before the capture, in which kernels compile and libraries set themselves up
WORTHWHILE = 8  # steps; capturing costs about as much as launching a few of them


def repeat(step: Callable[[Tensor], None], steps: range, device: torch.device) -> Iterator[None]:
    """Run `step` for every number in `steps`, given as an int64 tensor [1] on the device.

    The step reads and writes tensors that keep their place in memory, and never waits for the device. On a GPU it is
    captured after a few runs, then replayed.
    """
    at = torch.tensor([steps.start], device=device)

    def advance() -> None:
        step(at)
        at.add_(1)

    run: Callable[[], object] = advance
    for done, _ in enumerate(steps):
        if done == WARM_UP and len(steps) >= WORTHWHILE:
            run = captured(advance, device)
        run()
        yield


def captured(step: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """A function that repeats `step`: on a GPU a CUDA graph of it; elsewhere the step itself.

    The step must have run before, so that kernels are compiled and libraries are set up. If it cannot be captured, for
    lack of memory for example, it is repeated as it is, with a warning.
    """
    capture = CAPTURES.get(device.type)
    if capture is None:
        return step
    try:
        return partial(_replay, capture(step, device), step)
    except RuntimeError as error:
        warnings.warn(
            f"the decoding step could not be captured as a graph, so every step launches its kernels anew, which is "
            f"slower: {in_short(error)}",
            RuntimeWarning,
            stacklevel=2,
        )
        return step


def _replay(replay: Callable[[], object], step: Callable[[], object]) -> None:
    """Replay a graph of `step`, which is held because a graph does not own the tensors that it reads and writes."""
    replay()


def _cuda_graph(step: Callable[[], object], device: torch.device) -> Callable[[], object]:
    with torch.cuda.device(device):
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):  # records, and runs nothing
            step()
    return graph.replay


CAPTURES = {"cuda": _cuda_graph}  # by type of device: what turns a step into something that replays it
