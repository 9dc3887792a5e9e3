"""Prompts as token ids: what users give, and the one batch of all rows that a generator makes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from softcfg.errors import UserError, quote
from softcfg.models.base import Condition
from softcfg.models.geometry import Geometry
from softcfg.models.ids import LARGEST_ID, as_ids


@dataclass(frozen=True)
class Prompts:
    """The token ids of prompts: what a batch is conditioned on.

    Attributes:
        input_ids: int64 [B, L], the conditional prompts, left-padded where `attention_mask` [B, L] is 0. Without a
            mask, padding tokens of the model (unless they end texts too) in front of a prompt are its padding, as in
            transformers.
        unconditional_ids: int64 [1 or B, U], one for all or one per prompt, of any length, left-padded where
            `unconditional_mask` is 0. Needed where guidance is active.
    """

    input_ids: Tensor
    unconditional_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    unconditional_mask: Tensor | None = None

    @classmethod
    def batch(
        cls, prompts: Sequence[Prompts], pad_token_id: int, mask_of: Callable[[Tensor], Tensor] = torch.ones_like
    ) -> Prompts:
        """One batch of prompts of one row each, padded on the left to one length; what is hidden in one is left out.

        Args:
            mask_of: gives ids [1, L] that have no mask one; by default all are seen.

        Raises:
            UserError: one is no `Prompts`, or of several rows, or its mask does not fit.
        """
        for p in prompts:
            if not isinstance(p, Prompts):
                raise UserError(f"a prompt must be Prompts(input_ids, ...) of one row, got {quote(p)}")
        conditional = [_seen("input_ids", p.input_ids, p.attention_mask, mask_of) for p in prompts]
        input_ids, attention_mask = _padded(conditional, pad_token_id)
        unconditional = [
            _seen("unconditional_ids", p.unconditional_ids, p.unconditional_mask, mask_of)
            for p in prompts
            if p.unconditional_ids is not None
        ]
        if len(unconditional) < len(prompts):
            return cls(input_ids, attention_mask=attention_mask)
        unconditional_ids, unconditional_mask = _padded(unconditional, pad_token_id)
        return cls(input_ids, unconditional_ids, attention_mask, unconditional_mask)


def _seen(name: str, ids: Any, mask: Any, mask_of: Callable[[Tensor], Tensor]) -> Tensor:
    """The ids [L] or [1, L] of one row that its mask does not hide."""
    ids = as_ids(ids, name, LARGEST_ID)
    visible = mask_of(ids.reshape(1, -1)).reshape(ids.shape) if mask is None else as_mask(name, mask)
    length = ids.numel()
    if not {ids.shape, visible.shape} <= {(length,), (1, length)}:
        raise UserError(
            f"{name} of a prompt and their mask must be one row, [L] or [1, L], got {list(ids.shape)} and "
            f"{list(visible.shape)}"
        )
    return ids.flatten()[visible.flatten().bool()]


def behind_padding(ids: Tensor, pad: int | None, end: int | Sequence[int] | None) -> Tensor:
    """The mask of prompts [B, L] that came without, int64: 0 for padding in front of others, unless it ends texts."""
    if ids.dim() != 2 or pad is None or pad in (end if isinstance(end, Sequence) else [end]):
        return torch.ones_like(ids)
    text = ids != pad
    return ((text.cumsum(dim=1) > 0) | ~text.any(dim=1, keepdim=True)).long()


def as_mask(name: str, mask: Any) -> Tensor:
    """The mask of the ids that go by `name`, int64; raise a `UserError` unless it holds zeros and ones alone."""
    try:
        visible = torch.as_tensor(mask)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"the mask of {name} must be 0 and 1, got {quote(mask)}") from error
    if not ((visible == 0) | (visible == 1)).all():
        raise UserError(f"the mask of {name} must be 0 for padding and 1 elsewhere, got {quote(visible.tolist())}")
    return visible.long()


def _padded(ids: Sequence[Tensor], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Ids [L] of several rows as one batch [B, L], padded on the left, and its mask."""
    longest = max(map(len, ids))
    padded = torch.stack([F.pad(row, (longest - len(row), 0), value=pad_token_id) for row in ids])
    mask = torch.stack([F.pad(torch.ones_like(row), (longest - len(row), 0)) for row in ids])
    return padded, mask


class PromptCondition(Condition):
    """Prompts of all rows in one left-padded batch, followed by the tokens that were fed.

    Attributes:
        sequence: int64 [rows, slots + T]; a pass writes the tokens that it feeds.
        prompt_slots: L, what the conditional prompts took before they were padded to the length of the others.
    """

    padding: Tensor

    def __init__(
        self, ids: Tensor, padding: Tensor, prompt_slots: int, num_tokens: int, geometry: Geometry | None = None
    ) -> None:
        super().__init__(len(ids), ids.shape[1], num_tokens, padding, geometry)
        self.padded = bool(padding.any())
        self.prompt_slots = prompt_slots
        self.sequence = F.pad(ids, (0, num_tokens))

    def __getitem__(self, rows: slice) -> PromptCondition:
        """See `Condition.__getitem__`; no token was fed yet."""
        ids, geometry = self.sequence[rows, : self.slots], self.geometry if self.grid else None
        return PromptCondition(ids, self.padding[rows], self.prompt_slots, self.num_tokens, geometry)

    def conditional(self, batch: int, fed: int = 0) -> Tensor:
        """The conditional prompts as they were given and the first `fed` tokens after them, [batch, L + fed]."""
        return self.sequence[:batch, self.slots - self.prompt_slots : self.slots + fed]
