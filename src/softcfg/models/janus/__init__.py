"""Janus-Pro, text to image: the generator, and how it reads prompts."""

from softcfg.models.janus.generator import Janus, JanusConfig, from_published
from softcfg.models.janus.prompts import JanusPrompts

__all__ = ["Janus", "JanusConfig", "JanusPrompts", "from_published"]
