"""The steps of a batch on a CPU as one list of kernels, which is what a CUDA graph is on a GPU.

A small step takes as long as its hundreds of operations, each of which is Python and PyTorch's dispatch. Where all that
blocks and logits compute is kernels of `softcfg.nn.kernels.cpu`, the first step writes down how they were launched, and
every other one launches them again, by one call, with the numbers that move from step to step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from softcfg.nn import fused
from softcfg.nn.backends import numba_decode, registry
from softcfg.nn.context import AttentionContext
from softcfg.nn.kernels import available
from softcfg.nn.kv_cache import Int8KVCache, KVCache
from softcfg.nn.launches import recorded
from softcfg.nn.linear import Linear
from softcfg.nn.settings import holding

MOST_BYTES = 64 << 20  # that results between the kernels may take: each has memory of its own
Programs = WeakKeyDictionary[Any, "_Program | None"]


def replayed(
    module: nn.Module,
    programs: Programs,
    x: Tensor,
    context: AttentionContext,
    run: Callable[[Tensor], Tensor],
    prepared: object = None,
) -> Tensor | None:
    """What `run(x)` returns, by its kernels alone if they are known or become so; None for a step that has none.

    Args:
        module: whose weights `run` uses; it is laid out, and does not change.
        programs: of this module; one for each cache, or for what `prepared` is.
        x: [rows, 1, width].
        context: of the step.
        prepared: holds all else that `run` depends on, in memory that it keeps; None for nothing.
    """
    cache, slot = context.cache, context.position.slot
    if (
        cache is None or slot is None or type(cache) not in (KVCache, Int8KVCache) or not 0 < slot < cache.slots
        or x.shape[1] != 1 or x.dtype is not torch.float32 or not fused.are_enabled() or registry.is_forced()
        or recorded.get() is not None or not available.on_cpu(x) or not numba_decode.is_faster()
    ):  # fmt: skip
        return None
    key = cache if prepared is None else prepared
    if key not in programs:
        new = _Program(module, x, cache)
        found = new.record(x, context, run)
        programs[key] = new if new.serves else None
        return found
    known = programs[key]
    return None if known is None or not known.fits(x, cache) else known.replay(x, context)


class _Program:
    def __init__(self, module: nn.Module, x: Tensor, cache: KVCache) -> None:
        modules = list(module.modules())
        self._hooks: list[Any] = [torch.nn.modules.module._global_forward_hooks]
        self._hooks += [torch.nn.modules.module._global_forward_pre_hooks]
        for each in modules:
            self._hooks += [each._forward_hooks, each._forward_pre_hooks]
        self._attributes = [vars(each) for each in modules]
        # The memory of what the kernels read lives as long as the program.
        self._kept: list[Any] = [each.laid_out for each in modules if isinstance(each, Linear)]
        self._cache = weakref.ref(cache)
        self._input = torch.empty_like(x)
        self._output = self._input
        self.serves = False

    def record(self, x: Tensor, context: AttentionContext, run: Callable[[Tensor], Tensor]) -> Tensor:
        """What `run` returns; after that the program serves, if all of it was kernels."""
        self._input.copy_(x)
        numba_decode.tables_of(context)  # not a part of what is recorded, nor is the rotation
        watch, launches = _Watch(), list[tuple[int, ...]]()
        with holding(recorded, launches), watch:
            found = run(self._input)
        self._kept += watch.made
        small = sum(each.nbytes for each in watch.made) <= MOST_BYTES
        if launches and small and not watch.others and not self._is_watched():
            self._launches = available.cpu_kernels().Program(launches, self._kept)
            self._output, self.serves = found, True
            return found.clone()
        return found

    def fits(self, x: Tensor, cache: KVCache) -> bool:
        """Whether it serves such a step, and nobody wants to be called between."""
        return x.shape == self._input.shape and cache is self._cache() and not self._is_watched()

    def _is_watched(self) -> bool:
        """Whether a module has a hook or a `forward` of its own."""
        return any(self._hooks) or any("forward" in each for each in self._attributes)

    def replay(self, x: Tensor, context: AttentionContext) -> Tensor:
        """Run it."""
        self._input.copy_(x)
        rotary = context.rotary
        cos, sin = (None, None) if rotary is None else (rotary.first_cos, rotary.first_sin)
        self._launches.run(context.slots, cos, sin, numba_decode.tables_of(context))
        return self._output.clone()


class _Watch(TorchDispatchMode):
    """Notes the operations of PyTorch that are neither views nor new memory, and keeps the latter."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []
        self.others: set[str] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: to say so to the compiler would import it, which takes seconds and 100 MB."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func._schema.name
        if "::empty" in name or "::new_empty" in name:
            self.made.append(found)
        elif func._schema.is_mutable or not _is_harmless(found, args):
            self.others.add(name)
        return found


def _is_harmless(found: Any, args: Any) -> bool:
    """Whether an operation gave views of its arguments, or has nothing to do with tensors."""
    given, outputs = (
        {_memory(each) for each in tree_leaves(part) if isinstance(each, Tensor)} for part in (args, found)
    )
    return outputs <= given - {None} if outputs else not given


def _memory(tensor: Tensor) -> int | None:
    """Where the memory of a tensor begins; None for one of oneDNN's."""
    return None if tensor.is_mkldnn else tensor.untyped_storage().data_ptr()
