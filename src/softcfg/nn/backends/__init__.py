"""Attention backends, one file each. The one that is imported last is asked first (see `registry`)."""

from softcfg.nn.backends import math, embedding_bag, sdpa_weighted, sdpa, numba_decode, triton_decode  # noqa: F401  # isort: skip  # they register themselves
from softcfg.nn.backends.registry import (
    BACKENDS,
    AttentionBackend,
    AttentionCall,
    BackendUnavailableError,
    attention,
    register_backend,
    use_backend,
)

__all__ = [
    "BACKENDS",
    "AttentionBackend",
    "AttentionCall",
    "BackendUnavailableError",
    "attention",
    "register_backend",
    "use_backend",
]
