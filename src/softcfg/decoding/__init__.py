"""Drawing image tokens: the decode loop, filtering and reproducible randomness.

The names below are imported when they are first used: the command line reads the settings of `Sampling` without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softcfg.decoding.filtering import Sampling, draw
    from softcfg.decoding.jacobi import jacobi_decode
    from softcfg.decoding.randomness import ImageStreams, image_uniforms
    from softcfg.decoding.sequential import decode

_HOMES = {
    "ImageStreams": "randomness",
    "Sampling": "filtering",
    "decode": "sequential",
    "draw": "filtering",
    "image_uniforms": "randomness",
    "jacobi_decode": "jacobi",
}

__all__ = ["ImageStreams", "Sampling", "decode", "draw", "image_uniforms", "jacobi_decode"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
