"""What a kernel needs to begin while the one before it ends (programmatic dependent launch, `nn.launches`)."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from softcfg.nn.launches import is_linked


def launch_options(x: Tensor) -> dict[str, Any]:
    """What all kernels on the rows of `x` are launched with; they are told whether they are `LINKED` with others."""
    linked = is_linked(len(x)) and x.is_cuda and _can_link(x.device)
    # FP fusion is what it has always been; newer versions ask.
    return {"LINKED": linked, "enable_fp_fusion": True, **({"launch_pdl": True} if linked else {})}


CAN_WAIT = hasattr(tl.extra.cuda, "gdc_wait")  # since Triton 3.4


@functools.cache
def _can_link(device: torch.device) -> bool:
    """Compute capability 9.0, and a Triton that knows how to wait."""
    return CAN_WAIT and torch.cuda.get_device_capability(device) >= (9, 0)


if CAN_WAIT:

    @triton.jit
    def let_next_begin(LINKED: tl.constexpr):
        """Let the next kernel begin as soon as all programs of this one have."""
        if LINKED:
            tl.extra.cuda.gdc_launch_dependents()

    @triton.jit
    def wait_for_others(LINKED: tl.constexpr):
        """Wait for the end of the kernels before this one: what they wrote can be read, what they read be written."""
        if LINKED:
            tl.extra.cuda.gdc_wait()

else:

    @triton.jit
    def let_next_begin(LINKED: tl.constexpr):
        """Kernels are not linked."""

    @triton.jit
    def wait_for_others(LINKED: tl.constexpr):
        """Kernels are not linked."""


@triton.jit
def begin_linked(LINKED: tl.constexpr):
    """The first line of a kernel that reads nothing ahead."""
    let_next_begin(LINKED)
    wait_for_others(LINKED)
