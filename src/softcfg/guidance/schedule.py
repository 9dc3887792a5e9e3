"""Schedules: the guidance scale of every decoding step.

The scale of step t (0-based, of T) is s_t = 1 + gamma_t; with s_t = 1 the guided logits are the conditional
ones. A ramp maps the progress t / T in [0, 1) to the fraction of the way from 1 to the full scale.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from softcfg.guidance.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

# (steps, full scale, power, image codes among the steps) -> float64 [steps], before the interval.
Schedule = Callable[[int, float, float, int], "Tensor"]
SCHEDULES: Registry[Schedule] = Registry("schedule")
register_schedule = SCHEDULES.register


def ramp(function: Callable[[Tensor, float], Tensor]) -> Schedule:
    """The schedule that goes from 1 to the full scale as `function` of progress [steps] and power says."""

    @functools.wraps(function)
    def schedule(steps: int, scale: float, power: float, codes: int) -> Tensor:
        import torch

        # In float64, so that long sequences do not lose the small differences between neighbouring steps.
        progress = torch.arange(steps, dtype=torch.float64, device="cpu") / steps
        return 1 + (scale - 1) * function(progress, power)

    return schedule


@register_schedule("constant")
@ramp
def constant(progress: Tensor, power: float) -> Tensor:
    """The full scale at every step."""
    return progress.new_ones(progress.shape)


@register_schedule("linear")
@ramp
def linear(progress: Tensor, power: float) -> Tensor:
    """A straight rise from no guidance at the first step."""
    return progress


@register_schedule("cosine_power")
@ramp
def cosine_power(progress: Tensor, power: float) -> Tensor:
    """(1 - cos(pi progress^power)) / 2, the ramp of the released samplers; power 0 gives the full scale (0^0 = 1)."""
    return (1 - (math.pi * progress**power).cos()) / 2


@register_schedule("lumina_released")
def lumina_released(steps: int, scale: float, power: float, codes: int) -> Tensor:
    """The scales of the released Lumina-mGPT 2.0: they drift from `scale` to 4 and stay there.

    Every step multiplies the scale by 1 - n / (codes / 4), n = t + 2, and raises it to 4 if it is less, so a scale
    between 1 and 4 acts as 4. A scale of 1 or less is no guidance.
    """
    import torch

    scales = torch.ones(steps, dtype=torch.float64, device="cpu")
    if scale > 1:
        for step in range(steps):
            scale = scales[step] = max(4.0, scale * (1 - (step + 2) / (codes / 4)))
    return scales
