"""What a generator is: the interface that decoding, guidance and tracing are written against."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from softcfg.errors import UserError
from softcfg.nn.context import AttentionContext
from softcfg.nn.kv_cache import CACHES, KVCache
from softcfg.nn.position import Position
from softcfg.nn.rotary import Rotary

LabelsLike = Any  # a tensor, array or sequence of class ids


class Condition(ABC):
    """What the rows of a batch are conditioned on.

    The sequence of a row starts with `slots` slots that the condition fills; image token i stands at slot
    `slots + i`, and its logits come from the slot before it.

    Attributes:
        rows: sequences in the batch; with guidance the conditional ones first, then as many unconditional.
        slots: slots in front of the first image token, the same for all rows.
        num_tokens: T, image tokens to decode.
        padding: int64 [rows], leading slots of each row that no query sees (left-padded prompts); None for none.
        grid: lines and columns (h, w) of the images' codes, where the condition can choose; None for the model's.
    """

    grid: tuple[int, int] | None = None

    def __init__(self, rows: int, slots: int, num_tokens: int, padding: Tensor | None = None) -> None:
        self.rows = rows
        self.slots = slots
        self.num_tokens = num_tokens
        self.padding = padding

    @abstractmethod
    def __getitem__(self, rows: slice) -> Condition:
        """The condition of some of the rows."""

    @property
    def num_codes(self) -> int:
        """How many of the T image tokens are image codes, not structure like the ends of lines."""
        return self.num_tokens

    @property
    def cache_slots(self) -> int:
        """Slots that the cache needs: all but that of the last token, which is drawn and never fed."""
        return self.slots + self.num_tokens - 1


class ClassCondition(Condition):
    """One class id a row, `num_classes` for the null class.

    Attributes:
        classes: int64 [rows].
    """

    def __init__(self, classes: Tensor, slots: int, num_tokens: int) -> None:
        super().__init__(len(classes), slots, num_tokens)
        self.classes = classes

    def __getitem__(self, rows: slice) -> ClassCondition:
        """See `Condition.__getitem__`."""
        return ClassCondition(self.classes[rows], self.slots, self.num_tokens)


class Generator(nn.Module, ABC):
    """A decoder-only transformer that predicts image tokens under a condition.

    A family implements `condition`, `embed_condition`, `embed_tokens`, `logits` and, as its positions need,
    `add_positions` or `rotary`; `forward` puts them together. A model that computes its logits in another way, such as
    one of another library, implements `forward` instead.

    Attributes:
        config: the family's configuration, a dataclass.
        num_tokens: T, image tokens per image; where the condition can choose, the most.
        vocab_size: V, the number of tokens that may be drawn.
        num_classes: classes are 0 .. num_classes - 1; 0 for models that are conditioned on something else.
        cache_shape: (layers, heads, head_dim) of the key/value cache.
        cache_dtype: what the key/value cache stores, of `nn.kv_cache.CACHES`; None for the dtype of the weights.
        supports_row_positions: whether a pass may start at a slot of its own in each row (`Position.by_row`).
        layer_devices: where each layer computes, if they are spread over several devices.
        blocks: the transformer blocks in order; each is called as `block(x, layer, context)`.
    """

    config: Any
    num_tokens: int
    vocab_size: int
    num_classes: int = 0
    cache_shape: tuple[int, int, int]
    cache_dtype: torch.dtype | None = None
    supports_row_positions: bool = True
    layer_devices: list[torch.device] | None = None
    blocks: Any

    @abstractmethod
    def condition(self, inputs: Any, *, guided: bool) -> Condition:
        """The condition of a batch: rows for `inputs` and, if `guided`, as many unconditional rows after them.

        Args:
            inputs: one a row: the labels of class-conditional models, the prompts of others.

        Raises:
            UserError: the inputs do not fit the model.
        """

    def forward(
        self,
        condition: Condition,
        tokens: Tensor,
        *,
        cache: KVCache | None = None,
        slot: Position | int = 0,
        value_weights: Tensor | None = None,
        key_weights: Tensor | None = None,
    ) -> Tensor:
        """Process the sequence from `slot` on and return logits [rows, m, V].

        Args:
            condition: of all rows (with guidance the conditional rows first, then the unconditional).
            tokens: int64 [rows, n], the image tokens to feed. A pass at slot 0 puts the condition in front of
                them (n may be 0); a later pass starts at the slot of its first token, `condition.slots + i`.
            cache: keys and values of the slots before `slot`; those of this pass are written into it. Without
                it the pass must start at slot 0.
            slot: where the pass starts; `Position.by_row` if each row starts at a slot of its own (after the condition,
                and all of the pass inside the cache). Shapes then do not depend on the slots: attention covers the
                whole cache.
            value_weights, key_weights: weights on the cached values or keys of every slot, [rows, slots] or
                [rows, n, slots]; None for none.

        Returns:
            One row of logits for every input from which an image token is predicted: `tokens` [rows, T - 1] at
            slot 0 give [rows, T, V], the condition alone or one token give [rows, 1, V].

        Raises:
            ValueError: the pass needs a cache and there is none, or it does not fit into the cache.
        """
        position = Position.of(slot)
        x = self.embed_tokens(tokens)
        if position.is_start:
            x = torch.cat((self.embed_condition(condition), x), dim=1)
        x = self.add_positions(x, condition, position)
        context = AttentionContext.create(
            position,
            x.shape[1],
            cache,
            rotary=self.rotary(condition, position, x.shape[1]),
            value_weights=value_weights,
            key_weights=key_weights,
            padding=condition.padding,
        )
        x = self.run_blocks(x, condition, context)
        return self.logits(x[:, position.first_predicting(condition.slots) :]).to(tokens.device)

    def embed_condition(self, condition: Condition) -> Tensor:
        """The inputs for the slots of the condition, [rows, condition.slots, width]."""
        raise NotImplementedError(f"{type(self).__name__} must implement embed_condition (or forward as a whole)")

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """The inputs for image tokens int64 [rows, n], [rows, n, width]."""
        raise NotImplementedError(f"{type(self).__name__} must implement embed_tokens (or forward as a whole)")

    def add_positions(self, x: Tensor, condition: Condition, position: Position) -> Tensor:
        """The inputs `x` [rows, n, width] of a pass with learned positions added; by default as they are."""
        return x

    def rotary(self, condition: Condition, position: Position, new: int) -> Rotary | None:
        """The rotary embedding of the `new` slots of a pass; by default none."""
        return None

    def run_blocks(self, x: Tensor, condition: Condition, context: AttentionContext) -> Tensor:
        """The inputs [rows, n, width] through all blocks; to be overridden where a block takes more than that."""
        for layer, block in enumerate(self.blocks):
            x = block(x, layer, context)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """The logits [rows, m, V] from what leaves the blocks, [rows, m, width]."""
        raise NotImplementedError(f"{type(self).__name__} must implement logits (or forward as a whole)")

    @property
    def device(self) -> torch.device:
        """The device of the weights; where they are spread over several, that of the first layer."""
        return next(self.parameters()).device if self.layer_devices is None else self.layer_devices[0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.parameters()).dtype

    def new_cache(self, condition: Condition) -> KVCache:
        """A key/value cache for the rows of `condition`, on the device of the weights and for their dtype."""
        return self._cache_type()(
            *self._cache_size(condition), dtype=self.dtype, device=self.layer_devices or self.device
        )

    def cache_bytes(self, condition: Condition) -> int:
        """The memory that `new_cache` takes."""
        cache = self._cache_type()(*self._cache_size(condition), dtype=self.dtype, device="meta")
        return cache.nbytes

    def _cache_type(self) -> type[KVCache]:
        return KVCache if self.cache_dtype is None else CACHES[self.cache_dtype]

    def _cache_size(self, condition: Condition) -> tuple[int, int, int, int, int]:
        layers, heads, head_dim = self.cache_shape
        return layers, condition.rows, heads, condition.cache_slots, head_dim

    def constrain(self, logits: Tensor, steps: Tensor, condition: Condition) -> Tensor:
        """Rule out the tokens that may not stand at a position, by logits of -inf; by default none.

        Args:
            logits: guided logits [B, n, V].
            steps: int64 [n] or [B, n], the index of the image token that each position predicts.
            condition: of the batch, with or without its unconditional rows.
        """
        return logits

    def is_code(self, steps: Tensor, condition: Condition) -> Tensor | None:
        """Which image tokens are image codes (bool like `steps`), not structure like the ends of lines; None: all.

        Only codes get a confidence in SoftCFG.
        """
        return None

    def image_codes(self, tokens: Tensor, condition: Condition) -> Tensor:
        """What the image tokenizer decodes, int64 [B, h w] in [0, codebook_size), of the drawn `tokens` [B, T]."""
        return tokens


class ClassGenerator(Generator):
    """A generator that is conditioned on a class.

    Attributes:
        condition_slots: slots that the class takes in front of the first image token.
    """

    condition_slots: int

    def condition(self, labels: LabelsLike, *, guided: bool) -> ClassCondition:
        """See `Generator.condition`.

        Raises:
            UserError: `labels` is not a flat list of class ids in 0 .. num_classes - 1.
        """
        classes = as_ids(labels, "labels", self.num_classes).to(self.device)
        if classes.dim() != 1:
            raise UserError(f"labels must be a flat list of class ids, got shape {list(classes.shape)}")
        if guided:
            classes = torch.cat((classes, torch.full_like(classes, self.num_classes)))
        return self.class_condition(classes)

    def class_condition(self, classes: Tensor) -> ClassCondition:
        """The condition of rows given as int64 class ids, where `num_classes` stands for the null class."""
        return ClassCondition(classes, self.condition_slots, self.num_tokens)


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
