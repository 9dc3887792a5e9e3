"""NaN and infinity in weights, logits, guidance and pixels: one sentence, and never an image."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import softcfg
from prompt_model import prompt_generator
from softcfg import CFG, Sampling, SoftCFG, UserError
from softcfg.decoding import ImageStreams, decode, image_uniforms, jacobi_decode
from softcfg.guidance import RULES, Rule
from softcfg.models.base import Generator
from softcfg.nn import use_backend, weighted_attention

NAN, INF = math.nan, math.inf
UNEVEN = [[1, 2], [3, 4, 5, 6]]  # the shorter prompt is padded


def sequential(generator: Generator, inputs: Any, guidance: CFG) -> Tensor:
    return decode(generator, inputs, guidance, uniforms=image_uniforms(0, range(len(inputs)), generator.num_tokens))


def static(generator: Generator, inputs: Any, guidance: CFG) -> Tensor:
    uniforms = image_uniforms(0, range(len(inputs)), generator.num_tokens)
    return decode(generator, inputs, guidance, uniforms=uniforms, static=True)


def jacobi(generator: Generator, inputs: Any, guidance: CFG) -> Tensor:
    return jacobi_decode(generator, inputs, guidance, streams=ImageStreams(0, range(len(inputs))), window=3)[0]


def traced(generator: Generator, inputs: Any, guidance: CFG) -> Tensor:
    tokens = torch.zeros(len(inputs), generator.num_tokens, dtype=torch.int64)
    return softcfg.trace(generator, labels=inputs, tokens=tokens, guidance=guidance).guided_logits


WAYS: dict[str, Callable[..., Tensor]] = {
    "decode": sequential, "static": static, "jacobi": jacobi, "trace": traced,
}  # fmt: skip
METHODS = {"cfg": CFG(3.0), "softcfg": SoftCFG(3.0), "without": CFG(1.0)}
# What is poisoned, with what, and what the sentence says.
POISONS: dict[str, tuple[Callable[[Generator], Tensor], float, str]] = {
    "NaN in a value projection": (lambda g: g.blocks[0].qkv.weight[-1], NAN, "hold NaN"),
    "NaN in the head": (lambda g: g.output.weight[1], NAN, "hold NaN"),
    "infinity in the head": (lambda g: g.output.bias[1:2], INF, "hold infinity"),
    "nothing possible": (lambda g: g.output.bias, -INF, "are minus infinity for all codes"),
}


def poisoned(name: str) -> Generator:
    generator = prompt_generator(6)
    where, value, _ = POISONS[name]
    where(generator)[0 if "NaN" in name else ...] = value
    return generator


@pytest.mark.parametrize("inputs", [UNEVEN, UNEVEN[1:]], ids=["padded", "alone"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("way", WAYS)
def test_logits_that_are_no_numbers(way: str, poison: str, method: str, inputs: list[list[int]]) -> None:
    match = rf"logits of row 0 at step 0 {POISONS[poison][2]}, computed in float32: .*weights"
    with pytest.raises(UserError, match=match):
        WAYS[way](poisoned(poison), inputs, METHODS[method])


@pytest.mark.parametrize("way", ["decode", "static"])
def test_the_step_and_the_row_are_named(way: str) -> None:
    generator = prompt_generator(6)
    generator.angles[6] = NAN  # the position of token 2 behind the prompt of four, which predicts token 3
    with pytest.raises(UserError, match="logits of row 1 at step 3 hold NaN"):
        WAYS[way](generator, UNEVEN, CFG(1.0))


def test_a_reduced_dtype_is_told_to_try_float32() -> None:
    generator = poisoned("infinity in the head").bfloat16()
    with pytest.raises(UserError, match="computed in bfloat16: try dtype=float32"):
        sequential(generator, UNEVEN, CFG(1.0))


@pytest.mark.parametrize(
    ("guidance", "sampling"), [(CFG(3e38, schedule="constant"), Sampling()), (CFG(1.0), Sampling(temperature=1e-44))]
)
def test_guidance_and_temperature_that_overflow(guidance: CFG, sampling: Sampling) -> None:
    generator, streams = prompt_generator(6), ImageStreams(0, range(2))
    match = "nothing to draw from in the guided logits of row 0 at step 0.*smaller guidance scale"
    with pytest.raises(UserError, match=match):
        decode(generator, UNEVEN, guidance, uniforms=image_uniforms(0, range(2), 6), sampling=sampling)
    with pytest.raises(UserError, match=match):
        jacobi_decode(generator, UNEVEN, guidance, streams=streams, window=3, sampling=sampling)


@pytest.mark.parametrize("value", [1e308, 3.5e38, 10**400])
@pytest.mark.parametrize("name", ["guidance_scale", "guidance_scale_pow", "strength", "eps"])
def test_settings_that_float32_cannot_hold(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be at most 3\.4e\+38"):
        SoftCFG(**{name: value})


class Masked(torch.nn.Module):
    """A head that rules code 1 out in its own logits."""

    def __init__(self, head: torch.nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x).index_fill(-1, torch.tensor([1]), -INF)


class Norms(Rule):
    """A rule whose every number depends on all codes."""

    def guide(self, cond: Tensor, uncond: Tensor, scale: Any, *, step: Any, state: Any = None) -> Any:
        push = cond - uncond
        return cond + (scale - 1) * push / push.norm(dim=-1, keepdim=True), None


class Own(CFG):
    """A method with a rule of its own."""

    def guide(self, cond_logits: Tensor, uncond_logits: Tensor, scale: Any) -> Tensor:
        return uncond_logits + scale * (cond_logits - uncond_logits)


RULES_AND_METHODS = [
    SoftCFG(3.0),
    CFG(3.0, rule=Norms()),
    Own(3.0),
    *(CFG(3.0, rule=rule()) for rule in RULES.values()),
]


@pytest.mark.parametrize("method", RULES_AND_METHODS, ids=repr)
@pytest.mark.parametrize("way", WAYS)
def test_codes_that_the_model_rules_out_stay_out(way: str, method: CFG) -> None:
    generator = prompt_generator(6)
    generator.output = Masked(generator.output)
    drawn = WAYS[way](generator, UNEVEN, method)
    if way == "trace":
        assert (drawn[..., 1] == -INF).all()
        assert not drawn.isnan().any()
    else:
        assert not (drawn == 1).any()


@pytest.mark.parametrize("rule", [Norms(), *(rule() for rule in RULES.values() if not rule.stateful)], ids=repr)
def test_the_other_codes_are_guided_as_if_those_were_not_there(rule: Rule) -> None:
    torch.manual_seed(0)
    cond, uncond, out = torch.randn(3, 9), torch.randn(3, 9), torch.arange(9) % 4 == 1
    guidance = CFG(3.0, rule=rule)
    masked = guidance.guide(cond.masked_fill(out, -INF), uncond.masked_fill(out, -INF), 3.0)
    torch.testing.assert_close(masked[:, ~out], guidance.guide(cond[:, ~out], uncond[:, ~out], 3.0))
    assert (masked[:, out] == -INF).all()


@pytest.mark.parametrize(("backend", "weighted"), [("math", False), ("math", True), ("sdpa", False)])
def test_attention_zeroes_queries_that_see_nothing_and_no_others(backend: str, weighted: bool) -> None:
    query, key, value = (torch.randn(1, 2, 5, 8) for _ in range(3))
    value[:, :, 3, 0] = NAN
    mask = torch.arange(5)[None] >= 2  # two slots of padding
    with use_backend(backend):
        out = weighted_attention(query, key, value, mask=mask, value_weights=torch.ones(1, 5) if weighted else None)
    assert (out[:, :, :2, 1:] == 0).all()
    assert out[:, :, 3:, 0].isnan().all()


PARTS = [("decoder", "pixels of its decoder"), ("encoder", "latents of its encoder")]


@pytest.mark.parametrize(("part", "what"), PARTS)
@pytest.mark.parametrize("value", [NAN, INF])
def test_tokenizers_say_so_rather_than_draw_black(model_folder: Path, part: str, what: str, value: float) -> None:
    tokenizer = softcfg.load_tokenizer(model_folder)
    weights = [p for name, p in tokenizer.named_parameters() if name.startswith(part) and p.dim() > 1]
    weights[-1].view(-1)[0] = value
    inputs = {"decoder": torch.zeros(2, 16, dtype=torch.int64), "encoder": torch.ones(2, 3, 8, 8)}
    run = {"decoder": tokenizer.decode, "encoder": tokenizer.encode}
    with pytest.raises(UserError, match=f"image 0: the {what} are not finite, computed in float32"):
        run[part](inputs[part])


@pytest.mark.parametrize("guidance", [CFG(3.0), SoftCFG(3.0)], ids=repr)
def test_a_pipeline_whose_unconditional_rows_are_padded(prompt_model_folder: Path, guidance: CFG) -> None:
    pipe = softcfg.Pipeline.from_pretrained(prompt_model_folder)
    pipe.generator.model.layers[0].self_attn.v_proj.weight[0, 0] = NAN
    with pytest.raises(UserError, match="logits of row 0 at step 0 hold NaN, computed in float32"):
        pipe(prompts=["a red apple and a green star"], guidance=guidance)
