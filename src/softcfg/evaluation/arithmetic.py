"""Products of float32 in full precision, without the rounding to TF32 that some GPUs do by default."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from softcfg.nn.precision import own_dtype


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Context (or decorator) in which products and convolutions use no TF32 or bfloat16, whatever was set."""
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with own_dtype(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(chosen)
