import math
from typing import Any

import pytest
import torch

from softcfg import SoftCFG
from softcfg.guidance import token_confidence

KINDS = ["max", "sampled", "entropy", "margin"]  # those that ablate the confidence are in test_weakened.py


def brute_force(logits: list[float], token: int, kind: str, temperature: float) -> float:
    top = max(logits)
    weights = [math.exp((z - top) / temperature) for z in logits]
    p = [w / sum(weights) for w in weights]
    if kind == "max":
        return max(p)
    if kind == "sampled":
        return p[token]
    if kind == "margin":
        first, second = sorted(p, reverse=True)[:2]
        return first - second
    return 1 + sum(q * math.log(q) for q in p if q > 0) / math.log(len(p))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_against_brute_force(kind: str, temperature: float) -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(4, 5, 33, dtype=torch.float64)
    tokens = torch.randint(33, (4, 5))
    got = token_confidence(logits, tokens, kind, temperature)
    assert got.dtype == torch.float64
    for b in range(4):
        for i in range(5):
            exact = brute_force(logits[b, i].tolist(), int(tokens[b, i]), kind, temperature)
            assert got[b, i].item() == pytest.approx(exact, abs=1e-12)
    single = token_confidence(logits.float(), tokens, kind, temperature)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), got, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_certain_and_uniform_distributions(kind: str) -> None:
    certain = torch.full((1, 50), -1e4)
    certain[0, 7] = 1e4
    assert token_confidence(certain, torch.tensor([7]), kind).item() == 1.0
    uniform = token_confidence(torch.zeros(1, 50), torch.tensor([7]), kind).item()
    expected = {"max": 0.02, "sampled": 0.02, "entropy": 0.0, "margin": 0.0}[kind]
    assert uniform == pytest.approx(expected, abs=1e-6)
    assert uniform >= 0


@pytest.mark.parametrize("kind", KINDS)
def test_codes_ruled_out_and_a_vocabulary_of_one(kind: str) -> None:
    logits = torch.tensor([[1.0, float("-inf"), 1.0]])
    assert 0 <= token_confidence(logits, torch.tensor([0]), kind).item() <= 1
    assert token_confidence(torch.zeros(1, 1), torch.tensor([0]), kind).item() == 1.0


def test_low_precision_logits_are_raised_to_float32() -> None:
    logits = torch.randn(2, 9).bfloat16()
    got = SoftCFG().token_confidence(logits, torch.tensor([0, 1]))
    torch.testing.assert_close(got, logits.float().softmax(-1).amax(-1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "maximum"}, "kind must be one of max, sampled, .*, got 'maximum'"),
        ({"temperature": 0}, "temperature must be a finite number > 0, got 0"),
        ({"temperature": -1.0}, r"temperature must be a finite number > 0, got -1\.0"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_confidence(torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64), **arguments)
