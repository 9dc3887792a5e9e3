"""Rules: how the logits of the branches are combined.

A rule is a frozen dataclass of its settings. Most rules need nothing but the logits of the step. One that remembers
something over the steps (a momentum, for example) returns it as its state, a tensor with a row per image, and gets it
back at the next step: there is nothing hidden, so whoever steps through a sequence can go back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from softcfg.guidance.registry import Registry
from softcfg.guidance.settings import check

if TYPE_CHECKING:
    from torch import Tensor

RULED_OUT = float("-inf")  # the logit of a code that the model itself does not allow


@dataclass(frozen=True)
class Rule:
    """Classifier-free guidance (arXiv 2207.12598); other rules derive from it and are registered.

    Attributes:
        stateful: whether the rule has a state. One without is a function of a step's logits alone, and many steps can
            be computed at once.

    Raises:
        ValueError: a setting is out of its range; the message names it.
    """

    stateful: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check(self)

    def guide(
        self, cond: Tensor, uncond: Tensor, scale: Tensor | float, *, step: Tensor | int, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Guided logits [..., V] of a step, and the state after it (None for rules without one).

        Args:
            cond, uncond: logits [..., V] of the conditional and the unconditional branch.
            scale: s_t of the step; a tensor is of a shape that broadcasts to [..., 1].
            step: int64, 0-based, shaped like `scale`. Rules without a state may be given many steps at once.
            state: what the step before returned, [..., *]; None at the first step.

        Codes that the conditional branch rules out, by a logit of minus infinity, stay ruled out. From rules that are
        derived from this one they are hidden, as zeros in both branches.
        """
        guided = uncond + scale * (cond - uncond)
        return guided.masked_fill(cond == RULED_OUT, RULED_OUT), None  # minus infinity less itself is no number


RULES: Registry[type[Rule]] = Registry("rule")
RULES.register("cfg", label="CFG", description="uncond + scale * (cond - uncond)")(Rule)
