"""A perturbation in the passes of a batch: its confidences, its weights on the slots, and what its rows are fed."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from softcfg.errors import UserError
from softcfg.guidance import ConfidenceWeights, Perturbation
from softcfg.guidance.confidence import CONFIDENCES, max_probability, sampled_probability
from softcfg.guidance.perturbation import SMALLEST
from softcfg.models.base import Condition

ROUNDING = 1e-5  # by which the sum of probabilities may exceed 1


def confidence_in(perturbation: Perturbation, cond_logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """`Perturbation.token_confidence` in `tokens` [...] for conditional logits [..., V].

    Above 0 but for SoftCFG's own weights, see `above_zero`.

    Raises:
        UserError: a confidence of somebody's own gives another shape.
    """
    found = torch.as_tensor(perturbation.token_confidence(cond_logits, tokens, temperature))
    if found.shape != tokens.shape:
        raise UserError(
            f"the confidence of {type(perturbation).__name__} must be {list(tokens.shape)}, one for each token, got "
            f"{list(found.shape)}"
        )
    return found if _is_softcfg(perturbation, "weights", "weights_at") else above_zero(found)


def above_zero(confidence: Tensor) -> Tensor:
    """Confidences in tokens that were drawn, with a least number for 0, which says that nothing was drawn.

    SoftCFG's own weights are continuous and take a 0 as it is.
    """
    confidence = confidence.to(torch.promote_types(confidence.dtype, torch.float32))
    return confidence.masked_fill((confidence >= 0) & (confidence < SMALLEST), SMALLEST)


def require_confidence(perturbation: Perturbation, confidence: Tensor) -> None:
    """Raise a `UserError` for confidences outside of [0, 1], which a function of somebody's own may give."""
    outside = ~((confidence >= 0) & (confidence <= 1 + ROUNDING))
    if outside.any():
        raise UserError(
            f"the confidence of {type(perturbation).__name__} ({perturbation.confidence!r}) must lie in [0, 1], got "
            f"{float(confidence[outside][0])}"
        )


def probability_of(perturbation: Perturbation) -> str | None:
    """Whose probability its confidence is: that of the "largest" or of the "drawn" token; None for another."""
    if not _is_softcfg(perturbation, "token_confidence"):
        return None
    return {max_probability: "largest", sampled_probability: "drawn"}.get(CONFIDENCES[perturbation.confidence])


def step_weights(confidence: Tensor, perturbation: Perturbation, steps: Tensor) -> Tensor:
    """Weights [B, n, T] that the given steps (0-based) put on every token, from those before it.

    Args:
        confidence: [B, T], of all tokens.
        steps: int64 [n] or [B, n].
    """
    token = torch.arange(confidence.shape[1], device=confidence.device)
    step = steps.to(confidence.device)[..., None]
    return perturbation.weights_at(confidence[:, None] * (token < step), step)


def query_weights(
    perturbation: Perturbation, step_weights: Tensor, condition: Condition, *, from_start: bool
) -> dict[str, Tensor]:
    """Keyword arguments for a pass of the unconditional rows that predicts several tokens.

    Args:
        step_weights: [rows, n, T], of the steps that the pass predicts.
        from_start: the pass starts with the condition, whose slots, as queries and as keys, are not weighted.
    """
    leading = condition.slots - 1 if from_start else 0
    return attention_weights(perturbation, F.pad(step_weights, (condition.slots, 0, leading, 0), value=1.0))


def attention_weights(perturbation: Perturbation, weights: Tensor) -> dict[str, Tensor]:
    """Keyword arguments that hand `weights` to what the target of the perturbation names."""
    target = perturbation.target
    names = {"both": ("value", "key"), "none": ()}.get(target, (target,))
    return {f"{name}_weights": weights for name in names}


def weight_settings(perturbation: Perturbation) -> dict[str, Any] | None:
    """The settings with which `fused.write_weights` writes the weights of a perturbation; None if it has others."""
    if not _is_softcfg(perturbation, "weights", "weights_at"):
        return None
    settings = {name: getattr(perturbation, name) for name in ("step_norm", "strength", "floor", "eps")}
    return {**settings, "successor": perturbation.alignment == "successor"}


def weak_inputs(perturbation: Perturbation, tokens: Tensor, index: Tensor, codes: Tensor | None) -> Tensor:
    """What the unconditional rows are fed in the slots of the tokens `index`, int64 [B, n].

    Args:
        tokens: int64 [B, T].
        index: int64 [n] or [B, n].
        codes: bool [T] or [B, T], which tokens are image codes; None: all.
    """
    source = sources(perturbation, index, codes)
    return taken(tokens, index if source is None else source)


def sources(perturbation: Perturbation, index: Tensor, codes: Tensor | None) -> Tensor | None:
    """Which tokens are fed in the slots of the tokens `index`; None for those themselves."""
    source = perturbation.source(index)
    if source is index:
        return None
    return source if codes is None else source.where(taken(codes, index) & taken(codes, source), index)


def taken(values: Tensor, index: Tensor) -> Tensor:
    """The entries of `values` [T] or [B, T] at `index` [n] or [B, n]."""
    if index.dim() == 1:
        return values[..., index]
    return values[index] if values.dim() == 1 else values.gather(1, index)


def _is_softcfg(perturbation: Perturbation, *methods: str) -> TypeGuard[ConfidenceWeights]:
    """Whether these methods of a perturbation are those of SoftCFG: `SoftCFG` itself, and others that keep them."""
    kind = type(perturbation)
    return issubclass(kind, ConfidenceWeights) and all(
        getattr(kind, name) is getattr(ConfidenceWeights, name) for name in methods
    )
