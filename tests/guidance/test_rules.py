"""Each rule against its formula in float64, against diffusers, and what all rules have in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from softcfg import CFG, SoftCFG
from softcfg.guidance import RULES, Rule

BUILT_IN = ["cfg", "rescale", "apg", "zero_star", "tcfg", "adaptive", "probability", "log_softmax"]
VARIED: dict[str, dict[str, Any]] = {
    **{name: {} for name in BUILT_IN},
    "apg+": {"eta": 0.3, "norm_threshold": 2.0, "momentum": -0.5},
    "zero_star+": {"init_steps": 3},
    "rescale+": {"share": 0.25},
    "adaptive+": {"alpha": 2.5},
}
Array = np.ndarray


def rule_named(name: str) -> Rule:
    return RULES[name.rstrip("+")](**VARIED[name])


def centred(z: Array) -> Array:
    return z - z.mean()


def projected(c: Array, u: Array, s: float, eta: float, threshold: float, momentum: float, last: Array) -> Any:
    d = c - u + momentum * last
    short = d * min(1, threshold / np.linalg.norm(d)) if threshold else d
    unit = c / np.linalg.norm(c)
    along = (short @ unit) * unit
    return c + (s - 1) * (short - along + eta * along), d


def damped(c: Array, u: Array, s: float) -> Array:
    v = np.linalg.svd(np.stack((c, u)), full_matrices=False)[2][0]
    u = (u @ v) * v
    return u + s * (c - u)


def by_hand(name: str, cond: Array, uncond: Array, scales: Array) -> Array:
    """Logits [T, V] of one image, step by step."""
    settings: dict[str, Any] = VARIED[name]
    guided, last = [], np.zeros(cond.shape[1])
    for t, (s, raw_c, raw_u) in enumerate(zip(scales, cond, uncond, strict=True)):
        c, u = centred(raw_c), centred(raw_u)
        z = u + s * (c - u)
        match name.rstrip("+"):
            case "rescale":
                share = settings.get("share", 0.7)
                z = share * z * c.std() / z.std() + (1 - share) * z
            case "apg":
                z, last = projected(
                    c,
                    u,
                    s,
                    settings.get("eta", 0),
                    settings.get("norm_threshold", 0),
                    settings.get("momentum", 0),
                    last,
                )
            case "zero_star":
                best = np.linalg.lstsq(u[:, None], c, rcond=None)[0][0]
                z = c if t < settings.get("init_steps", 1) else (1 - s) * best * u + s * c
            case "tcfg":
                z = damped(c, u, s)
            case "adaptive":
                ratio = np.linalg.norm(c - u) / np.linalg.norm(u)
                z = u + (1 + (s - 1) * np.exp(-settings.get("alpha", 1) * ratio)) * (c - u)
            case "probability":
                p_c, p_u = (np.exp(x) / np.exp(x).sum() for x in (raw_c, raw_u))
                with np.errstate(divide="ignore"):
                    z = np.log(np.maximum(0, (1 - s) * p_u + s * p_c))
        guided.append(z)
    return np.stack(guided)


def branches(images: int = 3, steps: int = 6, codes: int = 20, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    cond = 2 * torch.randn(images, steps, codes, dtype=torch.float64, generator=generator)
    return cond, 0.6 * cond + torch.randn(cond.shape, dtype=torch.float64, generator=generator) + 3


def guided_by(rule: Rule, cond: Tensor, uncond: Tensor, scales: Tensor) -> Tensor:
    return CFG(rule=rule).guide_steps(cond, uncond, scales, torch.arange(cond.shape[1]))[0]


SCALES = torch.tensor([1.0, 1.5, 4.0, 9.0, 0.5, 2.0], dtype=torch.float64)


def test_all_rules_of_the_package_are_tested() -> None:
    assert list(RULES)[: len(BUILT_IN)] == BUILT_IN
    assert {name.rstrip("+") for name in VARIED} == set(BUILT_IN)


@pytest.mark.parametrize("name", VARIED)
def test_the_formula(name: str) -> None:
    cond, uncond = branches()
    guided = guided_by(rule_named(name), cond, uncond, SCALES)
    for image in range(len(cond)):
        expected = torch.from_numpy(by_hand(name, cond[image].numpy(), uncond[image].numpy(), SCALES.numpy()))
        torch.testing.assert_close(guided[image].softmax(-1), expected.softmax(-1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", VARIED)
def test_a_constant_changes_nothing(name: str) -> None:
    cond, uncond = branches()
    expected = guided_by(rule_named(name), cond, uncond, SCALES).softmax(-1)
    for shift in (cond.new_tensor(5.0), torch.randn(3, 6, 1, dtype=torch.float64)):
        for shifted in ((cond + shift, uncond), (cond, uncond + shift), (cond + shift, uncond - 2 * shift)):
            guided = guided_by(rule_named(name), *shifted, SCALES).softmax(-1)
            torch.testing.assert_close(guided, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", VARIED)
def test_scale_one_is_the_conditional_branch(name: str) -> None:
    cond, uncond = branches()
    guided = guided_by(rule_named(name), cond, uncond, torch.ones(6, dtype=torch.float64))
    expected = cond.log_softmax(-1) if name in ("probability", "log_softmax") else cond
    torch.testing.assert_close(guided, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", VARIED)
def test_equal_branches_stay_as_they_are(name: str) -> None:
    cond, _ = branches()
    guided = guided_by(rule_named(name), cond, cond + 1, SCALES)
    expected = cond.softmax(-1)
    torch.testing.assert_close(guided.softmax(-1), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("rescale", {"share": 0.0}),
        ("apg", {"eta": 1.0}),
        ("adaptive", {"alpha": 0.0}),
        ("log_softmax", {}),
    ],
)
def test_what_is_switched_off_is_cfg(name: str, settings: dict[str, Any]) -> None:
    cond, uncond = branches()
    guided = guided_by(RULES[name](**settings), cond, uncond, SCALES).softmax(-1)
    torch.testing.assert_close(guided, guided_by(Rule(), cond, uncond, SCALES).softmax(-1), rtol=1e-9, atol=1e-12)


def test_an_adaptive_scale_is_none_away_from_flat_logits() -> None:
    """The relative distance to them is endless, so it is as from logits that are nearly flat."""
    cond, uncond = branches()
    flat, nearly = (guided_by(RULES["adaptive"](), cond, small * uncond, SCALES) for small in (0.0, 1e-12))
    torch.testing.assert_close(flat.softmax(-1), cond.softmax(-1), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(flat.softmax(-1), nearly.softmax(-1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in VARIED if name != "cfg"])
def test_ruled_out_tokens_are_out_of_the_norms(name: str) -> None:
    """Beside tokens at -inf in both branches, the others are guided as if there were no more of them."""
    cond, uncond = branches()
    expected = guided_by(rule_named(name), cond, uncond, SCALES)
    out = torch.full((3, 6, 7), float("-inf"), dtype=torch.float64)
    guided = guided_by(rule_named(name), *(torch.cat((out, z, out), dim=-1) for z in (cond, uncond)), SCALES)
    assert guided[..., :7].isneginf().all()
    assert guided[..., -7:].isneginf().all()
    torch.testing.assert_close(guided[..., 7:-7], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", VARIED)
def test_logits_that_say_nothing(name: str) -> None:
    """Equal logits in one branch or both are no division by zero."""
    cond, _ = branches()
    if name == "cfg":
        return
    for pair in ((cond, cond * 0), (cond * 0, cond), (cond * 0, cond * 0)):
        probabilities = guided_by(rule_named(name), *pair, SCALES).softmax(-1)
        assert probabilities.isfinite().all()


@pytest.mark.parametrize("name", VARIED)
def test_float32_and_single_steps(name: str) -> None:
    """As decoding calls it: one step after the other, logits [B, V], and the state handed on."""
    cond, uncond = branches()
    guidance = SoftCFG(rule=rule_named(name))
    expected, state, steps = guided_by(rule_named(name), cond, uncond, SCALES), None, torch.arange(6)
    for t in range(6):
        guided, state = guidance.guide_step(
            cond[:, t].float(), uncond[:, t].float(), SCALES[t : t + 1].float(), step=steps[t : t + 1], state=state
        )
        assert guided.dtype == torch.float32
        torch.testing.assert_close(guided.double().softmax(-1), expected[:, t].softmax(-1), rtol=0, atol=2e-5)
        plain, _ = rule_named(name).guide(cond[:, t], uncond[:, t], float(SCALES[t]), step=t)
        assert plain.shape == guided.shape
    assert (state is None) == (not guidance.rule.stateful)


def test_apg_remembers_only_with_a_momentum() -> None:
    assert not RULES["apg"]().stateful
    assert RULES["apg"](momentum=0.5).stateful  # type: ignore[call-arg]


GUIDERS: dict[str, Callable[[], Rule]] = {
    "cfg": lambda: Rule(),
    "rescale": lambda: RULES["rescale"](),
    "apg": lambda: RULES["apg"](),
    "apg_all": lambda: RULES["apg"](eta=0.3, norm_threshold=15.0, momentum=-0.5),  # type: ignore[call-arg]
    "zero_star": lambda: RULES["zero_star"](init_steps=0),  # type: ignore[call-arg]
    "tcfg": lambda: RULES["tcfg"](),
    "adaptive": lambda: RULES["adaptive"](alpha=0.8),  # type: ignore[call-arg]
}


@pytest.mark.parametrize("name", GUIDERS)
def test_diffusers_guiders(name: str) -> None:
    """Numbers of diffusers 0.42.1: `forward(cond[t], uncond[t]).pred` of its guiders at a scale of 4, for 4 steps of 3
    images with 50 codes, cond and uncond float64 and centred. They are, by the names of the arrays:

    cfg         ClassifierFreeGuidance()
    rescale     ClassifierFreeGuidance(guidance_rescale=0.7)
    apg         AdaptiveProjectedGuidance(eta=0.0, adaptive_projected_guidance_rescale=0.0)
    apg_all     the same with eta=0.3, a rescale of 15.0 and a momentum of -0.5
    zero_star   ClassifierFreeZeroStarGuidance(zero_init_steps=0)
    tcfg        TangentialClassifierFreeGuidance()
    adaptive    MagnitudeAwareGuidance(alpha=0.8)

    each with guidance_scale=4.0, but for APG with guidance_scale=3.0 and use_original_formulation=True, the paper's.
    Zero star and TCFG compute in float32.
    """
    arrays = load_file(Path(__file__).parents[1] / "golden" / "guiders" / "guiders.safetensors")
    cond, uncond = (arrays[name].transpose(0, 1) for name in ("cond", "uncond"))
    guided = guided_by(GUIDERS[name](), cond, uncond, torch.full((4,), 4.0, dtype=torch.float64))
    tolerance = 1e-5 if name in ("zero_star", "tcfg") else 1e-10
    torch.testing.assert_close(guided.transpose(0, 1), arrays[name], rtol=tolerance, atol=tolerance)
