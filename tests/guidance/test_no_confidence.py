"""Tokens of which the model is not sure at all: a confidence of 0 is not that of a token which was not drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import softcfg
from prompt_model import CODES, LINE, PromptGenerator, prompt_generator
from softcfg import CFG, Sampling, SoftCFG
from softcfg.decoding import ImageStreams, decode, draw, image_uniforms, jacobi_decode
from softcfg.guidance import CONFIDENCES, PERTURBATIONS, ConfidenceWeights, Perturbation, register_confidence

T, LABELS = 15, [[5, 1, 2], [6, 3]]


class Marked(ConfidenceWeights):
    """Half of every image code that was drawn."""

    def weights(self, confidence: Tensor) -> Tensor:
        return 1 - 0.5 * (confidence > 0)


class Newest(PERTURBATIONS["window"]):  # type: ignore[misc]
    confidence = "none_for_even"


PERTURBED: dict[str, Callable[[], Perturbation]] = {
    "low_confidence": lambda: PERTURBATIONS["low_confidence"](confidence="none_for_even"),  # type: ignore[call-arg]
    "marked": lambda: Marked(confidence="none_for_even"),
    "marked by a kernel": lambda: Marked(confidence="sampled"),
    "window": lambda: Newest(size=2),
}


@pytest.fixture(autouse=True)
def none_for_even() -> Iterator[None]:
    @register_confidence("none_for_even")
    def confidence(probabilities: Tensor, tokens: Tensor) -> Tensor:
        return tokens % 2 * probabilities.amax(dim=-1)

    yield
    del CONFIDENCES["none_for_even"]


@pytest.fixture
def generator() -> PromptGenerator:
    """So sure that the probability of all codes but one is 0."""
    made = prompt_generator(T)
    made.output.weight.mul_(300)
    return made


@pytest.mark.parametrize("scale", [0.0, 1.0])
@pytest.mark.parametrize("name", PERTURBED)
def test_every_code_that_was_drawn_counts(
    generator: PromptGenerator, monkeypatch: pytest.MonkeyPatch, name: str, scale: float
) -> None:
    perturbation = PERTURBED[name]()
    guidance = CFG(3.0, schedule="constant", perturbation=perturbation, perturbation_scale=scale)
    tokens = torch.randint(CODES, (2, T), generator=torch.Generator().manual_seed(0))
    of = softcfg.trace(generator, labels=LABELS, tokens=tokens, guidance=guidance)
    is_code = (torch.arange(T) % LINE != LINE - 1).expand(2, -1)
    assert torch.equal(of.confidence > 0, is_code)
    assert (of.confidence[is_code] < 1e-30).any()
    step = torch.arange(T)
    drawn = is_code[:, None] & (step < step[:, None])
    if name == "low_confidence":
        hidden = (of.value_weights == 0).sum(dim=-1)
        assert torch.equal(hidden, drawn.sum(dim=-1) // 2)
        assert (of.confidence[:, -1] >= 0).all()
        last = of.value_weights[:, -1]
        for row in range(2):
            kept = of.confidence[row][drawn[row, -1] & (last[row] > 0)]
            assert of.confidence[row][last[row] == 0].max() <= kept.min()
    elif name == "window":
        assert torch.equal(of.value_weights == 0, drawn & (step[:, None] - step > 2))
    else:
        assert torch.equal(of.value_weights, 1 - 0.5 * drawn)

    seen: list[Tensor] = []
    forward, kind = (
        type(generator).forward,
        "attention_weights" if perturbation.target == "attention" else "value_weights",
    )

    def noted(self: Any, condition: Any, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get(kind) is not None:
            seen.append(kwargs[kind][-2:, condition.slots :].clone())
        return forward(self, condition, *args, **kwargs)

    monkeypatch.setattr(type(generator), "forward", noted)
    uniforms = image_uniforms(1, range(2), T)
    for static in (False, True):
        seen.clear()
        decode(generator, LABELS, guidance, uniforms=uniforms, forced_tokens=tokens, static=static)
        assert torch.equal(torch.stack(seen, dim=1), of.value_weights)


@pytest.mark.parametrize("name", PERTURBED)
def test_all_loops_agree(generator: PromptGenerator, name: str) -> None:
    guidance, uniforms = CFG(3.0, perturbation=PERTURBED[name]()), image_uniforms(1, range(2), T)
    tokens = decode(generator, LABELS, guidance, uniforms=uniforms)
    of = softcfg.trace(generator, labels=LABELS, tokens=tokens, guidance=guidance)
    assert torch.equal(tokens, draw(of.guided_logits.softmax(-1), uniforms))
    expected = decode(generator, LABELS, guidance, uniforms=uniforms, sampling=Sampling(top_k=1))
    streams = ImageStreams(0, range(2))
    drafted, _ = jacobi_decode(generator, LABELS, guidance, streams=streams, window=5, sampling=Sampling(top_k=1))
    assert torch.equal(drafted, expected)


def test_the_weights_of_softcfg_are_what_they_were(generator: PromptGenerator) -> None:
    """Without any confidence there is no budget to spend."""
    tokens = torch.zeros(2, T, dtype=torch.int64)
    of = softcfg.trace(generator, labels=LABELS, tokens=tokens, guidance=SoftCFG(3.0, confidence="none_for_even"))
    assert (of.confidence == 0).all()
    assert (of.value_weights == 1).all()
