"""A static cache of attention keys and values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from softcfg.nn.memory import in_huge_pages, require_memory
from softcfg.nn.position import Position


class KVCache:
    """Keys and values, allocated once: for each layer [rows, heads, slots, head_dim].

    Guidance weights act on the attention, not on the cache: what is written stays as it is.
    Rows are the sequences of a batch (with guidance the conditional ones first, then the unconditional).

    Args:
        dtype: of what is written and read.
        device: of all layers, or one per layer.
        by_slot: whether, on a CPU, all heads of a slot lie side by side instead of all slots of a head: what is filled
            is then in one piece, as the kernel there reads it (`softcfg.nn.backends.numba_decode`).

    Raises:
        MemoryError: there is not so much memory on the CPU (`softcfg.nn.memory.require_memory`).

    Attributes:
        stored: the dtype of the contents, if it differs from that of what is written.
    """

    stored: torch.dtype | None = None

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
        by_slot: bool = False,
    ) -> None:
        self.dtype = dtype
        shape, stored = (rows, heads, slots, head_dim), self.stored or dtype
        devices = [device] * layers if isinstance(device, (torch.device, str)) else device
        if all(torch.device(each).type == "cpu" for each in devices):
            inner = (slots, rows, heads, head_dim) if by_slot else shape
            require_memory(2 * layers * math.prod(shape) * stored.itemsize, f"the keys and values of {rows} rows")
            whole = in_huge_pages(torch.empty(2, layers, *inner, dtype=stored, device="cpu")).zero_()
            whole = whole.permute(0, 1, 3, 4, 2, 5) if by_slot else whole
            self.keys, self.values = (list(half.unbind()) for half in whole)
        else:
            self.keys = [torch.zeros(shape, dtype=stored, device=each) for each in devices]
            self.values = [torch.zeros(shape, dtype=stored, device=each) for each in devices]

    @property
    def slots(self) -> int:
        """The number of sequence positions that the cache holds."""
        return self.keys[0].shape[2]

    @property
    def nbytes(self) -> int:
        """Its memory in bytes."""
        return sum(contents.nbytes for contents in (*self.keys, *self.values))

    def clear(self) -> None:
        """Make all contents zero, as they are at first."""
        for contents in (*self.keys, *self.values):
            contents.zero_()

    def up_to(self, slots: int) -> KVCache:
        """The first `slots` slots as a cache that shares the memory of this one."""
        part = copy(self)
        part.keys = [keys[:, :, :slots] for keys in self.keys]
        part.values = [values[:, :, :slots] for values in self.values]
        return part

    def write(self, layer: int, keys: Tensor, values: Tensor, position: Position) -> None:
        """Write `keys` and `values` [rows, heads, n, head_dim] of the n slots from `position` on.

        Raises:
            ValueError: they do not fit into the cache.
        """
        position.write(self.keys[layer], keys)
        position.write(self.values[layer], values)

    def read(self, layer: int, slots: int) -> tuple[Tensor, Tensor]:
        """The layer's keys and values [rows, heads, slots, head_dim] of the first slots: here views of the cache."""
        return self.keys[layer][:, :, :slots], self.values[layer][:, :, :slots]

    def scales(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        """Factors [rows, heads, slots, 1] on the layer's stored keys and on its stored values; None for 1."""
        return None, None


class Int8KVCache(KVCache):
    """Keys and values as 8-bit integers: each vector of head_dim has its own scale, and its largest entry is 127."""

    stored = torch.int8

    def __init__(self, *size: int, **settings: Any) -> None:
        """See `KVCache`."""
        super().__init__(*size, **settings)
        rows, heads, slots, _ = self.keys[0].shape
        # The scales are kept in a cache whose vectors have one entry.
        devices, by_slot = [keys.device for keys in self.keys], settings.get("by_slot", False)
        self._scales = KVCache(len(self.keys), rows, heads, slots, 1, device=devices, by_slot=by_slot)

    @property
    def nbytes(self) -> int:
        """See `KVCache.nbytes`."""
        return super().nbytes + self._scales.nbytes

    def clear(self) -> None:
        """See `KVCache.clear`."""
        super().clear()
        self._scales.clear()

    def up_to(self, slots: int) -> Int8KVCache:
        """See `KVCache.up_to`."""
        part = super().up_to(slots)
        assert isinstance(part, Int8KVCache)
        part._scales = self._scales.up_to(slots)
        return part

    def write(self, layer: int, keys: Tensor, values: Tensor, position: Position) -> None:
        """See `KVCache.write`; the vectors are rounded."""
        rounded_keys, key_scales = _round(keys)
        rounded_values, value_scales = _round(values)
        super().write(layer, rounded_keys, rounded_values, position)
        self._scales.write(layer, key_scales, value_scales, position)

    def read(self, layer: int, slots: int) -> tuple[Tensor, Tensor]:
        """See `KVCache.read`; here new tensors."""
        keys, values = super().read(layer, slots)
        key_scales, value_scales = self._scales.read(layer, slots)
        return keys.to(self.dtype).mul_(key_scales), values.to(self.dtype).mul_(value_scales)

    def scales(self, layer: int) -> tuple[Tensor, Tensor]:
        """See `KVCache.scales`; float32."""
        return self._scales.keys[layer], self._scales.values[layer]


CACHES: dict[torch.dtype, type[KVCache]] = {torch.int8: Int8KVCache}  # by the reduced dtype that they store


def _round(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors [..., head_dim] rounded to int8, and the float32 scales [..., 1] that turn them back."""
    scales = vectors.abs().amax(dim=-1, keepdim=True).float() / 127
    return (vectors / torch.where(scales > 0, scales, 1)).round_().to(torch.int8), scales
