"""Causal attention whose cached values or keys carry weights.

SoftCFG scales the cached value of slot i by a weight w_i. Because

    sum_i a_i (w_i v_i) = sum_i (a_i w_i) v_i,

the weights multiply the attention probabilities after the softmax, and the cache is left as it is. A weight
on keys multiplies the scores before the softmax, q . (w_i k_i) = w_i (q . k_i). A weight on attention itself
multiplies the probabilities before they are normalised, w_i a_i / sum_j (w_j a_j), and hides a slot where it is 0.

How it is computed is the business of the backends (`softcfg.nn.backends`).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from softcfg.nn.backends import AttentionCall, attention
from softcfg.nn.context import AttentionContext, actual, require_tables
from softcfg.nn.fused import products, rotate_and_cache
from softcfg.nn.linear import Linear
from softcfg.nn.position import Position


def weighted_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    value_weights: Tensor | None = None,
    key_weights: Tensor | None = None,
    attention_weights: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Causal scaled dot-product attention; the n queries are the last n of the S slots, unless the mask says more.

    Args:
        query: [rows, heads, n, head_dim].
        key, value: [rows, key_heads, S, head_dim], S >= n. Each of the key heads serves heads / key_heads
            neighbouring query heads (grouped-query attention).
        value_weights, key_weights: factors on the values or keys of each slot, [rows, S], or [rows, n, S] where
            each query has its own. The attention row is not renormalised (SoftCFG, arXiv 2510.00996).
        attention_weights: factors >= 0 on the attention probabilities, which are renormalised; shaped likewise.
        mask: bool [rows, S], False for slots that no query may see (the padding of left-padded rows); or
            [rows, n, S], True for the slots that each query sees, causality included.

    Returns:
        [rows, heads, n, head_dim] in the dtype of `value`. The softmax is in float32 (or float64).

    Raises:
        ValueError: keys and values differ in rows, heads or slots, from each other or from the queries; or weights or
            the mask do not fit. PyTorch's fused attention and kernels would not notice.
    """
    if key.shape[:3] != value.shape[:3]:
        shapes = f"{list(key.shape)} and {list(value.shape)}"
        raise ValueError(f"keys and values must have the same rows, heads and slots, got {shapes}")
    (rows, heads, new, _), slots = query.shape, key.shape[2]
    if len(key) != rows or heads % key.shape[1] or new > slots:
        raise ValueError(f"queries {list(query.shape)} do not fit keys {list(key.shape)}")
    require_tables(
        rows, new, slots, value_weights=value_weights, key_weights=key_weights, attention_weights=attention_weights,
        mask=mask,
    )  # fmt: skip
    position = Position.shared(slots - new)
    context = AttentionContext(
        position,
        slots,
        value_weights=value_weights,
        key_weights=key_weights,
        attention_weights=attention_weights,
        given_mask=mask,
    )
    return attention(AttentionCall(query, key, value, context))


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """[rows, n, 3 * width], queries, keys and values as (heads, head_dim) -> three of [rows, heads, n, head_dim]."""
    rows, new, width = qkv.shape
    query, key, value = qkv.view(rows, new, 3 * heads, width // (3 * heads)).transpose(1, 2).chunk(3, dim=1)
    return query, key, value


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: int,
    context: AttentionContext,
    q_norm: nn.Module | None = None,
    k_norm: nn.Module | None = None,
) -> Tensor:
    """Attention of a layer for the new slots, with the rotary embedding, cache, weights and mask of the context.

    Args:
        query: [rows, heads, n, head_dim].
        key, value: [rows, key_heads, n, head_dim]; they are written into the cache.
        q_norm, k_norm: of queries and keys, before their rotation; None for none.

    Returns:
        [rows, n, heads * head_dim].
    """
    context = actual(context).on(query.device)
    query, key = rotate_and_cache(query, key, value, layer, context, q_norm, k_norm)
    return attention(AttentionCall(query, key, value, context, layer)).transpose(1, 2).flatten(2)


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

    def forward(self, x: Tensor, layer: int, context: AttentionContext, *, norm: nn.Module | None = None) -> Tensor:
        """Of norm(x) [rows, n, hidden_size] -> the same shape; writes the new keys and values into the cache."""
        query, key, value = split_heads(products(x, self.qkv, norm=norm)[0], self.heads)
        return products(attend(query, key, value, layer, context, self.q_norm, self.k_norm), self.proj)[0]


class FullAttention(nn.Module):
    """Multi-head self-attention of all positions to all, its projections under the names of released weights."""

    def __init__(self, width: int, heads: int, names: tuple[str, str] = ("qkv", "proj")) -> None:
        super().__init__()
        self.heads, self._names = heads, names
        self.add_module(names[0], nn.Linear(width, 3 * width))
        self.add_module(names[1], nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        """[B, n, width] -> the same shape."""
        qkv, proj = (getattr(self, name) for name in self._names)
        attended = F.scaled_dot_product_attention(*split_heads(qkv(x), self.heads))
        return proj(attended.transpose(1, 2).flatten(2))
