"""Attention without weights by PyTorch's fused kernels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from softcfg.nn.backends.registry import AttentionBackend, AttentionCall, register_backend


@register_backend
class SDPA(AttentionBackend):
    """`torch.nn.functional.scaled_dot_product_attention`."""

    name = "sdpa"

    def why_not(self, call: AttentionCall) -> str | None:
        """See `AttentionBackend.why_not`."""
        return "it has no weights on values or keys" if call.weighted else None

    def preferred(self, call: AttentionCall) -> bool:
        """See `AttentionBackend.preferred`: but for small ones, steps on a CPU are faster with the plain products."""
        return call.query.shape[2] > 1 or not call.query.is_cpu or call.step_size <= 1

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
