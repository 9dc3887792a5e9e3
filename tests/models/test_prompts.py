"""Generators whose rows have conditions of different lengths, and tokens by rule: prompt_model.py stands for them."""

import pytest
import torch

import softcfg
from prompt_model import END_OF_LINE, LINE, PromptGenerator, prompt_generator
from softcfg import CFG, SoftCFG
from softcfg.decoding import decode, image_uniforms
from softcfg.nn import Position

PROMPTS = [[1, 2, 3, 4, 5], [6], [3, 1]]


@pytest.fixture(scope="module")
def generator() -> PromptGenerator:
    return prompt_generator(12).double()


@pytest.mark.parametrize("by_row", [False, True], ids=["shared position", "position by row"])
def test_padded_rows_are_those_without_padding(generator: PromptGenerator, by_row: bool) -> None:
    tokens = torch.randint(generator.vocab_size, (3, 11))
    weights = torch.rand(3, 7, 16)

    def logits(rows: slice) -> torch.Tensor:
        condition = generator.condition(PROMPTS[rows], guided=False)
        first = 16 - condition.cache_slots  # padding has weights, too, without effect
        cache = generator.new_cache(condition)
        head = generator(condition, tokens[rows, :4], cache=cache, value_weights=weights[rows, 0, first:])
        slot = Position.shared(condition.slots + 4)
        if by_row:
            slot = Position.by_row(torch.full((condition.rows,), condition.slots + 4))
        tail = generator(condition, tokens[rows, 4:], cache=cache, slot=slot, value_weights=weights[rows, :, first:])
        return torch.cat((head, tail), 1)

    together = logits(slice(3))
    assert together.shape == (3, 12, generator.vocab_size)
    for row in range(3):
        torch.testing.assert_close(together[row : row + 1], logits(slice(row, row + 1)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("guidance", [CFG(3.0), SoftCFG(3.0), SoftCFG.released(guidance_scale=3.0)], ids=str)
def test_images_of_a_batch_of_prompts_are_those_drawn_alone(generator: PromptGenerator, guidance: CFG) -> None:
    uniforms = image_uniforms(0, range(3), 12)
    together = decode(generator, PROMPTS, guidance, uniforms=uniforms)
    alone = [decode(generator, [p], guidance, uniforms=uniforms[i : i + 1]) for i, p in enumerate(PROMPTS)]
    assert torch.equal(together, torch.cat(alone))
    assert len({tuple(row) for row in together.tolist()}) == 3


def test_tokens_by_rule_are_drawn_and_have_no_confidence(generator: PromptGenerator) -> None:
    tokens = decode(generator, PROMPTS, SoftCFG(3.0, strength=2), uniforms=image_uniforms(0, range(3), 12))
    ends = torch.arange(12) % LINE == LINE - 1
    assert (tokens[:, ends] == END_OF_LINE).all()
    assert (tokens[:, ~ends] != END_OF_LINE).all()
    trace = softcfg.trace(generator, labels=PROMPTS, guidance=SoftCFG(3.0, strength=2), tokens=tokens)
    assert trace.labels is None
    assert (trace.confidence[:, ends] == 0).all()
    assert (trace.confidence[:, ~ends] > 0).all()
    assert torch.isneginf(trace.guided_logits[:, ends, :END_OF_LINE]).all()
    assert torch.isfinite(trace.guided_logits[:, ~ends, :END_OF_LINE]).all()
    drawn = softcfg.trace(generator, labels=PROMPTS, guidance=SoftCFG(3.0, strength=2))
    assert torch.equal(drawn.tokens, tokens)
