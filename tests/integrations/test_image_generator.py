"""A model of transformers as the generator of a pipeline: images, traces, runs and the web page."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

import softcfg  # noqa: E402
from softcfg import CFG, Pipeline, SoftCFG, UserError  # noqa: E402
from softcfg.configuration import load_config  # noqa: E402
from softcfg.integrations import transformers as plug  # noqa: E402
from softcfg.prompts import Prompt  # noqa: E402
from softcfg.runs import RunRequest, draw_run  # noqa: E402
from softcfg.tokenizers import MoVQ, MoVQConfig  # noqa: E402
from softcfg.ui.studio import Studio  # noqa: E402
from tiny_models import MOVQ, WORDS  # noqa: E402

END_OF_LINE, END_OF_IMAGE, FIRST_CODE = 30, 31, 8
TOKENS = plug.ImageTokens(4, 4, 20, FIRST_CODE, row_end=(END_OF_LINE,), tail=(END_OF_IMAGE,))


def encode(prompt: Prompt) -> plug.Prompts:
    def ids(text: str) -> Tensor:
        return torch.tensor([[WORDS.index(word) for word in text.split()]])

    return plug.Prompts(ids(prompt.text), ids(prompt.negative_text or "[UNK]"))


def language_model(seed: int = 7) -> Any:
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64,
        )
    )  # fmt: skip
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    model.set_attn_implementation("softcfg")
    return model.eval()


def image_tokenizer(**changes: Any) -> MoVQ:
    torch.manual_seed(0)
    return MoVQ(load_config(MoVQConfig, {**MOVQ, **changes})).requires_grad_(False).eval()


def pipeline(model: Any = None, **changes: Any) -> Pipeline:
    generator = plug.ImageGenerator(model or language_model(), TOKENS, encode, options=("negative_text",), **changes)
    return Pipeline(generator, image_tokenizer(), name="llama")


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return pipeline()


@pytest.mark.parametrize("guidance", [CFG(3.0), SoftCFG(3.0), CFG(1.0)], ids=str)
def test_images_are_those_of_the_plug(pipe: Pipeline, guidance: CFG) -> None:
    """Each prompt alone, with the rules as a processor of logits."""
    prompts = [Prompt("red apple"), Prompt("a green star and a red apple", negative_text="a star")]
    out = pipe(prompts=prompts, guidance=guidance, seed=5)
    structure = TOKENS.structure
    assert (out.tokens.shape, out.pixels.shape) == ((2, 21), (2, 8, 8, 3))
    assert (out.tokens[:, structure >= 0] == structure[structure >= 0]).all()
    assert torch.equal(out.codes, out.tokens[:, structure < 0] - FIRST_CODE)
    assert out.codes.min() >= 0
    assert out.codes.max() < 20

    def rules(length: int) -> Callable[[Tensor, Tensor], Tensor]:
        def only(ids: Tensor, logits: Tensor) -> Tensor:
            wanted = int(structure[ids.shape[1] - length])
            kept = torch.tensor([wanted]) if wanted >= 0 else torch.arange(FIRST_CODE, FIRST_CODE + 20)
            return torch.full_like(logits, float("-inf")).index_copy(1, kept, logits[:, kept])

        return only

    for row, prompt in enumerate(prompts):
        ids = encode(prompt)
        alone = plug.decode(
            pipe.generator.model,
            ids.input_ids,
            guidance,
            num_tokens=21,
            unconditional_ids=ids.unconditional_ids,
            image_codes=structure < 0,
            logits_processor=[rules(ids.input_ids.shape[1])],
            seed=5,
            indices=[row],
        )
        assert torch.equal(alone[0], out.tokens[row])


def test_a_trace_draws_the_same(pipe: Pipeline) -> None:
    guidance = SoftCFG(3.0)
    out = pipe(prompts=["red apple", "a star"], guidance=guidance, seed=1)
    inputs = pipe.conditioning.inputs(out.prompts or [])
    trace = softcfg.trace(pipe.generator, labels=inputs, guidance=guidance, seed=1)
    assert torch.equal(trace.tokens, out.tokens)
    assert (trace.confidence[:, TOKENS.structure >= 0] == 0).all()


def test_a_run_knows_the_weights(pipe: Pipeline, tmp_path: Path) -> None:
    request = RunRequest(pipe, prompts=["red apple", "a star"], batch_size=1, seed=2)
    run = draw_run(request, tmp_path)
    expected = pipe(prompts=["red apple", "a star"], seed=2, batch_size=1)
    assert np.array_equal(np.concatenate([shard.pixels for shard in run.shards()]), expected.pixels)
    assert run.settings["model"] == "llama"
    described = run.settings["generator"]
    assert (described["family"], described["config"]["first_code_id"]) == ("ImageGenerator", FIRST_CODE)
    grown = dataclasses.replace(request, model=pipeline(), num_samples=4)  # the same weights, made again
    assert draw_run(grown, tmp_path).plan.num_samples == 4
    with pytest.raises(UserError, match=r"generator\.sha256"):
        draw_run(dataclasses.replace(request, model=pipeline(language_model(8))), tmp_path)


def test_the_web_page_draws_it(pipe: Pipeline) -> None:
    studio = Studio({"llama": pipe})
    panels = [panels for _, panels in studio.draw("visitor", studio.settings(subject="red apple", seed=1))][-1]
    picture = panels[-1].picture
    assert picture is not None
    assert np.array_equal(picture.pixels, pipe(prompts=["red apple"], guidance=SoftCFG(4.0), seed=1).pixels[0])


def test_what_does_not_fit_is_refused(pipe: Pipeline) -> None:
    with pytest.raises(UserError, match="takes no task"):
        pipe(prompts=[Prompt("a star", task="depth")])
    with pytest.raises(UserError, match="images of 8 x 8 pixels"):
        pipe(prompts=["a star"], width=16)
    with pytest.raises(UserError, match="out of 20 for an image, but the tokenizer reads 16 out of 16"):
        Pipeline(pipe.generator, image_tokenizer(n_embed=16))
    with pytest.raises(UserError, match="image tokens holds 45"):
        plug.ImageGenerator(language_model(), dataclasses.replace(TOKENS, tail=(45,)), encode)
    with pytest.raises(UserError, match="at least one prompt"):
        pipe.generator.condition([], guided=False)
    bare = plug.TransformersGenerator(language_model(), 4)
    with pytest.raises(UserError, match="does not say what it is conditioned on"):
        Pipeline(bare, image_tokenizer())


def test_padding_without_a_mask_is_not_seen() -> None:
    """As by `decode`: an `encode` may pad its ids."""
    model = language_model()
    model.config.pad_token_id = 39

    def drawn(padding: int) -> Tensor:
        pad = torch.full((1, padding), 39)

        def padded(prompt: Prompt) -> plug.Prompts:
            found = encode(prompt)
            return plug.Prompts(
                torch.cat((pad, found.input_ids), dim=1),
                torch.cat((pad, found.unconditional_ids), dim=1),  # type: ignore[list-item]
            )

        made = Pipeline(plug.ImageGenerator(model, TOKENS, padded), image_tokenizer(), name="llama")
        return made(prompts=["red apple"], guidance=SoftCFG(3.0)).tokens

    assert torch.equal(drawn(3), drawn(0))
