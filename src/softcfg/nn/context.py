"""What the attention layers of one pass share."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softcfg.nn.kv_cache import KVCache
from softcfg.nn.position import Position
from softcfg.nn.rotary import Rotary

OF_ALL_STEPS = {"cache", "padding", "new", "prepared", "actual", "is_read"}  # attributes of a `WatchedContext`


class Factors(NamedTuple):
    """The weights of a pass as they act on its scores [rows, heads, n, S], with which they broadcast; None for ones."""

    value: Tensor | None
    key: Tensor | None
    log_attention: Tensor | None


def require_tables(rows: int, new: int, slots: int, **tables: Tensor | None) -> None:
    """Raise `ValueError` unless weights and masks are [rows or 1, S] or [rows or 1, n or 1, S], with S or more slots.

    Kernels read them as if they were.
    """
    for name, table in tables.items():
        if table is None:
            continue
        *leading, width = table.shape
        fits = width >= slots and len(leading) in (1, 2) and leading[0] in (1, rows)
        if not fits or (len(leading) == 2 and leading[1] not in (1, new)):
            raise ValueError(f"{name} must be [{rows}, {slots}] or [{rows}, {new}, {slots}], got {list(table.shape)}")


@dataclass(frozen=True)
class AttentionContext:
    """What all attention layers of one pass share; n is the number of slots that the pass feeds.

    Attributes:
        position: where the pass starts, the slot of the first query.
        slots: S; every query attends to the first S slots of its row, but for what the mask or causality hides.
        cache: keys and values of the S slots; None if the pass feeds all of them.
        rotary: rotates the queries and keys of the new slots; None if the positions are not rotary.
        value_weights, key_weights: factors on the values or keys of each slot, [rows, S] or, if each query has its own,
            [rows, n, S]; None for ones. The attention row is not renormalised (SoftCFG, arXiv 2510.00996).
        attention_weights: factors >= 0 on the attention probabilities, which are renormalised; shaped likewise. A
            weight of 0 hides a slot. Each query must see a slot with a weight above 0.
        padding: int64 [rows], leading slots of each row that no query sees. The mask hides them as well.
        new: n, if the mask is to follow from position and padding.
        given_mask: the mask otherwise.
        prepared: what the generator has made ready for the blocks (`Generator.prepare`).
    """

    position: Position
    slots: int
    cache: KVCache | None = None
    rotary: Rotary | None = None
    value_weights: Tensor | None = None
    key_weights: Tensor | None = None
    attention_weights: Tensor | None = None
    padding: Tensor | None = None
    new: int | None = None
    given_mask: Tensor | None = None
    prepared: object = None

    @cached_property
    def mask(self) -> Tensor | None:
        """Bool [rows, S], False for slots that no query may see, or None: the queries are then the last n of the S
        slots, and causal. Or bool [rows, n, S], True for the slots that each query sees, causality included. It is made
        when it is first asked for: the kernels of a GPU read position and padding themselves.
        """
        return self.given_mask if self.new is None else self.position.mask(self.new, self.slots, self.padding)

    @cached_property
    def factors(self) -> Factors:
        """The weights, made ready once for all layers."""
        value, key, attention = (
            None if each is None else (each[:, None, None, :] if each.dim() == 2 else each[:, None])
            for each in (self.value_weights, self.key_weights, self.attention_weights)
        )
        return Factors(value, key, None if attention is None else attention.log())

    @classmethod
    def create(
        cls,
        position: Position,
        new: int,
        cache: KVCache | None = None,
        *,
        rotary: Rotary | None = None,
        value_weights: Tensor | None = None,
        key_weights: Tensor | None = None,
        attention_weights: Tensor | None = None,
        padding: Tensor | None = None,
        prepared: object = None,
        rows: int | None = None,
    ) -> AttentionContext:
        """The context of a pass that feeds `new` slots: weights are cut to the slots that it covers.

        Args:
            value_weights, key_weights, attention_weights: of at least these slots.
            rows: of the pass, if the shapes of cache and weights are to be checked.

        Raises:
            ValueError: the pass needs the cache of the slots before it, and there is none; or they do not fit.
        """
        slots = position.covered(new, None if cache is None else cache.slots)
        if rows is not None:
            if cache is not None and cache.keys[0].shape[0] != rows:
                raise ValueError(f"the cache is of {cache.keys[0].shape[0]} rows, and the pass of {rows}")
            require_tables(
                rows, new, slots, value_weights=value_weights, key_weights=key_weights,
                attention_weights=attention_weights,
            )  # fmt: skip
        return cls(
            position,
            slots,
            cache,
            rotary,
            value_weights=None if value_weights is None else value_weights[..., :slots],
            key_weights=None if key_weights is None else key_weights[..., :slots],
            attention_weights=None if attention_weights is None else attention_weights[..., :slots],
            padding=padding,
            new=new,
            prepared=prepared,
        )

    @cached_property
    def memory(self) -> dict[Hashable, Any]:
        """What a backend makes once for all layers of the pass."""
        return {}

    def on(self, device: torch.device) -> AttentionContext:
        """The context for layers on `device`: itself, or a copy that all layers there share."""
        if self._devices <= {device}:
            return self
        if device not in self._copies:
            moved: dict[str, Any] = {
                field.name: value.to(device)
                for field in fields(self)
                if isinstance(value := getattr(self, field.name), Tensor)
            }
            rotary = None if self.rotary is None else self.rotary.on(device)
            self._copies[device] = replace(self, position=self.position.on(device), rotary=rotary, **moved)
        return self._copies[device]

    @cached_property
    def _devices(self) -> set[torch.device]:
        weights = [self.value_weights, self.key_weights, self.attention_weights]
        tensors = [self.position.row_slots, *weights, self.given_mask, self.padding]
        if self.rotary is not None:
            tensors += [self.rotary.cos, self.rotary.sin]
        return {tensor.device for tensor in tensors if tensor is not None}

    @cached_property
    def _copies(self) -> dict[torch.device, AttentionContext]:
        return {}


class WatchedContext(AttentionContext):
    """The context of a step as its blocks get it while their kernels are written down, to be launched at other steps.

    Attributes:
        actual: the context, for attention.
        is_read: whether somebody else has read what may be another thing at another step, such as the slot.
    """

    actual: AttentionContext
    is_read = False

    @classmethod
    def of(cls, context: AttentionContext) -> WatchedContext:
        """The context, watched."""
        watched = object.__new__(cls)
        vars(watched).update(vars(context), actual=context)
        return watched

    def __getattribute__(self, name: str) -> Any:
        if name == "__class__":  # of which `dataclasses.replace` makes another
            return AttentionContext
        if name not in OF_ALL_STEPS and not name.startswith("__"):
            object.__setattr__(self, "is_read", True)
        return super().__getattribute__(name)


def actual(context: AttentionContext) -> AttentionContext:
    """The context itself, for attention, which is known to do the same at every step."""
    return context.actual if type(context) is WatchedContext else context
