"""Perturbations besides SoftCFG: other ways to let the unconditional branch know less about the tokens so far.

Most of their papers are about diffusion, where a pass sees the whole image at once and is perturbed anew at every
step. Token by token, a pass sees the tokens so far, and their cached keys and values stay. The docstrings say how each
method is adapted. Only image codes are perturbed: the condition and the ends of lines are seen as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from softcfg.guidance.confidence import CONFIDENCES, SCRAMBLED, scrambled
from softcfg.guidance.perturbation import PERTURBATIONS, Perturbation
from softcfg.guidance.settings import setting

if TYPE_CHECKING:
    from torch import Tensor

AGE_TARGETS = ("attention", "value")  # what weights by age may scale


@PERTURBATIONS.register("low_confidence", label="Low confidence", description="the tokens it was unsure of are hidden")
@dataclass(frozen=True)
class LowConfidence(Perturbation):
    """The tokens with the lowest confidences are hidden (A-CFG, arXiv 2505.20199).

    A-CFG masks such tokens in the unconditional input of a masked language model, and chooses them anew at every step.
    Models that predict the next token have no mask token; here no query of the step attends to them. The newest token
    may be among them and still enters through its own query.

    Attributes:
        share: of the tokens so far that is hidden, rounded down.
        confidence: a name from `softcfg.guidance.CONFIDENCES`.
    """

    share: float = setting(0.5, low=0, high=1, help="share of the tokens so far that is hidden; 0: CFG")
    confidence: str = setting("max", choices=CONFIDENCES, help="how sure the conditional branch is of a token")

    @property
    def acts(self) -> bool:
        """See `Perturbation.acts`."""
        return self.share > 0

    @property
    def target(self) -> str:
        """See `Perturbation.target`."""
        return "attention"

    def weights(self, confidence: Tensor) -> Tensor:
        """See `Perturbation.weights`: 0 for the tokens that are hidden."""
        drawn = confidence > 0
        # 0.29 of 100 are 29, but the product of the two is a little less.
        count = (self.share * drawn.sum(dim=-1, keepdim=True) * (1 + 1e-6)).floor()
        place = confidence.where(drawn, 2.0).argsort(dim=-1, stable=True).argsort(dim=-1)
        return (place >= count).to(confidence.dtype)


@PERTURBATIONS.register("window", label="Window", description="nothing but the newest tokens is seen")
@dataclass(frozen=True)
class Window(Perturbation):
    """The unconditional branch sees only the newest tokens, like a model with a shorter memory.

    Attributes:
        size: how many tokens are seen, the newest included.
        target: "attention", which is renormalised, or "value".
    """

    size: int = setting(16, low=1, help="how many of the newest tokens are seen")
    target: str = setting("attention", choices=AGE_TARGETS, help="what the weights scale")

    def weights_at(self, confidence: Tensor, step: Tensor) -> Tensor:
        """See `Perturbation.weights_at`: 0 for tokens older than the window."""
        return 1 - ((confidence > 0) & (_age(confidence, step) > self.size)).to(confidence.dtype)


@PERTURBATIONS.register("decay", label="Decay", description="the older a token, the less of it is seen")
@dataclass(frozen=True)
class Decay(Perturbation):
    """The unconditional branch forgets: w = 2^(-(age - 1) / half_life), where the newest token is of age 1.

    Attributes:
        half_life: tokens after which a weight is halved.
        target: "attention", which is renormalised (scores fall in a line, as in ALiBi, arXiv 2108.12409), or "value".
    """

    half_life: float = setting(16.0, low=0, above=True, help="tokens after which a weight is halved")
    target: str = setting("attention", choices=AGE_TARGETS, help="what the weights scale")

    def weights_at(self, confidence: Tensor, step: Tensor) -> Tensor:
        """See `Perturbation.weights_at`."""
        age = (_age(confidence, step) - 1).to(confidence.dtype)
        return (-age / self.half_life).exp2().where(confidence > 0, 1.0)


@PERTURBATIONS.register("pag", label="PAG", description="each token attends to itself alone, and to the condition")
@dataclass(frozen=True)
class SelfAttention(Perturbation):
    """Perturbed attention guidance (PAG, arXiv 2403.17377, equation 15): the attention map becomes the identity.

    A token attends to itself and to the condition, which in these models stands in the same sequence; where images and
    text do so in diffusion, PAG leaves the text visible as well. All layers are perturbed, so the branch predicts from
    the newest token and its position.
    """

    @property
    def target(self) -> str:
        """See `Perturbation.target`."""
        return "attention"

    def weights_at(self, confidence: Tensor, step: Tensor) -> Tensor:
        """See `Perturbation.weights_at`: 0 for all but the newest token."""
        return 1 - ((confidence > 0) & (_age(confidence, step) > 1)).to(confidence.dtype)


class OtherTokens(Perturbation):
    """A perturbation that replaces some tokens by others of the image; subclasses define `source`, it has no weights.

    Which token is read where is a fixed function of the index, the same for all images, so that an image depends only
    on its own random numbers. Replaced tokens are cached as such and stay.
    """

    @property
    def target(self) -> str:
        """See `Perturbation.target`."""
        return "none"

    def weights(self, confidence: Tensor) -> Tensor:
        """See `Perturbation.weights`: ones."""
        return confidence.new_ones(confidence.shape)


@PERTURBATIONS.register("tpg", label="TPG", description="the tokens are in disorder")
@dataclass(frozen=True)
class Shuffled(OtherTokens):
    """Token perturbation guidance (TPG, arXiv 2506.10036): the tokens are shuffled.

    TPG permutes what enters a layer. Token by token that is not defined: a permutation would bring in tokens that are
    not drawn yet, and permuting the cached ones changes nothing, since attention does not depend on their order. Here
    the order is disturbed where the tokens enter: in the place of each stands one of the last `window` tokens, itself
    included, at random. So tokens may occur twice, and no vector that the model does not know occurs.

    Attributes:
        window: how far away the other token may be.
    """

    window: int = setting(16, low=1, off=1, help="tokens among which the order is lost; 1: CFG")

    @property
    def acts(self) -> bool:
        """See `Perturbation.acts`."""
        return self.window > 1

    def source(self, index: Tensor) -> Tensor:
        """See `Perturbation.source`."""
        return index - scrambled(index, 1) % (index + 1).clamp(max=self.window)


@PERTURBATIONS.register("vpg", label="VPG", description="some tokens are replaced by others of the image")
@dataclass(frozen=True)
class CorruptedPrefix(OtherTokens):
    """Visual prefix guidance (VPG, arXiv 2605.30317): the weak branch reads a corrupted prefix.

    The paper's models predict a scale of the image at once and replace embeddings of the scales before. Here a token is
    replaced by one that was drawn before it, anywhere in the image: a vocabulary may hold more than image codes, and
    every image is made of codes that fit together somehow. As in all perturbations here, it is the unconditional branch
    that reads the corrupted prefix, so that guidance is along the condition and the prefix at once.

    Attributes:
        rate: share of the tokens that is replaced.
    """

    rate: float = setting(0.5, low=0, high=1, help="share of the tokens that is replaced; 0: CFG")

    @property
    def acts(self) -> bool:
        """See `Perturbation.acts`."""
        return self.rate > 0

    def source(self, index: Tensor) -> Tensor:
        """See `Perturbation.source`."""
        replaced = scrambled(index, 2) < self.rate * SCRAMBLED
        return (scrambled(index, 3) % (index + 1)).where(replaced, index)


def _age(confidence: Tensor, step: Tensor) -> Tensor:
    """How many steps ago the tokens [..., T] were drawn; the newest is of age 1."""
    import torch

    return step - torch.arange(confidence.shape[-1], device=confidence.device)
