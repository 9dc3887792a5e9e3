"""Image tokenizers: image tokens to pixels and back."""

from softcfg.tokenizers.alitok import AliTokTokenizer, AliTokTokenizerConfig
from softcfg.tokenizers.base import Tokenizer, to_uint8
from softcfg.tokenizers.emu3_vq import Emu3VQ, Emu3VQConfig
from softcfg.tokenizers.janus_vq import JanusVQ, JanusVQConfig
from softcfg.tokenizers.llamagen_vq import LlamaGenVQ, LlamaGenVQConfig
from softcfg.tokenizers.maskgit_vq import MaskGITVQ, MaskGITVQConfig
from softcfg.tokenizers.movq import MoVQ, MoVQConfig
from softcfg.tokenizers.robustok import RobusTokTokenizer, RobusTokTokenizerConfig

__all__ = [
    "AliTokTokenizer",
    "AliTokTokenizerConfig",
    "Emu3VQ",
    "Emu3VQConfig",
    "JanusVQ",
    "JanusVQConfig",
    "LlamaGenVQ",
    "LlamaGenVQConfig",
    "MaskGITVQ",
    "MaskGITVQConfig",
    "MoVQ",
    "MoVQConfig",
    "RobusTokTokenizer",
    "RobusTokTokenizerConfig",
    "Tokenizer",
    "to_uint8",
]
