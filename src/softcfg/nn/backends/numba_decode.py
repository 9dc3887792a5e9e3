"""Attention of a decoding step on a CPU, with weights, by the kernel in `softcfg.nn.kernels.cpu`.

PyTorch computes it as hundreds of small products of one row, which on some processors read the cache at half the speed
of the memory. Numba, an extra, compiles the kernel without a compiler on the machine.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from softcfg.nn.backends.embedding_bag import EmbeddingBag
from softcfg.nn.backends.math import Math
from softcfg.nn.backends.registry import (
    AttentionBackend,
    AttentionCall,
    BackendUnavailableError,
    forced,
    register_backend,
)
from softcfg.nn.choices import choose_once, on_threads, time_sides
from softcfg.nn.context import AttentionContext
from softcfg.nn.kernels import available
from softcfg.nn.kv_cache import Int8KVCache, KVCache
from softcfg.nn.memory import is_out_of_memory
from softcfg.nn.position import Position

GAIN = 1.1  # by which it may be slower: a step that is made of kernels alone is replayed without Python (`nn.replay`)
COPIES, MEASURED = 8, (8, 16, 128, 64)  # of a layer's cache: 64 MiB, so that it comes from memory


@register_backend
class NumbaDecode(AttentionBackend):
    """One query per row; scores, softmax and weighted sum of a head at once."""

    name = "numba_decode"

    def why_not(self, call: AttentionCall) -> str | None:
        """See `AttentionBackend.why_not`."""
        query, key, value = call.query, call.key, call.value
        if query.shape[2] != 1:
            return "it takes one query per row"
        if not query.is_cpu or not query.dtype == key.dtype == value.dtype == torch.float32:
            return "it runs on CPUs, in float32"
        if key.shape != value.shape or query.shape[1] % key.shape[1] or query.shape[::3] != key.shape[::3]:
            return "it takes keys and values of one shape, and as many queries for each head of them"
        cache = call.context.cache
        if cache is not None and (cache.stored not in (None, torch.int8) or call.context.slots > cache.slots):
            return "it reads keys and values in float32 or int8, of slots that the cache has"
        if not available.on_cpu(query):
            return "it needs Numba, no gradient, and that nothing else watches PyTorch's operations"
        return None

    def preferred(self, call: AttentionCall) -> bool:
        """See `AttentionBackend.preferred`: if it is faster on this machine."""
        return call.query.is_cpu and call.query.shape[2] == 1 and self.why_not(call) is None and is_faster()

    def attend(self, call: AttentionCall) -> Tensor:
        """See `AttentionBackend.attend`.

        Raises:
            BackendUnavailableError: the kernel does not compile.
        """
        context, query = call.context, call.query
        key, value, scales = self._contents(call)
        if key.stride() != value.stride() or key.stride(3) != 1:
            key, value = key.contiguous(), value.contiguous()
        tables = tables_of(context)
        query = query if query.stride(3) == 1 else query.contiguous()
        try:
            return available.cpu_kernels().attention(query, key, value, context.slots, *tables, *scales)
        except Exception as error:  # Numba and LLVM have no common type of error
            if is_out_of_memory(error) or isinstance(error, ValueError):  # the latter is about what it was given
                raise
            raise BackendUnavailableError(f"{type(error).__name__}: {error}") from error

    def _contents(self, call: AttentionCall) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        """Keys and values of at least the slots of the call, and their scales in a cache of integers.

        Of the cache it is the whole, which saves two slices a layer.
        """
        cache, layer = call.context.cache, call.layer
        if cache is not None and type(cache).read in (KVCache.read, Int8KVCache.read):
            return cache.keys[layer], cache.values[layer], cache.scales(layer)
        return *call.keys_and_values(), ()


def tables_of(context: AttentionContext) -> list[Tensor | None]:
    """Value weights, key weights, logarithms of attention weights and visible slots of a step, once for all layers.

    Each is [rows or 1, S], the entries of a row side by side; None where there are none.
    """
    if NumbaDecode.name not in context.memory:
        of_slots = (context.value_weights, context.key_weights, context.attention_weights, context.mask)
        value, key, attention, mask = (each if each is None or each.dim() == 2 else each[:, 0] for each in of_slots)
        attention = None if attention is None else attention.log()
        tables = [None if each is None else each.float() for each in (value, key, attention)]
        context.memory[NumbaDecode.name] = [
            each if each is None or each.stride(1) == 1 else each.contiguous()
            for each in (*tables, None if mask is None else mask.bool())
        ]
    return context.memory[NumbaDecode.name]


def reads_cache(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the steps of a model read its cache by this kernel: then the cache had better lie by slot."""
    if device.type != "cpu" or dtype is not torch.float32 or not available.may_use_cpu_kernels():
        return False
    return forced() == NumbaDecode.name or (forced() is None and is_faster())


def is_faster() -> bool:
    """Whether it is faster than PyTorch's operations on this machine, each with a cache as it likes it."""

    def measure() -> str:
        rows, heads, slots, width = MEASURED
        query = torch.ones(rows, heads, 1, width, dtype=torch.float32, device="cpu")
        position = Position.shared(slots - 1)

        def side(backend: AttentionBackend, *, by_slot: bool) -> Callable[[], None]:
            context = AttentionContext(position, slots, KVCache(COPIES, rows, heads, slots, width, by_slot=by_slot))
            new = query.new_zeros(()).expand(query.shape)  # what is in the cache is read in its place
            calls = [AttentionCall(query, new, new, context, layer) for layer in range(COPIES)]

            def attend() -> None:
                for call in calls:
                    backend.attend(call)

            return attend

        sides = {backend.name: side(backend, by_slot=False) for backend in (EmbeddingBag(), Math())}
        sides[NumbaDecode.name] = side(NumbaDecode(), by_slot=True)
        try:
            on_threads(1, sides[NumbaDecode.name])
        except BackendUnavailableError:  # a call will say so
            return NumbaDecode.name
        seconds = time_sides(sides)
        seconds[NumbaDecode.name] /= GAIN
        return min(seconds, key=seconds.__getitem__)

    names = (NumbaDecode.name, EmbeddingBag.name, Math.name)
    return choose_once("attention-by-slot-float32", names, measure) == NumbaDecode.name
