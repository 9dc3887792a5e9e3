"""The perturbations beside SoftCFG: their weights by hand, and what the unconditional branch then depends on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import softcfg
from softcfg import CFG, Pipeline, SoftCFG
from softcfg.decoding.perturbed import step_weights, weak_inputs
from softcfg.guidance import CONFIDENCES, PERTURBATIONS, OtherTokens, Perturbation, token_confidence
from softcfg.guidance.confidence import SCRAMBLED, scrambled
from softcfg.nn import use_backend
from softcfg.nn.attention import weighted_attention

WEIGHTED: list[tuple[str, dict[str, Any]]] = [
    ("low_confidence", {}),
    ("low_confidence", {"share": 0.3}),
    ("low_confidence", {"share": 1.0}),
    ("window", {"size": 3}),
    ("window", {"size": 1, "target": "value"}),
    ("decay", {"half_life": 2.5}),
    ("pag", {}),
]
REPLACING: list[tuple[str, dict[str, Any]]] = [("tpg", {"window": 4}), ("tpg", {}), ("vpg", {}), ("vpg", {"rate": 1.0})]


def made(name: str, settings: dict[str, Any]) -> Perturbation:
    return PERTURBATIONS[name](**settings)


def by_hand(name: str, settings: dict[str, Any], confidence: list[float], step: int) -> list[float]:
    """Weights at a step, of which the tokens before it are drawn; a confidence of 0 is of no image code."""
    weights = [1.0] * len(confidence)
    codes = [i for i in range(step) if confidence[i] > 0]
    if name == "low_confidence":
        hidden = sorted(codes, key=lambda i: confidence[i])[: int(settings.get("share", 0.5) * len(codes))]
        for i in hidden:
            weights[i] = 0.0
    for i in codes:
        age = step - i
        if name == "window" and age > settings["size"]:
            weights[i] = 0.0
        elif name == "decay":
            weights[i] = 0.5 ** ((age - 1) / settings["half_life"])
        elif name == "pag" and age > 1:
            weights[i] = 0.0
    return weights


@pytest.mark.parametrize(("name", "settings"), WEIGHTED)
def test_weights(name: str, settings: dict[str, Any]) -> None:
    confidence = torch.rand(3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) + 0.01
    confidence[1, 5], confidence[2, 0] = 0.0, 0.0
    perturbation = made(name, settings)
    weights = step_weights(confidence, perturbation, torch.arange(12))
    for row in range(3):
        for step in range(12):
            expected = by_hand(name, settings, confidence[row].tolist(), step)
            torch.testing.assert_close(weights[row, step], torch.tensor(expected, dtype=torch.float64))
            so_far = confidence[row] * (torch.arange(12) < step)
            torch.testing.assert_close(perturbation.weights_at(so_far, torch.tensor([step])), weights[row, step])


@pytest.mark.parametrize(("name", "settings"), REPLACING)
def test_sources_are_earlier_tokens(name: str, settings: dict[str, Any]) -> None:
    index = torch.arange(4000)
    source = made(name, settings).source(index)
    assert isinstance(made(name, settings), OtherTokens)
    assert (source >= 0).all()
    assert (source <= index).all()
    back = (index - source).double()
    if name == "tpg":
        window = settings.get("window", 16)
        assert back.max() == window - 1
        counts = back[window:].long().bincount(minlength=window).double() / (len(back) - window)
        torch.testing.assert_close(counts, torch.full((window,), 1 / window, dtype=torch.float64), rtol=0.25, atol=0)
    else:
        rate = settings.get("rate", 0.5)
        assert (back > 0).double().mean().item() == pytest.approx(rate, abs=0.03)
        share = (source[back > 0] / index[back > 0]).mean().item()
        assert share == pytest.approx(0.5, abs=0.03)
    one_by_one = torch.cat([made(name, settings).source(index[i : i + 1]) for i in range(50)])
    assert torch.equal(one_by_one, source[:50])


def test_structure_stays_in_its_place() -> None:
    tokens = torch.arange(100, 120).repeat(2, 1)
    codes = torch.arange(20) % 5 != 4
    perturbation = made("tpg", {})
    for index in (torch.arange(20), torch.arange(20).repeat(2, 1)):
        fed = weak_inputs(perturbation, tokens, index, codes)
        assert torch.equal(fed[:, 4::5], tokens[:, 4::5])
        others = fed[:, codes]
        assert (others != tokens[:, codes]).any()
        assert ((others - 100) % 5 != 4).all()
    assert torch.equal(weak_inputs(SoftCFG(), tokens, torch.arange(20), codes), tokens)


def test_scrambled_numbers_are_even() -> None:
    for salt in range(3):
        numbers = scrambled(torch.arange(100_000), salt).double() / SCRAMBLED
        assert numbers.min() >= 0
        assert numbers.max() < 1
        assert (numbers.histc(20, 0, 1) / 5000 - 1).abs().max() < 0.06
        assert torch.corrcoef(torch.stack((numbers[:-1], numbers[1:])))[0, 1].abs() < 0.02


def test_confidences_that_ablate() -> None:
    logits, tokens = torch.randn(4, 6, 30), torch.randint(30, (4, 6))
    assert torch.equal(token_confidence(logits, tokens, "uniform"), torch.full((4, 6), 0.5))
    largest = token_confidence(logits, tokens, "max")
    torch.testing.assert_close(token_confidence(logits, tokens, "unsure"), 1 - largest)
    random = token_confidence(logits, tokens, "random")
    assert torch.equal(random, token_confidence(-2 * logits, tokens, "random"))
    assert torch.equal(random[0, 0], token_confidence(logits[0, 0], tokens[0, 0], "random"))
    of_codes = CONFIDENCES["random"](torch.rand(5000, 5000), torch.arange(5000))
    assert 0 < of_codes.min() < 0.01
    assert 0.99 < of_codes.max() <= 1
    assert of_codes.mean().item() == pytest.approx(0.5, abs=0.02)
    weights = SoftCFG(confidence="uniform").weights(torch.tensor([0.5, 0.5, 0.5, 0.5, 0, 0]))
    torch.testing.assert_close(weights, torch.tensor([0.75, 0.75, 0.75, 0.75, 1, 1]))


@pytest.mark.parametrize("per_query", [False, True])
def test_weights_on_attention(per_query: bool) -> None:
    """The probabilities of the queries, weighted and renormalised; a slot of weight 0 might as well not be there."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 8, dtype=torch.float64) for n in (4, 7, 7))
    weights = torch.rand(2, 4, 7, dtype=torch.float64) if per_query else torch.rand(2, 7, dtype=torch.float64)
    weights[..., 2] = 0
    scores = query @ key.transpose(-1, -2) / 8**0.5
    scores = scores.masked_fill(~torch.ones(4, 7, dtype=torch.bool).tril(3), float("-inf"))
    weighted = scores.softmax(-1) * (weights[:, None] if per_query else weights[:, None, None])
    expected = weighted / weighted.sum(-1, keepdim=True) @ value
    out = weighted_attention(query, key, value, attention_weights=weights)
    torch.testing.assert_close(out, expected)
    kept = [0, 1, 3, 4, 5, 6]
    without = weighted_attention(query, key[:, :, kept], value[:, :, kept], attention_weights=weights[..., kept])
    torch.testing.assert_close(out, without)
    with pytest.raises(softcfg.UserError, match="it has no weights"), use_backend("sdpa"):
        weighted_attention(query, key, value, attention_weights=weights)


def uncond_logits(pipe: Pipeline, tokens: Tensor, name: str, **settings: Any) -> Tensor:
    guidance = CFG(3.0, perturbation=made(name, settings))
    return softcfg.trace(pipe.generator, labels=[1] * len(tokens), tokens=tokens, guidance=guidance).uncond_logits


def test_what_the_branch_depends_on(pipe: Pipeline) -> None:
    """Of the tokens so far: the newest alone with PAG, the newest few of each layer with a window."""
    tokens = torch.randint(20, (1, 16), generator=torch.Generator().manual_seed(0))
    other = tokens.clone()
    other[0, 3] = (other[0, 3] + 1) % 20
    both = torch.cat((tokens, other))
    layers = pipe.generator.cache_shape[0]
    for name, settings, reach in (("pag", {}, 1), ("window", {"size": 2}, 1 + layers)):
        one, two = uncond_logits(pipe, both, name, **settings)
        differ = [t for t in range(16) if not torch.allclose(one[t], two[t], atol=1e-5)]
        assert differ == list(range(4, 4 + reach))
    pag, window = (uncond_logits(pipe, tokens, name, **s) for name, s in (("pag", {}), ("window", {"size": 1})))
    assert torch.equal(pag, window)


@pytest.mark.parametrize(("name", "settings"), REPLACING)
def test_the_branch_reads_other_tokens(pipe: Pipeline, name: str, settings: dict[str, Any]) -> None:
    tokens = torch.randint(20, (2, 16), generator=torch.Generator().manual_seed(1))
    read = tokens[:, made(name, settings).source(torch.arange(16))]
    assert not torch.equal(read, tokens)
    expected = softcfg.trace(pipe.generator, labels=[1, 1], tokens=read, guidance=CFG(3.0)).uncond_logits
    torch.testing.assert_close(uncond_logits(pipe, tokens, name, **settings), expected)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("low_confidence", {"share": 0.0}),
        ("tpg", {"window": 1}),
        ("vpg", {"rate": 0.0}),
        ("softcfg", {"strength": 0.0}),
    ],
)
def test_no_strength_is_cfg(pipe: Pipeline, name: str, settings: dict[str, Any]) -> None:
    guidance = CFG(3.0, perturbation=made(name, settings))
    assert not guidance.perturbs
    assert guidance.is_plain
    assert torch.equal(pipe([0, 1], guidance).tokens, pipe([0, 1], CFG(3.0)).tokens)


@pytest.mark.parametrize(
    ("name", "settings"), [("window", {"size": 16}), ("decay", {"half_life": 1e9}), ("low_confidence", {"share": 1e-9})]
)
def test_weak_settings_come_close_to_cfg(pipe: Pipeline, name: str, settings: dict[str, Any]) -> None:
    tokens = torch.randint(20, (2, 16), generator=torch.Generator().manual_seed(1))
    expected = softcfg.trace(pipe.generator, labels=[1, 1], tokens=tokens, guidance=CFG(3.0)).uncond_logits
    torch.testing.assert_close(uncond_logits(pipe, tokens, name, **settings), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("share", "tokens", "hidden"), [(0.42, 150, 63), (0.29, 100, 29), (0.13, 900, 117), (0.3, 9, 2)]
)
def test_a_share_is_counted_exactly(share: float, tokens: int, hidden: int) -> None:
    confidence = torch.linspace(0.05, 0.95, tokens)[None]
    assert int((made("low_confidence", {"share": share}).weights(confidence) == 0).sum()) == hidden
