"""Emu3-Gen, text to image: the generator, and how it reads prompts."""

from softcfg.models.emu3.generator import Emu3, Emu3Config, from_published
from softcfg.models.emu3.prompts import Emu3Prompt, Emu3Prompts

__all__ = ["Emu3", "Emu3Config", "Emu3Prompt", "Emu3Prompts", "from_published"]
