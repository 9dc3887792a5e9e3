"""The dtype of the weights is that of the numbers: casts after loading, default dtypes and autocast change nothing."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import softcfg
from small_families import FAMILIES, LLAMA, load, state_of
from softcfg import CFG, Pipeline, SoftCFG
from softcfg.decoding import ImageStreams, decode, image_uniforms, jacobi_decode
from softcfg.evaluation import evaluate, register_extractor
from softcfg.evaluation.features import Extractor, Features
from softcfg.models.base import Generator
from softcfg.zoo import GENERATORS, TOKENIZERS, Component, ModelFile
from tiny_models import MOVQ, VQ, weights


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SURROUNDINGS: dict[str, Callable[[], Any]] = {
    "default float64": lambda: default_dtype(torch.float64),
    "default float16": lambda: default_dtype(torch.float16),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "autocast bfloat16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", dtype=torch.float16),
}
DTYPES = [torch.float32, torch.bfloat16]


def drawn(generator: Generator) -> list[Tensor]:
    """Tokens and logits of every way of drawing."""
    inputs, found = generator.example_inputs(2), []
    total = generator.condition(inputs, guided=False).num_tokens
    uniforms = image_uniforms(0, range(2), total)
    for guidance in (CFG(3.0), SoftCFG(3.0)):
        found += [decode(generator, inputs, guidance, uniforms=uniforms, static=static) for static in (False, True)]
        found.append(jacobi_decode(generator, inputs, guidance, streams=ImageStreams(0, range(2)), window=3)[0])
        trace = softcfg.trace(generator, labels=inputs, tokens=found[-3], guidance=guidance)
        found += [trace.guided_logits, trace.confidence, trace.value_weights]
    return found


@functools.cache
def expected_of(family: str, dtype: torch.dtype) -> list[Tensor]:
    """What a generator draws that was loaded in a dtype, with nothing set around it."""
    return drawn(load(family, dtype))


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cast_after_loading_is_a_dtype_at_loading(family: str) -> None:
    assert set(FAMILIES) == set(GENERATORS)
    assert equal(drawn(load(family).to(torch.bfloat16)), expected_of(family, torch.bfloat16))


@pytest.mark.parametrize("family", ["rar", *(pytest.param(each, marks=pytest.mark.slow) for each in FAMILIES)])
def test_other_ways_to_cast(family: str) -> None:
    expected = expected_of(family, torch.bfloat16)
    assert equal(drawn(load(family).bfloat16()), expected)
    whole = nn.ModuleDict({"generator": load(family)}).to(torch.bfloat16)
    assert equal(drawn(whole["generator"]), expected)
    assert equal(drawn(load(family).double().float()), expected_of(family, torch.float32))


# Every family once, under all surroundings in turn; the other pairs are slow.
FIRST = set(zip(FAMILIES, itertools.cycle(SURROUNDINGS)))
PAIRS = [
    pytest.param(*pair, marks=() if pair in FIRST else pytest.mark.slow)
    for pair in itertools.product(FAMILIES, SURROUNDINGS)
]


@pytest.mark.parametrize(("family", "around"), PAIRS)
def test_what_is_set_around_it_changes_nothing(family: str, around: str) -> None:
    for dtype in DTYPES:
        generator = load(family, dtype)
        expected = expected_of(family, dtype)
        state = state_of(family)
        with SURROUNDINGS[around]():
            assert equal(drawn(generator), expected)
            again = softcfg.load_generator(family, config=FAMILIES[family], checkpoint=state, dtype=dtype)
            assert equal(drawn(again), expected)


IMAGE_TOKENIZERS = {"maskgit-vq": VQ, "movq": MOVQ}


@pytest.mark.parametrize("around", SURROUNDINGS)
@pytest.mark.parametrize("family", IMAGE_TOKENIZERS)
def test_tokenizers(family: str, around: str) -> None:
    config = IMAGE_TOKENIZERS[family]
    tokenizer = softcfg.load_tokenizer(
        family, config=config, checkpoint=weights(Component(TOKENIZERS[family], config, ModelFile("none")))
    )
    tokens = torch.arange(2 * tokenizer.num_tokens).view(2, -1) % tokenizer.codebook_size
    pixels = tokenizer.decode(tokens)
    codes, raw = tokenizer.encode(pixels), tokenizer.decode_raw(tokens)
    with SURROUNDINGS[around]():
        assert equal(
            [tokenizer.decode(tokens), tokenizer.encode(pixels), tokenizer.decode_raw(tokens)], [pixels, codes, raw]
        )


@pytest.mark.parametrize("around", SURROUNDINGS)
def test_a_pipeline(prompt_model_folder: Path, around: str) -> None:
    def pixels() -> np.ndarray:
        return Pipeline.from_pretrained(prompt_model_folder)(prompts=["a red apple", "a star"], seed=3).pixels

    expected = pixels()
    with SURROUNDINGS[around]():
        assert np.array_equal(pixels(), expected)


@pytest.mark.parametrize("around", SURROUNDINGS)
def test_measuring_and_its_cache(around: str, tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 5)).eval()
    register_extractor("tiny", lambda *_: Extractor("tiny", describe, "one"))

    def describe(images: Tensor) -> Features:
        hidden = network[:3](images.float() / 255)
        return Features(hidden, logits=network[3](hidden))

    source = np.random.default_rng(0)
    samples, reference = (source.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8) for _ in range(2))

    def measure(**settings: Any) -> dict[str, float]:
        return evaluate(
            samples, reference, "tiny", ["fid", "inception_score", "precision", "recall"], **settings
        ).metrics

    expected = measure()
    with SURROUNDINGS[around]():
        assert measure(cache=tmp_path) == expected
    assert measure(cache=tmp_path) == expected  # of the features that were kept


@pytest.mark.parametrize("around", SURROUNDINGS)
def test_the_plug(around: str) -> None:
    transformers = pytest.importorskip("transformers")
    from softcfg.integrations import transformers as plug

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**LLAMA, "num_key_value_heads": 2}, initializer_range=0.3)
    model = transformers.LlamaForCausalLM(config).eval()
    model.set_attn_implementation("softcfg")
    ids, other = torch.tensor([[3, 4, 5], [6, 7, 8]]), torch.tensor([[9]])

    def tokens(guidance: CFG) -> list[Tensor]:
        made = plug.decode(model, ids, guidance, num_tokens=8, unconditional_ids=other)
        greedy = model.generate(
            ids, custom_generate=plug.generate, guidance=guidance, unconditional_ids=other, do_sample=False,
            max_new_tokens=8, attention_mask=torch.ones_like(ids), eos_token_id=None,
        )  # fmt: skip
        generator = plug.TransformersGenerator(model, 8)
        trace = softcfg.trace(generator, labels=plug.Prompts(ids, other), tokens=made, guidance=guidance)
        return [made, greedy, trace.guided_logits]

    for guidance in (CFG(3.0), SoftCFG(3.0)):
        expected = tokens(guidance)
        with SURROUNDINGS[around]():
            assert equal(tokens(guidance), expected)
