"""Janus-Pro, Emu3-Gen and LlamaGen T2I compute what the released programs compute, of prompts of different length."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import softcfg
from goldens import FOLDER, Golden, golden
from softcfg import CFG, UserError
from softcfg.configuration import load_config
from softcfg.decoding import Sampling
from softcfg.models.base import Condition, Generator
from softcfg.models.emu3.generator import Emu3
from softcfg.models.emu3.prompts import Emu3Prompt
from softcfg.models.janus.generator import Janus
from softcfg.models.llamagen_t2i.generator import LlamaGenT2I
from softcfg.zoo import GENERATORS

TOLERANCE = 3e-5


@dataclass
class Case:
    """Rows of a golden file: the inputs of the condition, the tokens drawn, and the logits of both branches."""

    inputs: list[Any]
    tokens: Tensor
    cond: Tensor
    uncond: Tensor


def load(family: str, name: str) -> tuple[Golden, Any]:
    file = golden(name)
    return file, softcfg.load_generator(family, config=file.config, checkpoint=file.weights())


def case(file: Golden, inputs: list[Any], suffix: str = "") -> Case:
    return Case(inputs, *(file.arrays[name + suffix] for name in ("tokens", "cond_logits", "uncond_logits")))


def check(generator: Generator, case: Case, steps: Sequence[int] | None = None) -> None:
    """One pass over all tokens, and the same token by token with a cache, compared in the first `steps` of each row."""
    condition = generator.condition(case.inputs, guided=True)
    tokens = case.tokens.repeat(2, 1)
    assert condition.num_tokens == tokens.shape[1]
    whole = generator(condition, tokens[:, :-1])
    assert whole.dtype == torch.float32
    cached = by_steps(generator, condition, tokens)
    for logits in (whole, cached):
        for row, expected in enumerate(torch.cat((case.cond, case.uncond))):
            compared = None if steps is None else steps[row % len(steps)]
            torch.testing.assert_close(logits[row, :compared], expected[:compared], rtol=0, atol=TOLERANCE)


def by_steps(generator: Generator, condition: Condition, tokens: Tensor) -> Tensor:
    cache = generator.new_cache(condition)
    logits = [generator(condition, tokens[:, :0], cache=cache)]
    for i in range(condition.num_tokens - 1):
        logits.append(generator(condition, tokens[:, i : i + 1], cache=cache, slot=condition.slots + i))
    return torch.cat(logits, dim=1)


@pytest.fixture(scope="module")
def janus() -> tuple[Golden, Janus]:
    return load("janus-pro", "janus/golden-generator-cfg-a")


@pytest.fixture(scope="module")
def emu3() -> tuple[Golden, Emu3]:
    return load("emu3", "emu3/golden-generator-cfg-a")


@pytest.fixture(scope="module")
def llamagen() -> tuple[Golden, LlamaGenT2I]:
    return load("llamagen-t2i", "llamagen-t2i/golden-generator-cfg-a")


class TestJanus:
    """Janus-Pro."""

    def test_the_library_s_layout(self, janus: tuple[Golden, Janus]) -> None:
        file, generator = janus
        prompts = file.call["prompts"]
        check(generator, case(file, prompts))
        for row, prompt in enumerate(prompts):
            check(generator, case(file, [prompt], f"_alone_{row}"))

    def test_the_original_layout(self) -> None:
        file, generator = load("janus-pro", "janus/golden-generator-original-a")
        for row, prompt in enumerate(file.call["prompts"]):
            check(generator, case(file, [prompt] * 2, f"_{row}"))

    def test_unconditional_prompts(self, janus: tuple[Golden, Janus]) -> None:
        _, generator = janus
        condition = generator.condition([[120, 5, 123, 6, 123], [120, 7, 123]], guided=True)
        assert condition.padding is not None
        assert condition.padding.tolist() == [0, 2, 0, 2]
        assert condition.ids[2].tolist() == [120, 122, 122, 122, 123]
        assert condition.ids[3, 2:].tolist() == [120, 122, 123]
        assert generator.condition([[120, 123]], guided=False).padding is None

    @pytest.mark.parametrize(
        ("prompts", "message"),
        [
            ([], "at least one"),
            ([[]], "at least one token"),
            ([[[120, 123]]], "flat list"),
            ([[120, 160]], "outside of 0..159"),
            ([[120.5]], "integers"),
            ([[120] * 17000], "takes?"),
        ],
    )
    def test_prompts_that_are_refused(self, janus: tuple[Golden, Janus], prompts: Any, message: str) -> None:
        with pytest.raises(UserError, match=message):
            janus[1].condition(prompts, guided=True)


class TestEmu3:
    """Emu3-Gen."""

    def prompts(self, file: Golden) -> list[Emu3Prompt]:
        call = file.call
        grids = call.get("sizes_h_w") or [call["size_h_w"]] * len(call["prompts"])
        return [
            Emu3Prompt(ids, negative, tuple(grid))
            for ids, negative, grid in zip(call["prompts"], call["negative_prompts"], grids, strict=True)
        ]

    @pytest.mark.parametrize("name", ["cfg-a", "cfg-a-plainnegative-temp09"])
    def test_the_library_s_layout(self, name: str) -> None:
        file, generator = load("emu3", f"emu3/golden-generator-{name}")
        check(generator, case(file, self.prompts(file)))

    def test_the_original_layout(self) -> None:
        file, generator = load("emu3", "emu3/golden-generator-original-a")
        for row, prompt in enumerate(self.prompts(file)):
            check(generator, case(file, [prompt], f"_alone_{row}"))

    def test_what_may_stand_where(self, emu3: tuple[Golden, Emu3]) -> None:
        file, generator = emu3
        condition = generator.condition(self.prompts(file), guided=True)
        steps = torch.arange(condition.num_tokens)
        guided = file.arrays["guided_logits"]
        allowed = generator.constrain(guided, steps, condition)
        kept = file.arrays["scores"].isfinite()
        assert allowed.isfinite()[kept].all()  # top-k comes after it
        counts = torch.where(condition.geometry.is_code(steps), 64, 1)
        assert torch.equal(allowed.isfinite().sum(-1), counts.expand(2, -1))
        torch.testing.assert_close(allowed[kept], guided[kept])
        codes = generator.image_codes(file.arrays["tokens"], condition)
        assert codes.shape == (2, condition.num_codes)
        assert codes.min() >= 0
        assert codes.max() < 64

    def test_by_default_the_negative_prompt_is_the_header(self, emu3: tuple[Golden, Emu3]) -> None:
        file, generator = emu3
        prompt = self.prompts(file)[0]
        condition = generator.condition([Emu3Prompt(prompt.ids, grid=prompt.grid)], guided=True)
        assert condition.padding is not None
        header = list(prompt.ids)[-5:]
        assert condition.ids[1, int(condition.padding[1]) :].tolist() == [59, *header]
        with pytest.raises(UserError, match="header"):
            generator.condition([Emu3Prompt([59, 1], grid=prompt.grid)], guided=True)

    @pytest.mark.parametrize(
        ("prompts", "message"),
        [
            ([], "at least one"),
            ([[59, 61]], "Emu3Prompt"),
            ([Emu3Prompt([59], [59], (4, 4)), Emu3Prompt([59], [59], (4, 5))], "one size"),
            ([Emu3Prompt([59], [59], (4, 2))], "3 columns"),
            ([Emu3Prompt([59], [59], (100, 100))], "positions"),
            ([Emu3Prompt([59], [128], (4, 4))], "outside of 0..127"),
        ],
    )
    def test_prompts_that_are_refused(self, emu3: tuple[Golden, Emu3], prompts: Any, message: str) -> None:
        with pytest.raises(UserError, match=message):
            emu3[1].condition(prompts, guided=True)


class TestLlamaGen:
    """LlamaGen's text-to-image models."""

    def captions(self, file: Golden) -> list[Tensor]:
        lengths = file.call["valid_lengths"]
        return [features[:n] for features, n in zip(file.arrays["text_features"], lengths, strict=True)]

    @pytest.mark.parametrize("name", ["cfg-a", "cfg-a-text120-topk40"])
    def test_captions_of_different_length(self, name: str) -> None:
        file, generator = load("llamagen-t2i", f"llamagen-t2i/golden-generator-{name}")
        captions = self.captions(file)
        check(generator, case(file, captions))
        everything = case(file, captions)
        rows = slice(2, 3)
        check(
            generator,
            Case(captions[rows], everything.tokens[rows], everything.cond[rows], everything.uncond[rows]),
        )

    def test_features_are_moved(self, llamagen: tuple[Golden, LlamaGenT2I]) -> None:
        file, generator = llamagen
        condition = generator.condition(self.captions(file), guided=False)
        assert torch.equal(condition.features, file.arrays["moved_features"])
        assert condition.padding is not None
        assert torch.equal(condition.padding, condition.slots - file.arrays["moved_mask"].sum(-1))

    @pytest.mark.parametrize("captions", [[], [torch.ones(3, 47)], [torch.ones(0, 48)], [torch.ones(13, 48)], [[1.0]]])
    def test_captions_that_are_refused(self, llamagen: tuple[Golden, LlamaGenT2I], captions: Any) -> None:
        with pytest.raises(UserError, match=r"captions? must be"):
            llamagen[1].condition(captions, guided=True)


def inputs_of(file: Golden) -> list[Any]:
    readers = {
        "janus": lambda file: file.call["prompts"],
        "emu3": TestEmu3().prompts,
        "llamagen-t2i": TestLlamaGen().captions,
    }
    inputs: list[Any] = readers[file.about["family"]](file)
    return inputs


@pytest.mark.parametrize("family", ["janus", "emu3", "llamagen"])
def test_rows_do_not_depend_on_each_other(family: str, request: pytest.FixtureRequest) -> None:
    """In float64 the logits of a prompt alone and beside a longer one agree to rounding."""
    file, generator = request.getfixturevalue(family)
    inputs = inputs_of(file)
    precise = copy.deepcopy(generator).double()
    tokens = file.arrays["tokens"]
    together = precise(precise.condition(inputs, guided=True), tokens.repeat(2, 1)[:, :-1])
    assert together.dtype == torch.float64
    for row, prompt in enumerate(inputs):
        alone = precise(precise.condition([prompt], guided=True), tokens[[row, row], :-1])
        torch.testing.assert_close(alone, together[[row, len(inputs) + row]], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("family", "name", "suffix"),
    [
        ("janus-pro", "janus/golden-generator-cfg-a", ""),
        ("janus-pro", "janus/golden-generator-cfg-a", "_alone_1"),
        ("janus-pro", "janus/golden-generator-cfg-a-topk24-topp092-temp08", ""),
        ("emu3", "emu3/golden-generator-cfg-a", ""),
        ("emu3", "emu3/golden-generator-cfg-a-plainnegative-temp09", ""),
        ("llamagen-t2i", "llamagen-t2i/golden-generator-cfg-a", ""),
        ("llamagen-t2i", "llamagen-t2i/golden-generator-cfg-a-text120-topk40", ""),
    ],
)
def test_guidance_and_what_tokens_are_drawn_from(family: str, name: str, suffix: str) -> None:
    file, generator = load(family, name)
    call, arrays = file.call, file.arrays
    sampling = Sampling(call["temperature"], call["top_k"], call.get("top_p", 1.0))
    inputs = inputs_of(file)[-1:] if suffix else inputs_of(file)
    scale = call["cfg_scale"] if family == "llamagen-t2i" else call["guidance_scale"]
    trace = softcfg.trace(
        generator,
        labels=inputs,
        tokens=arrays["tokens" + suffix],
        guidance=CFG(scale, schedule="constant"),
        sampling=sampling,
    )
    torch.testing.assert_close(trace.cond_logits, arrays["cond_logits" + suffix], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(trace.uncond_logits, arrays["uncond_logits" + suffix], rtol=0, atol=TOLERANCE)
    guided = arrays["guided_logits" + suffix]
    allowed = trace.guided_logits.isfinite()
    if family == "emu3":  # guided in log-probabilities, which moves all logits of a step by one number
        moved = (trace.guided_logits - guided).masked_fill(~allowed, torch.nan)
        assert (moved - moved.nanmedian(-1, keepdim=True).values)[allowed].abs().max() < 2e-4
        expected = arrays["scores"].softmax(-1)
    else:
        torch.testing.assert_close(trace.guided_logits, guided, rtol=0, atol=2e-4)
        expected = arrays.get("probs", guided.softmax(-1))
    probabilities = sampling.probabilities(trace.guided_logits)
    assert torch.equal(probabilities > 0, expected > 0)
    torch.testing.assert_close(probabilities, expected, rtol=0, atol=1e-4 if family == "emu3" else TOLERANCE)


@pytest.mark.parametrize(
    ("family", "name"), [("janus-pro", "janus"), ("emu3", "emu3"), ("llamagen-t2i", "llamagen-t2i")]
)
def test_bfloat16(family: str, name: str) -> None:
    file = golden(f"{name}/golden-generator-cfg-a")
    half = softcfg.load_generator(family, config=file.config, checkpoint=file.weights(), dtype=torch.bfloat16)
    logits = half(half.condition(inputs_of(file), guided=False), file.arrays["tokens"][:, :-1]).float()
    expected = file.arrays["cond_logits"]
    assert (logits - expected).abs().max() < 0.15 * expected.std()
    assert (logits - expected).abs().max() > TOLERANCE


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("janus-pro", "janus/keys-original-1b"),
        ("janus-pro", "janus/keys-original-7b"),
        ("janus-pro", "janus/keys-hf-1b"),
        ("janus-pro", "janus/keys-hf-7b"),
        ("emu3", "emu3/keys-gen-original"),
        ("emu3", "emu3/keys-gen-hf"),
        ("llamagen-t2i", "llamagen-t2i/keys-gpt-xl-t2i"),
    ],
)
def test_released_tensors(family: str, keys: str) -> None:
    released = json.loads((FOLDER / f"{keys}.json").read_text())
    model, config = GENERATORS[family].classes()
    with torch.device("meta"):
        published = {name: torch.empty(shape) for name, shape in released["tensors"].items()}
        module = model(load_config(config, released["config"]))
    expected = {name: list(tensor.shape) for name, tensor in GENERATORS[family].needed(published).items()}
    assert {name: list(tensor.shape) for name, tensor in module.state_dict().items()} == expected
