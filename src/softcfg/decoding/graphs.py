"""Repeating a step of constant shapes: on a GPU as one captured CUDA graph.

A decoding step of a small batch is hundreds of kernels of a few microseconds each, which a CPU cannot launch as fast
as the GPU runs them. A CUDA graph launches all of them at once, and replays them on the same memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

WARM_UP = 2  # steps before the capture, in which kernels compile and libraries set themselves up
WORTHWHILE = 8  # steps; capturing costs about as much as launching a few of them


def repeat(step: Callable[[Tensor], None], steps: range, device: torch.device) -> Iterator[None]:
    """Run `step` for every number in `steps`, given as an int64 tensor [1] on the device.

    The step reads and writes tensors that stay where they are, and never waits for the device. On a GPU its first
    runs are as they are; then it is captured and replayed.
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
    """What repeats `step`: on a GPU a CUDA graph of it, which keeps its tensors; elsewhere the step itself.

    The step has run before, so that kernels are compiled and libraries are set up.
    """
    if device.type != "cuda":
        return step
    with torch.cuda.device(device):
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):  # records, and runs nothing
            step()
    return graph.replay
