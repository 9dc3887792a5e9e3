"""Image tokenizers: image tokens to pixels and back."""

from softcfg.tokenizers.alitok import AliTokTokenizer, AliTokTokenizerConfig
from softcfg.tokenizers.base import Tokenizer, to_uint8
from softcfg.tokenizers.maskgit_vq import MaskGITVQ, MaskGITVQConfig

__all__ = [
    "AliTokTokenizer",
    "AliTokTokenizerConfig",
    "MaskGITVQ",
    "MaskGITVQConfig",
    "Tokenizer",
    "to_uint8",
]
