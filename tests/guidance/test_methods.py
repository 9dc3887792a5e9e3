import dataclasses
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from softcfg import CFG, SoftCFG
from softcfg.guidance import describe


@pytest.mark.parametrize("number", [np.float32(1.5), np.float16(1.5), Fraction(3, 2), np.int64(2), np.uint8(2)])
def test_numbers_become_those_of_python(number: Any) -> None:
    guidance, kind = SoftCFG(number, strength=number), type(number.item()) if isinstance(number, np.generic) else float
    assert (guidance.guidance_scale, guidance.strength) == (number, number)
    assert {type(guidance.guidance_scale), type(guidance.strength)} == {kind}
    assert torch.equal(guidance.scales(9), SoftCFG(float(number)).scales(9))
    steps = CFG(interval=[np.int64(1), np.int64(3)]).interval  # type: ignore[arg-type]
    assert steps == (1, 3)
    assert {type(step) for step in steps} == {int}
    with pytest.raises(ValueError, match="guidance_scale must be at most 3"):
        CFG(10**400 * number if isinstance(number, Fraction) else np.float64(1e39))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("interval", (False, True)),
        ("guidance_scale", -1.0),
        ("guidance_scale", math.nan),
        ("guidance_scale", math.inf),
        ("guidance_scale", "4"),
        ("guidance_scale_pow", -0.1),
        ("guidance_scale_pow", math.nan),
        ("schedule", "quadratic"),
        ("schedule", None),
        ("interval", (5, 3)),
        ("interval", (-1, 3)),
        ("interval", (1,)),
        ("confidence", "median"),
        ("step_norm", "yes"),
        ("strength", -1.0),
        ("strength", math.nan),
        ("strength", True),
        ("floor", -0.01),
        ("floor", 1.01),
        ("floor", math.nan),
        ("eps", -1e-9),
        ("eps", math.nan),
        ("target", "query"),
        ("alignment", "next"),
    ],
)
def test_invalid_settings_name_the_field_and_the_value(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field) as raised:
        SoftCFG(**{field: value})  # type: ignore[arg-type]
    assert repr(value) in str(raised.value)
    if field in {plain.name for plain in dataclasses.fields(CFG)}:
        with pytest.raises(ValueError, match=field):
            CFG(**{field: value})  # type: ignore[arg-type]


def test_ranges_are_named() -> None:
    with pytest.raises(ValueError, match=r"floor must be a number in \[0, 1\], got 2"):
        SoftCFG(floor=2)
    with pytest.raises(ValueError, match="strength must be a finite number >= 0, got -1"):
        SoftCFG(strength=-1)
    with pytest.raises(
        ValueError, match="confidence must be one of max, sampled, entropy, margin, unsure, uniform, random, got 'x'"
    ):
        SoftCFG(confidence="x")


def test_presets() -> None:
    assert SoftCFG.paper() == SoftCFG()
    assert describe(SoftCFG.paper(guidance_scale=9.0)) == {
        "method": "SoftCFG",
        "guidance_scale": 9.0,
        "guidance_scale_pow": 1.0,
        "schedule": "cosine_power",
        "interval": None,
        "confidence": "max",
        "step_norm": True,
        "strength": 1.0,
        "floor": 0.0,
        "eps": 0.0,
        "target": "value",
        "alignment": "own",
    }
    released = SoftCFG.released(strength=0.5)
    assert (released.confidence, released.alignment, released.floor, released.eps, released.strength) == (
        "sampled", "successor", 0.05, 1e-5, 0.5,
    )  # fmt: skip


def test_released_without_step_norm_has_neither_floor_nor_exponent() -> None:
    released = SoftCFG.released(step_norm=False, strength=0.3)
    assert (released.floor, released.strength, released.perturbs) == (0.0, 1.0, True)
    assert not SoftCFG.released(step_norm=False, strength=0.0).perturbs


def test_strength_zero_is_plain_guidance() -> None:
    assert not SoftCFG(strength=0).perturbs
    assert SoftCFG(strength=0.1).perturbs
    assert not CFG().perturbs


def test_numpy_numbers_and_lists_are_welcome() -> None:
    method = SoftCFG(guidance_scale=np.float32(2.5), strength=np.int64(1), interval=[2, 5])  # type: ignore[arg-type]
    assert method.interval == (2, 5)
    assert method.is_active


def test_methods_are_immutable_and_comparable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SoftCFG().strength = 2  # type: ignore[misc]
    assert SoftCFG() != CFG()
