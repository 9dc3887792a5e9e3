"""SoftCFG that weakens tokens of one kind of patches alone: is it the background that the confidence goes to?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.fashion_mnist.data import Split
from softcfg import SoftCFG
from softcfg.guidance import METHODS
from softcfg.tokenizers.base import Tokenizer

BLACK = 0.02  # mean gray value up to which a patch is background


@METHODS.register("PatchSoftCFG")  # by which the results know it
@dataclass(frozen=True)
class PatchSoftCFG(SoftCFG):
    """SoftCFG whose confidence is zero on all tokens but those of black patches, or but the others.

    With Step Normalisation the whole perturbation of a step goes to the tokens that are left.

    Attributes:
        patches: "black" or "other".
        black_codes: bool [V], of the model at hand (`find_black_codes`).
    """

    patches: str = "other"

    black_codes: ClassVar[Tensor | None] = None

    def token_confidence(self, cond_logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
        """See `SoftCFG.token_confidence`."""
        assert self.black_codes is not None
        counts = self.black_codes.to(tokens.device)[tokens] == (self.patches == "black")
        return super().token_confidence(cond_logits, tokens, temperature) * counts


def brightness(gray: Tensor, latent_size: tuple[int, int]) -> Tensor:
    """Mean gray values [B, T] of the tokens' patches, of images [B, H, W] in [0, 1]."""
    return F.adaptive_avg_pool2d(gray, latent_size).flatten(1)


@torch.no_grad()
def find_black_codes(tokenizer: Tokenizer, images: Split, count: int = 2000) -> Tensor:
    """Which codes stand for black patches (bool [V]): in real images their patches are black on average."""
    total, uses = torch.zeros(2, tokenizer.codebook_size, dtype=torch.float64)
    for part in images.pixels(slice(count)).split(100):
        codes = tokenizer.encode(part).cpu().flatten()
        total.index_add_(0, codes, brightness(part[:, 0], tokenizer.latent_size).double().flatten())
        uses.index_add_(0, codes, torch.ones_like(codes, dtype=torch.float64))
    return (uses > 0) & (total / uses.clamp(min=1) < BLACK)
