"""Parts that the generators share: weighted attention, positions, the key/value cache, rotary embedding."""

from softcfg.nn.attention import SelfAttention, weighted_attention
from softcfg.nn.backends import AttentionBackend, AttentionCall, register_backend, use_backend
from softcfg.nn.context import AttentionContext
from softcfg.nn.kv_cache import KVCache
from softcfg.nn.position import Position
from softcfg.nn.rotary import Rotary

__all__ = [
    "AttentionBackend",
    "AttentionCall",
    "AttentionContext",
    "KVCache",
    "Position",
    "Rotary",
    "SelfAttention",
    "register_backend",
    "use_backend",
    "weighted_attention",
]
