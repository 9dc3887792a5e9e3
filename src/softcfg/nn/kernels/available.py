"""Which kernels run here: Triton's on a GPU, Numba's on a CPU. Importing this imports neither."""

from __future__ import annotations

import functools
import os
import warnings
from contextlib import AbstractContextManager
from contextvars import ContextVar
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from softcfg.nn.launches import recorded
from softcfg.nn.settings import holding

CPU_VARIABLE = "SOFTCFG_CPU_KERNELS"  # "0": PyTorch's operations instead
_cpu_kernels_off: ContextVar[bool] = ContextVar("cpu_kernels_off", default=False)


def without_cpu_kernels() -> AbstractContextManager[None]:
    """Use none of Numba's kernels in this thread while the context is open."""
    return holding(_cpu_kernels_off, True)


def may_use_cpu_kernels() -> bool:
    """Whether there are Numba's kernels, and this thread uses them."""
    return has_numba() and not _cpu_kernels_off.get() and cpu_kernels() is not None


def on_gpu(x: Tensor) -> bool:
    """Whether Triton's kernels may be tried on a tensor: one of a GPU."""
    return x.is_cuda and has_triton()


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


def on_cpu(x: Tensor) -> bool:
    """Whether Numba's kernels may be tried on a tensor: one of a CPU whose operations nothing else follows."""
    return (
        x.is_cpu
        and type(x) is Tensor
        and not torch.is_grad_enabled()
        and torch._C._len_torch_dispatch_stack() == (recorded.get() is not None)
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch.compiler.is_compiling()
        and may_use_cpu_kernels()
    )


@functools.cache
def has_numba() -> bool:
    """Whether Numba is installed and its kernels are not turned off."""
    return find_spec("numba") is not None and os.environ.get(CPU_VARIABLE) != "0"


@functools.cache
def cpu_kernels() -> Any:
    """The module of Numba's kernels; None, after a warning, where they do not compile."""
    try:
        from softcfg.nn.kernels import cpu
    except Exception as error:  # Numba and LLVM have no common type of error
        message = "the kernels for the CPU do not run here, PyTorch's operations take their place"
        warnings.warn(f"{message}: {type(error).__name__}: {error}", RuntimeWarning, stacklevel=2)
        return None
    return cpu
