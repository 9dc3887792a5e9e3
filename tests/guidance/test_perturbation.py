from typing import Any

import pytest
import torch

from softcfg import SoftCFG
from softcfg.guidance import perturbation_weights


def brute_force(c: list[float], generated: int, m: SoftCFG) -> list[float]:
    """Weights at the step after `generated` tokens, by the definitions, in Python floats."""
    if m.alignment == "own":
        carried = {i: c[i] for i in range(generated)}
    else:
        carried = {i: c[i + 1] for i in range(generated - 1)}
    total = sum(carried.values()) + m.eps
    weights = [1.0] * len(c)
    for i, confidence in carried.items():
        share = confidence
        if m.step_norm:
            share = confidence / total if total else 0.0
        weights[i] = max(m.floor, (1 - share) ** m.strength)
    return weights


METHODS = [
    SoftCFG(),
    SoftCFG(step_norm=False),
    SoftCFG(strength=0.5),
    SoftCFG(strength=3.0, floor=0.1, eps=1e-3),
    SoftCFG(step_norm=False, strength=2.0, floor=0.3),
    SoftCFG.released(),
    SoftCFG.released(strength=3.0),
    SoftCFG.released(step_norm=False),
    SoftCFG(strength=0.0),
]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_against_brute_force(method: SoftCFG) -> None:
    torch.manual_seed(1)
    confidence = torch.rand(3, 12, dtype=torch.float64)
    confidence[1, 4], confidence[2, 0] = 1.0, 0.0
    for generated in range(13):
        buffer = confidence.clone()
        buffer[:, generated:] = 0
        exact = [brute_force(row, generated, method) for row in confidence.tolist()]
        torch.testing.assert_close(method.weights(buffer), torch.tensor(exact, dtype=torch.float64))
        torch.testing.assert_close(method.weights(buffer.float()), torch.tensor(exact), rtol=0, atol=2e-6)


def test_worked_example() -> None:
    confidence = torch.tensor([0.9, 0.5, 0.99], dtype=torch.float64)
    plain = SoftCFG(step_norm=False).weights(confidence)
    torch.testing.assert_close(plain, torch.tensor([0.1, 0.5, 0.01], dtype=torch.float64))
    normalised = SoftCFG().weights(confidence)
    exact = torch.tensor([1 - 0.9 / 2.39, 1 - 0.5 / 2.39, 1 - 0.99 / 2.39], dtype=torch.float64)
    torch.testing.assert_close(normalised, exact)
    assert (1 - normalised).sum().item() == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-6, 0.01, 1.0])
def test_ten_thousand_tokens_keep_the_budget(dtype: torch.dtype, scale: float) -> None:
    torch.manual_seed(2)
    confidence = scale * torch.rand(2, 10_000, dtype=dtype)
    confidence[:, ::7] = 0.0
    if scale == 1.0:
        confidence[:, ::11] = 1.0
    for generated in (1, 2, 100, 9_999, 10_000):
        buffer = confidence.clone()
        buffer[:, generated:] = 0
        buffer[:, 0] = max(scale, 1e-3)
        weights = SoftCFG().weights(buffer)
        assert ((weights >= 0) & (weights <= 1)).all()
        # float32 keeps 1 - w to 3e-8 a token.
        tolerance = 1e-12 if dtype == torch.float64 else 1e-6 + 3e-8 * generated
        torch.testing.assert_close((1 - weights).sum(-1), torch.ones(2, dtype=dtype), rtol=0, atol=tolerance)


def test_without_step_norm_the_perturbation_grows_with_the_length() -> None:
    confidence = torch.full((10_000,), 0.5, dtype=torch.float64)
    assert (1 - SoftCFG(step_norm=False).weights(confidence)).sum().item() == 5_000


@pytest.mark.parametrize("step_norm", [True, False])
@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_confidences_of_exactly_zero_and_one(step_norm: bool, strength: float, value: float) -> None:
    weights = SoftCFG(step_norm=step_norm, strength=strength).weights(torch.full((2, 10_000), value))
    share = value / 10_000 if step_norm else value
    torch.testing.assert_close(weights, torch.full((2, 10_000), (1 - share) ** strength))


def test_a_single_confident_token_loses_its_whole_value() -> None:
    confidence = torch.zeros(1, 5)
    confidence[0, 0] = 0.3
    assert SoftCFG().weights(confidence).tolist() == [[0.0, 1.0, 1.0, 1.0, 1.0]]
    assert SoftCFG(floor=0.05).weights(confidence)[0, 0].item() == pytest.approx(0.05)


def test_nothing_generated_means_weights_of_one() -> None:
    for method in METHODS:
        assert method.weights(torch.zeros(2, 6)).tolist() == [[1.0] * 6] * 2


def test_successor_alignment_shifts_by_one() -> None:
    confidence = torch.tensor([0.7, 0.2, 0.4, 0.0])
    weights = perturbation_weights(confidence, step_norm=False, alignment="successor")
    torch.testing.assert_close(weights, torch.tensor([0.8, 0.6, 1.0, 1.0]))


def test_weights_are_differentiable_and_leave_their_input_alone() -> None:
    confidence = torch.tensor([0.7, 0.2], requires_grad=True)
    before = confidence.detach().clone()
    SoftCFG().weights(confidence)[0].backward()
    assert confidence.grad is not None
    assert torch.equal(confidence.detach(), before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alignment": "Successor"}, "alignment must be one of own, successor, got 'Successor'"),
        ({"step_norm": "off"}, "step_norm must be True or False, got 'off'"),
        ({"strength": -1}, "strength must be a finite number >= 0, got -1"),
        ({"floor": 3}, r"floor must be a number in \[0, 1\], got 3"),
        ({"eps": -3}, "eps must be a finite number >= 0, got -3"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        perturbation_weights(torch.tensor([0.5, 0.25]), **settings)
