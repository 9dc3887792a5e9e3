"""A static cache of attention keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor


class KVCache:
    """Keys and values, allocated once: for each layer [rows, heads, slots, head_dim].

    Guidance weights act on the attention, not on the cache: what is written stays as it is.
    Rows are the sequences of a batch (with guidance the conditional ones first, then the unconditional).

    Args:
        device: of all layers, or one a layer.
    """

    def __init__(
        self,
        layers: int,
        rows: int,
        heads: int,
        slots: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | Sequence[torch.device] = "cpu",
    ) -> None:
        shape = (rows, heads, slots, head_dim)
        devices = [device] * layers if isinstance(device, (torch.device, str)) else device
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for device in devices]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for device in devices]

    @property
    def slots(self) -> int:
        """The number of sequence positions that the cache holds."""
        return self.keys[0].shape[2]

    def up_to(self, slots: int) -> KVCache:
        """The first `slots` slots as a cache that shares the memory of this one."""
        part = copy(self)
        part.keys = [keys[:, :, :slots] for keys in self.keys]
        part.values = [values[:, :, :slots] for values in self.values]
        return part

    def update(self, layer: int, keys: Tensor, values: Tensor, slot: int | Tensor) -> tuple[Tensor, Tensor]:
        """Write `keys` and `values` [rows, heads, n, head_dim] at `slot` and return the filled part.

        Args:
            slot: of all rows, or int64 [rows], one a row.

        Returns:
            Views [rows, heads, slot + n, head_dim] of the layer's keys and values; for slots by row, of all slots.
        """
        if isinstance(slot, Tensor):
            where = (slot[:, None] + torch.arange(keys.shape[2], device=slot.device))[:, None, :, None]
            self.keys[layer].scatter_(2, where.expand_as(keys), keys)
            self.values[layer].scatter_(2, where.expand_as(values), values)
            return self.keys[layer], self.values[layer]
        end = slot + keys.shape[2]
        if end > self.slots:
            raise ValueError(f"the cache has {self.slots} slots, writing up to slot {end} does not fit")
        self.keys[layer][:, :, slot:end] = keys
        self.values[layer][:, :, slot:end] = values
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]
