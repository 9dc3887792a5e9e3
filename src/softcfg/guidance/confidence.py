"""Confidences: how sure the conditional branch is of a token, in [0, 1], from its distribution p_c [..., V].

torch is imported where it is needed, here and in the modules beside: the command line reads names and settings
without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from softcfg.guidance.registry import Registry
from softcfg.guidance.settings import Setting

if TYPE_CHECKING:
    from torch import Tensor

Confidence = Callable[["Tensor", "Tensor"], "Tensor"]
CONFIDENCES: Registry[Confidence] = Registry("confidence")
register_confidence = CONFIDENCES.register
TEMPERATURE = Setting("temperature", float, 1.0, low=0, above=True)


@register_confidence("max", label="p_max", description="largest probability")
def max_probability(probabilities: Tensor, tokens: Tensor) -> Tensor:
    """p_max, the probability of the most likely code (the paper's confidence, arXiv 2510.00996)."""
    return probabilities.amax(dim=-1)


@register_confidence("sampled", label="p of the drawn code", description="probability of the drawn code")
def sampled_probability(probabilities: Tensor, tokens: Tensor) -> Tensor:
    """p(x), the probability of the token that was drawn (the released AliTok code)."""
    return probabilities.gather(-1, tokens[..., None]).squeeze(-1)


@register_confidence("entropy", label="1 - H / log V", description="one minus the normalised entropy")
def negentropy(probabilities: Tensor, tokens: Tensor) -> Tensor:
    """1 - H(p) / log V: 0 for the uniform distribution, 1 for a certain token."""
    import torch

    codes = probabilities.shape[-1]
    if codes == 1:
        return torch.ones_like(probabilities[..., 0])
    entropy = torch.special.entr(probabilities).sum(dim=-1)
    return (1 - entropy / math.log(codes)).clamp(0, 1)


@register_confidence("margin", label="margin", description="lead of the largest probability over the second")
def margin(probabilities: Tensor, tokens: Tensor) -> Tensor:
    """p_(1) - p_(2), the lead of the most likely code over the second."""
    import torch

    if probabilities.shape[-1] == 1:
        return torch.ones_like(probabilities[..., 0])
    first, second = probabilities.topk(2, dim=-1).values.unbind(-1)
    return first - second


@register_confidence("unsure", label="1 - p_max", description="one minus the largest probability: least sure first")
def unsureness(probabilities: Tensor, tokens: Tensor) -> Tensor:
    """1 - p_max, for perturbing the tokens of which the model is least sure (as A-CFG does, arXiv 2505.20199)."""
    return 1 - max_probability(probabilities, tokens)


@register_confidence("uniform", label="constant", description="one half for every token, to ablate the confidence")
def uniform(probabilities: Tensor, tokens: Tensor) -> Tensor:
    """One half, whatever the distribution; with Step Normalisation all tokens get the same weight."""
    return probabilities.new_full(probabilities.shape[:-1], 0.5)


@register_confidence("random", label="random", description="a random number for each code, to ablate the confidence")
def random_number(probabilities: Tensor, tokens: Tensor) -> Tensor:
    """A number from (0, 1] that is fixed for each code and has nothing to do with the distribution.

    A function of the code alone draws the same image in any batch, and again at every replay.
    """
    return (scrambled(tokens) + 1).to(probabilities.dtype) / SCRAMBLED


SCRAMBLED = 1 << 24  # float32 represents all smaller integers exactly


def scrambled(numbers: Tensor, salt: int = 0) -> Tensor:
    """Integers that look random, int64 in 0 .. `SCRAMBLED` - 1: a fixed function of `numbers`, int64 >= 0."""
    mixed = (numbers + 1 + 7919 * salt) * 2654435761 & 0xFFFFFFFF
    for _ in range(2):
        mixed = ((mixed >> 16) ^ mixed) * 73244475 & 0xFFFFFFFF
    return ((mixed >> 16) ^ mixed) & (SCRAMBLED - 1)


def token_confidence(cond_logits: Tensor, tokens: Tensor, kind: str = "max", temperature: float = 1.0) -> Tensor:
    """Confidence in `tokens` under p_c = softmax(cond_logits / temperature), before any top-k or top-p.

    Args:
        cond_logits: conditional logits [..., V]; neither they nor the tokens are checked.
        tokens: int64 [...], the tokens that were drawn.
        kind: a name from `CONFIDENCES`.
        temperature: > 0.

    Returns:
        float32 (float64 for float64 logits) [...], in [0, 1].

    Raises:
        ValueError: the kind is unknown, or the temperature is not above 0.
    """
    import torch

    confidence = CONFIDENCES.require(kind, "kind")
    TEMPERATURE.check(temperature)
    accumulate = torch.promote_types(cond_logits.dtype, torch.float32)
    logits = cond_logits.to(accumulate)
    probabilities = torch.softmax(logits if temperature == 1 else logits / temperature, dim=-1)
    return confidence(probabilities, tokens)
