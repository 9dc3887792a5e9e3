"""What decoding in any order needs of a batch: its confidences, its scales, and the branches that guidance combines."""

from __future__ import annotations

import torch
from torch import Tensor

from softcfg.decoding.filtering import Sampling
from softcfg.decoding.finite import FiniteLogits, branches_of
from softcfg.decoding.perturbed import probability_of, require_confidence
from softcfg.errors import UserError
from softcfg.guidance import CFG
from softcfg.models.base import Condition, Generator


class GuidedBatch:
    """A batch that is decoded, in whatever order.

    Attributes:
        batch: B, images.
        confidence: float32 [B, T], zero for tokens that are not drawn yet or are not image codes.
        finite: whether the logits so far were numbers; whoever steps must call `check`, which reads it.
    """

    def __init__(self, generator: Generator, condition: Condition, guidance: CFG, sampling: Sampling) -> None:
        self.generator = generator
        self.condition = condition
        self.guidance = guidance
        self.sampling = sampling
        self.batch = condition.rows // 2 if guidance.has_unconditional_branch else condition.rows
        total, device = condition.num_tokens, generator.device
        self.confidence = torch.zeros(self.batch, total, dtype=torch.float32, device=device)
        self._away = guidance.perturbs and not guidance.has_third_branch  # what the rule guides away from is perturbed
        self._scales = step_scales(guidance, condition).to(device)
        self._steps = torch.arange(total, device=device)
        codes = generator.is_code(self._steps, condition)
        self._codes = None if codes is None else codes.bool()
        self._probability_of = probability_of(guidance.weak_branch)
        self.finite = FiniteLogits(self.batch, branches_of(guidance), total, generator.dtype, device)

    def check(self, step: int | None = None) -> None:
        """Raise a `UserError` for logits that make no distribution and confidences that are none, of a step or of all.

        It waits for the device.
        """
        self.finite.check(step)
        if self.guidance.perturbs and self._probability_of is None:
            require_confidence(self.guidance.weak_branch, self.confidence if step is None else self.confidence[:, step])

    def sides(self, others: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """What the rule guides away from, and the third branch, of all branches but the conditional one."""
        third = others.pop() if self.guidance.has_third_branch else None
        if not self.guidance.is_active:
            return None, third
        weak = others.pop() if self.guidance.has_weak_model else None
        return self.guidance.away_from(others.pop() if others else None, weak), third


def guided_logits(
    generator: Generator,
    condition: Condition,
    guidance: CFG,
    cond_logits: Tensor,
    uncond_logits: Tensor,
    scales: Tensor,
    steps: Tensor,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Guide n neighbouring steps and rule out tokens that are not allowed there, before or after the rule as it needs.

    Args:
        cond_logits, uncond_logits: [B, n, V].
        scales, steps, state: as of `CFG.guide_steps`.

    Returns:
        Guided logits [B, n, V], -inf for tokens that are ruled out, and the states as of `CFG.guide_steps`.
    """
    branches = branches_for_rule(generator, condition, guidance, cond_logits, uncond_logits, steps)
    guided, states = guidance.guide_steps(*branches, scales, steps, state)
    return guided if guidance.rule.constrained else generator.constrain(guided, steps, condition), states


def branches_for_rule(
    generator: Generator, condition: Condition, guidance: CFG, cond_logits: Tensor, uncond_logits: Tensor, steps: Tensor
) -> tuple[Tensor, Tensor]:
    """The branches' logits [B, n, V] as the rule takes them, with disallowed tokens at -inf if it asks for that.

    In a vocabulary of text and image codes the norm of all logits would say little about the codes.
    """
    if not guidance.rule.constrained:
        return cond_logits, uncond_logits
    cond_logits = generator.constrain(cond_logits, steps, condition)
    return cond_logits, generator.constrain(uncond_logits, steps, condition)


def step_scales(guidance: CFG, condition: Condition) -> Tensor:
    """The guidance scale of every step, float32 [T].

    Raises:
        UserError: a schedule or guidance of somebody's own gives something else.
    """
    steps = condition.num_tokens
    scales = torch.as_tensor(guidance.scales(steps, condition.num_codes)).to("cpu", torch.float32)
    if scales.shape != (steps,):
        raise UserError(
            f"the schedule {guidance.schedule!r} of {type(guidance).__name__} must give {[steps]}, a guidance scale "
            f"for each step, got {list(scales.shape)}"
        )
    return scales
