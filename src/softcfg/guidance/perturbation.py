"""Perturbations: what the unconditional branch sees of the tokens generated so far. This module has the base class and
SoftCFG; the others are in `softcfg.guidance.weakened`.

The one state is the confidence buffer [..., T]: entry i is the confidence in generated token i, 0 where none
was generated yet. A zero confidence is a weight of one, so the same formula with the same shapes serves every
step, and the weights of a step depend on the confidences alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from softcfg.guidance.confidence import CONFIDENCES, token_confidence
from softcfg.guidance.registry import Registry
from softcfg.guidance.settings import check, setting

if TYPE_CHECKING:
    from torch import Tensor

TARGETS = ("value", "key", "both")
ALIGNMENTS = ("own", "successor")
SMALLEST = 2.0**-126  # normal float32: what an empty sum of confidences is divided by


@dataclass(frozen=True)
class Perturbation:
    """Weights on what the unconditional rows have cached of the tokens so far, or other tokens in their place.

    Derive from it, override `weights` (or `weights_at`, or `source`) and register the class.

    Raises:
        ValueError: a setting is out of its range; the message names it.
    """

    def __post_init__(self) -> None:
        check(self)

    @property
    def acts(self) -> bool:
        """Whether it perturbs anything with these settings."""
        return True

    @property
    def target(self) -> str:
        """What the weights scale: "value", "key", "both", or "attention", which is then renormalised, so that 0 hides a
        token; "none" for a perturbation without weights."""
        return "value"

    @property
    def confidence(self) -> str:
        """The confidence that `token_confidence` takes, a name from `CONFIDENCES`."""
        return "max"

    def token_confidence(self, cond_logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
        """Confidence [...] in the drawn `tokens` [...] from the conditional logits [..., V]."""
        return token_confidence(cond_logits, tokens, self.confidence, temperature)

    def weights(self, confidence: Tensor) -> Tensor:
        """Weights [..., T] of the generated tokens' slots for the confidences [..., T] so far (0: not generated).

        What draws and traces gives every generated image code a confidence above 0, if only by 2^-126.

        A step sees the slots generated before it, so the weights of the others, where the confidence is 0, do not
        matter for `target` "value" and must be 1 for "key" and "both".
        """
        raise NotImplementedError

    def weights_at(self, confidence: Tensor, step: Tensor) -> Tensor:
        """Weights as of `weights`, for a perturbation that needs the number of the step; by default `weights`.

        Args:
            confidence: [..., T], 0 for tokens that are not drawn yet or are not image codes.
            step: int64 [..., 1] or of a shape that broadcasts to it, 0-based: as many tokens are drawn.
        """
        return self.weights(confidence)

    def source(self, index: Tensor) -> Tensor:
        """Which token the unconditional branch reads in the place of token `index`, int64 [...]; by default the same.

        It must not come after it. Tokens that are not image codes stay as they are and replace no other.
        """
        return index

    def carried(self, confidence: Tensor) -> Tensor:
        """The confidences [..., T] of a whole sequence, 0 where no slot carries them."""
        return confidence


@dataclass(frozen=True)
class NoPerturbation(Perturbation):
    """The unconditional branch sees every token as it is."""

    @property
    def acts(self) -> bool:
        """See `Perturbation.acts`."""
        return False

    def weights(self, confidence: Tensor) -> Tensor:
        """Ones."""
        return confidence.new_ones(confidence.shape)


@dataclass(frozen=True)
class ConfidenceWeights(Perturbation):
    """The weights of SoftCFG (arXiv 2510.00996); the attributes are those of `SoftCFG`."""

    confidence: str = setting("max", choices=CONFIDENCES, help="how sure the conditional branch is of a token")
    step_norm: bool = setting(True, help="Step Normalisation: spend a fixed budget at every step", released="step_norm")
    strength: float = setting(
        1.0,
        low=0,
        help="exponent of the weights; 0: plain CFG",
        flag="--softcfg-strength",
        metavar="P",
        released="softcfg_strength",
        shown=(0.0, 5.0),
    )
    floor: float = setting(0.0, low=0, high=1, help="least weight, in [0, 1]", flag="--softcfg-floor", metavar="W")
    eps: float = setting(0.0, low=0, help="added to the sum of confidences", flag="--softcfg-eps", metavar="E")
    target: str = setting("value", choices=TARGETS, help="what the weights scale")
    alignment: str = setting("own", choices=ALIGNMENTS, help="whose confidence the slot of a token carries")

    @property
    def acts(self) -> bool:
        """Whether any weight differs from one."""
        return self.strength > 0

    def weights(self, confidence: Tensor) -> Tensor:
        """See `Perturbation.weights`; as `perturbation_weights`."""
        import torch.nn.functional as F

        if self.alignment == "successor":
            confidence = F.pad(confidence[..., 1:], (0, 1))
        if self.step_norm:
            total = confidence.sum(dim=-1, keepdim=True)
            total = total + self.eps if self.eps else total
            confidence = confidence / total.clamp_min(SMALLEST)  # without confidences, all shares are 0
        # A share may round to just above one.
        if self.strength == 1:
            return (1 - confidence).clamp_min(self.floor)
        weights = (1 - confidence).clamp_min(0).pow(self.strength)
        return weights.clamp_min(self.floor) if self.floor else weights

    def carried(self, confidence: Tensor) -> Tensor:
        """See `Perturbation.carried`; with "successor" alignment no slot carries the first token's."""
        if self.alignment == "successor":
            confidence = confidence.clone()
            confidence[..., 0] = 0
        return confidence


PERTURBATIONS: Registry[type[Perturbation]] = Registry("perturbation")
PERTURBATIONS.register("none", label="CFG", description="nothing is perturbed")(NoPerturbation)
PERTURBATIONS.register("softcfg", label="SoftCFG", description="values weighted by the confidence in their tokens")(
    ConfidenceWeights
)


def perturbation_weights(
    confidence: Tensor,
    *,
    step_norm: bool = True,
    strength: float = 1.0,
    floor: float = 0.0,
    eps: float = 0.0,
    alignment: str = "own",
) -> Tensor:
    """Weight of every generated token's slot (SoftCFG, arXiv 2510.00996).

        w_i = 1 - c_i                          without Step Normalisation
        w_i = 1 - c_i / (eps + sum_j c_j)      with it: the sum of (1 - w_i) is 1 at every step
        result = max(floor, w_i ^ strength)

    Args:
        confidence: [..., T] in [0, 1], zero for tokens not generated yet; its numbers are not checked.
        step_norm: spend a fixed budget over all tokens so far.
        strength: 0 leaves every weight at 1.
        floor: least weight.
        eps: added to the sum of confidences.
        alignment: "own": the slot of token i carries its own confidence (the paper). "successor": it carries
            that of token i + 1, so the newest token and the first confidence have no effect (the released code).

    Returns:
        Weights [..., T] in [floor, 1], in the dtype of `confidence`.

    Raises:
        ValueError: a setting is out of its range; the message names it.
    """
    made = ConfidenceWeights(step_norm=step_norm, strength=strength, floor=floor, eps=eps, alignment=alignment)
    return made.weights(confidence)
