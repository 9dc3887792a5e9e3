"""What decoding in any order needs of a batch: its confidences, its scales, and the branches that guidance combines."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from softcfg.decoding.filtering import Sampling
from softcfg.decoding.finite import FiniteLogits, branches_of
from softcfg.decoding.perturbed import probability_of, require_confidence
from softcfg.errors import UserError
from softcfg.guidance import CFG
from softcfg.models.base import Condition, Generator
from softcfg.nn.kv_cache import KVCache


class Part:
    """Rows that go through a generator together, with a cache of their own.

    Args:
        cache: their keys and values; None for one that holds nothing.
    """

    def __init__(self, generator: Generator, condition: Condition, cache: KVCache | None = None) -> None:
        self.generator = generator
        self.condition = condition
        self.cache = generator.take_cache(condition) if cache is None else cache


class GuidedBatch:
    """A batch that is decoded, in whatever order.

    Attributes:
        batch: B, images.
        parts: of its rows, those of each pass.
        confidence: float32 [B, T], zero for tokens that are not drawn yet or are not image codes.
        finite: whether the logits so far were numbers; whoever steps must call `check`, which reads it.
    """

    parts: Sequence[Part]

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

    def check(self, first: int = 0, stop: int | None = None) -> None:
        """Raise a `UserError` for logits that make no distribution and confidences that are none.

        It waits for the device.

        Args:
            first, stop: the steps to look at; by default all.
        """
        self.finite.check(first, stop)
        if self.guidance.perturbs and self._probability_of is None:
            require_confidence(self.guidance.weak_branch, self.confidence[:, first:stop])

    def leave_caches(self) -> None:
        """Leave the caches to the batch that comes, after which this one must not go on."""
        for part in self.parts:
            part.generator.leave_cache(part.condition, part.cache)

    def sides(self, others: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """What the rule guides away from, and the third branch, of all branches but the conditional one."""
        third = others.pop() if self.guidance.has_third_branch else None
        if not self.guidance.is_active:
            return None, third
        weak = others.pop() if self.guidance.has_weak_model else None
        return self.guidance.away_from(others.pop() if others else None, weak), third


def ruled_logits(
    generator: Generator,
    condition: Condition,
    guidance: CFG,
    cond_logits: Tensor,
    other: Tensor | None,
    third: Tensor | None,
    scales: Tensor,
    steps: Tensor,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What the rule and the third branch make of the logits of n neighbouring steps, before `finished_logits`.

    A rule that is `constrained` knows which tokens are not allowed: in a vocabulary of text and image codes the norm of
    all logits would say little about the codes.

    Args:
        cond_logits, other, third: [B, n, V], of the conditional branch, of what the rule guides away from and of the
            third branch; None for none.
        scales, steps, state: as of `CFG.guide_steps`.

    Returns:
        Logits [B, n, V], and the states as of `CFG.guide_steps`.
    """
    guided, states = cond_logits, None
    if other is not None:
        cond = cond_logits
        if guidance.rule.constrained:
            cond, other = (generator.constrain(logits, steps, condition) for logits in (cond, other))
        guided, states = guidance.guide_steps(cond, other, scales, steps, state)
    if third is not None:
        guided = guidance.push_away(guided, cond_logits, third, steps)
    return guided, states


def finished_logits(generator: Generator, condition: Condition, guided: Tensor, steps: Tensor) -> Tensor:
    """Guided logits [B, n, V] of `steps` without the tokens that are not allowed there, and processed."""
    return generator.processed(generator.constrain(guided, steps, condition), steps, condition)


def check_interval(guidance: CFG, tokens: int) -> None:
    """Raise `UserError` for guidance that acts in no step of an image of so many tokens, by its interval."""
    acts = guidance.is_active or guidance.has_third_branch
    if acts and guidance.interval is not None and guidance.interval[0] >= tokens:
        start, stop = guidance.interval
        raise UserError(
            f"the interval {start}-{stop} holds none of the {tokens} steps, 0 to {tokens - 1}, of an image, so that "
            "nothing is guided: give one that starts earlier"
        )


def step_scales(guidance: CFG, condition: Condition) -> Tensor:
    """The guidance scale of every step, float32 [T].

    Raises:
        UserError: the guidance acts in no step, or a schedule or guidance of somebody's own gives something else.
    """
    steps = condition.num_tokens
    check_interval(guidance, steps)
    scales = torch.as_tensor(guidance.scales(steps, condition.num_codes)).to("cpu", torch.float32)
    if scales.shape != (steps,):
        raise UserError(
            f"the schedule {guidance.schedule!r} of {type(guidance).__name__} must give {[steps]}, a guidance scale "
            f"for each step, got {list(scales.shape)}"
        )
    return scales
