"""The conditional branch, perturbed, as a third one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import softcfg
from prompt_model import PromptGenerator, prompt_generator
from softcfg import CFG, Pipeline, Sampling, SoftCFG
from softcfg.decoding import ImageStreams, decode, draw, image_uniforms, jacobi_decode
from softcfg.guidance import PERTURBATIONS, describe, restore
from tiny_models import tiny_llama

GUIDANCE = {
    "pag": CFG(1.0, perturbation="pag", perturbation_scale=2.0),  # type: ignore[arg-type]
    "cfg+pag": CFG(3.0, 0.5, perturbation="pag", perturbation_scale=2.0),  # type: ignore[arg-type]
    "apg+vpg": CFG(3.0, 0.5, interval=(2, 11), rule="apg", perturbation="vpg", perturbation_scale=1.5),  # type: ignore[arg-type]
    "tcfg+tpg": CFG(3.0, 0.5, rule="tcfg", perturbation="tpg", perturbation_scale=0.5),  # type: ignore[arg-type]
    "softcfg": SoftCFG(3.0, 0.5, strength=2.0, perturbation_scale=3.0),
}


@pytest.mark.parametrize("name", GUIDANCE)
def test_the_logits(pipe: Pipeline, name: str) -> None:
    """Those of the rule, and the difference of the conditional branch as it is and as it is perturbed."""
    guidance = GUIDANCE[name]
    tokens = torch.randint(20, (2, 16), generator=torch.Generator().manual_seed(0))
    trace = softcfg.trace(pipe.generator, labels=[1, 2], tokens=tokens, guidance=guidance, steps_per_pass=6)
    parts = {"rule": guidance.rule, "interval": guidance.interval}
    plain = softcfg.trace(
        pipe.generator, labels=[1, 2], tokens=tokens, guidance=CFG(guidance.guidance_scale, 0.5, **parts)
    )  # fmt: skip
    for field in ("cond_logits", "uncond_logits"):
        torch.testing.assert_close(getattr(trace, field), getattr(plain, field), rtol=0, atol=1e-5)
    # The same perturbation of a model whose null class is the class that is drawn.
    null, condition = pipe.generator.num_classes, pipe.generator.condition
    for row, label in enumerate((1, 2)):
        perturbed = CFG(2.0, perturbation=_perturbation(guidance))
        with pytest.MonkeyPatch.context() as patch:

            def swapped(labels: list[int], *, guided: bool, label: int = label) -> object:
                made = condition(labels, guided=guided)
                made.classes[made.classes == null] = label
                return made

            patch.setattr(pipe.generator, "condition", swapped)
            expected = softcfg.trace(
                pipe.generator, labels=[label], tokens=tokens[row : row + 1], guidance=perturbed
            ).uncond_logits
        assert trace.perturbed_logits is not None
        torch.testing.assert_close(trace.perturbed_logits[row : row + 1], expected, rtol=0, atol=1e-4)
    step = torch.arange(16)
    first, stop = guidance.interval or (0, 16)
    scale = guidance.perturbation_scale * ((step >= first) & (step < stop))[:, None]
    guided = plain.guided_logits + scale * (trace.cond_logits - trace.perturbed_logits)
    torch.testing.assert_close(trace.guided_logits, guided, rtol=0, atol=1e-4)


def _perturbation(guidance: CFG) -> object:
    return PERTURBATIONS["softcfg"](strength=2.0) if isinstance(guidance, SoftCFG) else guidance.perturbation  # type: ignore[call-arg]


@pytest.mark.parametrize("name", GUIDANCE)
def test_decoding(pipe: Pipeline, prompt_pipe: Pipeline, name: str) -> None:
    guidance, sampling, greedy = GUIDANCE[name], Sampling(0.8, top_k=12), Sampling(top_k=1)
    words = prompt_pipe.conditioning.inputs(prompt_pipe.conditioning.requests(["a red house", "a dog"]))
    for generator, inputs in ((pipe.generator, [0, 1]), (prompt_pipe.generator, words)):
        count = generator.condition(inputs, guided=False).num_tokens
        uniforms = image_uniforms(5, range(2), count)
        tokens = decode(generator, inputs, guidance, uniforms=uniforms, sampling=sampling)
        trace = softcfg.trace(generator, labels=inputs, tokens=tokens, guidance=guidance, sampling=sampling)
        assert torch.equal(tokens, draw(sampling.probabilities(trace.guided_logits), uniforms))
        static = decode(generator, inputs, guidance, uniforms=uniforms, sampling=sampling, static=True)
        assert torch.equal(static, tokens)
        expected = decode(generator, inputs, guidance, uniforms=uniforms, sampling=greedy)
        streams = ImageStreams(0, range(2))
        drafted, _ = jacobi_decode(generator, inputs, guidance, streams=streams, window=5, sampling=greedy)
        assert torch.equal(drafted, expected)


@pytest.mark.parametrize("name", GUIDANCE)
def test_plug(name: str) -> None:
    pytest.importorskip("transformers")
    from softcfg.integrations import transformers as plug

    model = tiny_llama()
    guidance, sampling = GUIDANCE[name], Sampling(top_k=10)
    prompts = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]]), "unconditional_ids": torch.tensor([[1]])}
    tokens = plug.decode(model, guidance=guidance, num_tokens=9, sampling=sampling, seed=3, **prompts)
    trace = softcfg.trace(
        plug.TransformersGenerator(model, 9), labels=plug.Prompts(**prompts), tokens=tokens, guidance=guidance
    )
    assert torch.equal(tokens, draw(sampling.probabilities(trace.guided_logits), image_uniforms(3, range(2), 9)))


@pytest.mark.parametrize("name", ["pag", "apg+vpg", "tcfg+tpg"])
def test_a_trace_shows_processors_the_tokens(name: str) -> None:
    """And not those that are read in their place by the branch that is perturbed."""
    pytest.importorskip("transformers")
    from softcfg.integrations import transformers as plug

    seen: list[list[int]] = []

    def note(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.extend(ids[:, -8:].tolist())
        return scores

    prompts = plug.Prompts(torch.tensor([[5, 6, 7], [8, 9, 10]]), torch.tensor([[1]]))
    tokens = torch.arange(20, 38).view(2, 9)
    generator = plug.TransformersGenerator(tiny_llama(), 9, logits_processor=[note])
    softcfg.trace(generator, labels=prompts, tokens=tokens, guidance=GUIDANCE[name])
    assert {tuple(row) for row in seen if len(row) == 8 and row[0] in (20, 29)} == {
        tuple(row[:8]) for row in tokens.tolist()
    }


def test_settings_and_traces(pipe: Pipeline, tmp_path: Path) -> None:
    for guidance in GUIDANCE.values():
        settings = describe(guidance)
        assert settings["perturbation_scale"] == guidance.perturbation_scale
        assert restore(json.loads(json.dumps(settings))) == guidance
    assert "perturbation_scale" not in describe(SoftCFG())
    trace = softcfg.trace(pipe.generator, labels=[0], guidance=GUIDANCE["pag"])
    trace.save(tmp_path / "trace.safetensors")
    saved = load_file(tmp_path / "trace.safetensors")
    assert torch.equal(saved["perturbed_logits"], trace.perturbed_logits)
    assert trace.at(torch.arange(16) < 3).perturbed_logits.shape[1] == 3  # type: ignore[union-attr]


def test_what_it_takes() -> None:
    off = CFG(3.0, perturbation_scale=2.0)
    assert not off.perturbs
    assert off.is_plain
    alone = GUIDANCE["pag"]
    assert alone.perturbs
    assert alone.has_third_branch
    assert not alone.is_active
    assert not SoftCFG(1.0).perturbs
    assert not SoftCFG(3.0).has_third_branch
    with pytest.raises(ValueError, match="perturbation_scale must be a finite number >= 0"):
        CFG(perturbation_scale=-1.0)


def test_logits_that_are_no_numbers(pipe: Pipeline) -> None:
    """The branch that they are of is named."""
    forward = type(pipe.generator).forward

    def broken(
        self: object, condition: object, *args: object, attention_weights: object = None, **kwargs: object
    ) -> object:
        logits = forward(self, condition, *args, **kwargs)  # type: ignore[arg-type]
        return logits if attention_weights is None else logits * float("nan")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(pipe.generator), "forward", broken)
        for name, branch in (("pag", "perturbed"), ("cfg+pag", "perturbed")):
            with pytest.raises(softcfg.UserError, match=f"the {branch} logits of row 0 at step"):
                pipe([0, 1], GUIDANCE[name])
            with pytest.raises(softcfg.UserError, match=f"the {branch} logits of row 0 at step"):
                softcfg.trace(pipe.generator, labels=[0], tokens=[[0] * 16], guidance=GUIDANCE[name])


@pytest.mark.parametrize("name", GUIDANCE)
def test_what_a_generator_makes_of_guided_logits_comes_last(name: str) -> None:
    """After the rule and the third branch, in every loop, and without what is not allowed."""

    class UpsideDown(PromptGenerator):
        def processed(self, logits: torch.Tensor, steps: torch.Tensor, condition: object) -> torch.Tensor:
            return logits.where(logits.isneginf(), -logits)

    guidance, greedy, labels = GUIDANCE[name], Sampling(top_k=1), [[5, 1, 2], [6, 3]]
    plain, turned = prompt_generator(16), UpsideDown(16).requires_grad_(False).eval()
    turned.load_state_dict(plain.state_dict())
    uniforms = image_uniforms(5, range(2), 16)
    tokens = decode(turned, labels, guidance, uniforms=uniforms)
    of = {
        each: softcfg.trace(each, labels=labels, tokens=tokens, guidance=guidance).guided_logits
        for each in (plain, turned)
    }
    ruled_out = of[plain].isneginf()
    assert ruled_out.any()
    torch.testing.assert_close(of[turned], -of[plain].masked_fill(ruled_out, torch.inf))
    assert torch.equal(tokens, draw(of[turned].softmax(-1), uniforms))
    expected = decode(turned, labels, guidance, uniforms=uniforms, sampling=greedy)
    streams = ImageStreams(0, range(2))
    drafted, _ = jacobi_decode(turned, labels, guidance, streams=streams, window=5, sampling=greedy)
    assert torch.equal(drafted, expected)
