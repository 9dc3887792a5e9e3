from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

import softcfg
from prompt_model import CODES, END_OF_LINE, PromptGenerator, prompt_generator
from softcfg import CFG, Sampling, SoftCFG, UserError
from softcfg.decoding import ImageStreams, decode, image_uniforms, jacobi, jacobi_decode
from softcfg.models.alitok import AliTok, AliTokConfig
from softcfg.models.base import Generator
from softcfg.models.llamagen import LlamaGen, LlamaGenConfig
from softcfg.models.rar import RAR, RobusTokConfig
from softcfg.nn.products import use_product

CODEBOOK, TOKENS = 3, 4
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "codebook_size": CODEBOOK}


def random_weights(make: Callable[[], Generator]) -> Generator:
    """A generator whose tokens depend much on those before them, but are not all but certain."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        generator = make()
        for name, parameter in generator.named_parameters():
            if parameter.dim() > 1:
                head = name in ("output.weight", "lm_head.weight")
                torch.nn.init.normal_(parameter, std=0.1 if head else 0.6)
    return generator.requires_grad_(False).eval()


def alitok() -> Generator:
    config = AliTokConfig(**SMALL, condition_num_classes=2, image_seq_len=TOKENS, grid_size=2)
    return random_weights(lambda: AliTok(config))


def robustok() -> Generator:
    config = RobusTokConfig(**SMALL, condition_num_classes=2, intermediate_size=16, image_seq_len=TOKENS)
    return random_weights(lambda: RAR(config))


def llamagen() -> Generator:
    config = LlamaGenConfig(
        dim=16, n_layer=2, n_head=2, num_classes=2, vocab_size=CODEBOOK, block_size=TOKENS, ffn_hidden_dim=16
    )
    return random_weights(lambda: LlamaGen(config))


GENERATORS: dict[str, Callable[[], Any]] = {
    "alitok": alitok,
    "robustok": robustok,
    "llamagen": llamagen,
    "prompts": lambda: random_weights(lambda: PromptGenerator(TOKENS)),
}
PLAIN = CFG(0)
METHODS = {
    "no guidance": PLAIN,
    "CFG": CFG(2.5),
    "SoftCFG": SoftCFG(2.5, schedule="constant", strength=3),
    "SoftCFG without Step Normalisation": SoftCFG(2.5, schedule="constant", step_norm=False),
    "SoftCFG, sampled, successor": SoftCFG.released(guidance_scale=2.5, schedule="constant", strength=3),
    "SoftCFG on keys, successor": SoftCFG(
        2.5, schedule="constant", step_norm=False, target="key", alignment="successor"
    ),
}


@torch.no_grad()
def exact(generator: Generator, label: Any, guidance: CFG, sampling: Sampling) -> dict[tuple[int, ...], float]:
    """The probability of every sequence: the product of what `trace`, replaying it, has for its tokens."""
    sequences = list(product(range(generator.vocab_size), repeat=TOKENS))
    trace = softcfg.trace(
        generator,
        labels=[label] * len(sequences),
        guidance=guidance,
        tokens=sequences,
        temperature=sampling.temperature,
    )
    chosen = sampling.probabilities(trace.guided_logits).double().gather(-1, trace.tokens[..., None]).squeeze(-1)
    return dict(zip(sequences, chosen.prod(dim=1).tolist(), strict=True))


def p_value(tokens: Tensor, expected: dict[tuple[int, ...], float]) -> float:
    """Of the chi-square test that whole sequences have their expected probabilities; rare ones are one cell."""
    counts = dict.fromkeys(expected, 0)
    for row in tokens.tolist():
        counts[tuple(row)] += 1
    observed, wanted, rare = [], [], [0.0, 0.0]
    for sequence, probability in expected.items():
        mean = probability * len(tokens)
        if mean >= 5:
            observed.append(counts[sequence])
            wanted.append(mean)
        else:
            rare[0] += counts[sequence]
            rare[1] += mean
    if rare[1] >= 5:
        observed.append(rare[0])
        wanted.append(rare[1])
    else:
        assert rare[0] < 20
    assert len(wanted) > 4
    share = sum(observed) / sum(wanted)  # nearly 1: what is rarer was left out
    return float(stats.chisquare(observed, [share * each for each in wanted]).pvalue)


def sample(
    generator: Generator, labels: list, guidance: CFG, window: int, sampling: Sampling, draws: int, seed: int = 0
) -> list[Tensor]:
    """Tokens [draws, T] of each label, all of them rows of one batch."""
    rows = [label for label in labels for _ in range(draws)]
    streams = ImageStreams(seed, range(len(rows)))
    with use_product("plain"):  # to measure which one is fastest for so many rows takes longer than to draw
        tokens, _ = jacobi_decode(generator, rows, guidance, streams=streams, window=window, sampling=sampling)
    return list(tokens.split(draws))


def check_law(name: str, method: str, draws: int) -> None:
    generator, guidance, sampling = GENERATORS[name](), METHODS[method], Sampling(temperature=0.8)
    labels: list = [[1, 2, 3], [5]] if name == "prompts" else [0, 1]
    for label, tokens in zip(labels, sample(generator, labels, guidance, 3, sampling, draws), strict=True):
        assert p_value(tokens, exact(generator, label, guidance, sampling)) > 1e-3


@pytest.mark.parametrize("name", ["alitok", "robustok", "prompts"])
def test_sequences_have_the_distribution_of_sequential_decoding(name: str) -> None:
    check_law(name, "SoftCFG", 2000)


@pytest.mark.parametrize("method", METHODS)
def test_with_every_method(method: str) -> None:
    check_law("llamagen", method, 2000)


@pytest.mark.slow
@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("method", METHODS)
def test_with_many_draws(name: str, method: str) -> None:
    check_law(name, method, 10000)


@pytest.mark.parametrize("window", [1, 2, 100])
def test_any_window_and_filter(window: int) -> None:
    generator, guidance, sampling = llamagen(), METHODS["SoftCFG"], Sampling(top_k=2, top_p=0.9)
    (tokens,) = sample(generator, [1], guidance, window, sampling, 2000)
    assert p_value(tokens, exact(generator, 1, guidance, sampling)) > 1e-3


def test_the_test_tells_wrong_distributions_from_right_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    generator, sampling = llamagen(), Sampling()
    soft = METHODS["SoftCFG"]
    law = exact(generator, 0, soft, sampling)
    assert p_value(sample(generator, [0], soft, 3, sampling, 2000)[0], law) > 1e-3
    for other in ("CFG", "SoftCFG without Step Normalisation", "SoftCFG, sampled, successor"):
        assert p_value(sample(generator, [0], METHODS[other], 3, sampling, 2000)[0], law) < 1e-6

    rule = jacobi.keep_or_redraw

    def redraw_from_all(drafts, drawn_from, probabilities, keeping, redrawing):  # type: ignore[no-untyped-def]
        kept, _ = rule(drafts, drawn_from, probabilities, keeping, redrawing)
        return kept, softcfg.decoding.draw(probabilities, redrawing)

    monkeypatch.setattr(jacobi, "keep_or_redraw", redraw_from_all)
    assert p_value(sample(generator, [0], soft, 3, sampling, 2000)[0], law) < 1e-6


def test_a_redrawn_token_has_the_distribution_asked_for() -> None:
    torch.manual_seed(0)
    p, q = torch.rand(2, 5, 7).softmax(-1).pow(4)
    p[1, 3] = 0
    p[2] = q[2]
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    drafts = torch.multinomial(q, 20000, replacement=True).T
    kept, redrawn = jacobi.keep_or_redraw(
        drafts, q.expand(20000, -1, -1), p.expand(20000, -1, -1), *torch.rand(2, 20000, 5)
    )
    tokens = torch.where(kept, drafts, redrawn)
    shares = torch.nn.functional.one_hot(tokens, 7).double().mean(0)
    torch.testing.assert_close(shares, p.double(), rtol=0, atol=0.015)
    torch.testing.assert_close(kept.double().mean(0), torch.minimum(p, q).sum(-1).double(), rtol=0, atol=0.015)
    assert (tokens[:, 1] != 3).all()


@pytest.fixture(scope="module")
def longer(model_folder: Path) -> Generator:
    return softcfg.load_generator(model_folder).double()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("window", [1, 5, 16])
def test_greedy_tokens_are_those_of_sequential_decoding(longer: Generator, method: str, window: int) -> None:
    labels, total = [0, 1, 2, 3, 1], longer.num_tokens
    greedy = Sampling(top_k=1)
    expected = decode(longer, labels, METHODS[method], uniforms=image_uniforms(0, range(5), total), sampling=greedy)
    steps: list[int] = []
    tokens, passes = jacobi_decode(
        longer,
        labels,
        METHODS[method],
        streams=ImageStreams(0, range(5)),
        window=window,
        sampling=greedy,
        on_step=steps.append,
    )
    assert torch.equal(tokens, expected)
    assert len(steps) == passes
    assert steps == sorted(set(steps))
    assert steps[-1] == total
    assert passes == total if window == 1 else passes <= total


@pytest.mark.parametrize("method", ["CFG", "SoftCFG"])
def test_an_image_is_a_function_of_its_stream(longer: Generator, method: str) -> None:
    labels, guidance = [0, 1, 2, 3, 0], METHODS[method]
    together, passes = jacobi_decode(longer, labels, guidance, streams=ImageStreams(3, range(5)), window=6)
    alone = [
        jacobi_decode(longer, [label], guidance, streams=ImageStreams(3, [row]), window=6)
        for row, label in enumerate(labels)
    ]
    assert torch.equal(together, torch.cat([tokens for tokens, _ in alone]))
    assert passes == max(passes for _, passes in alone)
    assert len({tuple(row) for row in together.tolist()}) == 5


def test_tokens_by_rule_are_drafted_by_rule() -> None:
    generator = prompt_generator(12)
    tokens, _ = jacobi_decode(generator, [[1, 2], [3]], CFG(2), streams=ImageStreams(0, [0, 1]), window=4)
    ends = torch.arange(12) % CODES == CODES - 1
    assert (tokens[:, ends] == END_OF_LINE).all()
    assert (tokens[:, ~ends] != END_OF_LINE).all()


def test_a_single_token() -> None:
    config = LlamaGenConfig(dim=16, n_layer=1, n_head=2, num_classes=2, vocab_size=CODEBOOK, block_size=1)
    generator = random_weights(lambda: LlamaGen(config))
    tokens, passes = jacobi_decode(generator, [0], SoftCFG(2), streams=ImageStreams(0, [0]), window=4)
    assert tokens.shape == (1, 1)
    assert passes == 1


def test_arguments_that_do_not_fit(longer: Generator) -> None:
    with pytest.raises(UserError, match="at least 1, got 0"):
        jacobi_decode(longer, [0], CFG(), streams=ImageStreams(0, [0]), window=0)
    with pytest.raises(UserError, match="streams must be as many as images, 1, got 2"):
        jacobi_decode(longer, [0], CFG(), streams=ImageStreams(0, [0, 1]), window=2)
