"""Causal attention whose cached values or keys carry weights.

SoftCFG scales the cached value of slot i by a weight w_i. Because

    sum_i a_i (w_i v_i) = sum_i (a_i w_i) v_i,

the weights multiply the attention probabilities after the softmax, and the cache is left as it is. A weight
on keys multiplies the scores before the softmax, q . (w_i k_i) = w_i (q . k_i).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softcfg.nn.kv_cache import KVCache
from softcfg.nn.linear import Linear
from softcfg.nn.rotary import rotate


def weighted_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    value_weights: Tensor | None = None,
    key_weights: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Causal scaled dot-product attention; the n queries are the last n of the S slots, unless the mask says more.

    Args:
        query: [rows, heads, n, head_dim].
        key, value: [rows, key_heads, S, head_dim], S >= n. Each of the key heads serves heads / key_heads
            neighbouring query heads (grouped-query attention).
        value_weights, key_weights: factors on the values or keys of each slot, [rows, S], or [rows, n, S] where
            each query has its own. The attention row is not renormalised (SoftCFG, arXiv 2510.00996).
        mask: bool [rows, S], False for slots that no query may see (the padding of left-padded rows); or
            [rows, n, S], True for the slots that each query sees, causality included.

    Returns:
        [rows, heads, n, head_dim] in the dtype of `value`. The softmax is in float32 (or float64).
    """
    rows, heads, new, _ = query.shape
    key_heads, slots = key.shape[1], key.shape[2]
    visible = None
    if mask is not None and mask.dim() == 3:
        visible = mask[:, None]
    else:
        if new > 1:
            visible = torch.ones(new, slots, dtype=torch.bool, device=query.device).tril_(slots - new)
        if mask is not None:
            visible = mask[:, None, None, :] if visible is None else visible & mask[:, None, None, :]

    # For a single query on a CPU the plain products are faster than the fused kernel.
    fused = value_weights is None and key_weights is None and (new > 1 or query.device.type != "cpu")
    if fused:
        if mask is None and new == slots:
            return F.scaled_dot_product_attention(query, key, value, is_causal=new > 1, enable_gqa=heads > key_heads)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, enable_gqa=heads > key_heads)
        return _finite(out, mask)

    # The query heads of a group stand side by side, so that their keys and values are not repeated.
    grouped = (query * query.shape[-1] ** -0.5).reshape(rows, key_heads, -1, query.shape[-1])
    scores = (grouped @ key.transpose(-1, -2)).view(rows, heads, new, slots)
    if key_weights is not None:
        scores = scores * _per_score(key_weights)
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    accumulate = torch.promote_types(scores.dtype, torch.float32)
    probabilities = scores.softmax(dim=-1, dtype=accumulate)
    if value_weights is not None:
        # In place where no gradient needs the softmax: for long sequences a copy costs more than the products.
        weigh = torch.mul if torch.is_grad_enabled() else Tensor.mul_
        probabilities = weigh(probabilities, _per_score(value_weights))
    out = probabilities.to(value.dtype).view(rows, key_heads, -1, slots) @ value
    return _finite(out.view(rows, heads, new, -1), mask)


def _per_score(weights: Tensor) -> Tensor:
    """[rows, S] or [rows, n, S] -> a shape that broadcasts against scores [rows, heads, n, S]."""
    return weights[:, None, None, :] if weights.dim() == 2 else weights[:, None]


def _finite(output: Tensor, mask: Tensor | None) -> Tensor:
    """Give zeros, not NaN, to queries that stand in the padding and see nothing."""
    return output if mask is None else output.nan_to_num(0.0)


@dataclass
class AttentionContext:
    """What every attention layer of one forward pass shares."""

    slot: int | Tensor  # where the first new position stands in the sequence, of all rows or [rows]
    cache: KVCache | None = None
    rotary: tuple[Tensor, Tensor] | None = None  # cos, sin of the new positions, [n, pairs] or [rows, n, pairs]
    value_weights: Tensor | None = None  # [rows, filled] or [rows, n, filled]
    key_weights: Tensor | None = None
    mask: Tensor | None = None  # bool [rows, filled] or [rows, n, filled]
    padding: Tensor | None = None  # int64 [rows], what the mask hides at the start of each row

    @classmethod
    def create(
        cls,
        slot: int | Tensor,
        new: int,
        cache: KVCache | None,
        rotary: tuple[Tensor, Tensor] | None = None,
        value_weights: Tensor | None = None,
        key_weights: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> AttentionContext:
        """Cut the per-slot tensors to the part of the sequence that is filled after this pass, and make the mask.

        Where rows have slots of their own, nothing is cut: attention runs over the whole cache, and the mask hides
        what lies behind each query.

        Args:
            padding: int64 [rows], leading slots of each row that no query sees.
        """
        mask: Tensor | None
        if isinstance(slot, Tensor):
            if cache is None:
                raise ValueError("a pass whose rows have slots of their own needs the cache of the slots before them")
            filled = cache.slots
            mask = _slots_up_to(slot, new, filled)
            if padding is not None:
                mask &= _behind_padding(padding, filled)[:, None]
        else:
            if slot and cache is None:
                raise ValueError(f"a pass that starts at slot {slot} needs the cache of the slots before it")
            filled = slot + new
            mask = None if padding is None else _behind_padding(padding, filled)
        return cls(
            slot=slot,
            cache=cache,
            rotary=rotary,
            value_weights=None if value_weights is None else value_weights[..., :filled],
            key_weights=None if key_weights is None else key_weights[..., :filled],
            mask=mask,
            padding=padding,
        )

    def on(self, device: torch.device) -> AttentionContext:
        """The same for layers on `device`, where the layers lie on several."""
        moved: dict[str, Any] = {
            name: value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, Tensor) and value.device != device
        }
        return replace(self, **moved) if moved else self


def pass_slots(slot: int | Tensor, new: int, padding: Tensor | None = None) -> slice | Tensor:
    """Index of the `new` slots of a pass from `slot` on, into tables by slot or position.

    Args:
        slot: of all rows, or int64 [rows].
        padding: int64 [rows]; positions are then counted from each row's first slot behind its padding (0 inside).

    Returns:
        A slice where all rows have the same, else int64 [rows, new].
    """
    if isinstance(slot, Tensor):
        start = slot[:, None] if padding is None else (slot - padding)[:, None]
    elif padding is not None:
        start = slot - padding[:, None]
    else:
        return slice(slot, slot + new)
    return (start + torch.arange(new, device=start.device)).clamp_min(0)


def _slots_up_to(slot: Tensor, new: int, slots: int) -> Tensor:
    """Bool [rows, new, slots]: which slots the queries of a pass see that starts at `slot` [rows]."""
    first = torch.arange(slots, device=slot.device) - torch.arange(new, device=slot.device)[:, None]
    return first <= slot[:, None, None]


def _behind_padding(padding: Tensor, slots: int) -> Tensor:
    """Bool [rows, slots], False for the leading slots that are padding."""
    return torch.arange(slots, device=padding.device) >= padding[:, None]


@cache
def decode_kernel() -> Callable[..., Tensor] | None:
    """The fused attention of a decoding step (`nn.kernels`), where Triton is there to compile it."""
    try:
        from softcfg.nn.kernels.decode_attention import decode_attention
    except ImportError:
        return None
    return decode_attention


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """[rows, n, 3 * width], queries, keys and values as (heads, head_dim) -> three of [rows, heads, n, head_dim]."""
    query, key, value = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return query, key, value


def attend(query: Tensor, key: Tensor, value: Tensor, layer: int, context: AttentionContext) -> Tensor:
    """Attention of a layer for the new positions, as the context has it: rotary embedding, cache, weights, mask.

    Args:
        query, key, value: [rows, heads, n, head_dim]; keys and values are written into the cache.

    Returns:
        [rows, n, heads * head_dim].
    """
    if context.rotary is not None:
        query, key = rotate(query, *context.rotary), rotate(key, *context.rotary)
    cache, slot = context.cache, context.slot
    fits = query.shape[2] == 1 and query.is_cuda and query.dtype != torch.float64
    if cache is not None and isinstance(slot, Tensor) and fits and (fused := decode_kernel()):
        cache.write(layer, key, value, slot)
        key_scales, value_scales = cache.scales(layer)
        out = fused(
            query,
            cache.keys[layer],
            cache.values[layer],
            slot,
            key_scales=key_scales,
            value_scales=value_scales,
            first=context.padding,
            value_weights=context.value_weights,
            key_weights=context.key_weights,
        )
        return out.transpose(1, 2).flatten(2)
    if cache is not None:
        key, value = cache.update(layer, key, value, slot)
    out = weighted_attention(
        query,
        key,
        value,
        value_weights=context.value_weights,
        key_weights=context.key_weights,
        mask=context.mask,
    )
    return out.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Multi-head causal self-attention with normalised queries and keys, as AliTok and RAR have it.

    `qkv` gives queries, keys and values in this order, each as (heads, head_dim); `q_norm` and `k_norm` act
    over head_dim and are shared by the heads.
    """

    def __init__(self, hidden_size: int, heads: int, q_norm: nn.Module, k_norm: nn.Module) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(hidden_size, 3 * hidden_size)
        self.q_norm = q_norm
        self.k_norm = k_norm
        self.proj = Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, layer: int, context: AttentionContext) -> Tensor:
        """[rows, n, hidden_size] -> the same shape; writes the new keys and values into the cache."""
        query, key, value = split_heads(self.qkv(x), self.heads)
        return self.proj(attend(self.q_norm(query), self.k_norm(key), value, layer, context))
