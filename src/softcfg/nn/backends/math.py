"""Attention as plain products: it serves every call, on every device, with a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from softcfg.nn.backends.registry import AttentionBackend, AttentionCall, register_backend


@register_backend
class Math(AttentionBackend):
    """Scores, softmax and the weighted sum, one after the other; the softmax is in float32 (or float64)."""

    name = "math"

    def why_not(self, call: AttentionCall) -> str | None:
        """See `AttentionBackend.why_not`."""
        return None

    def attend(self, call: AttentionCall) -> Tensor:
        """See `AttentionBackend.attend`."""
        query, context = call.query, call.context
        key, value = call.keys_and_values()
        rows, heads, new, head_dim = query.shape
        key_heads, slots = key.shape[1], key.shape[2]
        # The query heads of a group stand side by side, so that their keys and values are not repeated.
        grouped = query.reshape(rows * key_heads, -1, head_dim)
        key = key.reshape(rows * key_heads, slots, -1)
        nothing, scale = query.new_zeros(()), head_dim**-0.5
        if new == 1 and key.is_cpu and key.dtype == torch.bfloat16:
            # oneDNN copies keys that stand on the right, which takes longer than the product.
            scores = torch.baddbmm(nothing, key, grouped.mT, beta=0, alpha=scale).mT.reshape(rows, heads, new, slots)
        else:
            scores = torch.baddbmm(nothing, grouped, key.mT, beta=0, alpha=scale).view(rows, heads, new, slots)
        factors = context.factors
        # In place where no gradient needs what is there: for long sequences a copy costs more than the products.
        multiply, add = (torch.mul, torch.add) if torch.is_grad_enabled() else (Tensor.mul_, Tensor.add_)
        if factors.key is not None:
            scores = scores * factors.key
        if factors.log_attention is not None:  # softmax(scores + log w) is w softmax(scores), renormalised
            scores = add(scores, factors.log_attention.to(scores.dtype))
        visible = call.visible()
        if visible is not None:
            scores = scores.masked_fill(~visible, float("-inf"))
            if context.mask is not None:  # blind queries would be NaN, and products in bfloat16 let it into other rows
                scores = scores.masked_fill_(~visible.any(dim=-1, keepdim=True), 0)
        accumulate = torch.promote_types(scores.dtype, torch.float32)
        probabilities = scores.softmax(dim=-1, dtype=accumulate)
        if factors.value is not None:
            probabilities = multiply(probabilities, factors.value)
        return call.zero_blind(self.weighted_sum(call, probabilities.to(value.dtype), value), visible)

    def weighted_sum(self, call: AttentionCall, probabilities: Tensor, value: Tensor) -> Tensor:
        """Probabilities [rows, heads, n, S] and values [rows, key_heads, S, width] -> [rows, heads, n, width]."""
        rows, key_heads, slots, width = value.shape
        value = value.reshape(rows * key_heads, slots, width)
        out = torch.bmm(probabilities.view(rows * key_heads, -1, slots), value)
        return out.view(rows, call.query.shape[1], -1, width)
