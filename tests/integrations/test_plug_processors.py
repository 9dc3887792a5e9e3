"""Logits processors in the plug: once a step, after the rule and the third branch, whatever the guidance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

import softcfg  # noqa: E402
from plug_models import SHORT, llama, with_large_weights  # noqa: E402
from softcfg import CFG, Sampling, SoftCFG  # noqa: E402
from softcfg.decoding import decode, draw, image_uniforms  # noqa: E402
from softcfg.guidance import RULES, Rule  # noqa: E402
from softcfg.integrations import transformers as plug  # noqa: E402

T, PROMPTS = 12, torch.tensor([[10, 11, 12, 13, 14], [15, 21, 22, 23, 24]])
OWN_RULES = [name for name, rule in RULES.items() if rule.__module__.startswith("softcfg.")]


class Late(Rule):
    """The conditional logits themselves for six steps, then plain guidance."""

    constrained = True

    def guide(self, cond: Tensor, uncond: Tensor, scale: Any, *, step: Any, state: Any = None) -> Any:
        return (
            (cond, None)
            if (step < 6).all()
            else (cond.where(step < 6, super().guide(cond, uncond, scale, step=step)[0]), None)
        )


GUIDANCE: dict[str, CFG] = {
    "late": SoftCFG(4.0, schedule="constant", step_norm=False, rule=Late()),
    **{name: SoftCFG(4.0, schedule="constant", step_norm=False, rule=name) for name in OWN_RULES},  # type: ignore[arg-type]
    "pag": CFG(4.0, schedule="constant", perturbation="pag", perturbation_scale=2.0),  # type: ignore[arg-type]
    "apg+pag": CFG(4.0, schedule="constant", rule="apg", perturbation="pag", perturbation_scale=2.0),  # type: ignore[arg-type]
    "pag alone": CFG(1.0, perturbation="pag", perturbation_scale=2.0),  # type: ignore[arg-type]
    "softcfg away": CFG(1.0, perturbation="softcfg", perturbation_scale=3.0),  # type: ignore[arg-type]
    "unguided": CFG(1.0),
}


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    made = with_large_weights(llama())
    made.generation_config.eos_token_id = None
    return made


def drawn(model: Any, guidance: CFG, **settings: Any) -> Tensor:
    return plug.decode(model, PROMPTS, guidance, num_tokens=T, unconditional_ids=SHORT, seed=1, **settings)


@pytest.mark.parametrize("name", GUIDANCE)
def test_the_filters_of_generate_are_those_of_decode(model: Any, name: str) -> None:
    guidance = GUIDANCE[name]
    usual = {"top_k": 0, "top_p": 1.0, "temperature": 1.0}
    for settings in ({"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.5}):
        sequences = model.generate(
            PROMPTS, custom_generate=plug.generate, guidance=guidance, unconditional_ids=SHORT, do_sample=True,
            max_new_tokens=T, seed=1, **{**usual, **settings},
        )  # fmt: skip
        assert torch.equal(sequences[:, 5:], drawn(model, guidance, sampling=Sampling(**settings))), settings


def test_log_probabilities_draw_what_logits_draw(model: Any) -> None:
    """With a processor too that does not only rule out."""

    def halved(ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores - scores.amax(dim=-1, keepdim=True)
        return (scores / 2).masked_fill(scores < -9, -torch.inf)

    settings = {"logits_processor": [halved], "temperature": 0.8}
    expected = drawn(model, GUIDANCE["cfg"], **settings)
    assert torch.equal(drawn(model, GUIDANCE["log_softmax"], **settings), expected)
    assert not torch.equal(drawn(model, GUIDANCE["cfg"], temperature=0.8), expected)


@pytest.mark.parametrize("name", GUIDANCE)
def test_they_are_called_once_a_step_with_the_guided_logits(model: Any, name: str) -> None:
    guidance, seen = GUIDANCE[name], []

    def even_tokens(ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(scores)
        return scores.masked_fill(torch.arange(60) % 2 == 1, -torch.inf)

    tokens = drawn(model, guidance, logits_processor=[even_tokens])
    assert len(seen) == T
    assert (tokens % 2 == 0).all()
    of = softcfg.trace(
        plug.TransformersGenerator(model, T), labels=plug.Prompts(PROMPTS, SHORT), tokens=tokens, guidance=guidance
    )
    expected, state = of.cond_logits, None
    if guidance.is_active:
        parts = []
        for step in range(T):
            step_of = {"scale": of.guidance_scale[step, None], "step": torch.tensor([step]), "state": state}
            logits, state = guidance.rule.guide(of.cond_logits[:, step], of.uncond_logits[:, step], **step_of)
            parts.append(logits)
        expected = torch.stack(parts, dim=1)
    if of.perturbed_logits is not None:
        expected = expected + guidance.perturbation_scale * (of.cond_logits - of.perturbed_logits)
    torch.testing.assert_close(torch.stack(seen, dim=1).softmax(-1), expected.softmax(-1), rtol=0, atol=1e-4)
    traced = softcfg.trace(
        plug.TransformersGenerator(model, T, logits_processor=[even_tokens]),
        labels=plug.Prompts(PROMPTS, SHORT), tokens=tokens, guidance=guidance,
    )  # fmt: skip
    assert len(seen) == 2 * T
    assert traced.guided_logits[..., 1::2].isneginf().all()
    assert torch.equal(draw(traced.guided_logits.softmax(-1), image_uniforms(1, range(2), T)), tokens)


@pytest.mark.parametrize("name", GUIDANCE)
def test_they_may_write_into_what_they_get(model: Any, name: str) -> None:
    """As is usual in transformers: confidences and what is pushed away from are not changed by it."""

    def in_place(ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, 20:] = -torch.inf
        return scores

    def not_in_place(ids: Tensor, scores: Tensor) -> Tensor:
        return in_place(ids, scores.clone())

    expected = drawn(model, GUIDANCE[name], logits_processor=[not_in_place])
    assert torch.equal(drawn(model, GUIDANCE[name], logits_processor=[in_place]), expected)
    assert (expected < 20).all()


@pytest.mark.parametrize("name", ["rescale", "apg+pag"])
def test_rules_with_norms_take_them_over_what_an_image_allows(model: Any, name: str) -> None:
    guidance = GUIDANCE[name]
    layout = plug.ImageTokens(rows=3, columns=3, num_codes=25, first_code_id=20, row_end=(7,))
    generator = plug.ImageGenerator(model, layout, lambda prompt: plug.Prompts(PROMPTS[:1], SHORT))
    prompts = [plug.Prompts(PROMPTS[:1], SHORT)]
    tokens = decode(generator, prompts, guidance, uniforms=image_uniforms(0, range(1), T))
    of = softcfg.trace(generator, labels=prompts, tokens=tokens, guidance=guidance)
    for step in range(T):
        codes = slice(20, 45) if step % 4 < 3 else slice(7, 8)
        cond, uncond = of.cond_logits[:, step, codes], of.uncond_logits[:, step, codes]
        expected = guidance.guide(cond, uncond, of.guidance_scale[step])
        if of.perturbed_logits is not None:
            expected = expected + guidance.perturbation_scale * (cond - of.perturbed_logits[:, step, codes])
        torch.testing.assert_close(of.guided_logits[:, step, codes], expected, rtol=1e-4, atol=1e-4)
        assert of.guided_logits[:, step].isfinite().sum() == expected.numel()
