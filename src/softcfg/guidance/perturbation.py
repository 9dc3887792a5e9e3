"""The weights that SoftCFG puts on the unconditional branch's cached values.

The one state is the confidence buffer [..., T]: entry i is the confidence in generated token i, 0 where none
was generated yet. A zero confidence is a weight of one, so the same formula with the same shapes serves every
step, and the weights of a step depend on the confidences alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TARGETS = ("value", "key", "both")
ALIGNMENTS = ("own", "successor")


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
        confidence: [..., T] in [0, 1], zero for tokens not generated yet.
        step_norm: spend a fixed budget over all tokens so far.
        strength: 0 leaves every weight at 1.
        floor: least weight.
        eps: added to the sum of confidences.
        alignment: "own": the slot of token i carries its own confidence (the paper). "successor": it carries
            that of token i + 1, so the newest token and the first confidence have no effect (the released code).

    Returns:
        Weights [..., T] in [floor, 1], in the dtype of `confidence`.
    """
    if alignment == "successor":
        confidence = F.pad(confidence[..., 1:], (0, 1))
    if step_norm:
        total = confidence.sum(dim=-1, keepdim=True) + eps
        confidence = confidence / torch.where(total > 0, total, 1)
    # A share may round to just above one.
    return (1 - confidence).clamp_min(0).pow(strength).clamp_min(floor)
