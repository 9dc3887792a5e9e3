"""Every rule and perturbation of the package wherever guidance acts: decoding, traces, speculative decoding, other
libraries' models, files, commands, sweeps, runs and the web page."""

from __future__ import annotations

import json
import urllib.parse
from pathlib import Path

import numpy as np
import pytest
import torch

import softcfg
from softcfg import CFG, Pipeline, Sampling, SoftCFG
from softcfg.cli import arguments
from softcfg.cli.main import build_parser, main
from softcfg.decoding import ImageStreams, decode, draw, image_uniforms, jacobi_decode
from softcfg.guidance import PERTURBATIONS, RULES, describe, restore
from softcfg.runs.folder import RunFolder
from softcfg.tuning.space import methods, sample_flags
from softcfg.ui.settings import METHODS
from softcfg.ui.studio import Studio
from tiny_models import tiny_llama

GREEDY = Sampling(top_k=1)
GUIDANCE: dict[str, CFG] = {
    "none+cfg": CFG(3.0, 0.5),
    "softcfg": SoftCFG(3.0, 0.5),
    **{f"none+{name}": CFG(3.0, 0.5, rule=name) for name in RULES if name != "cfg"},  # type: ignore[arg-type]
    **{f"softcfg+{name}": SoftCFG(3.0, 0.5, rule=name) for name in RULES if name != "cfg"},  # type: ignore[arg-type]
    **{
        f"{name}+cfg": CFG(3.0, 0.5, perturbation=name)  # type: ignore[arg-type]
        for name in PERTURBATIONS
        if name not in ("none", "softcfg")
    },
    "window+rescale": CFG(3.0, 0.5, rule="rescale", perturbation=PERTURBATIONS["window"](size=3)),  # type: ignore[arg-type, call-arg]
    "pag+apg": CFG(3.0, 0.5, rule=RULES["apg"](momentum=0.5, eta=0.1), perturbation="pag"),  # type: ignore[arg-type, call-arg]
    "vpg+tcfg": CFG(3.0, 0.5, rule="tcfg", perturbation=PERTURBATIONS["vpg"](rate=1.0)),  # type: ignore[arg-type, call-arg]
}
ON_PAGE = [name for name in GUIDANCE if name in METHODS]


@pytest.mark.parametrize("name", GUIDANCE)
def test_decoding(pipe: Pipeline, name: str) -> None:
    """A replay of the drawn tokens draws them again; so do steps of constant shapes and a window of drafts."""
    guidance, labels, sampling = GUIDANCE[name], [0, 1], Sampling(0.8, top_k=12)
    uniforms = image_uniforms(5, range(2), 16)
    tokens = decode(pipe.generator, labels, guidance, uniforms=uniforms, sampling=sampling)
    for steps in (16, 5):
        trace = softcfg.trace(
            pipe.generator, labels=labels, tokens=tokens, guidance=guidance, sampling=sampling, steps_per_pass=steps
        )
        assert torch.equal(tokens, draw(sampling.probabilities(trace.guided_logits), uniforms))
    static = decode(pipe.generator, labels, guidance, uniforms=uniforms, sampling=sampling, static=True)
    assert torch.equal(static, tokens)
    expected = decode(pipe.generator, labels, guidance, uniforms=uniforms, sampling=GREEDY)
    drafted, _ = jacobi_decode(
        pipe.generator, labels, guidance, streams=ImageStreams(0, range(2)), window=5, sampling=GREEDY
    )
    assert torch.equal(drafted, expected)


def test_they_draw_different_images(pipe: Pipeline) -> None:
    """But for log-probabilities, which are logits less a constant, and a window over all of the image."""
    drawn = {name: tuple(pipe([0, 1, 2, 3], g).tokens.flatten().tolist()) for name, g in GUIDANCE.items()}
    for name, same in (
        ("none+log_softmax", "none+cfg"),
        ("softcfg+log_softmax", "softcfg"),
        ("window+cfg", "none+cfg"),
    ):
        assert drawn.pop(name) == drawn[same]
    assert len(set(drawn.values())) == len(drawn)


@pytest.mark.parametrize("name", GUIDANCE)
def test_a_model_of_texts_and_codes(prompt_pipe: Pipeline, name: str) -> None:
    """Lines of codes with ends, in a vocabulary of which most tokens are ruled out; rows of different lengths."""
    generator, guidance = prompt_pipe.generator, GUIDANCE[name]
    inputs = prompt_pipe.conditioning.inputs(prompt_pipe.conditioning.requests(["a red house", "a dog"]))
    count = generator.condition(inputs, guided=False).num_tokens
    uniforms = image_uniforms(2, range(2), count)
    tokens = decode(generator, inputs, guidance, uniforms=uniforms)
    trace = softcfg.trace(generator, labels=inputs, tokens=tokens, guidance=guidance, steps_per_pass=7)
    probabilities = trace.guided_logits.softmax(-1)
    assert torch.equal(tokens, draw(probabilities, uniforms))
    ruled_out = generator.constrain(
        torch.zeros_like(probabilities), torch.arange(count), generator.condition(inputs, guided=False)
    ).isneginf()
    assert ruled_out.any()
    assert (probabilities[ruled_out] == 0).all()
    expected = decode(generator, inputs, guidance, uniforms=uniforms, sampling=GREEDY)
    drafted, _ = jacobi_decode(
        generator, inputs, guidance, streams=ImageStreams(0, range(2)), window=6, sampling=GREEDY
    )
    assert torch.equal(drafted, expected)


@pytest.fixture(scope="module")
def llama() -> torch.nn.Module:
    pytest.importorskip("transformers")
    from softcfg.integrations import transformers as _  # noqa: F401

    model = tiny_llama()
    return model


@pytest.mark.parametrize("name", GUIDANCE)
def test_plug(llama: torch.nn.Module, name: str) -> None:
    from softcfg.integrations import transformers as plug

    guidance, sampling = GUIDANCE[name], Sampling(top_k=10)
    prompts = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]]), "unconditional_ids": torch.tensor([[1]])}
    tokens = plug.decode(llama, guidance=guidance, num_tokens=9, sampling=sampling, seed=3, **prompts)
    generator = plug.TransformersGenerator(llama, 9)
    trace = softcfg.trace(generator, labels=plug.Prompts(**prompts), tokens=tokens, guidance=guidance)
    assert torch.equal(tokens, draw(sampling.probabilities(trace.guided_logits), image_uniforms(3, range(2), 9)))


@pytest.mark.parametrize("name", GUIDANCE)
def test_settings_files_flags_and_sweeps(pipe: Pipeline, name: str) -> None:
    guidance = GUIDANCE[name]
    settings = describe(guidance)
    assert restore(json.loads(json.dumps(settings))) == guidance
    words = sample_flags(guidance, Sampling(0.9))
    args = build_parser().parse_args(["sample", "any", *words])
    assert arguments.guidance_from(args, pipe) == guidance
    perturbation, _, rule = name.partition("+")
    chosen = {field: value for field, value in settings.items() if field != "method"}
    trial = {**chosen, "perturbation": perturbation, "rule": rule or "cfg"}
    assert methods(pipe, trial)[0] == guidance


@pytest.mark.parametrize("name", ["none+apg", "softcfg+tcfg", "pag+apg", "vpg+tcfg", "window+rescale"])
def test_runs(pipe: Pipeline, model_folder: Path, tmp_path: Path, name: str) -> None:
    words, folder = sample_flags(GUIDANCE[name], Sampling(0.9)), tmp_path / "run"
    assert (
        main(
            ["sample", str(model_folder), *words, "--labels", "0,1", "--num-samples", "2", "--output-dir", str(folder)]
        )
        == 0
    )
    run = RunFolder.open(folder)
    assert restore(run.settings["guidance"]) == GUIDANCE[name]
    expected = pipe([0, 1], GUIDANCE[name]).pixels
    assert np.array_equal(run.require(0).pixels, expected)
    assert (folder / "comparison.png").is_file()


@pytest.mark.parametrize("name", ON_PAGE)
def test_web_page(pipe: Pipeline, name: str) -> None:
    studio = Studio({"tiny": pipe})
    settings = studio.settings(subject=1, methods=[name])
    query = dict(urllib.parse.parse_qsl(settings.query(), strict_parsing=True))
    assert studio.settings_from_query(query) == settings
    (panel,) = [panels for _, panels in studio.draw("visitor", settings)][-1]
    assert panel.picture is not None
    assert torch.equal(panel.picture.tokens, pipe([1], GUIDANCE[name]).tokens[0])
    assert studio.inspect(panel.picture).guidance == GUIDANCE[name]


def test_the_page_offers_all() -> None:
    offered = {"none+cfg", *METHODS}
    assert {f"{p}+cfg" for p in PERTURBATIONS if p != "softcfg"} <= offered
    assert {f"{p}+{r}" for r in RULES if r != "cfg" for p in ("none", "softcfg")} <= offered
