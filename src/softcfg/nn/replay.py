"""The steps of a batch on a CPU as one list of kernels, which is what a CUDA graph is on a GPU.

A small step takes as long as its hundreds of operations, each of which is Python and PyTorch's dispatch. Where all that
blocks and logits compute is kernels of `softcfg.nn.kernels.cpu`, the first step writes down how they were launched, and
every other one launches them again, by one call, with the numbers that move from step to step.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from softcfg.nn import fused
from softcfg.nn.backends import numba_decode, registry
from softcfg.nn.context import AttentionContext, WatchedContext
from softcfg.nn.kernels import available
from softcfg.nn.kv_cache import Int8KVCache, KVCache
from softcfg.nn.launches import recorded
from softcfg.nn.linear import Linear
from softcfg.nn.rotary import Rotary
from softcfg.nn.settings import holding

Launches = list[tuple[int, ...]]  # as `softcfg.nn.kernels.cpu.as_recorded` gives them
MOST_BYTES = 64 << 20  # that results between the kernels may take: each has memory of its own
Programs = WeakKeyDictionary[Any, "_Program | None"]
surroundings: ContextVar[Surroundings | None] = ContextVar("surroundings", default=None)


class StepInputs(NamedTuple):
    """What all steps of a batch are fed beside their tokens, in memory that stays where it is.

    Attributes:
        slots: of the condition; step 1 feeds the one after them.
        rotary: of the slots of steps 1 and later; None for none.
        context: of the last step, whose cache and tables serve all.
    """

    slots: int
    rotary: Rotary | None
    context: AttentionContext


class Surroundings(ABC):
    """What is launched with the kernels of a step, by the same call, where the step is replayed: before and after them.

    Attributes:
        number: of the step that comes, from 1.
        met: whether the last step looked for it.
        served: whether it was replayed, and all of this was launched.
        inputs: of all steps, where the first launch embeds the token; None where steps depend on more than that.
        ahead: runs steps from `number` on, at most so many, and returns how many; 0 if they are to be done in another
            way. None until it is known how steps are launched.
    """

    number = 1
    met = served = False
    inputs: StepInputs | None = None
    ahead: Callable[[int], int] | None = None

    @abstractmethod
    def launches(self, fed: Tensor, logits: Tensor) -> tuple[Launches, Launches]:
        """What comes before and after, for steps that are fed `fed` [rows, 1, width] and give `logits` [rows, 1, V]."""

    @abstractmethod
    def move(self, before: list[np.ndarray], after: list[np.ndarray]) -> None:
        """Change the parameters of what comes before and after to those of step `number`."""

    @abstractmethod
    def alike(self) -> int:
        """How many steps from `number` on have parameters that move by the same numbers."""

    @abstractmethod
    def missed(self) -> None:
        """Do what comes before a step in another way: it is not replayed."""


def replayed(
    module: nn.Module,
    programs: Programs,
    x: Tensor,
    context: AttentionContext,
    run: Callable[[Tensor, AttentionContext], Tensor],
) -> Tensor | None:
    """What `run(x, context)` returns, by its kernels alone if they are known or become so; None where there are none.

    Args:
        module: whose weights `run` uses; it is laid out, and does not change.
        programs: of this module; one for each cache, or for what is prepared.
        x: [rows, 1, width].
        context: of the step; what is `prepared` holds all else that `run` depends on, in memory that it keeps.
    """
    cache, slot = context.cache, context.position.slot
    serves = (
        cache is not None and slot is not None and type(cache) in (KVCache, Int8KVCache) and 0 < slot < cache.slots
        and x.shape[1] == 1 and _may_run(x)
    )  # fmt: skip
    key = cache if context.prepared is None else context.prepared
    known = programs.get(key) if serves else None
    around = surroundings.get()
    if around is not None:
        around.met = True
    if known is not None and cache is not None and known.fits(x, cache):
        return known.replay(x, context, around)
    if around is not None:
        around.missed()
    if not serves or key in programs:
        return None
    assert cache is not None
    new = _Program(module, x, cache)
    found = new.record(x, context, run)
    programs[key] = new if new.serves else None
    return found


def _may_run(x: Tensor) -> bool:
    """Whether steps that are fed `x` may be replayed in this thread, now."""
    return (
        x.dtype is torch.float32 and fused.are_enabled() and registry.forced() is None and recorded.get() is None
        and registry.is_asked_first(numba_decode.NumbaDecode.name) and available.on_cpu(x) and numba_decode.is_faster()
    )  # fmt: skip


def keeps_tables(context: AttentionContext) -> bool:
    """Whether what is written into its weights later is what attention reads: it reads no copies of them."""
    value, key, logarithms, _ = numba_decode.tables_of(context)
    pairs = ((value, context.value_weights), (key, context.key_weights))
    return logarithms is None and all(
        one is None or other is None or one.data_ptr() == other.data_ptr() for one, other in pairs
    )


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
        # Weakly by what it is surrounded, the program with that, and the parameters of what comes before and after.
        self._surrounded: tuple[Any, Any, list[list[np.ndarray]]] | None = None
        self.serves = False

    def record(self, x: Tensor, context: AttentionContext, run: Callable[[Tensor, AttentionContext], Tensor]) -> Tensor:
        """What `run` returns; after that the program serves, if all of it was kernels, the same at every step."""
        self._input.copy_(x)
        numba_decode.tables_of(context)  # not a part of what is recorded, nor is the rotation
        watch, launches, watched = _Watch(), Launches(), WatchedContext.of(context)
        with holding(recorded, launches), watch:
            found = run(self._input, watched)
        self._kept += watch.made
        small = sum(each.nbytes for each in watch.made) <= MOST_BYTES
        if launches and small and not watch.others and not watched.is_read and not self._is_watched():
            self._recorded, self._launches = launches, available.cpu_kernels().Program(launches, self._kept)
            self._output, self.serves = found, True
            return found.clone()
        return found

    def fits(self, x: Tensor, cache: KVCache) -> bool:
        """Whether it serves such a step, and nobody wants to be called between."""
        return x.shape == self._input.shape and cache is self._cache() and not self._is_watched()

    def _is_watched(self) -> bool:
        """Whether a module has a hook or a `forward` of its own."""
        return any(self._hooks) or any("forward" in each for each in self._attributes)

    def replay(self, x: Tensor, context: AttentionContext, around: Surroundings | None = None) -> Tensor:
        """Run it, and what is to be launched around it; what is returned then is the program's own memory."""
        self._input.copy_(x)
        launches = self._launches if around is None else self._with(around)
        launches.set_slot(context.slots, *_turns(context.rotary), numba_decode.tables_of(context))
        launches.launch()
        if around is None:
            return self._output.clone()
        around.served = True
        if around.ahead is None and around.inputs is not None:
            around.ahead = partial(self.ahead, weakref.ref(around))
        return self._output

    def ahead(self, of: Callable[[], Surroundings | None], most: int) -> int:
        """See `Surroundings.ahead`."""
        around, cache = of(), self._cache()
        if around is None or around.inputs is None or self._surrounded is None or self._surrounded[0]() is not around:
            return 0  # another batch has stepped over the same cache, with tables of its own
        if cache is None or cache is not around.inputs.context.cache or self._is_watched() or not _may_run(self._input):
            return 0
        steps, moves = min(most, around.alike()), None
        if steps > 1:
            around.number += 1
            moves = self._at(around).parameters()
            around.number -= 1
        launches = self._at(around)
        if moves is not None:
            moves -= launches.parameters()
        launches.launch(steps, moves)
        return steps

    def _at(self, around: Surroundings) -> Any:
        """The program with the launches around it, as it is in step `around.number`."""
        launches, inputs, number = self._with(around), around.inputs, around.number
        assert inputs is not None
        rotary = None if inputs.rotary is None else inputs.rotary.later(number - 1)
        launches.set_slot(inputs.slots + number, *_turns(rotary), numba_decode.tables_of(inputs.context))
        return launches

    def _with(self, around: Surroundings) -> Any:
        """The program with the launches around it, made when it is first needed, for the step that comes."""
        if self._surrounded is None or self._surrounded[0]() is not around:
            before, after = around.launches(self._input, self._output)
            whole = available.cpu_kernels().Program([*before, *self._recorded, *after], self._kept)
            moving = [
                [whole.parameters_of(index) for index in where] for where in (range(len(before)), range(-len(after), 0))
            ]
            self._surrounded = weakref.ref(around), whole, moving
        _, whole, moving = self._surrounded
        around.move(*moving)
        return whole


def _turns(rotary: Rotary | None) -> tuple[Tensor | None, Tensor | None]:
    """Cosines and sines of the first slot."""
    return (None, None) if rotary is None else (rotary.first_cos, rotary.first_sin)


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
