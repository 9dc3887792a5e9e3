"""From logits to a drawn token: temperature, top-k, top-p, inverse CDF."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from softcfg.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn from guided logits.

    Attributes:
        temperature: > 0, divides the logits.
        top_k: keep the k most likely codes (ties with the k-th stay); 0 keeps all.
        top_p: in (0, 1], keep the smallest set of most likely codes whose probability reaches p; 1 keeps all.
            Applied after top-k.

    Raises:
        ValueError: a setting is out of its range; the message names it.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not _is_real(self.temperature) or not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be a finite number > 0, got {self.temperature!r}")
        if not isinstance(self.top_k, numbers.Integral) or isinstance(self.top_k, bool) or self.top_k < 0:
            raise ValueError(f"top_k must be an integer >= 0 (0: off), got {self.top_k!r}")
        if not _is_real(self.top_p) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1] (1: off), got {self.top_p!r}")

    def probabilities(self, logits: Tensor) -> Tensor:
        """Distribution [..., V] that tokens are drawn from, float32, zero for codes that were filtered out."""
        logits = logits.float() / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            kth = logits.topk(self.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < kth, float("-inf"))
        probabilities = logits.softmax(dim=-1)
        if self.top_p < 1:
            ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
            # A code goes when those before it already exceed p, so the one that crosses p stays.
            ordered = ordered.masked_fill(ordered.cumsum(dim=-1) - ordered > self.top_p, 0)
            probabilities = torch.zeros_like(ordered).scatter(-1, order, ordered)
            probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
        return probabilities


def one_sampling(
    sampling: Sampling | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    default: Callable[..., Sampling] = Sampling,
) -> Sampling:
    """The settings of a call that takes them as one object or one by one.

    Args:
        temperature, top_k, top_p: what was given one by one; None where nothing was.
        default: fills in what was not given.

    Raises:
        UserError: both forms are given.
    """
    loose = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    given = {name: value for name, value in loose.items() if value is not None}
    if sampling is None:
        return default(**given)
    if given:
        raise UserError(f"give sampling or {', '.join(given)}, not both")
    return sampling


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Draw one token from each distribution by inverse CDF.

    Args:
        probabilities: [..., V], not necessarily normalised.
        uniform: [...] in [0, 1).

    Returns:
        int64 [...]. A code of probability zero is never drawn.
    """
    cdf = probabilities.double().cumsum(dim=-1)
    total = cdf[..., -1:]
    # u * total may round up to the total itself, behind the last possible code.
    threshold = torch.minimum(uniform.double()[..., None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, threshold, right=True).squeeze(-1)


def _is_real(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
