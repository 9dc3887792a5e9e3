"""The plug against brute force: each row alone, in float64, with eager attention over values scaled by hand."""

from __future__ import annotations

import copy
import importlib
import math
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

import softcfg  # noqa: E402
from plug_models import PROMPTS, SHORT, TEXT, janus, llama, mistral, with_large_weights  # noqa: E402
from softcfg import CFG, Sampling, SoftCFG, UserError  # noqa: E402
from softcfg.decoding import decode, draw, image_uniforms, sequential  # noqa: E402
from softcfg.integrations import transformers as plug  # noqa: E402

T = 9
LONG = torch.tensor([[1, 0, 0, 0, 0, 4, 3], [1, 5, 5, 5, 5, 5, 3]])


def gpt2() -> Any:
    """Absolute positions: padding on the left must not be counted."""
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
        )
    )


def emu3() -> Any:
    vq = {
        "base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, "attn_resolutions": [], "hidden_size": 32,
        "codebook_size": 16, "temporal_downsample_factor": 1,
    }  # fmt: skip
    config = transformers.Emu3Config(text_config=TEXT, vq_config=vq, vocabulary_map={"<image>": 5})
    return transformers.Emu3ForConditionalGeneration(config)


MODELS = {"llama": llama, "mistral": mistral, "gpt2": gpt2, "emu3": emu3, "janus": janus}


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """Small models whose random weights are large enough for guidance to matter."""
    made = {}
    for name, make in MODELS.items():
        torch.manual_seed(7)
        made[name] = with_large_weights(make())
    return made


def head_of(model: Any) -> plug.ImageHead | None:
    return plug.ImageHead.janus(model) if hasattr(model, "prepare_embeddings_for_image_generation") else None


@dataclass
class Recorder:
    """A logits processor that keeps what it sees."""

    ids: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        self.ids.append(ids.clone())
        self.logits.append(logits.clone())
        return logits


class ScaledCache(transformers.DynamicCache):
    """Hands out values (or keys) multiplied by `weights`, one for each slot from the first on."""

    weights: dict[str, Tensor]

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(*args, **kwargs)
        for target, weights in self.weights.items():
            factor = weights[-values.shape[2] :, None]
            keys, values = (keys * factor, values) if target == "key" else (keys, values * factor)
        return keys, values


class Branch:
    """One row of one branch of a model in float64, without padding, fed token by token."""

    def __init__(self, model: Any, prompt: list[int]) -> None:
        self.model, self.prompt = model, torch.tensor([prompt])
        self.cache = ScaledCache(config=model.config)

    def logits(self, tokens: list[int], weights: dict[str, list[float]]) -> Tensor:
        """Logits after the prompt and `tokens`, of which all but the last were fed before."""
        ids = torch.tensor([tokens[-1:]]) if tokens else self.prompt
        ones = [1.0] * self.prompt.shape[1]
        self.cache.weights = {target: torch.tensor(ones + of).double() for target, of in weights.items()}
        if not hasattr(self.model, "prepare_embeddings_for_image_generation"):
            return self.model(input_ids=ids, past_key_values=self.cache, use_cache=True).logits[0, -1]
        embed = self.model.prepare_embeddings_for_image_generation if tokens else self.model.get_input_embeddings()
        hidden = self.model.model.language_model(inputs_embeds=embed(ids), past_key_values=self.cache, use_cache=True)
        return self.model.model.generation_head(hidden.last_hidden_state[0, -1])


@torch.no_grad()
def brute_force(
    model: Any,
    prompt: list[int],
    unconditional: list[int],
    tokens: list[int],
    *,
    scale: float,
    power: float,
    weights_of: Any,
    temperature: float = 1.0,
    codes: set[int] | None = None,
    targets: tuple[str, ...] = ("value",),
) -> Tensor:
    """Guided logits [T, V] of one image; `weights_of` turns the confidences so far into weights."""
    model = copy.deepcopy(model).double()
    model.set_attn_implementation("eager")
    cond, uncond = Branch(model, prompt), Branch(model, unconditional)
    confidences: list[float] = []
    guided = []
    for step in range(len(tokens)):
        z_c = cond.logits(tokens[:step], {})
        z_u = uncond.logits(tokens[:step], dict.fromkeys(targets, weights_of(confidences)))
        s = 1 + (scale - 1) * (1 - math.cos(math.pi * (step / len(tokens)) ** power)) / 2
        guided.append(z_u + s * (z_c - z_u))
        is_code = codes is None or tokens[step] in codes
        confidences.append(float((z_c / temperature).softmax(-1).max()) if is_code else 0.0)
    return torch.stack(guided)


def plain(confidences: list[float]) -> list[float]:
    return [1.0 for _ in confidences]


def normalised(confidences: list[float]) -> list[float]:
    total = sum(confidences)
    return [1 - c / total if total else 1.0 for c in confidences]


def unnormalised(confidences: list[float]) -> list[float]:
    return [1 - c for c in confidences]


METHODS = {"cfg": (CFG, plain), "softcfg": (SoftCFG, normalised), "no-step-norm": (SoftCFG, unnormalised)}


def bare(row: Tensor, mask: Tensor | None = None) -> list[int]:
    return row.tolist() if mask is None else row[mask.bool()].tolist()


def guided_logits(model: Any, guidance: CFG, **settings: Any) -> tuple[Tensor, Tensor]:
    """Tokens [B, T] that the plug draws after PROMPTS, and the guided logits [B, T, V] it drew them from."""
    recorder = Recorder()
    settings = {"num_tokens": T, "unconditional_ids": SHORT, "attention_mask": PROMPTS > 0, **settings}
    tokens = plug.decode(model, PROMPTS, guidance, head=head_of(model), logits_processor=[recorder], **settings)
    return tokens, torch.stack(recorder.logits, dim=1)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_equals_brute_force(models: dict[str, Any], name: str, method: str, cache: str) -> None:
    model = models[name]
    kind, weights_of = METHODS[method]
    settings = {"guidance_scale": 3.0, "guidance_scale_pow": 0.5}
    guidance = kind(**settings) if kind is CFG else SoftCFG(**settings, step_norm=method == "softcfg")
    sampling = Sampling(temperature=0.8, top_k=20)
    tokens, logits = guided_logits(model, guidance, cache=cache, sampling=sampling, seed=3)

    expected = torch.stack([
        brute_force(
            model, bare(PROMPTS[b], PROMPTS[b] > 0), bare(SHORT[0]), tokens[b].tolist(),
            scale=3.0, power=0.5, weights_of=weights_of, temperature=0.8,
        )
        for b in range(2)
    ])  # fmt: skip
    torch.testing.assert_close(logits.double(), expected, atol=1e-4, rtol=0)
    uniforms = image_uniforms(3, range(2), T)
    for step in range(T):
        assert torch.equal(tokens[:, step], draw(sampling.probabilities(expected[:, step]), uniforms[:, step]))


@pytest.mark.parametrize("name", MODELS)
def test_guidance_matters_in_these_models(models: dict[str, Any], name: str) -> None:
    """The comparisons above tell the methods apart: on the same tokens their logits differ by far more than 1e-4."""
    first = torch.tensor([[5], [6]]).expand(2, T)

    def logits(guidance: CFG) -> Tensor:
        recorder = Recorder()
        plug.decode(
            models[name], PROMPTS, guidance, num_tokens=T, unconditional_ids=SHORT, attention_mask=PROMPTS > 0,
            head=head_of(models[name]), logits_processor=[recorder, force(first, start=5)],
        )  # fmt: skip
        return torch.stack(recorder.logits, dim=1)

    cfg, soft, no_norm = (logits(g) for g in (CFG(), SoftCFG(), SoftCFG(step_norm=False)))
    assert torch.equal(cfg[:, 0], soft[:, 0])  # nothing to weight yet
    assert (cfg - soft).abs().max() > 0.01
    assert (soft - no_norm).abs().max() > 0.01


def force(tokens: Tensor, start: int) -> Any:
    """A logits processor that allows the given tokens [B, T] alone, one a step, after prompts of length `start`."""

    def processor(ids: Tensor, logits: Tensor) -> Tensor:
        wanted = tokens[:, ids.shape[1] - start, None]
        return torch.full_like(logits, float("-inf")).scatter(1, wanted, logits.gather(1, wanted))

    return processor


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_longer_unconditional_prompts_with_padding(models: dict[str, Any], cache: str) -> None:
    model, mask = models["emu3"], LONG > 0
    mask[0, 0], mask[0, 1:5] = False, False
    tokens, logits = guided_logits(model, SoftCFG(), unconditional_ids=LONG, unconditional_mask=mask, cache=cache)
    for b in range(2):
        expected = brute_force(
            model, bare(PROMPTS[b], PROMPTS[b] > 0), bare(LONG[b], mask[b]), tokens[b].tolist(),
            scale=4.0, power=1.0, weights_of=normalised,
        )  # fmt: skip
        torch.testing.assert_close(logits[b].double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("target", "targets"), [("key", ("key",)), ("both", ("key", "value"))])
def test_weights_on_keys(models: dict[str, Any], target: str, targets: tuple[str, ...]) -> None:
    tokens, logits = guided_logits(models["llama"], SoftCFG(target=target))
    expected = brute_force(
        models["llama"], bare(PROMPTS[1]), bare(SHORT[0]), tokens[1].tolist(),
        scale=4.0, power=1.0, weights_of=normalised, targets=targets,
    )  # fmt: skip
    torch.testing.assert_close(logits[1].double(), expected, atol=1e-4, rtol=0)


def test_tokens_that_are_no_image_codes_are_never_weighted(models: dict[str, Any]) -> None:
    """Two rows of three codes and a line end, by id and by step."""
    model = models["emu3"]
    line_end, codes = 3, range(20, 60)
    steps = torch.tensor([True, True, True, False, True, True, True, False])

    def rules(ids: Tensor, logits: Tensor) -> Tensor:
        allowed = torch.zeros(logits.shape[1], dtype=torch.bool)
        allowed[list(codes) if steps[ids.shape[1] - 5] else [line_end]] = True
        return logits.masked_fill(~allowed, float("-inf"))

    drawn = []
    for image_codes in (codes, steps):
        recorder = Recorder()
        tokens = plug.decode(
            model, PROMPTS, SoftCFG(), num_tokens=8, unconditional_ids=SHORT, attention_mask=PROMPTS > 0,
            image_codes=image_codes, logits_processor=[recorder, rules],
        )  # fmt: skip
        assert torch.equal(tokens == line_end, ~steps.expand(2, -1))
        assert ((tokens >= 20) == steps).all()
        expected = brute_force(
            model, bare(PROMPTS[1]), bare(SHORT[0]), tokens[1].tolist(),
            scale=4.0, power=1.0, weights_of=normalised, codes=set(codes),
        )  # fmt: skip
        torch.testing.assert_close(torch.stack(recorder.logits, 1)[1].double(), expected, atol=1e-4, rtol=0)
        drawn.append(tokens)
    assert torch.equal(drawn[0], drawn[1])


def test_processors_see_prompts_and_tokens(models: dict[str, Any]) -> None:
    recorder, wanted = Recorder(), torch.arange(20, 20 + 2 * T).view(2, T)
    tokens = plug.decode(
        models["llama"], PROMPTS, SoftCFG(), num_tokens=T, unconditional_ids=LONG,
        attention_mask=PROMPTS > 0, logits_processor=[recorder, force(wanted, start=5)],
    )  # fmt: skip
    assert torch.equal(tokens, wanted)
    for step, ids in enumerate(recorder.ids):
        assert torch.equal(ids, torch.cat((PROMPTS, wanted[:, :step]), dim=1))


def test_an_image_depends_on_its_seed_and_index_alone(models: dict[str, Any]) -> None:
    model, settings = models["llama"], {"num_tokens": T, "unconditional_ids": SHORT, "seed": 11}
    both = plug.decode(model, PROMPTS, SoftCFG(), attention_mask=PROMPTS > 0, indices=[4, 9], **settings)
    assert model(both).logits.requires_grad  # the tokens are ordinary tensors
    alone = plug.decode(model, PROMPTS[1:], SoftCFG(), indices=[9], **settings)
    assert torch.equal(both[1:], alone)
    assert not torch.equal(alone, plug.decode(model, PROMPTS[1:], SoftCFG(), indices=[8], **settings))


@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_is_decode_behind_the_prompts(models: dict[str, Any], cache: str | None) -> None:
    model = models["emu3"]
    sequences = model.generate(
        PROMPTS, attention_mask=PROMPTS > 0, custom_generate=plug.generate, guidance=SoftCFG(),
        unconditional_ids=LONG, image_codes=range(60), seed=5, indices=[3, 4], max_new_tokens=T, do_sample=True,
        temperature=0.7, top_k=30, top_p=0.9, eos_token_id=None, cache_implementation=cache,
    )  # fmt: skip
    tokens = plug.decode(
        model, PROMPTS, SoftCFG(), attention_mask=PROMPTS > 0, num_tokens=T, unconditional_ids=LONG, seed=5,
        indices=[3, 4], sampling=Sampling(temperature=0.7, top_k=30, top_p=0.9),
    )  # fmt: skip
    assert torch.equal(sequences, torch.cat((PROMPTS, tokens), dim=1))


def test_generate_takes_the_cache_given(models: dict[str, Any]) -> None:
    model, cache = models["llama"], transformers.DynamicCache(config=models["llama"].config)
    model.generate(
        PROMPTS[1:], custom_generate=plug.generate, guidance=SoftCFG(), unconditional_ids=SHORT, max_new_tokens=T,
        eos_token_id=None, past_key_values=cache,
    )  # fmt: skip
    assert cache.get_seq_length() == 5 + T - 1
    assert cache.layers[0].values.shape[0] == 2
    with pytest.raises(UserError, match="cache must be empty"):
        plug.decode(model, PROMPTS, SoftCFG(), num_tokens=T, unconditional_ids=SHORT, cache=cache)


def test_janus_through_generate(models: dict[str, Any]) -> None:
    model = models["janus"]
    head = plug.ImageHead.janus(model)
    sequences = model.generate(
        PROMPTS[1:], custom_generate=plug.generate, guidance=SoftCFG(), head=head, unconditional_ids=SHORT,
        max_new_tokens=T, do_sample=True, top_k=10, eos_token_id=None,
    )  # fmt: skip
    tokens = plug.decode(
        model, PROMPTS[1:], SoftCFG(), num_tokens=T, unconditional_ids=SHORT, head=head, sampling=Sampling(top_k=10)
    )
    assert torch.equal(sequences[:, 5:], tokens)


def test_padding_of_a_call_alone_is_not_seen(models: dict[str, Any]) -> None:
    """Nor in the unconditional prompts, where the model itself has no padding token."""
    model = copy.deepcopy(models["llama"])
    model.config.pad_token_id = model.generation_config.pad_token_id = None
    prompts, unconditional = torch.tensor([[3, 3, 10, 11], [12, 13, 14, 15]]), torch.tensor([[3, 3, 9], [7, 8, 9]])
    settings: dict[str, Any] = {
        "max_new_tokens": T, "do_sample": False, "eos_token_id": None, "pad_token_id": 3,
        "custom_generate": plug.generate, "guidance": CFG(3.0, schedule="constant"),
    }  # fmt: skip
    found = model.generate(prompts, unconditional_ids=unconditional, **settings)[:, 4:]
    alone = model.generate(prompts[:1, 2:], unconditional_ids=unconditional[:1, 2:], **settings)[:, 2:]
    assert torch.equal(found[:1], alone)


def test_calls_of_janus_without_a_mask_and_by_position(models: dict[str, Any]) -> None:
    model, prompts = models["janus"], torch.tensor([[7, 8, 9, 4]])
    config = transformers.GenerationConfig(
        bos_token_id=1, pad_token_id=0, do_sample=False, guidance_scale=5.0, generation_kwargs={"boi_token_id": 4}
    )
    ours: dict[str, Any] = {
        "generation_mode": "image", "generation_config": config, "custom_generate": plug.generate,
        "guidance": CFG(5.0, schedule="constant"),
    }  # fmt: skip
    masked = model.generate(prompts, torch.ones_like(prompts), **ours)
    assert torch.equal(model.generate(prompts, **ours), masked)
    processors = transformers.LogitsProcessorList()
    assert torch.equal(model.generate(prompts, torch.ones_like(prompts), processors, **ours), masked)
    with pytest.raises(UserError, match="give the prompts"):
        model.generate(**ours)


def test_plain_guidance_is_that_of_janus(models: dict[str, Any]) -> None:
    """The image mode of Janus: padding that is seen takes the place of the text, one scale at every step."""
    model, prompts = models["janus"], torch.tensor([[1, 7, 8, 9, 4], [1, 10, 11, 12, 4]])
    config = transformers.GenerationConfig(
        bos_token_id=1, pad_token_id=0, do_sample=False, guidance_scale=5.0, max_length=20,
        generation_kwargs={"boi_token_id": 4},
    )  # fmt: skip
    usual = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), generation_mode="image", generation_config=config
    )
    ours = plug.decode(
        model, prompts, CFG(5.0, schedule="constant"), num_tokens=usual.shape[1], head=plug.ImageHead.janus(model),
        unconditional_ids=torch.tensor([[1, 0, 0, 0, 4]]), sampling=Sampling(top_k=1), cache="static",
    )  # fmt: skip
    assert torch.equal(usual, ours)


def image_mode(prompts: Tensor, **settings: Any) -> dict[str, Any]:
    config = transformers.GenerationConfig(
        bos_token_id=1, pad_token_id=0, do_sample=False, guidance_scale=5.0, max_length=20,
        generation_kwargs={"boi_token_id": 4},
    )  # fmt: skip
    mask = torch.ones_like(prompts)
    mask[0, :2] = 0
    return {"attention_mask": mask, "generation_mode": "image", "generation_config": config, **settings}


def test_the_image_mode_of_janus_takes_the_plug(models: dict[str, Any]) -> None:
    """Plain guidance is the one of Janus itself, token by token, and SoftCFG that of `decode`."""
    model, prompts = models["janus"], torch.tensor([[0, 0, 1, 7, 4], [1, 10, 11, 12, 4]])
    usual = model.generate(prompts, **image_mode(prompts))
    ours = {"custom_generate": plug.generate}
    plain = CFG(5.0, schedule="constant")
    assert torch.equal(model.generate(prompts, **image_mode(prompts, guidance=plain, **ours)), usual)
    by_default = model.generate(prompts, **image_mode(prompts, **ours))
    assert by_default.shape == usual.shape
    assert not torch.equal(by_default, usual)
    mask = image_mode(prompts)["attention_mask"]
    unconditional = torch.tensor([[0, 0, 1, 0, 4], [1, 0, 0, 0, 4]])
    expected = plug.decode(
        model, prompts, SoftCFG(5.0, schedule="constant"), num_tokens=usual.shape[1], attention_mask=mask,
        unconditional_ids=unconditional, unconditional_mask=mask, sampling=Sampling(top_k=1),
    )  # fmt: skip
    assert torch.equal(by_default, expected)
    repeated = model.generate(
        prompts, **image_mode(prompts, do_sample=True, guidance_scale=3.0, num_return_sequences=2, **ours)
    )
    assert repeated.shape == (4, usual.shape[1])
    with pytest.raises(UserError, match="give guidance or guidance_scale, not both"):
        model.generate(prompts, **image_mode(prompts, guidance=plain, guidance_scale=3.0, **ours))
    bare = transformers.GenerationConfig(bos_token_id=1)
    with pytest.raises(UserError, match="the generation config needs bos_token_id, pad_token_id, boi_token_id"):
        model.generate(prompts, **image_mode(prompts, generation_config=bare, **ours))


def test_the_head_of_janus_is_found(models: dict[str, Any]) -> None:
    model, settings = models["janus"], {"num_tokens": T, "unconditional_ids": SHORT}
    tokens = plug.decode(model, PROMPTS[1:], SoftCFG(), **settings)
    assert torch.equal(tokens, plug.decode(model, PROMPTS[1:], SoftCFG(), head=plug.ImageHead.janus(model), **settings))
    assert plug.TransformersGenerator(model, T).vocab_size == model.config.vq_config.num_embeddings
    drawn = model.generate(
        PROMPTS[1:], custom_generate=plug.generate, guidance=SoftCFG(), unconditional_ids=SHORT, max_new_tokens=T,
        do_sample=True, top_k=0,
    )  # fmt: skip
    assert torch.equal(drawn[:, 5:], tokens)


def test_an_image_head_that_is_not_known_is_refused(models: dict[str, Any]) -> None:
    other = copy.deepcopy(models["llama"])
    other.gen_head = torch.nn.Linear(4, 4)
    for call in (
        lambda: plug.decode(other, PROMPTS, SoftCFG(), num_tokens=4, unconditional_ids=SHORT),
        lambda: plug.TransformersGenerator(other, 4),
        lambda: other.generate(PROMPTS, custom_generate=plug.generate, guidance=SoftCFG(), unconditional_ids=SHORT),
    ):
        with pytest.raises(UserError, match=r"has an image head, gen_head, of a kind .* give head=ImageHead\(embed="):
            call()


def test_several_images_a_prompt(models: dict[str, Any]) -> None:
    model, settings = models["llama"], {"guidance": SoftCFG(), "max_new_tokens": T, "do_sample": True}
    sequences = model.generate(
        PROMPTS, attention_mask=PROMPTS > 0, custom_generate=plug.generate, unconditional_ids=LONG,
        num_return_sequences=2, eos_token_id=None, **settings,
    )  # fmt: skip
    assert sequences.shape == (4, 5 + T)
    assert not torch.equal(sequences[0], sequences[1])
    last = model.generate(
        PROMPTS[1:],
        custom_generate=plug.generate,
        unconditional_ids=LONG[1:],
        indices=[3],
        eos_token_id=None,
        **settings,
    )
    assert torch.equal(last[0], sequences[3])


@pytest.mark.parametrize("name", ["llama", "mistral", "emu3"])
def test_without_guidance_it_is_the_usual_generation(models: dict[str, Any], name: str) -> None:
    model, settings = models[name], {"attention_mask": PROMPTS > 0, "max_new_tokens": T, "eos_token_id": None}
    usual = model.generate(PROMPTS, do_sample=False, **settings)
    assert torch.equal(usual, model.generate(PROMPTS, custom_generate=plug.generate, guidance=CFG(1.0), **settings))


def test_plain_guidance_is_that_of_transformers(models: dict[str, Any]) -> None:
    """Its guidance acts on log-probabilities, which shifts all logits of a step alike; the best token is the same."""
    settings = {"attention_mask": torch.ones_like(PROMPTS[1:]), "max_new_tokens": T, "do_sample": False}
    usual = models["llama"].generate(PROMPTS[1:], guidance_scale=3.0, negative_prompt_ids=SHORT, **settings)
    ours = models["llama"].generate(
        PROMPTS[1:], custom_generate=plug.generate, guidance=CFG(3.0, schedule="constant"), unconditional_ids=SHORT,
        **settings,
    )  # fmt: skip
    assert torch.equal(usual, ours)


def test_rows_end_at_the_end_token(models: dict[str, Any]) -> None:
    end, pad = 2, 0
    wanted = torch.tensor([[30, 31, end, 40, 40, 40], [32, 33, 34, 35, end, 40]])
    sequences = models["llama"].generate(
        PROMPTS, attention_mask=PROMPTS > 0, custom_generate=plug.generate, guidance=SoftCFG(), unconditional_ids=SHORT,
        max_new_tokens=6, logits_processor=[force(wanted, start=5)],
    )  # fmt: skip
    assert sequences[:, 5:].tolist() == [[30, 31, end, pad, pad], [32, 33, 34, 35, end]]


def test_prefix_rules_of_generate(models: dict[str, Any]) -> None:
    sequences = models["llama"].generate(
        PROMPTS, attention_mask=PROMPTS > 0, custom_generate=plug.generate, guidance=SoftCFG(), unconditional_ids=SHORT,
        max_new_tokens=4, do_sample=True, prefix_allowed_tokens_fn=lambda row, ids: [20 + row, 40 + len(ids)],
    )  # fmt: skip
    for row in range(2):
        for position in range(5, 9):
            assert int(sequences[row, position]) in (20 + row, 40 + position)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["mistral", "emu3", "janus"])
def test_as_a_generator_it_decodes_and_traces(models: dict[str, Any], name: str, cache: str) -> None:
    """The library's decode loop draws the same tokens, and its parallel replay sees the same guided logits."""
    model, steps, recorder = models[name], torch.arange(T) % 4 != 3, Recorder()
    generator = plug.TransformersGenerator(
        model, T, head=head_of(model), code_steps=steps, logits_processor=[recorder], cache=cache
    )
    prompts = plug.Prompts(PROMPTS, LONG, attention_mask=PROMPTS > 0)
    sampling = Sampling(temperature=0.8)
    tokens = decode(generator, prompts, SoftCFG(), uniforms=image_uniforms(3, range(2), T), sampling=sampling)
    drawn, logits = guided_logits(
        model, SoftCFG(), unconditional_ids=LONG, image_codes=steps, sampling=sampling, seed=3, cache=cache
    )
    assert torch.equal(tokens, drawn)

    with pytest.raises(UserError, match="one length for all rows"):
        decode(generator, prompts, SoftCFG(), uniforms=image_uniforms(3, range(2), T), static=True)

    recorder.ids.clear()
    trace = softcfg.trace(generator, labels=prompts, tokens=tokens, guidance=SoftCFG(), temperature=0.8)
    torch.testing.assert_close(trace.guided_logits, logits, atol=1e-4, rtol=0)
    assert torch.equal(trace.confidence > 0, steps.expand(2, -1))
    for step, ids in enumerate(recorder.ids):
        assert torch.equal(ids, torch.cat((PROMPTS, tokens[:, :step]), dim=1))
    pieces = softcfg.trace(
        generator, labels=prompts, tokens=tokens, guidance=SoftCFG(), temperature=0.8, steps_per_pass=4
    )
    torch.testing.assert_close(pieces.guided_logits, logits, atol=1e-4, rtol=0)


def test_text_generation_is_untouched(models: dict[str, Any]) -> None:
    """Without weights the registered attention is sdpa."""
    model = copy.deepcopy(models["llama"])
    ours = model(PROMPTS, attention_mask=PROMPTS > 0).logits
    model.set_attn_implementation("sdpa")
    assert torch.equal(ours, model(PROMPTS, attention_mask=PROMPTS > 0).logits)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_one_pass_with_weights_equals_many(models: dict[str, Any], cache: str) -> None:
    """Weights as keyword arguments of a forward call over several tokens, one row of weights a query."""
    model = models["llama"]
    ids = torch.randint(1, 60, (2, 8), generator=torch.Generator().manual_seed(0))
    weights = torch.rand(2, 8, generator=torch.Generator().manual_seed(1))

    def new_cache() -> Any:
        if cache == "static":
            return transformers.StaticCache(config=model.config, max_cache_len=10)
        return transformers.DynamicCache(config=model.config)

    past, steps = new_cache(), []
    for i in range(8):
        steps.append(model(ids[:, i : i + 1], past_key_values=past, value_weights=weights[:, : i + 1]).logits)
    once = model(ids, past_key_values=new_cache(), value_weights=weights).logits
    torch.testing.assert_close(once, torch.cat(steps, dim=1), atol=1e-4, rtol=0)
    past = new_cache()
    model(ids[:, :3], past_key_values=past, value_weights=weights[:, :3])
    rest = model(ids[:, 3:], past_key_values=past, value_weights=weights[:, None].expand(-1, 5, -1)).logits
    torch.testing.assert_close(rest, once[:, 3:], atol=1e-4, rtol=0)


def test_refusals(models: dict[str, Any]) -> None:
    model = models["llama"]

    def draw_four(guidance: CFG | None = None, ids: Tensor = PROMPTS, **settings: Any) -> Tensor:
        settings = {"num_tokens": 4, "unconditional_ids": SHORT, **settings}
        return plug.decode(settings.pop("model", model), ids, guidance or SoftCFG(), **settings)

    with pytest.raises(UserError, match="needs unconditional_ids"):
        draw_four(unconditional_ids=None)
    with pytest.raises(UserError, match="1 row or 2, one per prompt, got 3"):
        draw_four(unconditional_ids=SHORT.repeat(3, 1))
    with pytest.raises(UserError, match="padded on the left"):
        draw_four(attention_mask=torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]))
    with pytest.raises(UserError, match=r"input_ids holds 60, which is outside of 0\.\.59"):
        draw_four(ids=PROMPTS + 46)
    with pytest.raises(UserError, match=r"must be \[B, L\]"):
        draw_four(ids=PROMPTS[0])
    with pytest.raises(UserError, match="steps that draw image codes"):
        draw_four(image_codes=torch.ones(3, dtype=torch.bool))
    with pytest.raises(UserError, match="cache must be"):
        draw_four(cache="offloaded")

    other = copy.deepcopy(model)
    other.set_attn_implementation("sdpa")
    with pytest.raises(UserError, match=r"set_attn_implementation\('softcfg'\)"):
        draw_four(model=other)
    assert draw_four(CFG(), model=other).shape == (2, 4)  # needs no weights

    def generate(**settings: Any) -> Tensor:
        settings = {"guidance": SoftCFG(), "unconditional_ids": SHORT, "max_new_tokens": 4, **settings}
        return model.generate(PROMPTS, custom_generate=plug.generate, **settings)

    with pytest.raises(UserError, match="num_beams=2"):
        generate(num_beams=2)
    with pytest.raises(UserError, match="guidance_scale=3"):
        generate(guidance_scale=3.0)
    with pytest.raises(UserError, match="leave use_cache on"):
        generate(use_cache=False)


def test_attention_that_cannot_carry_weights_is_refused(models: dict[str, Any]) -> None:
    query, module = torch.randn(1, 2, 1, 8), models["llama"].model.layers[0].self_attn
    with pytest.raises(UserError, match="LlamaAttention has softcap"):
        plug.attention(module, query, query, query, None, value_weights=torch.ones(1, 1), softcap=30.0)
    with pytest.raises(UserError, match="LlamaAttention has s_aux"):
        plug.attention(module, query, query, query, None, s_aux=torch.ones(2))
    with pytest.raises(UserError, match="boolean mask"):
        plug.attention(module, query, query, query, torch.zeros(1, 1, 1, 1), value_weights=torch.ones(1, 1))


# What transformers' `generate` does with its settings, `custom_generate=plug.generate` without guidance does too.
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "temperature": {"temperature": 0.3},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.5, "temperature": 0.5},
    "top_h": {"top_h": 0.4, "temperature": 0.5},
    "min_p": {"min_p": 0.1, "temperature": 0.3},
    "typical_p": {"typical_p": 0.5, "temperature": 0.3},
    "epsilon_cutoff": {"epsilon_cutoff": 0.02, "temperature": 0.5},
    "eta_cutoff": {"eta_cutoff": 0.02, "temperature": 0.5},
    "repetition_penalty": {"repetition_penalty": 3.0, "temperature": 0.5},
    "suppress_tokens": {"suppress_tokens": list(range(10, 50))},
    "renormalize_logits": {"renormalize_logits": True, "top_p": 0.7},
    "all": {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "typical_p": 0.9, "epsilon_cutoff": 0.01},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_tokens_are_drawn_from_the_distribution_of_transformers(
    models: dict[str, Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model, drawn_from = models["llama"], []

    def first(probabilities: Tensor, uniform: Tensor) -> Tensor:
        drawn_from.append(probabilities)
        return probabilities.argmax(dim=-1)

    monkeypatch.setattr(sequential, "draw", first)
    settings = {"do_sample": True, "top_k": None, **SETTINGS[name]}
    settings |= {"attention_mask": PROMPTS > 0, "max_new_tokens": T, "eos_token_id": None}
    ours = model.generate(PROMPTS, custom_generate=plug.generate, guidance=CFG(1.0), **settings)

    monkeypatch.setattr(torch, "multinomial", lambda probabilities, num_samples: probabilities.argmax(-1, keepdim=True))
    theirs = model.generate(PROMPTS, **settings, output_scores=True, return_dict_in_generate=True)
    assert torch.equal(ours, theirs.sequences)
    if settings["do_sample"]:
        torch.testing.assert_close(torch.stack(drawn_from), torch.stack(theirs.scores).softmax(-1))


@pytest.mark.parametrize("seed", range(4))
def test_greedy_decoding_takes_the_first_of_ties(seed: int) -> None:
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)).bfloat16().eval()
    model.lm_head.weight.data[1::2] = model.lm_head.weight.data[::2]  # as happens by itself in bfloat16
    settings = {"attention_mask": torch.ones(1, 5), "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    ours = model.generate(PROMPTS[1:], custom_generate=plug.generate, guidance=CFG(1.0), seed=seed, **settings)
    assert torch.equal(ours, model.generate(PROMPTS[1:], **settings))


ENDS = {"ids": range(1, 60), "steps": torch.arange(6) != 4}  # which tokens are image codes: all, or all but the fifth


@pytest.mark.parametrize("codes", ENDS)
def test_an_end_token_among_the_image_codes_ends_nothing(models: dict[str, Any], codes: str) -> None:
    end = TEXT["eos_token_id"]
    wanted = torch.tensor([[30, 31, end, 40, 40, 40], [32, 33, 34, 35, end, 40]])
    sequences = models["llama"].generate(
        PROMPTS, attention_mask=PROMPTS > 0, custom_generate=plug.generate, guidance=SoftCFG(), unconditional_ids=SHORT,
        max_new_tokens=6, logits_processor=[force(wanted, start=5)], image_codes=ENDS[codes],
    )  # fmt: skip
    if codes == "steps":
        wanted[1, 5] = 0  # padding
    assert torch.equal(sequences[:, 5:], wanted)


class Heard(transformers.generation.streamers.BaseStreamer):
    def __init__(self) -> None:
        self.parts: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.parts.append(value.tolist())

    def end(self) -> None:
        self.parts.append("end")


def test_the_streamer_hears_what_that_of_transformers_hears(models: dict[str, Any]) -> None:
    model, ours, theirs = models["llama"], Heard(), Heard()
    settings = {"attention_mask": torch.ones(1, 5), "max_new_tokens": 4, "do_sample": False}
    model.generate(PROMPTS[1:], streamer=theirs, **settings)
    model.generate(PROMPTS[1:], custom_generate=plug.generate, guidance=CFG(1.0), streamer=ours, **settings)
    assert ours.parts == theirs.parts


class Foreign(torch.nn.Module):
    """An attention layer that takes no part in `AttentionInterface`, or does so without keyword arguments."""

    def __init__(self, attention: Any, how: str) -> None:
        super().__init__()
        self.attention, self.how = attention, how

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.how == "own":
            key = hidden_states.view(*hidden_states.shape[:2], 4, -1).transpose(1, 2)
            kwargs["past_key_values"].update(key, key, self.attention.layer_idx)
            return torch.zeros_like(hidden_states), None
        kwargs = {name: value for name, value in kwargs.items() if not name.endswith("_weights")}
        return self.attention(hidden_states, *args, **kwargs)


@pytest.mark.parametrize("how", ["own", "without"])
def test_a_layer_that_loses_the_weights_is_refused(models: dict[str, Any], how: str) -> None:
    model = copy.deepcopy(models["llama"])
    model.model.layers[1].self_attn = Foreign(model.model.layers[1].self_attn, how)
    with pytest.raises(UserError, match="1 of the 2 attention layers of LlamaForCausalLM did not see the weights"):
        plug.decode(model, PROMPTS[1:], SoftCFG(), num_tokens=4, unconditional_ids=SHORT)
    assert plug.decode(model, PROMPTS[1:], CFG(), num_tokens=4, unconditional_ids=SHORT).shape == (1, 4)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_padding_without_a_mask_is_padding_as_in_transformers(models: dict[str, Any], name: str) -> None:
    settings = {"num_tokens": T, "unconditional_ids": SHORT}
    tokens = plug.decode(models[name], PROMPTS, SoftCFG(), **settings)
    assert torch.equal(tokens, plug.decode(models[name], PROMPTS, SoftCFG(), attention_mask=PROMPTS > 0, **settings))
    seen = plug.decode(models[name], PROMPTS, SoftCFG(), attention_mask=torch.ones_like(PROMPTS), **settings)
    assert not torch.equal(tokens, seen)  # a mask that is given counts
    settings = {"max_new_tokens": T, "do_sample": False, "eos_token_id": None}
    usual = models[name].generate(PROMPTS, **settings)
    tokens = plug.decode(models[name], PROMPTS, CFG(1.0), num_tokens=T, sampling=Sampling(top_k=1))
    assert torch.equal(usual[:, 5:], tokens)


def test_prompts_of_a_pipeline_keep_their_own_masks() -> None:
    padded = plug.Prompts(torch.tensor([[0, 7, 8]]), torch.tensor([[0, 0, 3]]), torch.tensor([[0, 1, 1]]), None)
    batch = plug.Prompts.batch([padded, plug.Prompts(torch.tensor([9, 9, 9, 9]), torch.tensor([1]))], 0)
    assert batch.attention_mask.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert batch.unconditional_mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_guidance_of_a_padded_batch_is_that_of_janus(models: dict[str, Any]) -> None:
    model, prompts = models["janus"], torch.tensor([[0, 0, 1, 7, 4], [1, 10, 11, 12, 4]])
    mask = (torch.arange(5) >= torch.tensor([[2], [0]])).long()
    config = transformers.GenerationConfig(
        bos_token_id=1, pad_token_id=0, do_sample=False, guidance_scale=5.0, max_length=20,
        generation_kwargs={"boi_token_id": 4},
    )  # fmt: skip
    usual = model.generate(prompts, attention_mask=mask, generation_mode="image", generation_config=config)
    ours = plug.decode(
        model, prompts, CFG(5.0, schedule="constant"), num_tokens=usual.shape[1], head=plug.ImageHead.janus(model),
        unconditional_ids=prompts.where((prompts == 1) | (prompts == 4), 0), attention_mask=mask,
        unconditional_mask=mask, sampling=Sampling(top_k=1), cache="static",
    )  # fmt: skip
    assert torch.equal(usual, ours)


MODES = {"num_beams=2": {"num_beams": 2}, "contrastive search": {"penalty_alpha": 0.6, "top_k": 4}}


@pytest.mark.parametrize("what", MODES)
def test_other_ways_of_generating_are_refused(models: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError, match=f"{what} is not supported by softcfg's decoding"):
        models["llama"].generate(PROMPTS, custom_generate=plug.generate, guidance=CFG(1.0), **MODES[what])


def test_logits_that_are_no_numbers(models: dict[str, Any]) -> None:
    model = copy.deepcopy(models["llama"])
    model.model.layers[0].self_attn.v_proj.weight.data[0, 0] = math.nan
    settings = {"unconditional_ids": SHORT, "attention_mask": PROMPTS > 0}
    with pytest.raises(UserError, match="logits of row 0 at step 0 hold NaN, computed in float32"):
        plug.decode(model, PROMPTS, SoftCFG(), num_tokens=4, **settings)
    with pytest.raises(UserError, match="logits of row 0 at step 0 hold NaN, computed in float32"):
        model.generate(
            PROMPTS, custom_generate=plug.generate, guidance=SoftCFG(), max_new_tokens=4, do_sample=False, **settings
        )


def test_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    for name in [name for name in sys.modules if name.startswith(plug.__name__)]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match=r"pip install '\.\[transformers\]'"):
        importlib.import_module(plug.__name__)
