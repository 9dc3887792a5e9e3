"""Attention without weights by PyTorch's fused kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from softcfg.nn.backends.registry import AttentionBackend, AttentionCall, register_backend

FEW_QUERIES, FEW_NUMBERS = 64, 1 << 17  # and numbers in the keys, on a CPU


@register_backend
class SDPA(AttentionBackend):
    """`torch.nn.functional.scaled_dot_product_attention`."""

    name = "sdpa"

    def why_not(self, call: AttentionCall) -> str | None:
        """See `AttentionBackend.why_not`."""
        return "it has no weights on values or keys" if call.weighted else None

    def preferred(self, call: AttentionCall) -> bool:
        """See `AttentionBackend.preferred`: a single query on a CPU is faster with the plain products, but for few of
        them, where one operation instead of eight is what counts.
        """
        query, key, slots = call.query, call.key, call.context.slots
        rows, heads, new, head_dim = query.shape
        if new > 1 or not query.is_cpu:
            return True
        few = rows * heads <= FEW_QUERIES and rows * key.shape[1] * slots * head_dim <= FEW_NUMBERS
        return few and query.dtype is torch.float32

    def attend(self, call: AttentionCall) -> Tensor:
        """See `AttentionBackend.attend`."""
        key, value = call.keys_and_values()
        new = call.query.shape[2]
        grouped = call.query.shape[1] > key.shape[1]
        if call.context.mask is None and new == call.context.slots:
            return F.scaled_dot_product_attention(call.query, key, value, is_causal=new > 1, enable_gqa=grouped)
        visible = call.visible()
        out = F.scaled_dot_product_attention(call.query, key, value, attn_mask=visible, enable_gqa=grouped)
        return call.zero_blind(out, visible)
