"""A step on a CPU that is one launch: the draw, the weights and the confidences are those of single operations."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("numba")

from replaying import launched_steps
from small_families import load
from softcfg import CFG, SoftCFG, UserError
from softcfg.decoding import Sampling, decode, image_uniforms, threads
from softcfg.decoding.sequential import Decoder
from softcfg.models import llamagen
from softcfg.models.base import Generator
from softcfg.nn.backends import numba_decode
from softcfg.nn.products import use_product
from softcfg.nn.replay import _Program

IMAGES = 3
RULES = {
    "none": CFG(1.0),
    "CFG": CFG(3.0),
    "interval": CFG(3.0, interval=(1, 3)),
    "SoftCFG": SoftCFG(3.0),
    "SoftCFG at scale 1": SoftCFG(1.0),
    "released": SoftCFG.released(guidance_scale=3.0),
    "keys": SoftCFG(3.0, target="key"),
    "without Step Normalisation": SoftCFG(3.0, step_norm=False, strength=0.5, floor=0.2),
}
LEFT_ALONE = {
    "APG": CFG(3.0, rule="apg"),  # type: ignore[arg-type]
    "third branch": SoftCFG(3.0, perturbation_scale=1.5),
}


@pytest.fixture(autouse=True)
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that were one launch, each alone; attention by kernel is the fastest on any machine."""
    monkeypatch.setattr(numba_decode, "is_faster", lambda: True)
    monkeypatch.setattr(threads, "AT_ONCE", 0.0)
    return launched_steps(monkeypatch)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many steps each launch ran; as many as can be run at once."""
    monkeypatch.setattr(threads, "AT_ONCE", 1e3)
    found: list[int] = []
    ahead = _Program.ahead

    def noted(*given: Any) -> int:
        found.append(ahead(*given))
        return found[-1]

    monkeypatch.setattr(_Program, "ahead", noted)
    return found


def drawn(generator: Generator, guidance: CFG, **more: Any) -> Tensor:
    inputs = generator.example_inputs(IMAGES)
    uniforms = image_uniforms(0, range(IMAGES), generator.condition(inputs, guided=False).num_tokens)
    with use_product("panels"):
        return decode(generator, inputs, guidance, uniforms=uniforms, **more)


def one_by_one(run: Callable[[], Tensor]) -> Tensor:
    """The same without the launch of all of a step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "_around", lambda *_: None)
        return run()


@pytest.mark.parametrize("family", ["alitok", "emu3", "lumina-mgpt-2", "rar"])
@pytest.mark.parametrize("name", RULES)
def test_it_draws_the_tokens_of_single_operations(family: str, name: str, steps: list[int]) -> None:
    generator = load(family)

    def run() -> Tensor:
        return drawn(generator, RULES[name], sampling=Sampling(temperature=0.8))

    wanted = one_by_one(run)
    assert not steps
    assert torch.equal(run(), wanted)
    assert steps == list(range(2, wanted.shape[1]))  # the first has no program, the second makes it


@pytest.mark.parametrize("family", ["alitok", "emu3", "lumina-mgpt-2"])
@pytest.mark.parametrize("name", RULES)
def test_several_steps_at_once_draw_the_same(family: str, name: str, steps: list[int], launches: list[int]) -> None:
    """Also of prompts of different lengths, and of images whose rows end with a token of their own."""
    generator = load(family)

    def run() -> Tensor:
        return drawn(generator, RULES[name], sampling=Sampling(temperature=0.8))

    wanted = one_by_one(run)
    assert not launches
    assert torch.equal(run(), wanted)
    assert steps == list(range(2, wanted.shape[1]))
    condition = generator.condition(generator.example_inputs(IMAGES), guided=RULES[name].has_unconditional_branch)
    assert (condition.padding is not None) == (family == "lumina-mgpt-2" and RULES[name].has_unconditional_branch)
    allowed = generator.allowed(torch.arange(3, wanted.shape[1]), condition)
    alike = [len(list(group)) for _, group in groupby([] if allowed is None else allowed.tolist())]
    assert launches == (alike or [wanted.shape[1] - 3])
    assert max(launches) > 1


def test_callbacks_of_several_steps_at_once(launches: list[int]) -> None:
    """`on_step` is called for each of them, and `on_tokens` sees each step's tokens before the next."""
    generator, seen = load("alitok"), []
    wanted = drawn(generator, RULES["SoftCFG"], on_step=seen.append)
    assert seen == list(range(1, generator.num_tokens + 1))
    assert len(launches) == 1
    launches.clear()
    so_far: list[Tensor] = []
    tokens = drawn(generator, RULES["SoftCFG"], on_tokens=lambda tokens: so_far.append(tokens.clone()))
    assert torch.equal(tokens, wanted)
    assert [each.shape[1] for each in so_far] == seen
    assert all(torch.equal(each, wanted[:, : each.shape[1]]) for each in so_far)
    assert set(launches) == {1}


class Sized(nn.Embedding):
    """A table of somebody's own, which the kernel that looks tokens up knows nothing of."""

    def forward(self, tokens: Tensor) -> Tensor:
        return 2 * super().forward(tokens)


@pytest.mark.parametrize("how", ["another table", "renormalised", "embed_tokens", "add_positions", "prepare"])
def test_inputs_that_are_more_than_rows_of_a_table_are_computed(
    how: str, launches: list[int], steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = load("llamagen")
    plain = drawn(generator, RULES["SoftCFG"])
    assert launches
    launches.clear()
    steps.clear()
    table = generator.tok_embeddings
    assert isinstance(table, nn.Embedding)
    if how == "another table":
        generator.tok_embeddings = Sized.from_pretrained(table.weight)
    elif how == "renormalised":
        table.max_norm = 1e-3
    else:
        own = {
            "embed_tokens": lambda self, tokens: 2 * self.tok_embeddings(tokens),
            "add_positions": lambda self, x, condition, position: x + 1,
            "prepare": lambda *_: None,
        }
        monkeypatch.setattr(type(generator), how, own[how])
    found = drawn(generator, RULES["SoftCFG"])
    assert torch.equal(found, one_by_one(lambda: drawn(generator, RULES["SoftCFG"])))
    assert torch.equal(found, plain) == (how == "prepare")
    assert not launches
    assert steps or how in ("another table", "renormalised")


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_has_no_kernels_is_left_alone(name: str, steps: list[int]) -> None:
    drawn(load("llamagen"), LEFT_ALONE[name])
    assert not steps


def test_filters_and_forced_tokens_are_left_alone(steps: list[int]) -> None:
    generator = load("llamagen")
    tokens = drawn(generator, RULES["SoftCFG"], sampling=Sampling(top_k=3))
    drawn(generator, RULES["SoftCFG"], forced_tokens=tokens)
    assert not steps


def test_a_forward_of_ones_own_is_called(steps: list[int]) -> None:
    class Own(llamagen.LlamaGen):
        def forward(self, *arguments: Any, **named: Any) -> Tensor:
            logits = super().forward(*arguments, **named)
            return logits.index_fill(-1, torch.tensor([7]), 1e6)

    plain = load("llamagen")
    own = Own(plain.config)
    own.load_state_dict(plain.state_dict())
    assert (drawn(own.eval().requires_grad_(False), RULES["SoftCFG"]) == 7).all()
    assert not steps


class Wrapper(nn.Module):
    """Has a `forward` of its own and everything else of what it wraps, as what `torch.compile` returns."""

    def __init__(self, wrapped: Generator) -> None:
        super().__init__()
        self._orig_mod = wrapped
        self.calls = 0
        self.forward = self.called

    def called(self, *given: Any, **named: Any) -> Tensor:
        self.calls += 1
        return self._orig_mod(*given, **named)

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "_orig_mod" else getattr(self._orig_mod, name)


@pytest.mark.parametrize("seen_through", [False, True])
@pytest.mark.parametrize("family", ["alitok", "emu3"])
def test_a_wrapper_draws_what_it_wraps(
    family: str, seen_through: bool, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its forward is taken for that of all generators, but does not look for what is launched around it."""
    generator = load(family)
    wanted = one_by_one(lambda: drawn(generator, RULES["SoftCFG"]))
    wrapper: Any = Wrapper(generator)
    if seen_through:
        monkeypatch.setattr("softcfg.decoding.sequential.overrides", lambda *_: False)
    assert torch.equal(drawn(wrapper, RULES["SoftCFG"]), wanted)
    assert not steps
    assert wrapper.calls == wanted.shape[1] + seen_through


@pytest.mark.parametrize("part", ["", "model.layers.1", "model.embed_tokens"])
@pytest.mark.parametrize("family", ["emu3", "lumina-mgpt-2"])  # without and with prompts of different lengths
def test_a_hook_that_comes_and_goes_is_called(family: str, part: str, steps: list[int]) -> None:
    generator, calls = load(family), []
    wanted = drawn(generator, RULES["SoftCFG"])
    steps.clear()
    handles = []

    def on_step(done: int) -> None:
        if done == 4:
            handles.append(generator.get_submodule(part).register_forward_hook(lambda *_: calls.append(1)))
        elif done == 9:
            handles[0].remove()

    assert torch.equal(drawn(generator, RULES["SoftCFG"], on_step=on_step), wanted)
    assert len(calls) == 5
    assert steps == [2, 3, *range(9, wanted.shape[1])]


@pytest.mark.parametrize("name", ["CFG", "SoftCFG"])
def test_logits_that_are_no_numbers_are_found_at_their_step(name: str, steps: list[int]) -> None:
    generator = load("emu3")
    tokens = drawn(generator, RULES[name])
    step = next(step for step in range(5, 12) if (tokens[:, :step] != tokens[0, step]).all())
    generator.model.embed_tokens.weight[tokens[0, step]] = torch.nan  # type: ignore[union-attr, index, operator]
    steps.clear()
    with pytest.raises(UserError, match=rf"logits of row 0 at step {step + 1} hold NaN"):
        drawn(generator, RULES[name])
    assert steps == list(range(2, step + 2))


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("name", ["CFG", "SoftCFG"])
def test_they_are_found_among_several_steps_at_once(name: str, steps: list[int]) -> None:
    generator = load("alitok")
    tokens = drawn(generator, RULES[name])
    step = next(step for step in (2, 3, 4) if (tokens[:, :step] != tokens[0, step]).all())
    generator.embeddings.weight[tokens[0, step]] = torch.nan  # type: ignore[union-attr, index, operator]
    with pytest.raises(UserError, match=rf"logits of row 0 at step {step + 1} hold NaN"):
        drawn(generator, RULES[name])
    assert steps[-1] == generator.num_tokens - 1


def test_batches_one_after_the_other_are_apart(steps: list[int]) -> None:
    generator = load("llamagen")
    first = drawn(generator, RULES["SoftCFG"])
    kept = first.clone()
    assert not torch.equal(drawn(generator, RULES["CFG"]), first)
    assert torch.equal(first, kept)
    assert torch.equal(drawn(generator, RULES["SoftCFG"]), first)


def test_two_that_step_over_one_cache_in_turns_have_weights_of_their_own(steps: list[int]) -> None:
    generator = load("emu3")
    inputs = generator.example_inputs(IMAGES)
    condition = generator.condition(inputs, guided=True)
    total = condition.num_tokens
    uniforms = image_uniforms(0, range(IMAGES), total)

    def run() -> list[Tensor]:
        cache = generator.new_cache(condition)
        decoders = [Decoder(generator, condition, RULES[name], Sampling(), cache) for name in ("CFG", "SoftCFG")]
        tokens = [torch.zeros(IMAGES, total, dtype=torch.int64) for _ in decoders]
        with torch.inference_mode(), use_product("panels"), decoders[0].prepared_linear_layers():
            for number in range(total):
                for decoder, drawn in zip(decoders, tokens, strict=True):
                    for _ in range(2):  # again, with what another one has left and with its own
                        decoder.advance(decoder.step(number), drawn, uniforms)
        return [*tokens, *(decoder.confidence for decoder in decoders)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "_around", lambda *_: None)
        wanted = run()
    assert not steps
    assert all(map(torch.equal, run(), wanted))
    assert len(steps) > 3 * total
