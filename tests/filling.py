"""Weights that need no file: each tensor follows from its name, its shape and a seed alone.

The stream behind `numpy.random.RandomState` is frozen, so these are the same numbers everywhere; the golden
files were made with them.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor


def fill_tensor(name: str, shape: Sequence[int], seed: int = 0, gain: float = 1.0) -> Tensor:
    """The tensor of `shape` under the released parameter `name`; `gain` scales matrices and kernels only."""
    if name.endswith("num_batches_tracked"):
        return torch.tensor(0)
    draw = np.random.RandomState((seed + zlib.crc32(name.encode("utf-8"))) & 0xFFFFFFFF)
    normal = draw.standard_normal(tuple(shape)).astype(np.float32)
    if len(shape) > 1:
        table = "embed" in name or "token" in name
        filled = 0.5 * normal if table else gain * normal / math.sqrt(math.prod(shape[1:]))
    elif name.endswith("running_var"):
        filled = np.abs(1.0 + 0.1 * normal)
    elif name.endswith("weight"):
        filled = 1.0 + 0.1 * normal
    else:
        filled = 0.05 * normal
    return torch.from_numpy(np.asarray(filled, dtype=np.float32))


def fill_state_dict(shapes: Mapping[str, Sequence[int]], seed: int = 0, gain: float = 1.0) -> dict[str, Tensor]:
    """A whole state dict, every tensor named in `shapes` filled."""
    return {name: fill_tensor(name, shape, seed, gain) for name, shape in shapes.items()}
