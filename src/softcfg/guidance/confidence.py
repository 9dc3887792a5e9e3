"""How sure the conditional branch is of a token: numbers in [0, 1] from its distribution p_c [..., V]."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def max_probability(probabilities: Tensor, tokens: Tensor) -> Tensor:
    """p_max, the probability of the most likely code (the paper's confidence, arXiv 2510.00996)."""
    return probabilities.amax(dim=-1)


def sampled_probability(probabilities: Tensor, tokens: Tensor) -> Tensor:
    """p(x), the probability of the token that was drawn (the released AliTok code)."""
    return probabilities.gather(-1, tokens[..., None]).squeeze(-1)


def negentropy(probabilities: Tensor, tokens: Tensor) -> Tensor:
    """1 - H(p) / log V: 0 for the uniform distribution, 1 for a certain token."""
    codes = probabilities.shape[-1]
    if codes == 1:
        return torch.ones_like(probabilities[..., 0])
    entropy = torch.special.entr(probabilities).sum(dim=-1)
    return (1 - entropy / math.log(codes)).clamp(0, 1)


def margin(probabilities: Tensor, tokens: Tensor) -> Tensor:
    """p_(1) - p_(2), the lead of the most likely code over the second."""
    if probabilities.shape[-1] == 1:
        return torch.ones_like(probabilities[..., 0])
    first, second = probabilities.topk(2, dim=-1).values.unbind(-1)
    return first - second


CONFIDENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "max": max_probability,
    "sampled": sampled_probability,
    "entropy": negentropy,
    "margin": margin,
}


def token_confidence(cond_logits: Tensor, tokens: Tensor, kind: str = "max", temperature: float = 1.0) -> Tensor:
    """Confidence in `tokens` under p_c = softmax(cond_logits / temperature), before any top-k or top-p.

    Args:
        cond_logits: conditional logits [..., V].
        tokens: int64 [...], the tokens that were drawn.
        kind: a name from `CONFIDENCES`.

    Returns:
        float32 (float64 for float64 logits) [...], in [0, 1].
    """
    accumulate = torch.promote_types(cond_logits.dtype, torch.float32)
    probabilities = torch.softmax(cond_logits.to(accumulate) / temperature, dim=-1)
    return CONFIDENCES[kind](probabilities, tokens)
