"""Checking ids that users give: labels, tokens, codes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from softcfg.errors import UserError, quote

LARGEST_ID = (1 << 63) - 1  # the count of ids that nothing else bounds

IdsLike = Sequence[int] | np.ndarray | Tensor


def as_ids(values: IdsLike, name: str, count: int) -> Tensor:
    """Turn a tensor, array or list of ids into an int64 tensor and check that all lie in 0 .. count - 1.

    Raises:
        UserError: a value is not such an id; `name` and the value are named.
    """
    try:
        ids = values if isinstance(values, Tensor) else torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{name} must be integers in 0..{count - 1}, got {quote(values)}") from error
    if ids.numel() and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool):
        raise UserError(f"{name} must be integers in 0..{count - 1}, got values of type {ids.dtype}")
    ids = ids.long()
    outside = ids[(ids < 0) | (ids >= count)]
    if outside.numel():
        raise UserError(f"{name} holds {int(outside[0])}, which is outside of 0..{count - 1}")
    return ids
