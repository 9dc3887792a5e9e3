"""Parts that the generators share: weighted attention, the key/value cache, rotary embedding."""

from softcfg.nn.attention import AttentionContext, SelfAttention, weighted_attention
from softcfg.nn.kv_cache import KVCache

__all__ = ["AttentionContext", "KVCache", "SelfAttention", "weighted_attention"]
