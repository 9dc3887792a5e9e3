"""Drawing image tokens: the decode loop, filtering and reproducible randomness."""

from softcfg.decoding.filtering import Sampling, draw
from softcfg.decoding.randomness import image_uniforms
from softcfg.decoding.sequential import decode

__all__ = ["Sampling", "decode", "draw", "image_uniforms"]
