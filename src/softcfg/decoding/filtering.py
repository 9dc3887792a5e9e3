"""From logits to a drawn token: temperature, top-k, top-p, inverse CDF."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from softcfg.guidance.settings import check, setting

if TYPE_CHECKING:
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

    temperature: float = setting(
        1.0,
        low=0,
        above=True,
        help="divides the logits, > 0",
        of_model=True,
        released="randomize_temperature",
        shown=(0.1, 2.0),
    )
    top_k: int = setting(0, low=0, off=0, help="keep the K most likely codes; 0: all", metavar="K", of_model=True)
    top_p: float = setting(
        1.0, low=0, above=True, high=1, off=1, help="keep codes up to this total probability; 1: all", metavar="P"
    )

    def __post_init__(self) -> None:
        check(self)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Distribution [..., V] that tokens are drawn from, float32, zero for codes that were filtered out."""
        import torch

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
        uniform: [...] in [0, 1); or int64 in units of 2^-53, for devices without float64 (see `randomness.on_device`).

    Returns:
        int64 [...]. A code of probability zero is never drawn.
    """
    import torch

    if not uniform.is_floating_point():
        cdf, threshold = _in_whole_numbers(probabilities, uniform)
    else:
        cdf = probabilities.double().cumsum(dim=-1)
        total = cdf[..., -1:]
        # u * total may round up to the total itself, behind the last possible code.
        threshold = torch.minimum(uniform.double()[..., None] * total, torch.nextafter(total, torch.zeros_like(total)))
    # Without a distribution there is no such code, and an id outside of the vocabulary ends a GPU's process.
    return torch.searchsorted(cdf, threshold, right=True).squeeze(-1).clamp_max(probabilities.shape[-1] - 1)


def _in_whole_numbers(probabilities: Tensor, units: Tensor) -> tuple[Tensor, Tensor]:
    """The cumulated probabilities and the threshold u * total, int64, to 60 binary places and without rounding of sums.

    Args:
        units: u in units of 2^-53, int64.
    """
    import torch

    probabilities = probabilities.float()
    exponent = probabilities.sum(dim=-1, keepdim=True).log2().ceil()
    cdf = (probabilities * torch.exp2((60 - exponent).clamp_max(126))).long().cumsum(dim=-1)
    # The product has up to 114 bits: (a 2^26 + b) (c 2^26 + d) / 2^53, without b d, which is less than one.
    total, units = cdf[..., -1:], units[..., None]
    (a, b), (c, d) = ((number >> 26, number & (1 << 26) - 1) for number in (units, total))
    threshold = (a * c >> 1) + (((a * c & 1) << 26) + a * d + b * c >> 27)
    return cdf, threshold
