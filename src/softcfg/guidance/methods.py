"""Guidance methods: dataclasses of settings whose functions take tensors and return tensors.

    guided logits at step t:  z = z_uncond + s_t (z_cond - z_uncond) = (1 + gamma_t) z_cond - gamma_t z_uncond

`CFG` is plain classifier-free guidance. `SoftCFG` (arXiv 2510.00996) also scales, in the unconditional branch
only, the cached values of the tokens generated so far by weights that fall with the model's confidence in them.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from softcfg.guidance.confidence import CONFIDENCES, token_confidence
from softcfg.guidance.perturbation import ALIGNMENTS, TARGETS, perturbation_weights
from softcfg.guidance.schedule import SCHEDULES, guidance_scales

RELEASED_FLOOR = 0.05
RELEASED_EPS = 1e-5


@dataclass(frozen=True)
class CFG:
    """Classifier-free guidance.

    Attributes:
        guidance_scale: g >= 0, the full scale 1 + gamma. 0 and 1 mean the conditional branch alone, at half the work.
        guidance_scale_pow: k >= 0, the power of the cosine ramp.
        schedule: "cosine_power" (the released samplers' ramp from 1 to g), "constant", "linear" or
            "lumina_released" (see `softcfg.guidance.schedule.lumina_released`).
        interval: steps [start, stop), 0-based, outside of which there is no guidance; None for all steps.

    Raises:
        ValueError: a setting is out of its range; the message names the field, its value and the range.
    """

    guidance_scale: float = 4.0
    guidance_scale_pow: float = 1.0
    schedule: str = "cosine_power"
    interval: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        _check_number(self, "guidance_scale", 0)
        _check_number(self, "guidance_scale_pow", 0)
        _check_name(self, "schedule", SCHEDULES)
        if self.interval is not None:
            bounds = tuple(self.interval)
            if len(bounds) != 2 or not all(isinstance(step, int) for step in bounds) or not 0 <= bounds[0] <= bounds[1]:
                raise ValueError(f"interval must be two steps 0 <= start <= stop, got {self.interval!r}")
            object.__setattr__(self, "interval", bounds)

    @property
    def is_active(self) -> bool:
        """Whether the unconditional branch is needed at all."""
        return self.guidance_scale not in (0, 1)

    @property
    def perturbs(self) -> bool:
        """Whether there is an unconditional branch and it is perturbed."""
        return False

    def scales(self, steps: int, codes: int | None = None) -> Tensor:
        """The guidance scale s_t of every step, float32 [steps]; `codes` of them draw image codes, by default all."""
        return guidance_scales(steps, self.guidance_scale, self.schedule, self.guidance_scale_pow, self.interval, codes)

    def guide(self, cond_logits: Tensor, uncond_logits: Tensor, scale: Tensor | float) -> Tensor:
        """Guided logits from both branches' logits [..., V] at the scale s_t of the step."""
        return uncond_logits + scale * (cond_logits - uncond_logits)


@dataclass(frozen=True)
class SoftCFG(CFG):
    """SoftCFG: guidance with a confidence-weighted unconditional branch (arXiv 2510.00996). Defaults are the paper's.

    Attributes:
        confidence: "max" p_max (the paper), "sampled" p(x_i) (released), "entropy" 1 - H / log V, or "margin".
        step_norm: Step Normalisation, so that the sum of (1 - w_i) is 1 at every step.
        strength: exponent of the weights, >= 0; 0 is plain CFG.
        floor: least weight, in [0, 1].
        eps: >= 0, added to the sum of confidences.
        target: what the weights scale, "value" (the method), "key" or "both" (the paper's Table 3).
        alignment: "own": a token's slot carries its own confidence (the paper); "successor": that of the next
            token (released).
    """

    confidence: str = "max"
    step_norm: bool = True
    strength: float = 1.0
    floor: float = 0.0
    eps: float = 0.0
    target: str = "value"
    alignment: str = "own"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_name(self, "confidence", CONFIDENCES)
        if not isinstance(self.step_norm, bool):
            raise ValueError(f"step_norm must be True or False, got {self.step_norm!r}")
        _check_number(self, "strength", 0)
        _check_number(self, "floor", 0, 1)
        _check_number(self, "eps", 0)
        _check_name(self, "target", TARGETS)
        _check_name(self, "alignment", ALIGNMENTS)

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

    @property
    def perturbs(self) -> bool:
        """Whether there is an unconditional branch and it is perturbed."""
        return self.is_active and self.strength > 0

    def token_confidence(self, cond_logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
        """Confidence [...] in the drawn `tokens` [...] from the conditional logits [..., V]."""
        return token_confidence(cond_logits, tokens, self.confidence, temperature)

    def weights(self, confidence: Tensor) -> Tensor:
        """Weights [..., T] of the generated tokens' slots for the confidences [..., T] so far (0: not generated)."""
        return perturbation_weights(
            confidence,
            step_norm=self.step_norm,
            strength=self.strength,
            floor=self.floor,
            eps=self.eps,
            alignment=self.alignment,
        )


def _check_number(settings: Any, field: str, low: float, high: float = math.inf) -> None:
    value = getattr(settings, field)
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value) and low <= value <= high):
        wanted = f"a finite number >= {low}" if high == math.inf else f"a number in [{low}, {high}]"
        raise ValueError(f"{field} must be {wanted}, got {value!r}")


def _check_name(settings: Any, field: str, known: Any) -> None:
    value = getattr(settings, field)
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{field} must be one of {', '.join(known)}, got {value!r}")
