"""Tokens that take the place of drawn ones (teacher forcing)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softcfg.errors import UserError, quote
from softcfg.models.base import Generator
from softcfg.models.ids import as_ids


def check_forced(
    generator: Generator, shape: tuple[int, int], tokens: Any, mask: Any
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """The forced tokens, int64 [B, T], and where they are used, bool [B, T], on the generator's device.

    Args:
        shape: [B, T].
        tokens: None for none.
        mask: None for everywhere.

    Raises:
        UserError: they are something else, or there is a mask without tokens.
    """
    if tokens is None:
        if mask is not None:
            raise UserError("forced_mask says where to use forced_tokens, which are missing")
        return None, None
    forced = as_ids(tokens, "forced_tokens", generator.vocab_size)
    try:
        where = torch.ones_like(forced, dtype=torch.bool) if mask is None else torch.as_tensor(mask)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"forced_mask must hold True and False, got {quote(mask)}") from error
    if where.dtype != torch.bool:
        raise UserError(f"forced_mask must be boolean, got {where.dtype}")
    for name, values in (("forced_tokens", forced), ("forced_mask", where)):
        if values.shape != shape:
            raise UserError(f"{name} must have shape {list(shape)}, got {list(values.shape)}")
    return forced.to(generator.device), where.to(generator.device)
