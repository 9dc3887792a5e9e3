"""What the plug for transformers is given: numbers for guidance, weights of every length, and what it refuses."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

import plug_models  # noqa: E402
import softcfg  # noqa: E402
from plug_models import PROMPTS, SHORT, WINDOW, with_large_weights  # noqa: E402
from softcfg import CFG, Sampling, SoftCFG, UserError  # noqa: E402
from softcfg.guidance import PERTURBATIONS  # noqa: E402
from softcfg.integrations import transformers as plug  # noqa: E402


@pytest.fixture(scope="module")
def llama() -> Any:
    return made(plug_models.llama)


@pytest.fixture(scope="module")
def mistral() -> Any:
    return made(plug_models.mistral)


@pytest.fixture(scope="module")
def janus() -> Any:
    return made(plug_models.janus)


def made(make: Callable[[], Any]) -> Any:
    torch.manual_seed(7)
    return with_large_weights(make())


def decode(model: Any, guidance: Any = SoftCFG(), prompts: Any = PROMPTS, **settings: Any) -> Tensor:  # noqa: B008
    return plug.decode(model, prompts, guidance, **{"num_tokens": 4, "unconditional_ids": SHORT, **settings})


def generate(model: Any, **settings: Any) -> Tensor:
    usual = {"guidance": SoftCFG(), "unconditional_ids": SHORT, "max_new_tokens": 4, "eos_token_id": None}
    return model.generate(PROMPTS, custom_generate=plug.generate, **{**usual, **settings})


def in_image_mode(janus: Any, **settings: Any) -> Tensor:
    prompts = torch.tensor([[1, 7, 8, 9, 4], [1, 10, 11, 12, 4]])
    config = transformers.GenerationConfig(
        bos_token_id=1, pad_token_id=0, do_sample=False, generation_kwargs={"boi_token_id": 4}
    )
    settings = {"custom_generate": plug.generate, **settings}
    return janus.generate(prompts, generation_mode="image", generation_config=config, **settings)


# Indices of images.


@pytest.mark.parametrize(
    ("indices", "sentence"),
    [
        ([0], "indices must be as many as rows, 2, got 1"),
        ([0, 1, 2], "indices must be as many as rows, 2, got 3"),
        ([], "indices must be as many as rows, 2, got 0"),
        (5, "indices must be a list, got 5"),
        ([0.5, 1.5], "image index must be a whole number in .* got 0.5"),
        ([True, False], "image index must be a whole number in .* got True"),
    ],
    ids=str,
)
def test_there_is_one_index_a_row(llama: Any, indices: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        decode(llama, indices=indices)
    with pytest.raises(UserError, match=sentence):
        generate(llama, indices=indices)


def test_every_image_of_a_prompt_needs_an_index(llama: Any) -> None:
    with pytest.raises(UserError, match="as many as rows, 4, got 2"):
        generate(llama, indices=[3, 4], num_return_sequences=2, do_sample=True)


def test_indices_may_be_a_tensor(llama: Any) -> None:
    assert torch.equal(decode(llama, indices=torch.tensor([4, 9])), decode(llama, indices=[4, 9]))


# Guidance and lengths.


def test_a_number_is_the_scale_of_softcfg(llama: Any) -> None:
    assert torch.equal(decode(llama, 2.5), decode(llama, SoftCFG(2.5)))
    assert torch.equal(generate(llama, guidance=2.5), generate(llama, guidance=SoftCFG(2.5)))
    assert not torch.equal(decode(llama, 2.5), decode(llama, SoftCFG()))


def test_without_guidance_it_is_that_of_the_paper(llama: Any) -> None:
    assert torch.equal(decode(llama, None), decode(llama, SoftCFG()))
    assert torch.equal(generate(llama, guidance=None), generate(llama))
    omitted = llama.generate(
        PROMPTS, custom_generate=plug.generate, unconditional_ids=SHORT, max_new_tokens=4, eos_token_id=None
    )
    assert torch.equal(omitted, generate(llama))


@pytest.mark.parametrize("guidance", [True, "cfg", SoftCFG, float("nan")], ids=str)
def test_what_is_no_guidance(llama: Any, guidance: Any) -> None:
    for call in (lambda: decode(llama, guidance), lambda: generate(llama, guidance=guidance)):
        with pytest.raises(UserError, match=r"^guidance(_scale)? must be .* got "):
            call()


def test_a_number_in_the_image_mode_of_janus(janus: Any) -> None:
    """As `guidance_scale`, it holds at every step; 0 and 1 guide nothing."""
    expected = in_image_mode(janus, guidance=SoftCFG(3.0, schedule="constant"))
    assert torch.equal(in_image_mode(janus, guidance=3.0), expected)
    assert torch.equal(in_image_mode(janus, guidance_scale=3.0), expected)
    unguided = in_image_mode(janus, guidance=CFG(1.0))
    assert not torch.equal(unguided, in_image_mode(janus))
    assert torch.equal(in_image_mode(janus, guidance_scale=0.0), unguided)


@pytest.mark.parametrize("num_tokens", [-1, 0, 12.0, True, "4"], ids=str)
def test_what_is_no_number_of_tokens(llama: Any, num_tokens: Any) -> None:
    for call in (
        lambda: decode(llama, num_tokens=num_tokens),
        lambda: plug.TransformersGenerator(llama, num_tokens),
    ):
        with pytest.raises(UserError, match=r"^num_tokens must be (a whole number|at least 1), got "):
            call()


# Weights in a loop of one's own.


def weighted_step(model: Any, before: int, weights: Any, kind: str, name: str = "value_weights") -> Tensor:
    """Logits of a token after `before` others."""
    cache = (
        transformers.DynamicCache(config=model.config)
        if kind == "dynamic"
        else transformers.StaticCache(config=model.config, max_cache_len=20)
    )
    model(torch.arange(10, 10 + before)[None], past_key_values=cache)
    return model(torch.tensor([[30]]), past_key_values=cache, **{name: weights}).logits


@pytest.mark.parametrize("name", ["value_weights", "key_weights", "attention_weights"])
@pytest.mark.parametrize("before", [3, 8])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_there_is_a_weight_for_every_slot(
    request: pytest.FixtureRequest, family: str, kind: str, before: int, name: str
) -> None:
    """Also where a layer keeps fewer slots, in a window, or more, in a static cache."""
    model, filled = request.getfixturevalue(family), before + 1
    weights = torch.rand(1, 12, generator=torch.Generator().manual_seed(0)) + 0.5
    assert weighted_step(model, before, weights[:, :filled], kind, name).isfinite().all()
    for length in (1, filled - 2, filled - 1, filled + 1, filled + 3):
        with pytest.raises(UserError, match=rf"^{name} must .* of the {filled} slots .*, got \[1, {length}\]$"):
            weighted_step(model, before, weights[:, :length], kind, name)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_window_takes_the_last_of_the_weights(mistral: Any, kind: str) -> None:
    """Those in front of it change nothing, the last one does: exact lengths put each weight at its slot."""
    weights = torch.ones(1, 9)
    plain = weighted_step(mistral, 8, weights, kind)
    hidden, new = weights.clone(), weights.clone()
    hidden[:, :3], new[:, -1] = 0.1, 0.1
    assert torch.equal(weighted_step(mistral, 8, hidden, kind), plain)
    assert not torch.allclose(weighted_step(mistral, 8, new, kind), plain, atol=1e-3)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_window_in_which_all_is_hidden_shows_the_new_slot(mistral: Any, kind: str) -> None:
    """Prompts are never hidden, but may lie outside of it."""
    weights = torch.zeros(1, 9)
    hidden = weighted_step(mistral, 8, weights, kind, "attention_weights")
    weights[:, -1] = 1
    assert torch.equal(hidden, weighted_step(mistral, 8, weights, kind, "attention_weights"))
    assert hidden.isfinite().all()
    every = CFG(3.0, perturbation=PERTURBATIONS["low_confidence"](share=1.0))  # type: ignore[call-arg]
    generator, given = plug.TransformersGenerator(mistral, 12, cache=kind), plug.Prompts(PROMPTS, SHORT)
    drawn = decode(mistral, every, num_tokens=12, cache=kind, sampling=Sampling(top_k=1))
    traced = softcfg.trace(generator, labels=given, tokens=drawn, guidance=every)
    assert torch.equal(traced.guided_logits.argmax(dim=-1), drawn)


@pytest.mark.parametrize("kind", ["none", "static"])
@pytest.mark.parametrize("length", [2, 4])
def test_the_first_pass_needs_a_weight_for_every_slot(llama: Any, kind: str, length: int) -> None:
    cache = transformers.StaticCache(config=llama.config, max_cache_len=9) if kind == "static" else None
    with pytest.raises(UserError, match=rf"of the 3 slots .* got \[1, {length}\]"):
        llama(torch.tensor([[7, 8, 9]]), past_key_values=cache, use_cache=False, value_weights=torch.ones(1, length))


def test_a_mask_of_ones_own_shows_what_is_filled(llama: Any) -> None:
    def step(length: int) -> Tensor:
        cache = transformers.StaticCache(config=llama.config, max_cache_len=9)
        llama(torch.tensor([[10, 11, 12]]), past_key_values=cache)
        mask = (torch.arange(9) < 4)[None, None, None]
        weights = torch.full((1, length), 0.5)
        return llama(torch.tensor([[30]]), attention_mask=mask, past_key_values=cache, value_weights=weights).logits

    torch.testing.assert_close(step(4), weighted_step(llama, 3, torch.full((1, 4), 0.5), "dynamic"))
    for length in (3, 5, 9):
        with pytest.raises(UserError, match="of the 4 slots"):
            step(length)


@pytest.mark.parametrize(
    "weights",
    [torch.ones(4), torch.ones(2, 4), torch.ones(1, 2, 4), torch.tensor(1.0), [[1.0, 1.0, 1.0, 1.0]]],
    ids=lambda weights: str(list(weights.shape)) if isinstance(weights, Tensor) else "list",
)
def test_weights_of_another_shape(llama: Any, weights: Any) -> None:
    with pytest.raises(UserError, match=r"^value_weights must "):
        weighted_step(llama, 3, weights, "dynamic")


def test_a_generator_needs_weights_of_all_its_slots(llama: Any) -> None:
    generator = plug.TransformersGenerator(llama, 4)
    condition = generator.condition(plug.Prompts(PROMPTS[1:]), guided=False)
    with pytest.raises(UserError, match="value_weights must be of at least the 7 slots filled so far, got 6"):
        generator(condition, torch.tensor([[20, 21]]), value_weights=torch.ones(1, 6))


def test_attention_that_is_not_causal_cannot_have_weights(llama: Any) -> None:
    query, module = torch.randn(1, 2, 3, 8), llama.model.layers[0].self_attn
    with pytest.raises(UserError, match="LlamaAttention is not causal"):
        plug.attention(module, query, query, query, None, value_weights=torch.ones(1, 3), is_causal=False)


def bert() -> Any:
    """Not a decoder, by default."""
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    return transformers.BertLMHeadModel(transformers.BertConfig(vocab_size=60, **size))


def gemma3() -> Any:
    config = transformers.Gemma3TextConfig(**plug_models.TEXT, head_dim=8, use_bidirectional_attention=True)
    return transformers.Gemma3ForCausalLM(config)


@pytest.mark.parametrize("make", [bert, gemma3])
def test_a_model_that_is_not_causal_is_refused(make: Callable[[], Any]) -> None:
    """Whatever its attention, and whether or not there is a mask."""
    model = made(make)
    for attention in ("softcfg", "sdpa", "eager"):
        model.set_attn_implementation(attention)
        for prompts in (PROMPTS, PROMPTS[1:]):
            with pytest.raises(UserError, match=r"^\w+ is not causal, so nothing can be drawn"):
                decode(model, CFG(3.0), prompts)


def test_a_layer_that_is_not_causal_is_refused(llama: Any) -> None:
    model = copy.deepcopy(llama)
    model.model.layers[1].self_attn.is_causal = False
    for guidance in (CFG(3.0), SoftCFG()):
        with pytest.raises(UserError, match="LlamaAttention is not causal: nothing can be drawn"):
            decode(model, guidance)


def test_prompts_that_are_read_in_both_directions() -> None:
    """PaliGemma's layers say that they are not causal, but no pass that draws has more than one query."""
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 8, "patch_size": 4, "intermediate_size": 16,
    }  # fmt: skip
    text = transformers.GemmaConfig(**plug_models.TEXT, head_dim=8)
    config = transformers.PaliGemmaConfig(text_config=text, vision_config=vision, projection_dim=32)
    model = made(lambda: transformers.PaliGemmaForConditionalGeneration(config))
    drawn = decode(model, CFG(1.0), PROMPTS[1:], sampling=Sampling(top_k=1))
    assert torch.equal(drawn, model.generate(PROMPTS[1:], max_new_tokens=4, do_sample=False, eos_token_id=None)[:, 5:])
    assert decode(model, SoftCFG(), PROMPTS[1:], unconditional_ids=PROMPTS[1:] + 1).shape == (1, 4)
    with pytest.raises(UserError, match="gives other logits after a prompt with padding"):
        decode(model, CFG(3.0))
    generator, given = plug.TransformersGenerator(model, 4), plug.Prompts(PROMPTS[1:], PROMPTS[1:] + 1)
    with pytest.raises(UserError, match="drawn from step by step, but not traced"):
        softcfg.trace(generator, labels=given, tokens=drawn, guidance=CFG(3.0))


# What `generate` of transformers keeps to itself.


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"negative_prompt_ids": SHORT}, "no negative_prompt_ids: give unconditional_ids in its place"),
        (
            {"negative_prompt_attention_mask": torch.ones(1, 2)},
            "no negative_prompt_attention_mask: give unconditional_mask in its place",
        ),
        ({"position_ids": torch.zeros(2, 5, dtype=torch.int64)}, "token ids alone, not position_ids"),
        ({"cache_implementation": "offloaded"}, "cache_implementation=offloaded is not supported"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_generate_refuses_what_it_would_not_use(llama: Any, settings: dict[str, Any], sentence: str) -> None:
    for guidance in (SoftCFG(), CFG(1.0)):
        with pytest.raises(UserError, match=sentence):
            generate(llama, guidance=guidance, **settings)


def behind_a_function(model: Any, **settings: Any) -> Tensor:
    """As `generate`, from a function of the user's."""

    def own(*args: Any, **kwargs: Any) -> Tensor:
        return plug.generate(*args, guidance=SoftCFG(), unconditional_ids=SHORT, **kwargs)

    return model.generate(PROMPTS, custom_generate=own, **{"max_new_tokens": 4, "eos_token_id": None, **settings})


def test_a_function_around_generate_changes_nothing(llama: Any, janus: Any) -> None:
    """Nothing of what `generate` of transformers keeps to itself is lost."""
    cache = transformers.DynamicCache(config=llama.config)
    assert torch.equal(behind_a_function(llama, past_key_values=cache), generate(llama))
    assert cache.get_seq_length() == 8
    with pytest.raises(UserError, match="takes no negative_prompt_ids"):
        behind_a_function(llama, negative_prompt_ids=SHORT)
    with pytest.raises(UserError, match=r"^this is for model\.generate\(\.\.\., custom_generate=generate\): call that"):
        plug.generate(llama, PROMPTS, [], [], llama.generation_config)
    bound = functools.partial(plug.generate, guidance=SoftCFG(3.0, schedule="constant"))
    assert torch.equal(in_image_mode(janus, custom_generate=bound), in_image_mode(janus, guidance=3.0))
    with pytest.raises(UserError, match="image mode of Janus takes softcfg's generate"):
        in_image_mode(janus, custom_generate=lambda *args, **kwargs: plug.generate(*args, **kwargs))


def test_generate_refuses_an_assistant(llama: Any) -> None:
    with pytest.raises(UserError, match="assisted generation is not supported by softcfg's decoding"):
        generate(llama, assistant_model=llama)


def test_a_mask_given_to_generate_counts(llama: Any) -> None:
    """One without zeros too, which `generate` leaves out: padding tokens are then seen."""
    ones = torch.ones_like(PROMPTS)
    sequences = generate(llama, attention_mask=ones, do_sample=True, top_k=0)
    assert torch.equal(sequences[:, 5:], decode(llama, attention_mask=ones))
    assert not torch.equal(sequences[:, 5:], decode(llama))


def test_generate_takes_lists(llama: Any) -> None:
    ids, mask = [[1, 3, 4], [0, 5, 4]], [[1, 1, 1], [0, 1, 1]]
    sequences = generate(llama, unconditional_ids=ids, unconditional_mask=mask)
    tensors = {"unconditional_ids": torch.tensor(ids), "unconditional_mask": torch.tensor(mask)}
    assert torch.equal(sequences, generate(llama, **tensors))


# The other arguments.

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mask of fractions": ({"attention_mask": PROMPTS * 0.5}, "mask of input_ids must be 0 for padding and 1"),
    "additive mask": ({"attention_mask": torch.where(PROMPTS > 0, 0.0, -1e9)}, "mask of input_ids must be 0 for"),
    "mask of text": ({"attention_mask": "all"}, "mask of input_ids must be 0 and 1, got 'all'"),
    "mask without ids": (
        {"guidance": CFG(1.0), "unconditional_ids": None, "unconditional_mask": torch.ones(1, 2)},
        "unconditional_ids, which are missing",
    ),
    "no codes": ({"image_codes": []}, "image_codes must name at least one token"),
    "codes of text": ({"image_codes": "all"}, "image_codes must be ids of tokens, or one bool per step, got 'all'"),
    "no sampling": ({"sampling": 0}, r"sampling must be Sampling\(\.\.\.\), got 0"),
    "settings of sampling": ({"sampling": {}}, r"sampling must be Sampling\(\.\.\.\), got {}"),
    "sampling twice": (
        {"sampling": Sampling(), "temperature": 0.9, "top_p": 0.5},
        "give sampling or temperature, top_p, not both",
    ),
    "no temperature": ({"temperature": 0.0}, "temperature must be"),
    "no head": ({"head": plug.ImageHead.janus}, r"head must be ImageHead\(\.\.\.\), got <bound method"),
    "name of a model": ({"model": "gpt2"}, "model must be a model of transformers, got 'gpt2'"),
    "no cache": ({"cache": None}, "cache must be 'dynamic' or 'static', got None"),
    "no padding": ({"pad_token_id": None}, "pad_token_id must be a whole number, got None"),
    "fraction of padding": ({"pad_token_id": 0.5}, "pad_token_id must be a whole number, got 0.5"),
    "padding unknown": ({"pad_token_id": 60}, r"pad_token_id holds 60, which is outside of 0\.\.59"),
    "one processor": ({"logits_processor": lambda ids, logits: logits}, "logits_processor must be a list"),
    "processor of nothing": (
        {"logits_processor": [lambda ids, logits: None]},
        r"logits_processor must return logits \[2, 60\], as they came, got None",
    ),
    "processor of one row": (
        {"logits_processor": [lambda ids, logits: logits[:1]]},
        r"logits_processor must return logits \[2, 60\], as they came, got \[1, 60\]",
    ),
    "one criterion": ({"stopping_criteria": lambda ids, scores: False}, "stopping_criteria must be a list"),
    "criterion of one row": (
        {"stopping_criteria": [lambda ids, scores: torch.tensor([True])]},
        r"stopping_criteria must return bool \[2\], one per row, got \[1\]",
    ),
    "criterion of nothing": (
        {"stopping_criteria": [lambda ids, scores: None]},
        r"stopping_criteria must return bool \[2\], one per row, got None",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_decode_refuses(llama: Any, what: str) -> None:
    settings, sentence = REFUSED[what]
    with pytest.raises(UserError, match=sentence):
        decode(**{"model": llama, **settings})


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.4}, {"temperature": 2.0, "top_k": 9, "top_p": 0.7}],
    ids=str,
)
def test_decode_takes_the_settings_of_sampling_one_by_one(llama: Any, settings: dict[str, Any]) -> None:
    drawn = decode(llama, num_tokens=8, **settings)
    assert torch.equal(drawn, decode(llama, num_tokens=8, sampling=Sampling(**settings)))
    assert not torch.equal(drawn, decode(llama, num_tokens=8))


@pytest.mark.parametrize("ended", [True, torch.tensor(True)], ids=["bool", "tensor"])
def test_a_criterion_may_end_all_rows_at_once(llama: Any, ended: Any) -> None:
    tokens = decode(llama, stopping_criteria=[lambda ids, scores: ended if ids.shape[1] == 7 else False])
    assert torch.equal(tokens, decode(llama)[:, :2])


def test_padding_need_not_be_a_code_of_the_head(llama: Any) -> None:
    """A row that has ended gets padding, and the head for images is never fed it."""
    embed, logits = torch.nn.Embedding(16, llama.config.hidden_size), torch.nn.Linear(llama.config.hidden_size, 16)
    head = plug.ImageHead(embed=embed, backbone=llama.model, logits=logits, vocab_size=16)
    ended = [lambda ids, scores: torch.tensor([ids.shape[1] >= 7, False])]
    padded = decode(llama, head=head, stopping_criteria=ended, pad_token_id=20)
    whole = decode(llama, head=head)
    assert torch.equal(padded[1], whole[1])
    assert torch.equal(padded[0, :2], whole[0, :2])
    assert (padded[0, 2:] == 20).all()


def static_cache(model: Any, slots: int) -> Any:
    return transformers.StaticCache(config=model.config, max_cache_len=slots)


def test_a_cache_given_has_room(llama: Any, mistral: Any) -> None:
    """8 slots are prompts and tokens; of a window no more than it are needed."""
    with pytest.raises(UserError, match="room for 8 slots, prompts and tokens, got 7"):
        decode(llama, cache=static_cache(llama, 7))
    with pytest.raises(UserError, match=f"room for {WINDOW} slots, prompts and tokens, got 3"):
        decode(mistral, cache=static_cache(mistral, 3))
    for model, slots in ((llama, 8), (mistral, WINDOW)):
        assert torch.equal(decode(model, cache=static_cache(model, slots)), decode(model))
    used = static_cache(llama, 8)
    llama(PROMPTS, past_key_values=used)
    used.reset()
    with pytest.raises(UserError, match="room for 4 rows, those of all branches, got 2"):
        decode(llama, cache=used)


def test_janus_needs_unconditional_ids_to_a_mask(janus: Any) -> None:
    with pytest.raises(UserError, match="unconditional_ids, which are missing"):
        in_image_mode(janus, unconditional_mask=torch.ones(2, 5))


# Generators and their prompts.


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ((0, 4, 20), "rows must be at least 1, got 0"),
        ((4, 4.0, 20), "columns must be a whole number, got 4.0"),
        ((4, 4, -3, 30), "num_codes must be at least 1, got -3"),
        ((4, 4, 20, -1), "first_code_id must be at least 0, got -1"),
        ((4, 4, 20, 8, 30), "row_end must be a tuple of ids, got 30"),
        ((4, 4, 20, 8, (), (1.5,)), "tail must be integers"),
    ],
    ids=str,
)
def test_image_tokens_are_a_grid(fields: tuple[Any, ...], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        plug.ImageTokens(*fields)


def prompts_of(ids: Any, mask: Any = None) -> Callable[..., plug.Prompts]:
    return lambda prompt: plug.Prompts(ids, attention_mask=mask)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"options": "negative_text"}, "options must be a list of task, image, negative_text, got 'negative_text'"),
        ({"options": ["negative"]}, r"options must be a list of .* got \['negative'\]"),
        ({"encode": "template"}, "encode must be a function of a Prompt, got 'template'"),
        ({"tokens": (4, 4, 20)}, r"tokens must be ImageTokens\(\.\.\.\), got \(4, 4, 20\)"),
    ],
    ids=str,
)
def test_an_image_generator_refuses(llama: Any, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        plug.ImageGenerator(llama, **{"tokens": plug.ImageTokens(4, 4, 20), "encode": prompts_of(SHORT), **changes})


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        (plug.Prompts(SHORT), r"prompts must be a list of Prompts\(input_ids, \.\.\.\), got Prompts"),
        ([SHORT], r"a prompt must be Prompts\(input_ids, \.\.\.\) of one row, got tensor"),
        ([plug.Prompts(PROMPTS)], r"must be one row, \[L\] or \[1, L\], got \[2, 5\] and \[2, 5\]"),
        ([plug.Prompts(SHORT, attention_mask=torch.ones(1, 3))], r"must be one row, .* got \[1, 2\] and \[1, 3\]"),
        ([plug.Prompts("a star")], "input_ids must be integers in"),
    ],
    ids=["alone", "tensor", "two rows", "longer mask", "text"],
)
def test_prompts_of_an_image_generator_are_rows(llama: Any, inputs: Any, sentence: str) -> None:
    generator = plug.ImageGenerator(llama, plug.ImageTokens(4, 4, 20), prompts_of(SHORT))
    with pytest.raises(UserError, match=sentence):
        generator.condition(inputs, guided=False)


def test_a_generator_takes_prompts_and_steps(llama: Any) -> None:
    with pytest.raises(UserError, match=r"prompts must be Prompts\(input_ids, \.\.\.\), got tensor"):
        plug.TransformersGenerator(llama, 4).condition(PROMPTS, guided=False)
    steps = [True, False, True, True]
    assert plug.TransformersGenerator(llama, 4, code_steps=steps).code_steps.tolist() == steps  # type: ignore[arg-type, union-attr]
    with pytest.raises(UserError, match=r"steps that draw image codes must be bool \[4\]"):
        plug.TransformersGenerator(llama, 4, code_steps=steps[:3])  # type: ignore[arg-type]
