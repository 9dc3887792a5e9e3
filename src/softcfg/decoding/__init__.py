"""Drawing image tokens: the decode loop, filtering and reproducible randomness."""

from softcfg.decoding.filtering import Sampling, draw
from softcfg.decoding.jacobi import jacobi_decode
from softcfg.decoding.randomness import ImageStreams, image_uniforms
from softcfg.decoding.sequential import decode

__all__ = ["ImageStreams", "Sampling", "decode", "draw", "image_uniforms", "jacobi_decode"]
