"""Numbers that follow from a trace: what the figures show, as tensors for your own figures."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from softcfg.decoding.perturbed import step_weights
from softcfg.guidance import settings_of
from softcfg.inspection.trace import Trace
from softcfg.models.geometry import Geometry
from softcfg.nn.precision import as_float64


def normalised_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """H(p) / log V of p = softmax(logits / temperature): [..., V] -> [...] in [0, 1]."""
    probabilities = (as_float64(logits) / temperature).softmax(dim=-1)
    return (torch.special.entr(probabilities).sum(dim=-1) / math.log(logits.shape[-1])).float()


def branch_distance(trace: Trace) -> Tensor:
    """Total variation distance [B, T] between the conditional and the unconditional distribution, in [0, 1].

    The share of the probability that guidance has to move; 0 where the branches agree and guidance does nothing.
    """
    cond = (as_float64(trace.cond_logits) / trace.temperature).softmax(dim=-1)
    uncond = (as_float64(trace.uncond_logits) / trace.temperature).softmax(dim=-1)
    return ((cond - uncond).abs().sum(dim=-1) / 2).float()


def entropy_gap(trace: Trace) -> Tensor:
    """Normalised entropy of the unconditional minus that of the conditional branch, [B, T] (the paper's Fig. 3)."""
    cond = normalised_entropy(trace.cond_logits, trace.temperature)
    return normalised_entropy(trace.uncond_logits, trace.temperature) - cond


def perturbation_budget(trace: Trace, *, step_norm: bool | None = None) -> Tensor:
    """Sum over the tokens so far of (1 - w), [B, T]: how much perturbation each step carries (the paper's Fig. 7).

    Args:
        step_norm: as traced if None; else what the same confidences give with or without Step Normalisation. Ignored
            by perturbations without that setting.
    """
    perturbation = trace.guidance.weak_branch
    if step_norm is not None and has_step_norm(trace):
        perturbation = replace(perturbation, step_norm=step_norm)  # type: ignore[call-arg]
    steps = torch.arange(trace.confidence.shape[1])
    parts = [(1 - step_weights(trace.confidence, perturbation, some)).sum(dim=-1) for some in steps.split(256)]
    return torch.cat(parts, dim=1)


def has_step_norm(trace: Trace) -> bool:
    """Whether the perturbation has Step Normalisation as a setting."""
    return "step_norm" in settings_of(type(trace.guidance.weak_branch))


def on_grid(per_token: Tensor, geometry: Geometry | None = None) -> Tensor:
    """Arrange values per token [..., T] as the image's grid [..., rows, columns]; tokens without a place are left out.

    Args:
        geometry: where the tokens stand; by default the largest square of the last of them.
    """
    return (geometry or Geometry.square(per_token.shape[-1])).on_grid(per_token)
