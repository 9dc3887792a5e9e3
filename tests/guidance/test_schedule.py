import math
from typing import Any

import pytest
import torch

from goldens import golden
from softcfg import CFG
from softcfg.guidance import guidance_scales


# Values of the released samplers' ramp at t = 0, 64, 128, 192, 255 of 256 (temperature does not enter).
@pytest.mark.parametrize(
    ("scale", "power", "expected"),
    [
        (16.0, 2.75, [1, 1.01806, 1.80308, 7.4044, 15.99576]),
        (15.5, 2.5, [1, 1.03491, 2.0896, 7.95716, 15.49661]),
        (6.9, 1.5, [1, 1.22456, 2.64015, 5.2853, 6.8995]),
        (8.0, 1.2, [1, 1.60191, 3.79321, 6.62833, 7.99962]),
    ],
)
def test_cosine_ramp_of_the_released_models(scale: float, power: float, expected: list[float]) -> None:
    scales = CFG(guidance_scale=scale, guidance_scale_pow=power).scales(256)
    torch.testing.assert_close(scales[[0, 64, 128, 192, 255]], torch.tensor(expected), rtol=0, atol=6e-6)


def test_ramp_is_the_formula_in_float64() -> None:
    got = guidance_scales(10_000, 9.0, power=1.7)
    for t in (0, 1, 17, 5000, 9999):
        exact = 1 + (9.0 - 1) * (1 - math.cos(math.pi * (t / 10_000) ** 1.7)) / 2
        assert got[t].item() == pytest.approx(exact, rel=1e-6)


def test_power_zero_gives_the_full_scale_at_every_step() -> None:
    assert guidance_scales(5, 4.0, power=0.0).tolist() == [4.0] * 5


def test_constant_and_linear() -> None:
    assert guidance_scales(4, 3.0, "constant").tolist() == [3.0] * 4
    assert guidance_scales(4, 3.0, "linear").tolist() == [1.0, 1.5, 2.0, 2.5]


def test_lumina_drifts_to_four() -> None:
    case = golden("lumina/golden-guided-trajectory-decay")
    scales = CFG(9.0, schedule="lumina_released").scales(73, codes=64)
    assert torch.equal(scales, case.arrays["guidance_scale"].float())
    # At 768 px the released program reaches 4 from 6 in 42 steps, from 8 in 55, from 15 in 77.
    for scale, steps in ((6.0, 42), (8.0, 55), (15.0, 77)):
        scales = CFG(scale, schedule="lumina_released").scales(9313, codes=9216)
        assert (scales == 4).float().argmax().item() == steps - 1
    assert guidance_scales(3, 2.0, "lumina_released").tolist() == [4.0] * 3
    assert guidance_scales(3, 0.5, "lumina_released").tolist() == [1.0] * 3


def test_interval_leaves_the_other_steps_unguided() -> None:
    scales = CFG(guidance_scale=5.0, schedule="constant", interval=(1, 3)).scales(5)
    assert scales.tolist() == [1.0, 5.0, 5.0, 1.0, 1.0]


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_scales_zero_and_one_need_no_unconditional_branch(scale: float) -> None:
    guidance = CFG(guidance_scale=scale)
    assert not guidance.is_active
    assert guidance.scales(7).tolist() == [1.0] * 7


def test_scale_below_one_is_guidance() -> None:
    guidance = CFG(guidance_scale=0.5, schedule="constant")
    assert guidance.is_active
    assert guidance.scales(2).tolist() == [0.5, 0.5]


def test_guided_logits_are_the_papers_combination() -> None:
    cond, uncond = torch.randn(2, 3, 11, dtype=torch.float64)
    gamma = 2.75
    guided = CFG().guide(cond, uncond, 1 + gamma)
    torch.testing.assert_close(guided, (1 + gamma) * cond - gamma * uncond)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": -1.0}, r"guidance_scale must be a finite number >= 0, got -1\.0"),
        ({"scale": math.nan}, "guidance_scale must be a finite number >= 0, got nan"),
        ({"power": -1}, "guidance_scale_pow must be a finite number >= 0, got -1"),
        ({"schedule": "cosine"}, "schedule must be one of constant, linear, .*, got 'cosine'"),
        ({"interval": (4, 2)}, "interval must be two steps 0 <= start <= stop"),
        ({"steps": 2.5}, r"steps must be an integer >= 0, got 2\.5"),
        ({"codes": 0}, "codes must be an integer >= 1, got 0"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        guidance_scales(**{"steps": 5, "scale": 3.0, **arguments})
