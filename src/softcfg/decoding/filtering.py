"""From logits to a drawn token: temperature, top-k, top-p, inverse CDF."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from softcfg.guidance.settings import check, setting

if TYPE_CHECKING:
    from torch import Tensor

from softcfg.errors import UserError, quote, user_errors


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn from guided logits.

    Attributes:
        temperature: > 0, divides the logits.
        top_k: keep the k most likely codes (ties with the k-th stay); 0 keeps all.
        top_p: in (0, 1], keep the smallest set of most likely codes whose probability reaches p; 1 keeps all.
            Applied after top-k.
        entropy_gain, entropy_decay, entropy_base: the temperature follows the entropy H of each step's distribution, in
            nats: it is multiplied by gain * exp(-H / decay) + base (arXiv 2510.09012, there T_0, alpha and theta, with
            2.5, 3 and 0.6 for LlamaGen). So sure steps become livelier and unsure ones calmer. H is of the logits
            after top-k and before the temperature, as in the paper's code; a gain of 0 leaves the temperature alone.
        entropy_top_p: in (0, 1], p for steps without entropy; from there to `top_p` it grows in proportion to the
            entropy, divided by that of equally likely codes (after ENkG, arXiv 2601.19488: few candidates where the
            model is sure, many where it is not; the straight line is this library's choice). 1: `top_p` at every step.
        min_candidates: least number of codes that top-p keeps (the guard of ENkG).

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
        1.0,
        low=0,
        above=True,
        high=1,
        off=1,
        help="keep codes up to this total probability; 1: all",
        metavar="P",
        of_model=True,
    )
    entropy_gain: float = setting(
        0.0,
        low=0,
        off=0,
        help="temperature by entropy H: times GAIN exp(-H / DECAY) + BASE; 0: off",
        metavar="GAIN",
        of_model=True,
    )
    entropy_decay: float = setting(
        3.0, low=0, above=True, help="see --entropy-gain, in nats", metavar="DECAY", of_model=True
    )
    entropy_base: float = setting(0.6, low=0, above=True, help="see --entropy-gain", metavar="BASE", of_model=True)
    entropy_top_p: float = setting(
        1.0,
        low=0,
        above=True,
        high=1,
        off=1,
        help="P of --top-p at no entropy, more with more; 1: off",
        metavar="P",
        of_model=True,
    )
    min_candidates: int = setting(1, low=1, off=1, help="codes that --top-p keeps at least", metavar="K", of_model=True)

    def __post_init__(self) -> None:
        check(self)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Distribution [..., V] that tokens are drawn from, float32, zero for codes that were filtered out."""
        given = logits
        logits = given.float()
        if self.temperature != 1:
            logits = logits / float(self.temperature)
        if 0 < self.top_k < logits.shape[-1]:
            kth = logits.topk(self.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < kth, float("-inf"))
        if self.entropy_gain:
            entropy = _entropy((logits * self.temperature).softmax(dim=-1))
            logits = logits / (self.entropy_gain * (-entropy / self.entropy_decay).exp() + self.entropy_base)
        probabilities = logits.softmax(dim=-1)
        if self.entropy_top_p < 1:
            most = (given > float("-inf")).sum(dim=-1, keepdim=True).clamp_min(2).log()
            share = (_entropy(probabilities) / most).clamp(0, 1)
            probabilities = self._nucleus(probabilities, self.entropy_top_p + (self.top_p - self.entropy_top_p) * share)
        elif self.top_p < 1:
            probabilities = self._nucleus(probabilities, self.top_p)
        return probabilities

    def _nucleus(self, probabilities: Tensor, total: Tensor | float) -> Tensor:
        """The probabilities [..., V] of the likeliest codes up to `total`, a number or [..., 1]."""
        import torch

        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        # A code goes when those before it already exceed p, so the one that crosses p stays.
        beyond = ordered.cumsum(dim=-1) - ordered > total
        beyond[..., : self.min_candidates].fill_(False)
        ordered = ordered.masked_fill(beyond, 0)
        probabilities = torch.zeros_like(ordered).scatter(-1, order, ordered)
        return probabilities / probabilities.sum(dim=-1, keepdim=True)

    def describe(self) -> dict[str, Any]:
        """The settings by name, for files: temperature, top-k, top-p, and what else is not the default."""
        fields = dataclasses.fields(self)
        return {
            field.name: getattr(self, field.name)
            for field in fields
            if field.name in ("temperature", "top_k", "top_p") or getattr(self, field.name) != field.default
        }


def _entropy(probabilities: Tensor) -> Tensor:
    """The entropy of distributions [..., V] in nats, [..., 1]."""
    import torch

    return torch.special.entr(probabilities).sum(dim=-1, keepdim=True)


def one_sampling(
    sampling: Sampling | None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    default: Callable[..., Sampling] = Sampling,
) -> Sampling:
    """The settings of a call that takes them as one object or one by one.

    Args:
        temperature, top_k, top_p: what was given one by one; None where nothing was.
        default: fills in what was not given.

    Raises:
        UserError: both forms are given, something else than `Sampling`, or a setting that is out of its range.
    """
    if sampling is not None and not isinstance(sampling, Sampling):
        raise UserError(f"sampling must be Sampling(...), got {quote(sampling)}")
    loose = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    given = {name: value for name, value in loose.items() if value is not None}
    if sampling is None:
        with user_errors():
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
        # A number below 1 is at most 1 - 2^-53, so u * total rounds to less than the total: to a possible code.
        threshold = uniform.double()[..., None] * cdf[..., -1:]
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
