"""LlamaGen's text-to-image models: the generator, and how it reads captions."""

from softcfg.models.llamagen_t2i.captions import LlamaGenCaptions, clean_caption
from softcfg.models.llamagen_t2i.generator import LlamaGenT2I, LlamaGenT2IConfig

__all__ = ["LlamaGenCaptions", "LlamaGenT2I", "LlamaGenT2IConfig", "clean_caption"]
