"""Rules: how the logits of the branches are combined.

A rule is a frozen dataclass of its settings. Most rules need nothing but the logits of the step. One that remembers
something over the steps (a momentum, for example) returns it as its state, a tensor with a row per image, and gets it
back at the next step. Nothing is hidden, so a decoder can go back to an earlier step.

In the formulas, z_c and z_u are the logits of the conditional and the unconditional branch and s is the scale of the
step. Papers on diffusion write them for a predicted noise, velocity or image. Logits differ from those in that adding a
constant to all of them means nothing, so the rules that take norms or products centre the logits first (see `Centred`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from softcfg.guidance.registry import Registry
from softcfg.guidance.settings import check, setting

if TYPE_CHECKING:
    from torch import Tensor

    Scale = Tensor | float
    Step = Tensor | int
    State = Tensor | None
    Guided = tuple[Tensor, State]

RULED_OUT = float("-inf")  # the logit of a code that the model itself does not allow


@dataclass(frozen=True)
class Rule:
    """Classifier-free guidance (arXiv 2207.12598); other rules derive from it and are registered.

    Attributes:
        stateful: whether the rule has a state. One without is a function of a step's logits alone, and many steps can
            be computed at once.
        constrained: whether tokens that the generator rules out at a step are at -inf in the logits that the rule
            gets. By default they are ruled out after the rule, which need not know of them. Filters and processors of
            logits always come after it.

    Raises:
        ValueError: a setting is out of its range; the message names it.
    """

    stateful: ClassVar[bool] = False
    constrained: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check(self)

    def guide(self, cond: Tensor, uncond: Tensor, scale: Scale, *, step: Step, state: State = None) -> Guided:
        """Guided logits [..., V] of a step, and the state after it (None for rules without one).

        Args:
            cond, uncond: logits [..., V] of the conditional and the unconditional branch.
            scale: s_t of the step; a tensor is of a shape that broadcasts to [..., 1].
            step: int64, 0-based, shaped like `scale`. Rules without a state may be given many steps at once.
            state: what the step before returned, [..., *]; None at the first step.

        Codes that the conditional branch rules out, by a logit of minus infinity, stay ruled out. From other rules they
        are hidden, as zeros in both branches, unless the rule is `constrained`.
        """
        guided = uncond + scale * (cond - uncond)
        return guided.masked_fill(cond == RULED_OUT, RULED_OUT), None  # -inf minus -inf is NaN


RULES: Registry[type[Rule]] = Registry("rule")
RULES.register("cfg", label="CFG", description="uncond + scale * (cond - uncond)")(Rule)


@dataclass(frozen=True)
class Centred(Rule):
    """A rule that takes norms or products of logits, made of `combine`.

    The logits of each branch are centred over the codes that are possible in both, so that a constant added to them
    changes nothing; the mean of the conditional ones is added to the result. A code at -inf in one branch is left out
    of the norms and keeps its conditional logit. So a token that is ruled out in both branches stays ruled out.
    """

    constrained: ClassVar[bool] = True

    def guide(self, cond: Tensor, uncond: Tensor, scale: Scale, *, step: Step, state: State = None) -> Guided:
        """See `Rule.guide`."""
        possible = cond + uncond > RULED_OUT
        weight = possible.to(cond.dtype)
        count = weight.sum(dim=-1, keepdim=True).clamp_min(1)
        (centred_cond, mean), (centred_uncond, _) = (_centre(z, possible, weight, count) for z in (cond, uncond))
        guided, state = self.combine(centred_cond, centred_uncond, scale, step=step, state=state)
        return (guided + mean).where(possible, cond), state

    def combine(self, cond: Tensor, uncond: Tensor, scale: Scale, *, step: Step, state: State) -> Guided:
        """As `Rule.guide`, for finite logits [..., V] whose sum is 0; those of impossible codes are 0."""
        raise NotImplementedError


@RULES.register("rescale", label="Rescaled CFG", description="CFG with the spread of the conditional logits")
@dataclass(frozen=True)
class Rescale(Centred):
    """Rescaled CFG (arXiv 2305.08891, equations 15 and 16).

        z = z_u + s (z_c - z_u),    guided = share * z std(z_c) / std(z) + (1 - share) * z

    The standard deviations are over the codes. The paper's share is 0.7.
    """

    share: float = setting(0.7, low=0, high=1, help="of the rescaled logits in the result; 0: CFG", shown=(0.0, 1.0))

    def combine(self, cond: Tensor, uncond: Tensor, scale: Scale, *, step: Step, state: State) -> Guided:
        """See `Centred.combine`."""
        guided = uncond + scale * (cond - uncond)
        ratio = _divided(_norm(cond), _norm(guided))
        return guided * (self.share * ratio + 1 - self.share), None


@RULES.register("apg", label="APG", description="guidance across the conditional logits, not along them")
@dataclass(frozen=True)
class ProjectedGuidance(Centred):
    """Adaptive projected guidance (arXiv 2410.02416, section 4 and algorithm 1).

        d_t = z_c - z_u + momentum * d_{t-1}, shortened to the norm threshold if it is longer
        guided = z_c + (s - 1) (across + eta * along),    d_t = along + across, along parallel to z_c

    The paper's threshold and its negative momentum belong to diffusion: the threshold to the norm of an image, the
    momentum to many looks at one. Here each step is another token, so both are off by default, which leaves the
    projection. What the momentum remembers is d before it is shortened, as in the paper's code.

    Attributes:
        eta: share of the part along the conditional logits, which sharpens or flattens their distribution.
        norm_threshold: greatest Euclidean norm of d over the codes; 0 for any.
        momentum: share of the last step's d that is added; negative values push away from it.
    """

    eta: float = setting(0.0, low=0, high=1, help="share of guidance along the conditional logits; 1: CFG")
    norm_threshold: float = setting(0.0, low=0, off=0, help="greatest norm of the difference of the branches; 0: any")
    momentum: float = setting(0.0, low=-1, high=1, help="share of the last step's difference that is added")

    @property
    def stateful(self) -> bool:  # type: ignore[override]
        """See `Rule.stateful`: with a momentum."""
        return self.momentum != 0

    def combine(self, cond: Tensor, uncond: Tensor, scale: Scale, *, step: Step, state: State) -> Guided:
        """See `Centred.combine`."""
        push = cond - uncond if state is None else cond - uncond + self.momentum * state
        state = push if self.stateful else None
        if self.norm_threshold:
            push = push * _divided(self.norm_threshold, _norm(push)).clamp(max=1)
        along = _divided(_dot(push, cond), _norm(cond).square())
        # cond + (scale - 1) (push - (1 - eta) along cond)
        return (1 - (scale - 1) * (1 - self.eta) * along) * cond + (scale - 1) * push, state


@RULES.register("zero_star", label="CFG-Zero*", description="CFG from the unconditional logits at their best length")
@dataclass(frozen=True)
class ZeroStar(Centred):
    """CFG-Zero* (arXiv 2503.18886, algorithm 1).

        a = <z_c, z_u> / <z_u, z_u>,    guided = a z_u + s (z_c - a z_u)

    In the paper the first steps do nothing at all (zero-init), because a wrong velocity is worse than none. A token has
    to be drawn at every step, and logits of zero would draw it from noise. What is left out in the first steps is thus
    the guidance: they take the conditional logits.

    Attributes:
        init_steps: how many steps are not guided.
    """

    init_steps: int = setting(1, low=0, off=0, help="first steps without guidance")

    def combine(self, cond: Tensor, uncond: Tensor, scale: Scale, *, step: Step, state: State) -> Guided:
        """See `Centred.combine`."""
        scale = scale + (step < self.init_steps) * (1 - scale)
        length = _divided(_dot(cond, uncond), _norm(uncond).square())
        return scale * cond + (1 - scale) * length * uncond, None


@RULES.register("tcfg", label="TCFG", description="CFG from what the unconditional logits share with the conditional")
@dataclass(frozen=True)
class TangentialDamping(Centred):
    """Tangential damping (TCFG, arXiv 2503.18137, algorithm 1).

        guided = u + s (z_c - u),    u = <z_u, v> v

    where v is the first right singular vector of the matrix with the rows z_c and z_u. It needs no decomposition: with
    p = <z_c, z_u>, d = <z_c, z_c> - <z_u, z_u> and h = sqrt(d^2 + 4 p^2),

        u = p / h z_c + (1 - d / h) / 2 z_u

    Where the rows are orthogonal and of one length, v is not unique, and u is z_u / 2.
    """

    def combine(self, cond: Tensor, uncond: Tensor, scale: Scale, *, step: Step, state: State) -> Guided:
        """See `Centred.combine`."""
        product, gap = _dot(cond, uncond), _norm(cond).square() - _norm(uncond).square()
        length = gap.hypot(2 * product)
        # u = a z_c + b z_u
        a, b = _divided(product, length), (1 - _divided(gap, length)) / 2
        return (scale + (1 - scale) * a) * cond + (1 - scale) * b * uncond, None


@RULES.register("adaptive", label="Adaptive scale", description="CFG whose scale falls with the branches' distance")
@dataclass(frozen=True)
class AdaptiveScale(Centred):
    """A scale that falls with the relative distance of the branches (RAAG, later MAMBO-G, arXiv 2508.03442).

        s' = 1 + (s - 1) exp(-alpha r),    r = |z_c - z_u| / |z_u|,    guided = z_u + s' (z_c - z_u)

    The paper's alpha of 8 is for the velocities of flows, of which r is a small fraction for most of the time. The
    logits of the branches are often about as far apart as they are long, so the default here is 1.
    """

    alpha: float = setting(1.0, low=0, help="how fast the scale falls with the distance; 0: CFG", shown=(0.0, 5.0))

    def combine(self, cond: Tensor, uncond: Tensor, scale: Scale, *, step: Step, state: State) -> Guided:
        """See `Centred.combine`."""
        push = cond - uncond
        ratio = (_norm(push) / _norm(uncond)).nan_to_num(0.0)  # endless from flat logits; none where both are flat
        return cond + (scale - 1) * (-self.alpha * ratio).exp() * push, None


@RULES.register("probability", label="CFG of probabilities", description="CFG of probabilities instead of logits")
@dataclass(frozen=True)
class ProbabilitySpace(Rule):
    """Guidance of probabilities: CFG's formula (arXiv 2207.12598) for p = softmax(z).

        guided = log max(0, p_u + s (p_c - p_u))

    A code that the unconditional branch likes much better than the conditional one gets a probability of zero. The
    softmax is of the logits as they are; a temperature acts on the guided logits after it.
    """

    constrained: ClassVar[bool] = True

    def guide(self, cond: Tensor, uncond: Tensor, scale: Scale, *, step: Step, state: State = None) -> Guided:
        """See `Rule.guide`."""
        p_cond, p_uncond = cond.softmax(dim=-1), uncond.softmax(dim=-1)
        return (p_cond + (scale - 1) * (p_cond - p_uncond)).clamp_min(0).log(), None


@RULES.register("log_softmax", label="CFG of log-probabilities", description="CFG of log-probabilities, as Emu3 has it")
@dataclass(frozen=True)
class LogSoftmax(Rule):
    """Guidance of log-probabilities, as for language models (arXiv 2306.17806) and in Emu3's code.

        guided = l_u + s (l_c - l_u),    l = log softmax(z)

    Log-probabilities are logits less a constant, so the distribution is that of CFG for every temperature, top-k and
    top-p; the guided logits are those of the released code to the last constant.
    """

    constrained: ClassVar[bool] = True

    def guide(self, cond: Tensor, uncond: Tensor, scale: Scale, *, step: Step, state: State = None) -> Guided:
        """See `Rule.guide`."""
        cond, uncond = cond.log_softmax(dim=-1), uncond.log_softmax(dim=-1)
        guided = uncond + scale * (cond - uncond)
        return guided.where(cond.isfinite() & uncond.isfinite(), cond), None


def _centre(logits: Tensor, possible: Tensor, weight: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """The logits [..., V] less their mean over the possible codes, 0 for the others; and the mean, [..., 1].

    Args:
        weight: `possible` as numbers.
        count: how many are possible, [..., 1].
    """
    kept = logits.where(possible, 0)
    mean = kept.sum(dim=-1, keepdim=True) / count
    return kept.addcmul(weight, mean, value=-1), mean


def _norm(logits: Tensor) -> Tensor:
    """The Euclidean norm over the codes, [..., 1]."""
    return logits.norm(dim=-1, keepdim=True)


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """The inner product over the codes, [..., 1]."""
    return (one * other).sum(dim=-1, keepdim=True)


def _divided(above: Tensor | float, below: Tensor) -> Tensor:
    """The quotient of numbers [..., 1]; 0 where the denominator is."""
    return (above / below).where(below != 0, 0)
