"""What a generator is: the interface that decoding, guidance and tracing are written against."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from softcfg.errors import UserError
from softcfg.nn.kv_cache import KVCache

LabelsLike = Any  # a tensor, array or sequence of class ids


@dataclass
class Condition:
    """What the rows of a batch are conditioned on: one class id a row, `num_classes` for the null class."""

    classes: Tensor  # int64 [rows]

    @property
    def rows(self) -> int:
        """Number of sequences in the batch: twice the images where guidance runs, else once."""
        return self.classes.shape[0]


class Generator(nn.Module, ABC):
    """A decoder-only transformer that predicts image tokens, class-conditionally.

    The sequence starts with `condition_slots` slots that the condition fills; image token i stands at slot
    `condition_slots + i`, and its logits come from the slot before it.

    Attributes:
        num_tokens: T, image tokens per image.
        vocab_size: V, the number of image codes.
        num_classes: classes are 0 .. num_classes - 1.
        condition_slots: slots in front of the first image token.
        cache_shape: (layers, heads, head_dim) of the key/value cache.
    """

    num_tokens: int
    vocab_size: int
    num_classes: int
    condition_slots: int
    cache_shape: tuple[int, int, int]

    @abstractmethod
    def forward(
        self,
        condition: Condition,
        tokens: Tensor,
        *,
        cache: KVCache | None = None,
        slot: int = 0,
        value_weights: Tensor | None = None,
        key_weights: Tensor | None = None,
    ) -> Tensor:
        """Process the sequence from `slot` on and return logits [rows, m, V].

        Args:
            condition: of all rows (with guidance the conditional rows first, then the unconditional).
            tokens: int64 [rows, n], the image tokens to feed. A pass at slot 0 puts the condition in front of
                them (n may be 0); a later pass starts at the slot of its first token, `condition_slots + i`.
            cache: keys and values of the slots before `slot`; those of this pass are written into it. Without
                it the pass must start at slot 0.
            slot: where the pass starts.
            value_weights, key_weights: weights on the cached values or keys of every slot, [rows, slots] or
                [rows, n, slots]; None for none.

        Returns:
            One row of logits for every input from which an image token is predicted: `tokens` [rows, T - 1] at
            slot 0 give [rows, T, V], the condition alone or one token give [rows, 1, V].
        """

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.parameters()).dtype

    def condition(self, labels: LabelsLike, *, guided: bool) -> Condition:
        """The condition of a batch: rows for `labels` and, if `guided`, as many unconditional rows after them.

        Raises:
            UserError: `labels` is not a flat list of class ids in 0 .. num_classes - 1.
        """
        classes = as_ids(labels, "labels", self.num_classes).to(self.device)
        if classes.dim() != 1:
            raise UserError(f"labels must be a flat list of class ids, got shape {list(classes.shape)}")
        if guided:
            classes = torch.cat((classes, torch.full_like(classes, self.num_classes)))
        return self.class_condition(classes)

    def class_condition(self, classes: Tensor) -> Condition:
        """The condition of rows given as int64 class ids, where `num_classes` stands for the null class."""
        return Condition(classes)

    def new_cache(self, rows: int) -> KVCache:
        """A key/value cache for `rows` sequences of this generator, in the dtype and on the device of its weights."""
        layers, heads, head_dim = self.cache_shape
        # The last token is drawn and never fed.
        slots = self.condition_slots + self.num_tokens - 1
        return KVCache(layers, rows, heads, slots, head_dim, dtype=self.dtype, device=self.device)

    def first_predicting(self, slot: int) -> int:
        """Index, within a pass that starts at `slot`, of the first input from which an image token is predicted."""
        return max(0, self.condition_slots - 1 - slot)


def as_ids(values: Sequence[int] | np.ndarray | Tensor, name: str, count: int) -> Tensor:
    """Turn a tensor, array or list of ids into an int64 tensor and check that all lie in 0 .. count - 1.

    Raises:
        UserError: naming `name` and the first value that is no id.
    """
    try:
        ids = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"{name} must be integers in 0..{count - 1}, got {values!r}") from None
    if ids.numel() and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool):
        raise UserError(f"{name} must be integers in 0..{count - 1}, got values of type {ids.dtype}")
    ids = ids.long()
    outside = ids[(ids < 0) | (ids >= count)]
    if outside.numel():
        raise UserError(f"{name} holds {int(outside[0])}, which is outside of 0..{count - 1}")
    return ids
