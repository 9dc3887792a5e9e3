import math

import pytest
import torch

from softcfg import Sampling
from softcfg.decoding import draw, image_uniforms


def brute_force(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    scaled = [z / temperature for z in logits]
    kept = set(range(len(logits)))
    if top_k:
        kth = sorted(scaled, reverse=True)[min(top_k, len(scaled)) - 1]
        kept = {i for i in kept if scaled[i] >= kth}
    mass = {i: math.exp(scaled[i]) for i in kept}
    p = {i: mass[i] / sum(mass.values()) for i in kept}
    before = 0.0
    nucleus = {}
    for i in sorted(p, key=lambda i: -p[i]):
        if before > top_p and top_p < 1:
            break
        nucleus[i] = p[i]
        before += p[i]
    return [nucleus.get(i, 0.0) / sum(nucleus.values()) for i in range(len(logits))]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 1, 5, 40])
@pytest.mark.parametrize("top_p", [1.0, 0.7, 0.05])
def test_probabilities_against_brute_force(temperature: float, top_k: int, top_p: float) -> None:
    torch.manual_seed(3)
    logits = 2 * torch.randn(6, 17)
    got = Sampling(temperature, top_k, top_p).probabilities(logits)
    for row, exact in zip(got, logits.tolist(), strict=True):
        expected = torch.tensor(brute_force(exact, temperature, top_k, top_p))
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-6)
        assert torch.equal(row > 0, expected > 0)


def entropy_of(p: list[float]) -> float:
    return -sum(q * math.log(q) for q in p if q)


@pytest.mark.parametrize("top_k", [0, 4])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_temperature_by_entropy(top_k: int, top_p: float) -> None:
    torch.manual_seed(3)
    logits = torch.randn(6, 17) * torch.tensor([0.1, 0.5, 1, 2, 4, 8])[:, None]
    sampling = Sampling(0.8, top_k, top_p, entropy_gain=2.5, entropy_decay=1.5, entropy_base=0.3)
    for row, exact in zip(sampling.probabilities(logits), logits.tolist(), strict=True):
        entropy = entropy_of(brute_force(exact, 1.0, top_k, 1.0))
        temperature = 0.8 * (2.5 * math.exp(-entropy / 1.5) + 0.3)
        expected = torch.tensor(brute_force(exact, temperature, top_k, top_p))
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("top_k", [0, 6])
@pytest.mark.parametrize("least", [1, 3])
def test_candidates_by_entropy(top_k: int, least: int) -> None:
    torch.manual_seed(3)
    logits = torch.randn(6, 17) * torch.tensor([0.01, 0.5, 1, 2, 4, 8])[:, None]
    out = torch.full((6, 9), float("-inf"))  # codes that cannot be have no part in the greatest entropy
    sampling = Sampling(0.8, top_k, 0.95, entropy_top_p=0.4, min_candidates=least)
    got = sampling.probabilities(torch.cat((out, logits), dim=1))
    assert (got[:, :9] == 0).all()
    sizes = []
    for row, exact in zip(got[:, 9:], logits.tolist(), strict=True):
        p = brute_force(exact, 0.8, top_k, 1.0)
        total = 0.4 + 0.55 * entropy_of(p) / math.log(17)
        expected = brute_force(exact, 0.8, top_k, total)
        if sum(q > 0 for q in expected) < least:
            kept = sorted(p, reverse=True)[:least]
            expected = [q / sum(kept) if q in kept else 0.0 for q in p]
        torch.testing.assert_close(row, torch.tensor(expected), rtol=0, atol=1e-5)
        sizes.append(int((row > 0).sum()))
    assert sizes[0] > sizes[-1] == least


def test_a_single_possible_code() -> None:
    logits = torch.full((2, 5), float("-inf"))
    logits[:, 3] = 1.0
    for settings in ({"entropy_gain": 1.0}, {"entropy_top_p": 0.5}, {"top_p": 0.5, "min_candidates": 4}):
        assert torch.equal(Sampling(**settings).probabilities(logits), (logits > 0).float())


def test_files_hold_what_was_chosen() -> None:
    assert Sampling(0.9, 5).describe() == {"temperature": 0.9, "top_k": 5, "top_p": 1.0}
    chosen = Sampling(entropy_gain=2.5, min_candidates=3)
    assert chosen.describe() == {
        "temperature": 1.0, "top_k": 0, "top_p": 1.0, "entropy_gain": 2.5, "min_candidates": 3,
    }  # fmt: skip
    assert Sampling(**chosen.describe()) == chosen


def test_ties_with_the_kth_stay() -> None:
    p = Sampling(top_k=2).probabilities(torch.tensor([[1.0, 3.0, 1.0, 1.0, 0.0]]))
    assert (p > 0).tolist() == [[True, True, True, True, False]]


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"entropy_gain": -1.0}, "entropy_gain"),
        ({"entropy_decay": 0.0}, "entropy_decay"),
        ({"entropy_base": 0.0}, "entropy_base"),
        ({"entropy_top_p": 1.5}, "entropy_top_p"),
        ({"min_candidates": 0}, "min_candidates"),
    ],
)
def test_invalid_settings(settings: dict, field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be"):
        Sampling(**settings)


def test_draw_is_the_inverse_cdf() -> None:
    p = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]]).repeat(7, 1)
    u = torch.tensor([0.0, 0.2, 0.25, 0.5, 0.7499, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert draw(p, u).tolist() == [1, 1, 3, 3, 3, 4, 4]


def test_a_code_of_probability_zero_is_never_drawn() -> None:
    torch.manual_seed(0)
    p = torch.rand(2000, 64)
    p[torch.rand_like(p) < 0.7] = 0
    p[:, 5] += 1e-30
    p[:, -3:] = 0
    for u in (torch.zeros(2000), torch.full((2000,), 1 - 2**-53, dtype=torch.float64), torch.rand(2000)):
        assert (p.gather(1, draw(p, u)[:, None]) > 0).all()


def test_drawn_frequencies_follow_the_probabilities() -> None:
    from scipy import stats

    p = torch.tensor([0.5, 0.2, 0.0, 0.05, 0.25])
    u = image_uniforms(5, range(100), 200).flatten()
    counts = torch.bincount(draw(p.expand(20_000, -1), u), minlength=5)
    assert counts[2] == 0
    seen = p > 0
    assert stats.chisquare(counts[seen].numpy(), (20_000 * p[seen].double()).numpy()).pvalue > 1e-3


def test_a_large_vocabulary_keeps_its_rare_codes() -> None:
    p = torch.full((1, 65_536), 1 / 65_536)
    for code in (0, 1, 40_000, 65_535):
        u = torch.tensor([(code + 0.5) / 65_536], dtype=torch.float64)
        assert draw(p, u).item() == code


@pytest.mark.parametrize("scale", [1.0, 1e-6, 300.0])
@pytest.mark.parametrize("codes", [1, 5, 16_384])
def test_whole_numbers_draw_what_float64_draws(codes: int, scale: float) -> None:
    torch.manual_seed(codes)
    p = scale * (3 * torch.randn(400, codes)).softmax(-1)
    p[torch.rand_like(p) < 0.3] = 0
    p[:, codes // 2] += 1e-9 * scale
    u = image_uniforms(0, range(400), 3)
    u[0], u[1] = 0, 1 - 2**-53
    units = (u * 2**53).long()
    for i in range(3):
        drawn = draw(p, units[:, i])
        assert torch.equal(drawn, draw(p, u[:, i]))
        assert (p.gather(1, drawn[:, None]) > 0).all()
