"""Guidance: the scales of the steps, a rule that combines the branches, and a perturbation of the unconditional one.

    guided logits at step t:  z = z_uncond + s_t (z_cond - z_uncond) = (1 + gamma_t) z_cond - gamma_t z_uncond

`CFG` is plain classifier-free guidance, and holds any other rule and perturbation. `SoftCFG` (arXiv 2510.00996) is
guidance with the perturbation of that name: it scales, in the unconditional branch only, the cached values of the
tokens generated so far by weights that fall with the model's confidence in them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from softcfg.guidance.perturbation import PERTURBATIONS, ConfidenceWeights, NoPerturbation, Perturbation
from softcfg.guidance.registry import Registry
from softcfg.guidance.rules import RULED_OUT, RULES, Rule
from softcfg.guidance.schedule import SCHEDULES
from softcfg.guidance.settings import Setting, check, setting

if TYPE_CHECKING:
    from torch import Tensor

RELEASED_FLOOR = 0.05
RELEASED_EPS = 1e-5


@dataclass(frozen=True, repr=False)
class CFG:
    """Classifier-free guidance.

    Attributes:
        guidance_scale: g >= 0, the full scale 1 + gamma. 0 and 1 mean the conditional branch alone, at half the work.
        guidance_scale_pow: k >= 0, the power of the cosine ramp.
        schedule: a name from `softcfg.guidance.SCHEDULES`: "cosine_power" (the released samplers' ramp from 1 to g),
            "constant", "linear" or "lumina_released" (see `softcfg.guidance.schedule.lumina_released`).
        interval: steps [start, stop), 0-based, outside of which there is no guidance; None for all steps.
        rule: how the logits of the branches are combined: a `Rule`, or the name of one in `softcfg.guidance.RULES`.
        perturbation: what the unconditional branch sees: a `Perturbation`, or the name of one in
            `softcfg.guidance.PERTURBATIONS`; None for the tokens as they are.
        perturbation_scale: q >= 0. Above 0 it is not the unconditional branch that is perturbed, but the conditional
            one, as a third branch whose logits z_p push away: q (z_cond - z_p) is added to the guided logits in the
            steps of the interval (as in PAG, arXiv 2403.17377). It takes a pass of its own. 0: no third branch.
        weak_share: m in [0, 1], the share of a weak model in what the rule guides away from: it gets the logits
            (1 - m) z_uncond + m z_weak in place of z_uncond, where z_weak are those of another, weaker generator under
            the same condition. 1 is autoguidance (arXiv 2406.02507), z_cond + (s_t - 1) (z_cond - z_weak), without an
            unconditional branch; between 0 and 1 it is beside CFG. What perturbs the unconditional branch perturbs
            the weak model too. The generator itself is an argument of what draws.

    Raises:
        ValueError: a setting is out of its range; the message names the field, its value and the range.
    """

    guidance_scale: float = setting(
        4.0,
        low=0,
        help="full guidance scale; 0 or 1: no guidance",
        metavar="G",
        of_model=True,
        released="guidance_scale",
        shown=(0.0, 20.0),
    )
    guidance_scale_pow: float = setting(
        1.0,
        low=0,
        help="power of the cosine ramp from 1 to G",
        metavar="K",
        of_model=True,
        released="guidance_scale_pow",
        shown=(0.0, 5.0),
    )
    schedule: str = setting("cosine_power", choices=SCHEDULES, help="how the scale moves over the steps", of_model=True)
    interval: tuple[int, int] | None = setting(
        None, help="guide in the steps START <= step < STOP alone, such as 32-192", metavar="START-STOP"
    )
    perturbation_scale: float = setting(
        0.0,
        kw_only=True,
        low=0,
        off=0,
        help="guide away from a perturbed conditional branch, a third one, by this scale, as in PAG; 0: perturb the "
        "unconditional branch instead",
        metavar="Q",
    )
    weak_share: float = setting(
        0.0,
        kw_only=True,
        low=0,
        high=1,
        off=0,
        help="share of the weak model in what is guided away from; 1: in place of the unconditional branch",
        metavar="M",
        of_model=True,
    )
    rule: Rule = field(default=Rule(), kw_only=True)
    perturbation: Perturbation = field(default=NoPerturbation(), kw_only=True)

    def __post_init__(self) -> None:
        check(self)
        if self.interval is not None:
            object.__setattr__(self, "interval", tuple(self.interval))
        object.__setattr__(self, "rule", _part("rule", self.rule, Rule, RULES))
        object.__setattr__(self, "perturbation", _part("perturbation", self.perturbation, Perturbation, PERTURBATIONS))
        if type(self).guide is not CFG.guide and type(self.rule) is not Rule:
            raise ValueError(f"{type(self).__name__} has a rule of its own, guide, and takes no other")

    def __repr__(self) -> str:
        shown = [f for f in dataclasses.fields(self) if not (f.kw_only and getattr(self, f.name) == f.default)]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"

    @property
    def is_active(self) -> bool:
        """Whether there is anything that the rule guides away from."""
        return self.guidance_scale not in (0, 1)

    @property
    def has_unconditional_branch(self) -> bool:
        """Whether the unconditional branch is needed."""
        return self.is_active and self.weak_share < 1

    @property
    def has_weak_model(self) -> bool:
        """Whether a weak model is needed."""
        return self.is_active and self.weak_share > 0

    @property
    def weak_branch(self) -> Perturbation:
        """What the unconditional branch, or the third one, sees of the tokens so far."""
        return self.perturbation

    @property
    def perturbs(self) -> bool:
        """Whether there is a branch that is perturbed: the unconditional one or a third."""
        return self.weak_branch.acts and (self.is_active or self.perturbation_scale > 0)

    @property
    def has_third_branch(self) -> bool:
        """Whether the conditional branch is perturbed, in a pass of its own."""
        return self.weak_branch.acts and self.perturbation_scale > 0

    @property
    def title(self) -> str:
        """A short name for figures: CFG, SoftCFG, or the names of the rule and the perturbation."""
        name = titled(type(self.weak_branch) if self.weak_branch.acts else NoPerturbation, type(self.rule))
        return f"{name}, weak model" if self.has_weak_model else name

    @property
    def is_linear(self) -> bool:
        """Whether the guided logits are uncond + scale * (cond - uncond)."""
        return type(self.rule) is Rule and all(getattr(type(self), name) is own for name, own in _LINEAR.items())

    @property
    def is_plain(self) -> bool:
        """Whether it is plain CFG, whatever its class."""
        return self.is_linear and not (self.perturbs or self.has_weak_model)

    def plain(self) -> CFG:
        """Plain CFG with the same scales."""
        return CFG(self.guidance_scale, self.guidance_scale_pow, self.schedule, self.interval)

    def scales(self, steps: int, codes: int | None = None) -> Tensor:
        """The guidance scale s_t of every step, float32 [steps]; `codes` of them draw image codes, by default all."""
        import torch

        if self.guidance_scale == 0:
            return torch.ones(steps, dtype=torch.float32)
        codes = steps if codes is None else codes
        scales = SCHEDULES[self.schedule](steps, self.guidance_scale, self.guidance_scale_pow, codes)
        if self.interval is not None:
            step = torch.arange(steps)
            scales = scales.masked_fill((step < self.interval[0]) | (step >= self.interval[1]), 1.0)
        return scales.float()

    def away_from(self, uncond_logits: Tensor | None, weak_logits: Tensor | None) -> Tensor:
        """What the rule guides away from: the logits [..., V] of the unconditional branch, of the weak model, or mixed.

        Args:
            uncond_logits, weak_logits: None where there is no such branch.
        """
        if uncond_logits is None or weak_logits is None:
            found = weak_logits if uncond_logits is None else uncond_logits
            assert found is not None
            return found
        return (1 - self.weak_share) * uncond_logits + self.weak_share * weak_logits

    def push_away(self, guided: Tensor, cond_logits: Tensor, perturbed_logits: Tensor, steps: Tensor) -> Tensor:
        """The guided logits [..., n, V] with those of the third branch taken into account.

        Args:
            cond_logits, perturbed_logits: [..., n, V], of the conditional branch as it is and as it is perturbed.
            steps: the 0-based steps, [n] or [..., n].
        """
        first, stop = self.interval or (0, None)
        guides = steps >= first if stop is None else (steps >= first) & (steps < stop)
        push = (cond_logits - perturbed_logits).nan_to_num(0.0, 0.0, 0.0)  # for what is ruled out in either
        return guided + self.perturbation_scale * guides[..., None] * push

    def guide(self, cond_logits: Tensor, uncond_logits: Tensor, scale: Tensor | float) -> Tensor:
        """Guided logits from both branches' logits [..., V] at the scale s_t of the step.

        A rule that looks at the step, or has a state, takes this for the first one; see `guide_step`.
        """
        return self._ruled(cond_logits, uncond_logits, scale, step=0)[0]

    def guide_step(
        self, cond_logits: Tensor, uncond_logits: Tensor, scale: Tensor, *, step: Tensor, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Guided logits [..., V] of a step, and the state of the rule after it; arguments as of `Rule.guide`."""
        if type(self.rule) is not Rule:
            return self._ruled(cond_logits, uncond_logits, scale, step=step, state=state)
        if type(self).guide is CFG.guide:
            return self.guide(cond_logits, uncond_logits, scale), None
        guided = self.guide(*_without_ruled_out(cond_logits, uncond_logits), scale)
        return guided.masked_fill(cond_logits == RULED_OUT, RULED_OUT), None

    def _ruled(
        self, cond: Tensor, uncond: Tensor, scale: Tensor | float, *, step: Tensor | int, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """What the rule makes of the logits; codes that the model rules out stay so under every rule."""
        if type(self.rule) is Rule or self.rule.constrained:  # they see to that themselves
            return self.rule.guide(cond, uncond, scale, step=step, state=state)
        guided, state = self.rule.guide(*_without_ruled_out(cond, uncond), scale, step=step, state=state)
        return guided.masked_fill(cond == RULED_OUT, RULED_OUT), state

    def guide_steps(
        self, cond_logits: Tensor, uncond_logits: Tensor, scales: Tensor, steps: Tensor, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Guide n neighbouring steps: at once if the rule has no state, else one after the other.

        Args:
            cond_logits, uncond_logits: [B, n, V].
            scales, steps: s_t and the 0-based steps, [n] or [B, n].
            state: the rule's after the step before the first, [B, *]; None at the start of the sequence.

        Returns:
            Guided logits [B, n, V], and the states before the first and after every step, [B, n + 1, *] (before the
            start of the sequence: zeros); None for rules without a state.
        """
        if not self.rule.stateful:
            return self.guide_step(cond_logits, uncond_logits, scales[..., None], step=steps[..., None])
        import torch

        guided, states = [], [state]
        for i in range(cond_logits.shape[1]):
            logits, state = self.guide_step(
                cond_logits[:, i], uncond_logits[:, i], scales[..., i, None], step=steps[..., i, None], state=state
            )
            guided.append(logits)
            states.append(state)
        if state is None:
            raise TypeError(f"{type(self.rule).__name__} is stateful, but returned no state")
        known = [torch.zeros_like(state) if each is None else each for each in states]
        return torch.stack(guided, dim=1), torch.stack(known, dim=1)


def guidance_scales(
    steps: int,
    scale: float,
    schedule: str = "cosine_power",
    power: float = 1.0,
    interval: tuple[int, int] | None = None,
    codes: int | None = None,
) -> Tensor:
    """The guidance scale of every step, float32 [steps].

    Args:
        steps: T.
        scale: the full scale g; 0 means the conditional branch alone and gives ones, like 1.
        schedule: a name from `SCHEDULES`.
        power: exponent of `cosine_power`; the other schedules do not use it.
        interval: steps [start, stop), 0-based, outside of which the scale is 1.
        codes: how many of the tokens are image codes, not structure like the ends of lines; by default all. Only
            `lumina_released` uses it.

    Raises:
        ValueError: one of them is out of its range; the message names it, as `CFG` does.
    """
    Setting("steps", int, None, low=0).check(steps)
    if codes is not None:
        Setting("codes", int, None, low=1).check(codes)
    return CFG(scale, power, schedule, interval).scales(steps, codes)


# As they are here, whatever may be put in their place.
_LINEAR = {name: getattr(CFG, name) for name in ("guide", "guide_step", "guide_steps", "away_from")}


@dataclass(frozen=True, repr=False)
class SoftCFG(ConfidenceWeights, CFG):
    """SoftCFG: guidance with a confidence-weighted unconditional branch (arXiv 2510.00996). Defaults are the paper's.

    It has the attributes of `CFG` too; its perturbation is its own.

    Attributes:
        confidence: "max" p_max (the paper), "sampled" p(x_i) (released), "entropy" 1 - H / log V, "margin", or another
            name from `softcfg.guidance.CONFIDENCES`.
        step_norm: Step Normalisation, so that the sum of (1 - w_i) is 1 at every step.
        strength: exponent of the weights, >= 0; 0 is plain CFG.
        floor: least weight, in [0, 1].
        eps: >= 0, added to the sum of confidences.
        target: what the weights scale, "value" (the method), "key" or "both" (the paper's Table 3).
        alignment: "own": a token's slot carries its own confidence (the paper); "successor": that of the next
            token (released).
    """

    def __post_init__(self) -> None:
        CFG.__post_init__(self)
        if self.perturbation != NoPerturbation():
            raise ValueError("SoftCFG is a perturbation itself; give another one to CFG(perturbation=...)")

    __repr__ = CFG.__repr__

    @property
    def weak_branch(self) -> Perturbation:
        """SoftCFG itself: its functions `token_confidence` and `weights`."""
        return self

    @classmethod
    def paper(cls, **settings: Any) -> SoftCFG:
        """SoftCFG as the paper defines it (the defaults), with `settings` on top."""
        return cls(**settings)

    @classmethod
    def released(cls, **settings: Any) -> SoftCFG:
        """SoftCFG as the released AliTok code computes it, with `settings` on top.

        It takes the probability of the drawn token, one slot early, with a floor of 0.05 and 1e-5 added to the
        sum. Without Step Normalisation it has neither floor nor exponent: `strength` then only says whether
        the perturbation is on (0 crashes the released code; here it is plain CFG).
        """
        preset: dict[str, Any] = {"confidence": "sampled", "alignment": "successor"}
        if settings.get("step_norm", True):
            preset.update(floor=RELEASED_FLOOR, eps=RELEASED_EPS)
        settings = {**preset, **settings}
        method = cls(**settings)
        if not method.step_norm and method.strength > 0:
            method = cls(**{**settings, "strength": 1.0})
        return method


METHODS: Registry[type[CFG]] = Registry("method")
METHODS.register("CFG")(CFG)
METHODS.register("SoftCFG")(SoftCFG)
PRESETS: Registry[Callable[..., SoftCFG]] = Registry("preset")
PRESETS.register("paper")(SoftCFG.paper)
PRESETS.register("released")(SoftCFG.released)


def _without_ruled_out(cond: Tensor, uncond: Tensor) -> tuple[Tensor, Tensor]:
    """The logits with zeros in both branches for codes that the conditional branch rules out."""
    ruled_out = cond == RULED_OUT
    return cond.masked_fill(ruled_out, 0), uncond.masked_fill(ruled_out, 0)


def titled(perturbation: type[Perturbation], rule: type[Rule]) -> str:
    """The names of a perturbation and a rule, as one title."""
    if perturbation is SoftCFG:
        perturbation = ConfidenceWeights
    parts = [
        _label(PERTURBATIONS, perturbation) if perturbation is not NoPerturbation else "",
        _label(RULES, rule) if rule is not Rule else "",
    ]
    return " + ".join(filter(None, parts)) or "CFG"


def _label(registry: Registry[Any], kind: type) -> str:
    try:
        return registry.label(registry.name_of(kind))
    except ValueError:
        return kind.__name__


def _part(name: str, value: Any, kind: type, registry: Registry[Any]) -> Any:
    """A rule or perturbation from itself or its name."""
    if value is None and kind is Perturbation:
        return NoPerturbation()
    if isinstance(value, str):
        return registry.require(value, name)()
    if not isinstance(value, kind) or isinstance(value, CFG):
        raise ValueError(f"{name} must be a {kind.__name__}, or one of {', '.join(registry)}, got {value!r}")
    return value
