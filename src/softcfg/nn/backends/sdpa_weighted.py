"""Weights on values by an attention that knows none: PyTorch's fused kernels on values that carry the weights.

Weights that all queries share go into the values: the sum of a_i (w_i v_i). Weights of SoftCFG differ from query to
query, w_ti = 1 - p_i / s_t for query t and slot i (arXiv 2510.00996 with strength 1 and floor 0; p the confidences, s
their sum up to t plus eps, or 1 without Step Normalisation). As the p_i are the same for all queries,

    sum_i a_ti w_ti v_i = sum_i a_ti v_i - (1 / s_t) sum_i a_ti (p_i v_i),

which is one attention on the values [v, p v], of twice the width. Its scores are never held, so its memory grows with
the length of the sequence and not with its square. In a decoding step it reads half as much again as the plain
products, which take the weights after the softmax.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from softcfg.nn.backends.registry import AttentionBackend, AttentionCall, register_backend

TOLERANCE = 1e-4  # of a weight in float32


@register_backend
class WeightedSDPA(AttentionBackend):
    """`scaled_dot_product_attention` on values that carry the weights; for small steps, and for `use_backend`."""

    name = "sdpa_weighted"

    def why_not(self, call: AttentionCall) -> str | None:
        """See `AttentionBackend.why_not`; for several queries it looks at the weights, which waits for the device."""
        context = call.context
        if context.key_weights is not None or context.attention_weights is not None:
            return "it has weights on values alone"
        if context.value_weights is None or _shared(context.value_weights) is not None:
            return None
        if call.query.requires_grad or context.value_weights.requires_grad:
            return "it has no gradient where each query has weights of its own"
        confidence, inverse = split(call)
        off = inverse[..., None] * confidence[:, None] - (1 - context.value_weights)
        if off.masked_fill(~_visible(call), 0).abs().amax() <= TOLERANCE:
            return None
        return (
            "the weights of its queries are not 1 - p / s with one p for each slot, as those of SoftCFG are with "
            "strength 1, floor 0 and the alignment 'own'"
        )

    def preferred(self, call: AttentionCall) -> bool:
        """See `AttentionBackend.preferred`."""
        return call.step_size <= 0.5

    def attend(self, call: AttentionCall) -> Tensor:
        """See `AttentionBackend.attend`."""
        key, value = call.keys_and_values()
        visible, weights, width = call.visible(), call.context.value_weights, value.shape[-1]
        shared = None if weights is None else _shared(weights)
        inverse = None
        if shared is not None:
            factors = call.context.memory.get(self.name)
            if factors is None:
                factors = call.context.memory[self.name] = shared[:, None, :, None].to(value.dtype)
            value = value * factors
        elif weights is not None:
            confidence, inverse = split(call)
            value = torch.cat((value, value * confidence[:, None, :, None].to(value.dtype)), dim=-1)
        grouped = call.query.shape[1] > key.shape[1]
        out = F.scaled_dot_product_attention(call.query, key, value, attn_mask=visible, enable_gqa=grouped)
        if inverse is not None:
            out = out[..., :width] - inverse[:, None, :, None].to(out.dtype) * out[..., width:]
        return call.zero_blind(out, visible)


def split(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """p [rows, S] and 1 / s [rows, n] of weights [rows, n, S] that are 1 - p / s; of others something else.

    Slots that a query does not see may have any weight there; p is what the last query that sees a slot makes of it.
    """
    assert call.context.value_weights is not None
    visible = _visible(call)
    less = (1 - call.context.value_weights).masked_fill(~visible, 0)
    # The last query's 1 / s is the unit: it is taken from the slots that both of two queries see.
    confidence = less[:, -1]
    seen = (confidence[:, None] * visible).sum(dim=-1)
    inverse = less.sum(dim=-1) / torch.where(seen == 0, 1, seen)
    return confidence, inverse


def _visible(call: AttentionCall) -> Tensor:
    visible = call.visible()
    slots, new = call.context.slots, call.query.shape[2]
    if visible is None:
        return torch.ones(1, 1, slots, dtype=torch.bool, device=call.query.device)
    return visible[:, 0].expand(-1, new, -1)


def _shared(weights: Tensor) -> Tensor | None:
    """Weights [rows, S] that all queries share; None if each has its own."""
    if weights.dim() == 2:
        return weights
    return weights[:, 0] if weights.shape[1] == 1 else None
