"""Where a pass through the generator starts in the sequence of each row.

A sequence is a row of slots: first those of the condition, then one for every image token. A pass feeds `new`
neighbouring slots. If all rows start at the same slot, that slot is a plain number: attention and tables are cut to the
filled part of the sequence. If rows start at slots of their own, the slots are a tensor on the device: shapes do not
depend on them, attention covers the whole cache, and a mask hides what comes after each query. A step of such shapes
never waits for the device, so one captured CUDA graph serves all steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class Position(ABC):
    """The slot at which a pass starts. Made by `Position.start`, `Position.shared` and `Position.by_row`.

    Attributes:
        slot: of all rows, as a number; None if rows have slots of their own.
        row_slots: int64 [rows], the slot of each row, on the device; None if all rows share one.
    """

    slot: int | None
    row_slots: Tensor | None

    @staticmethod
    def start() -> Position:
        """The start of the sequence: the pass begins with the condition."""
        return _SharedPosition(0)

    @staticmethod
    def shared(slot: int) -> Position:
        """The same slot for all rows.

        Raises:
            ValueError: it is below 0.
        """
        if slot < 0:
            raise ValueError(f"a slot is at least 0, got {slot}")
        return _SharedPosition(slot)

    @staticmethod
    def by_row(slots: Tensor) -> Position:
        """A slot for each row, int64 [rows], after the condition. The whole pass must fit into the cache."""
        return _RowPosition(slots.contiguous())  # a kernel reads them one after the other

    @staticmethod
    def of(position: Position | int) -> Position:
        """A slot number as a position; a position stays as it is.

        Raises:
            TypeError: it is neither.
            ValueError: the number is below 0.
        """
        if isinstance(position, Position):
            return position
        if not isinstance(position, int):
            raise TypeError(f"a slot is an int or a Position (Position.by_row for a tensor), got {type(position)}")
        return Position.shared(position)

    @property
    def is_start(self) -> bool:
        """Whether the pass begins with the condition."""
        return self.slot == 0

    @abstractmethod
    def shifted(self, by: int) -> Position:
        """The position `by` slots later."""

    @abstractmethod
    def repeated(self, copies: int) -> Position:
        """The position for `copies` times as many rows, copy after copy."""

    @abstractmethod
    def on(self, device: torch.device) -> Position:
        """The same position with its tensor on `device`."""

    @abstractmethod
    def index(self, new: int, padding: Tensor | None = None) -> slice | Tensor:
        """Index of the `new` slots of the pass into tables that have an entry for each slot.

        Args:
            padding: int64 [rows], slots of padding in front of each row. Slots are then counted from the first one
                after the padding; those in the padding count as 0.

        Returns:
            A slice if all rows have the same slots, otherwise int64 [rows, new].
        """

    @abstractmethod
    def first_predicting(self, condition_slots: int) -> int:
        """Index, within the pass, of the first input that predicts an image token: the last slot of the condition."""

    @abstractmethod
    def covered(self, new: int, cache_slots: int | None) -> int:
        """How many slots, counted from the first, attention covers in a pass of `new` slots.

        Args:
            cache_slots: slots that the cache holds; None without a cache.

        Raises:
            ValueError: the pass needs a cache, and there is none.
        """

    @abstractmethod
    def mask(self, new: int, slots: int, padding: Tensor | None = None) -> Tensor | None:
        """Which of the first `slots` slots the pass may see.

        Args:
            padding: int64 [rows], slots of padding in front of each row, which no query sees.

        Returns:
            Bool [rows, slots], for queries that stand at the last `new` of the slots and are causal besides; or bool
            [rows, new, slots], causality included; or None, where causality is all.
        """

    @abstractmethod
    def write(self, contents: Tensor, vectors: Tensor) -> None:
        """Write `vectors` [rows, heads, new, ...] into `contents` [rows, heads, slots, ...] at this position.

        Raises:
            ValueError: they do not fit (checked where the slot is known without waiting for the device).
        """


@dataclass(frozen=True)
class _SharedPosition(Position):
    slot: int
    row_slots = None

    def shifted(self, by: int) -> Position:
        return _SharedPosition(self.slot + by)

    def repeated(self, copies: int) -> Position:
        return self

    def on(self, device: torch.device) -> Position:
        return self

    def index(self, new: int, padding: Tensor | None = None) -> slice | Tensor:
        if padding is None:
            return slice(self.slot, self.slot + new)
        return (self.slot - padding[:, None] + torch.arange(new, device=padding.device)).clamp_min(0)

    def first_predicting(self, condition_slots: int) -> int:
        return max(0, condition_slots - 1 - self.slot)

    def covered(self, new: int, cache_slots: int | None) -> int:
        if self.slot and cache_slots is None:
            raise ValueError(f"a pass that starts at slot {self.slot} needs the cache of the slots before it")
        return self.slot + new

    def mask(self, new: int, slots: int, padding: Tensor | None = None) -> Tensor | None:
        return None if padding is None else _after_padding(padding, slots)

    def write(self, contents: Tensor, vectors: Tensor) -> None:
        stop, slots = self.slot + vectors.shape[2], contents.shape[2]
        if stop > slots:
            raise ValueError(f"the cache has {slots} slots, writing up to slot {stop} does not fit")
        contents[:, :, self.slot : stop] = vectors


@dataclass(frozen=True, eq=False)
class _RowPosition(Position):
    row_slots: Tensor
    slot = None

    def shifted(self, by: int) -> Position:
        return _RowPosition(self.row_slots + by)

    def repeated(self, copies: int) -> Position:
        return _RowPosition(self.row_slots.repeat(copies))

    def on(self, device: torch.device) -> Position:
        return _RowPosition(self.row_slots.to(device))

    def index(self, new: int, padding: Tensor | None = None) -> slice | Tensor:
        slots = self.row_slots[:, None]
        if new != 1:
            slots = slots + torch.arange(new, device=slots.device)
        return slots if padding is None else (slots - padding[:, None]).clamp_min(0)

    def first_predicting(self, condition_slots: int) -> int:
        return 0

    def covered(self, new: int, cache_slots: int | None) -> int:
        if cache_slots is None:
            raise ValueError("a pass whose rows have slots of their own needs the cache of the slots before them")
        return cache_slots

    def mask(self, new: int, slots: int, padding: Tensor | None = None) -> Tensor | None:
        device = self.row_slots.device
        offsets = torch.arange(slots, device=device) - torch.arange(new, device=device)[:, None]
        mask = offsets <= self.row_slots[:, None, None]
        return mask if padding is None else mask & _after_padding(padding, slots)[:, None]

    def write(self, contents: Tensor, vectors: Tensor) -> None:
        index = self.index(vectors.shape[2])
        assert isinstance(index, Tensor)
        contents.scatter_(2, index[:, None, :, None].expand_as(vectors), vectors)


def _after_padding(padding: Tensor, slots: int) -> Tensor:
    """Bool [rows, slots], False for the leading slots that are padding."""
    return torch.arange(slots, device=padding.device) >= padding[:, None]
