"""What transformers calls for attention and for masks under the name "softcfg": `sdpa`, with weights on slots."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from softcfg.errors import UserError, quote
from softcfg.nn.attention import weighted_attention

ATTENTION = "softcfg"  # the name of `attention` for `attn_implementation`
BOTH_WAYS = "use_bidirectional_attention"  # a setting of models: `TransformersGenerator` knows which it may draw with
NOTED_SLOTS = "softcfg_filled_slots"  # an attribute of a mask

# Whether each call of `attention` in this pass brought weights: a layer that loses them would draw plain CFG.
brought_weights: ContextVar[list[bool] | None] = ContextVar("brought_weights", default=None)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    value_weights: Tensor | None = None,
    key_weights: Tensor | None = None,
    attention_weights: Tensor | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls an attention function: `sdpa`, with weights where the forward call gives some.

    Args:
        query: [rows, heads, n, head_dim]. key, value: [rows, key_heads, S, head_dim].
        attention_mask: bool [rows or 1, 1, n, S], as `sdpa` takes it; None: causal.
        value_weights, key_weights: factors on the cached values or keys of the slots filled so far, [rows, filled] or
            [rows, n, filled]. S is smaller where a layer keeps a window, and larger in a static cache.
        attention_weights: factors on the attention to these slots, which is renormalised; shaped likewise. A query that
            they leave nothing to see, as a window without the prompt may, sees its own slot.

    Returns:
        [rows, n, heads, head_dim], and None for the attention probabilities.

    Raises:
        UserError: the layer has sinks; or it is not causal in a pass that draws, or with weights; or weights are given
            and it has anything else but queries, keys, values and a boolean mask, or they are not of the slots filled
            so far.
    """
    weighted = any(weights is not None for weights in (value_weights, key_weights, attention_weights))
    new, causal = query.shape[2], getattr(module, "is_causal", True)
    if kwargs.get("is_causal") is not None and attention_mask is None and new > 1:  # of one query it says nothing
        causal = kwargs["is_causal"]
    if (calls := brought_weights.get()) is not None:
        calls.append(weighted)
        if not causal and not getattr(getattr(module, "config", None), BOTH_WAYS, False):
            raise UserError(f"{type(module).__name__} is not causal: nothing can be drawn with it step by step")
    with_weights = ("s_aux", "softcap", "position_bias", "dropout", "cache")
    for name in with_weights if weighted else ("s_aux",):  # sdpa drops sinks
        if isinstance(kwargs.get(name), Tensor) or kwargs.get(name):
            raise UserError(f"{type(module).__name__} has {name}, which the attention {ATTENTION!r} cannot do")
    if not weighted:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    mask = None
    if attention_mask is not None:
        if attention_mask.dtype != torch.bool or attention_mask.shape[1] != 1:
            raise UserError("attention with weights needs a boolean mask that all heads share")
        mask = attention_mask[:, 0]
    elif new > 1:  # sdpa's causal rule: the first pass, the rest of a static cache is empty
        if not causal:
            raise UserError(f"{type(module).__name__} is not causal: its attention cannot have weights")
        key, value = key[:, :, :new], value[:, :, :new]
    given = {"value_weights": value_weights, "key_weights": key_weights, "attention_weights": attention_weights}
    if calls is None:  # not in a pass of `TransformersGenerator`, which cuts the weights to the slots itself
        for name, weights in given.items():
            if weights is not None:
                _check_weights(name, weights, query, key, attention_mask)
    if scaling is not None:
        query = query * (scaling * query.shape[-1] ** 0.5)
    fitted = {name: _fitted(weights, key) for name, weights in given.items()}
    if (weights := fitted["attention_weights"]) is not None:
        fitted["attention_weights"] = _with_own_slot(weights, mask, new)
    out = weighted_attention(query, key, value, mask=mask, **fitted)
    return out.transpose(1, 2).contiguous(), None


def _check_weights(name: str, weights: Tensor, query: Tensor, key: Tensor, mask: Tensor | None) -> None:
    """Raise a `UserError` unless there is a weight for every slot filled so far; see `attention`."""
    if not isinstance(weights, Tensor):
        raise UserError(f"{name} must be a tensor, got {quote(weights)}")
    rows, new, length = query.shape[0], query.shape[2], weights.shape[-1] if weights.dim() else 0
    filled = _filled(key, mask, length)
    if weights.shape not in ((rows, filled), (rows, new, filled)):
        raise UserError(
            f"{name} must have a factor for each of the {filled} slots filled so far, the new ones included: shape "
            f"[{rows}, {filled}] or [{rows}, {new}, {filled}], got {list(weights.shape)}"
        )


def _filled(key: Tensor, mask: Tensor | None, length: int) -> int:
    """The number of slots filled so far, the new ones included; `length` where a window hides it.

    The mask of `sdpa_mask_noting_slots` says it. One that was made elsewhere shows the last slot that is seen; a layer
    that sees all its S slots has S, or is a window on the last S of more.
    """
    slots = key.shape[2]
    if mask is None:
        return slots
    noted = getattr(mask, NOTED_SLOTS, None)
    if noted is not None:
        filled = int(noted)  # which a static cache counts on the device: wait for it once, for all layers
        setattr(mask, NOTED_SLOTS, filled)
        return filled
    seen = mask[:, 0, -1].any(dim=0).nonzero()
    last = int(seen[-1]) + 1 if len(seen) else slots
    return max(slots, length) if last == slots else last


def _fitted(weights: Tensor | None, key: Tensor) -> Tensor | None:
    """The weights of the slots [..., filled] for the S slots of `key`: the last S, or ones for those still empty."""
    if weights is None:
        return None
    slots, filled = key.shape[2], weights.shape[-1]
    weights = weights[..., -slots:] if filled > slots else F.pad(weights, (0, slots - filled), value=1.0)
    return weights.to(key.device)


def _with_own_slot(weights: Tensor, mask: Tensor | None, new: int) -> Tensor:
    """Attention weights [rows, S] or [rows, new, S], with 1 on the last slot that a query sees if all these have 0."""
    slots = weights.shape[-1]
    if mask is None:
        mask = torch.ones(1, new, slots, dtype=torch.bool, device=weights.device).tril(slots - new)
    of_queries = weights.view(len(weights), -1, slots)
    slot = torch.arange(slots, device=weights.device)
    own = slot == slot.where(mask, -1).amax(dim=-1, keepdim=True)
    sees_none = ~(mask & (of_queries != 0)).any(dim=-1, keepdim=True)
    filled = of_queries.masked_fill(own & sees_none, 1)
    return filled[:, 0] if new == 1 else filled


def sdpa_mask_noting_slots(batch_size: int, q_length: int, kv_length: int, q_offset: Any = 0, **kwargs: Any) -> Any:
    """What transformers calls a mask function: `sdpa_mask`, which keeps how many slots are filled with the mask.

    Keys do not tell: a static cache has more slots, and a window fewer.
    """
    mask = sdpa_mask(batch_size, q_length, kv_length, q_offset, **kwargs)
    if mask is not None and not torch.compiler.is_compiling():
        setattr(mask, NOTED_SLOTS, q_offset + q_length)
    return mask


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask_noting_slots)
