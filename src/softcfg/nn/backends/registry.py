"""The contract of attention backends, their registry, and the choice of one for a call.

A backend is a class with a name that says which calls it can serve and serves them. `@register_backend` makes it
known; nothing else has to change, so a backend may live in a file outside of this package. The backend that was
registered last is asked first.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from softcfg.errors import UserError
from softcfg.nn.context import AttentionContext
from softcfg.nn.settings import holding

OWN = f"{__package__}."  # modules of the library's backends
FEW_QUERIES, FEW_NUMBERS = 64, 1 << 17  # numbers of the keys


@dataclass(frozen=True)
class AttentionCall:
    """The attention of one layer in one pass.

    Attributes:
        query: [rows, heads, n, head_dim], rotated.
        key, value: [rows, key_heads, m, head_dim]. With a cache the m = n new ones, which it holds already; without a
            cache all m = S of them (see `keys_and_values`). Each key head serves heads / key_heads neighbouring query
            heads (grouped-query attention).
        context: position, cache, weights and mask.
        layer: which layer of the cache to read.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    context: AttentionContext
    layer: int = 0

    @property
    def weighted(self) -> bool:
        """Whether values, keys or attention have weights."""
        context = self.context
        value, key, attention = context.value_weights, context.key_weights, context.attention_weights
        return value is not None or key is not None or attention is not None

    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        """All keys and values [rows, key_heads, S, head_dim], in the dtype of the query."""
        cache = self.context.cache
        return (self.key, self.value) if cache is None else cache.read(self.layer, self.context.slots)

    @cached_property
    def step_size(self) -> float:
        """How large a step on a CPU is: up to 1, the number of operations is what counts; infinite for other calls."""
        rows, heads, new, head_dim = self.query.shape
        if new > 1 or not self.query.is_cpu or self.query.dtype is not torch.float32:
            return math.inf
        numbers = rows * self.key.shape[1] * self.context.slots * head_dim
        return max(rows * heads / FEW_QUERIES, numbers / FEW_NUMBERS)

    def visible(self) -> Tensor | None:
        """Which slots each query sees, bool [1 or rows, 1, 1 or n, S]; None if it is all of them."""
        mask, new, slots = self.context.mask, self.query.shape[2], self.context.slots
        if mask is not None and mask.dim() == 3:
            return mask[:, None]
        padded = None if mask is None else mask[:, None, None, :]
        if new == 1:
            return padded
        causal = torch.ones(new, slots, dtype=torch.bool, device=self.query.device).tril_(slots - new)
        causal = causal[None, None]
        return causal if padded is None else causal & padded

    def zero_blind(self, out: Tensor, visible: Tensor | None) -> Tensor:
        """`out` with zeros for the queries that see nothing, as those in the padding; any other NaN stays one.

        Args:
            out: the attention [rows, heads, n, head_dim].
            visible: what `visible()` gave.
        """
        if self.context.mask is None or visible is None:
            return out
        return out.masked_fill(~visible.any(dim=-1, keepdim=True), 0)


class BackendUnavailableError(RuntimeError):
    """Raised by a backend that turns out not to run on this machine."""


class AttentionBackend(ABC):
    """A way to compute attention. Register a subclass without arguments by `@register_backend`.

    Attributes:
        name: for `use_backend`.
        unavailable: why it does not run, for devices where it has failed.
    """

    name: str

    def __init__(self) -> None:
        self.unavailable: dict[torch.device, str] = {}

    @abstractmethod
    def why_not(self, call: AttentionCall) -> str | None:
        """Why it cannot serve the call, as the end of a sentence; None if it can."""

    def preferred(self, call: AttentionCall) -> bool:
        """Whether it serves a call, if it can, faster than the backends that were registered before it.

        It is asked before `why_not`, which may take longer; it must not wait for the device.
        """
        return True

    @abstractmethod
    def attend(self, call: AttentionCall) -> Tensor:
        """The attention [rows, heads, n, head_dim], in the dtype of the values; zeros for queries that see nothing.

        Raises:
            BackendUnavailableError: it does not run on this machine. The next backend then serves the call.
        """


BACKENDS: dict[str, AttentionBackend] = {}

_forced: ContextVar[str | None] = ContextVar("forced_attention_backend", default=None)


def register_backend(backend: type[AttentionBackend]) -> type[AttentionBackend]:
    """Class decorator that makes a backend known. It is asked before those that are registered already."""
    BACKENDS.pop(backend.name, None)
    BACKENDS[backend.name] = backend()
    return backend


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Compute all attention of this thread with the named backend while the context is open.

    A call that the backend cannot serve then raises a `UserError`. Graphs that were captured before are not affected.

    Raises:
        UserError: there is no backend of this name.
    """
    if name not in BACKENDS:
        raise UserError(f"there is no attention backend {name!r}; there are {', '.join(BACKENDS)}")
    with holding(_forced, name):
        yield


def forced() -> str | None:
    """The backend of `use_backend`, if this thread is inside."""
    return _forced.get()


def is_asked_first(name: str) -> bool:
    """Whether the library's backend of this name is asked before all that are from outside of the library."""
    for backend in reversed(BACKENDS.values()):
        if not type(backend).__module__.startswith(OWN):
            return False
        if backend.name == name:
            return True
    return False


def attention(call: AttentionCall) -> Tensor:
    """The attention of a call, [rows, heads, n, head_dim], by the backend that is forced or else the best one."""
    name, device = forced(), call.query.device
    if name is not None:
        return _attend_forced(BACKENDS[name], call)
    for backend in reversed(BACKENDS.values()):
        if device in backend.unavailable or not backend.preferred(call) or backend.why_not(call) is not None:
            continue
        try:
            return backend.attend(call)
        except BackendUnavailableError as error:
            backend.unavailable[device] = str(error)
            message = f"the attention backend {backend.name!r} does not run on {device}, a slower one takes its place"
            warnings.warn(f"{message}: {error}", RuntimeWarning, stacklevel=2)
    raise RuntimeError("no attention backend can serve the call")


def _attend_forced(backend: AttentionBackend, call: AttentionCall) -> Tensor:
    reason = backend.why_not(call)
    if reason is not None:
        raise UserError(f"the attention backend {backend.name!r} of use_backend cannot serve this call: {reason}")
    try:
        return backend.attend(call)
    except BackendUnavailableError as error:
        raise UserError(f"the attention backend {backend.name!r} of use_backend does not run here: {error}") from error
