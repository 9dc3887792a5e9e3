"""Tokens that take the place of drawn ones (teacher forcing)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softcfg.errors import UserError, quote
from softcfg.models.base import Condition, Generator
from softcfg.models.ids import as_ids


def check_forced(
    generator: Generator, condition: Condition, batch: int, tokens: Any, mask: Any
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """The forced tokens, int64 [B, T], and where they are used, bool [B, T], on the generator's device.

    Args:
        condition: of the batch, with or without its unconditional rows.
        batch: B.
        tokens: None for none.
        mask: None for everywhere.

    Raises:
        UserError: they are something else, or tokens that may not stand where they are used; or there is a mask without
            tokens.
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
        if values.shape != (batch, condition.num_tokens):
            raise UserError(f"{name} must have shape {[batch, condition.num_tokens]}, got {list(values.shape)}")
    forced, where = forced.to(generator.device), where.to(generator.device)
    allowed = generator.allowed(torch.arange(condition.num_tokens, device=generator.device), condition)
    if allowed is not None:
        first, stop = allowed.unbind(-1)
        wrong = (where & ((forced < first) | (forced >= stop))).nonzero()
        if len(wrong):
            row, step = wrong[0].tolist()
            token, low, high = int(forced[row, step]), int(first[step]), int(stop[step]) - 1
            what = f"{low}" if low == high else f"{low}..{high}"
            raise UserError(f"forced_tokens holds {token} at step {step}, where the model can draw {what} alone")
    return forced, where
