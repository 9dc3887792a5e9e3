"""The Lumina-mGPT 2.0 generator: the released logits, the layout of its sequences, and prompts in one batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import softcfg
from goldens import Golden, golden
from softcfg import CFG, SoftCFG, UserError
from softcfg.configuration import load_config
from softcfg.decoding import ImageStreams, Sampling, decode, image_uniforms, jacobi_decode
from softcfg.models.geometry import Geometry
from softcfg.models.lumina import Lumina, LuminaConfig, PromptCondition, TokenPrompt
from softcfg.models.lumina.generator import HeadNorm
from softcfg.nn import Position

# The reduced ids of the golden files, under the names of the configuration.
IDS = {
    "prompt_start_id": 60, "separator_id": 456, "image_start_id": 61, "image_end_id": 62, "new_line_id": 66,
    "size_id": 67, "first_code_id": 200, "num_codes": 256, "image_size": 64,
}  # fmt: skip
TRAJECTORIES = ["cfg4", "decay"]


def load(name: str, **arguments: Any) -> tuple[Golden, Lumina]:
    case = golden(f"lumina/golden-{name}")
    generator = softcfg.load_generator(
        "lumina-mgpt-2", config={**case.config, **IDS}, checkpoint=case.weights(), **arguments
    )
    assert isinstance(generator, Lumina)
    return case, generator


def prompt(case: Golden) -> TokenPrompt:
    """The prompt of a trajectory, without the image start and the size, which the generator puts behind it."""
    ids = case.arrays["prompt"].tolist()
    assert ids[-3:] == [61, 67 + case.call["h_grids"], 67 + case.call["w_grids"]]
    return TokenPrompt(ids[:-3], width=32 * case.call["w_grids"], height=32 * case.call["h_grids"])


def replay(case: Golden, generator: Lumina, guidance: CFG | None = None) -> softcfg.Trace:
    return softcfg.trace(
        generator,
        labels=[prompt(case)],
        tokens=case.arrays["tokens"][None],
        guidance=guidance or CFG(case.call["guidance"], schedule="lumina_released"),
        temperature=case.call["temperature"],
    )


def close(got: Tensor, expected: Tensor, tolerance: float = 3e-5) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["prenorm", "swinnorm"])
@torch.no_grad()
def test_released_logits(name: str) -> None:
    case, generator = load(f"generator-forward-{name}")
    ids = case.arrays["input_ids"].long()
    # The first token as the condition, the others as image tokens.
    condition = PromptCondition(
        ids[:, :1], None, Geometry(1, 22, row_end=1, tail=1), torch.zeros(2, 0, 22, dtype=torch.int64)
    )
    close(generator(condition, ids[:, 1:]), case.arrays["logits"])
    for slots in (list(range(1, 24)), [Position.by_row(torch.full((2,), slot)) for slot in range(1, 24)]):
        cache = generator.new_cache(condition)
        logits = [generator(condition, ids[:, :0], cache=cache)]
        for i, slot in enumerate(slots, start=1):
            logits.append(generator(condition, ids[:, i : i + 1], cache=cache, slot=slot))
        close(torch.cat(logits, dim=1), case.arrays["logits_cached"])


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_released_trajectories(name: str) -> None:
    case, generator = load(f"guided-trajectory-{name}")
    trace = replay(case, generator)
    close(trace.cond_logits[0], case.arrays["cond_logits"])
    close(trace.uncond_logits[0], case.arrays["uncond_logits"])
    assert torch.equal(trace.guidance_scale, case.arrays["guidance_scale"].float())
    processed = case.arrays["processed"]
    sampling = Sampling(case.call["temperature"], case.call["image_top_k"])
    probabilities = sampling.probabilities(trace.guided_logits)[0]
    assert torch.equal(probabilities > 0, processed.isfinite())
    close(probabilities, processed.softmax(dim=-1))
    kept = processed.isfinite() & (processed.isfinite().sum(dim=-1, keepdim=True) > 1)
    close(trace.guided_logits[0][kept] / sampling.temperature, processed[kept], 2e-4)
    condition = generator.condition([prompt(case)], guided=True)
    assert torch.equal(generator.image_codes(case.arrays["tokens"][None], condition)[0], case.arrays["image_codes"])


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_step_by_step_decoding_gives_the_same_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, generator = load(f"guided-trajectory-{name}")
    seen: list[Tensor] = []
    guide = CFG.guide

    def watch(self: CFG, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        seen.append(torch.cat((cond, uncond)))
        return guide(self, cond, uncond, scale)

    monkeypatch.setattr(CFG, "guide", watch)
    tokens = case.arrays["tokens"][None]
    method = CFG(case.call["guidance"], schedule="lumina_released")
    uniforms = image_uniforms(0, [0], tokens.shape[1])
    decode(generator, [prompt(case)], method, uniforms=uniforms, forced_tokens=tokens)
    cond, uncond = torch.cat(seen, dim=1)
    close(cond, case.arrays["cond_logits"])
    close(uncond, case.arrays["uncond_logits"])


def test_prompts_of_different_length_in_one_batch() -> None:
    case, generator = load("guided-trajectory-decay", dtype=torch.float64)
    prompts = [prompt(case), TokenPrompt([60, 5, 456], 64, 64), TokenPrompt([60, *range(20), 456], 64, 64)]
    guidance = SoftCFG(5.0, schedule="constant")
    uniforms = image_uniforms(3, range(3), 73)
    together = decode(generator, prompts, guidance, uniforms=uniforms)
    trace = softcfg.trace(generator, labels=prompts, tokens=together, guidance=guidance)
    for row, one in enumerate(prompts):
        alone = decode(generator, [one], guidance, uniforms=uniforms[row : row + 1])
        assert torch.equal(alone[0], together[row])
        single = softcfg.trace(generator, labels=[one], tokens=alone, guidance=guidance)
        close(single.guided_logits[0], trace.guided_logits[row], 1e-9)


@pytest.mark.parametrize("guidance", [CFG(5.0, schedule="constant"), SoftCFG(5.0, schedule="constant")], ids=str)
def test_speculative_jacobi_decoding(guidance: CFG) -> None:
    case, generator = load("guided-trajectory-decay", dtype=torch.float64)
    prompts = [prompt(case), TokenPrompt([60, 5, 456], 64, 64)]
    greedy = Sampling(top_k=1)
    expected = decode(generator, prompts, guidance, uniforms=image_uniforms(0, range(2), 73), sampling=greedy)
    streams = ImageStreams(0, range(2))
    tokens, _ = jacobi_decode(generator, prompts, guidance, streams=streams, window=12, sampling=greedy)
    assert torch.equal(tokens, expected)
    # Ends of lines are known ahead, so they are settled with the code before them.
    tokens, passes = jacobi_decode(generator, prompts, guidance, streams=ImageStreams(0, range(2)), window=4)
    assert passes <= 73 - 9
    is_code = torch.tensor(([True] * 8 + [False]) * 8 + [False])
    assert (tokens[:, is_code] >= 200).all()
    assert (tokens[:, ~is_code] < 200).all()


@pytest.mark.parametrize("groups", [1, 2])
def test_the_norm_of_heads_has_the_eps_that_is_set_later(groups: int) -> None:
    norm, x = HeadNorm(groups, 8), torch.randn(3, 4, 1, 8)
    norm.eps = 1.0
    torch.testing.assert_close(norm(x), F.layer_norm(x, (8,), eps=1.0))


def test_rows_as_the_model_reads_them() -> None:
    _, generator = load("guided-trajectory-cfg4")
    given = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])
    prompts = [TokenPrompt([60, 9, 456], 32, 64, given), TokenPrompt([], 32, 64, given + 8)]
    condition = generator.condition(prompts, guided=True)
    opening = [61, 69, 68]
    lines = [[200, 201, 202, 203, 66, 204, 205, 206, 207, 66], [208, 209, 210, 211, 66, 212, 213, 214, 215, 66]]
    assert condition.padding is not None
    rows = [ids[pad:] for ids, pad in zip(condition.ids.tolist(), condition.padding.tolist(), strict=True)]
    assert rows == [[60, 9, 456, *opening, *lines[0]], *([*opening, *lines[i]] for i in (1, 0, 1))]
    assert (condition.grid, condition.slots, condition.num_tokens) == ((8, 4), 16, 6 * 5 + 1)
    assert generator.condition(prompts[1:], guided=True).padding is None


def test_given_lines_are_like_drawn_ones() -> None:
    case, generator = load("guided-trajectory-cfg4", dtype=torch.float64)
    whole, tokens = prompt(case), case.arrays["tokens"][None]
    lines, columns = 3, 12
    given = case.arrays["image_codes"].view(-1, columns)[:lines]
    rest = TokenPrompt(whole.ids, whole.width, whole.height, given)
    guidance = CFG(4.0, schedule="constant")
    expected = softcfg.trace(generator, labels=[whole], tokens=tokens, guidance=guidance)
    drawn = lines * (columns + 1)
    trace = softcfg.trace(generator, labels=[rest], tokens=tokens[:, drawn:], guidance=guidance)
    close(trace.guided_logits, expected.guided_logits[:, drawn:], 1e-5)
    condition = generator.condition([rest], guided=True)
    assert torch.equal(generator.image_codes(tokens[:, drawn:], condition)[0], case.arrays["image_codes"])


def test_token_rules() -> None:
    _, generator = load("guided-trajectory-cfg4")
    condition = generator.condition([TokenPrompt([60, 456], 64, 32)] * 2, guided=True)
    layout = ("c" * 8 + "n") * 4 + "e"
    assert condition.num_tokens == len(layout)
    steps = torch.arange(len(layout))
    codes = set(range(200, 456))
    allowed = generator.constrain(torch.zeros(2, len(layout), 512), steps, condition).isfinite()
    for row in allowed:
        for letter, ids in zip(layout, row, strict=True):
            assert set(ids.nonzero().flatten().tolist()) == {"c": codes, "n": {66}, "e": {62}}[letter]
    # Rows that stand at steps of their own.
    apart = torch.tensor([[7, 8], [35, 36]])
    assert torch.equal(
        generator.constrain(torch.zeros(2, 2, 512), apart, condition).isfinite(),
        allowed[0][apart.flatten()].view(2, 2, -1),
    )
    assert torch.equal(generator.is_code(steps, condition), torch.tensor([letter == "c" for letter in layout]))


def test_softcfg_weighs_codes_only() -> None:
    case, generator = load("guided-trajectory-decay")
    trace = replay(case, generator, SoftCFG(4.0, schedule="constant"))
    is_code = torch.tensor(([True] * 8 + [False]) * 8 + [False])
    assert (trace.confidence[0, ~is_code] == 0).all()
    assert (trace.confidence[0, is_code] > 0).all()
    assert trace.value_weights is not None
    assert (trace.value_weights[0][:, ~is_code] == 1).all()
    close((1 - trace.value_weights[0, 1:]).sum(dim=-1), torch.ones(72))
    plain = replay(case, generator, CFG(4.0, schedule="constant"))
    assert torch.equal(plain.cond_logits, trace.cond_logits)
    assert (plain.uncond_logits - trace.uncond_logits).abs().max() > 1e-3


def test_bfloat16_stays_near() -> None:
    case, generator = load("guided-trajectory-decay", dtype=torch.bfloat16)
    trace = replay(case, generator)
    assert trace.cond_logits.dtype == torch.float32
    error = (trace.cond_logits[0] - case.arrays["cond_logits"]).square().mean().sqrt()
    assert 1e-4 < error / case.arrays["cond_logits"].std() < 0.02


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "at least one"),
        (["a cat"], "TokenPrompt"),
        ([TokenPrompt([60], 64, 64), TokenPrompt([60], 64, 32)], "one size, got 64 x 32, 64 x 64"),
        ([TokenPrompt([60], 48, 64)], "width must be a multiple of 32, got 48"),
        ([TokenPrompt([60], 64, 32 * 133)], "height 4256 is too large"),
        ([TokenPrompt([512], 64, 64)], "prompt ids holds 512"),
        ([TokenPrompt([60] * 190, 64, 64)], "265 positions, but the model has 256"),
        ([TokenPrompt([60], 64, 64, torch.zeros(8, 8, dtype=torch.int64))], "given codes"),
    ],
)
def test_prompts_that_do_not_fit(prompts: list[Any], message: str) -> None:
    _, generator = load("guided-trajectory-cfg4")
    with pytest.raises(UserError, match=message):
        generator.condition(prompts, guided=True)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_key_value_heads": 2}, "num_key_value_heads must be num_attention_heads"),
        ({"hidden_size": 65}, "hidden_size 65"),
        ({"model_parallel_size": 3}, "model_parallel_size"),
        ({"new_line_id": 512}, "new_line_id 512 is outside"),
        ({"num_codes": 400}, "400 image codes"),
        ({"image_size": 40}, "multiple of 32"),
    ],
)
def test_configurations_that_are_refused(changed: dict[str, int], message: str) -> None:
    case = golden("lumina/golden-generator-forward-prenorm")
    with pytest.raises(UserError, match=message):
        load_config(LuminaConfig, {**case.config, **IDS, **changed})
