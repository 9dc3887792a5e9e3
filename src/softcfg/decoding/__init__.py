"""Drawing image tokens: the decode loop, filtering and reproducible randomness.

The names below are imported when they are first used: the command line reads the settings of `Sampling` without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softcfg.lazy import lazy_names

if TYPE_CHECKING:
    from softcfg.decoding.filtering import Sampling, draw
    from softcfg.decoding.jacobi import jacobi_decode
    from softcfg.decoding.randomness import ImageStreams, image_uniforms
    from softcfg.decoding.sequential import decode

_HOMES = {
    "softcfg.decoding.filtering": ("Sampling", "draw"),
    "softcfg.decoding.jacobi": ("jacobi_decode",),
    "softcfg.decoding.randomness": ("ImageStreams", "image_uniforms"),
    "softcfg.decoding.sequential": ("decode",),
}

__all__ = ["ImageStreams", "Sampling", "decode", "draw", "image_uniforms", "jacobi_decode"]

__getattr__ = lazy_names(globals(), _HOMES)
