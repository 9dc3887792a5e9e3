"""Steps that are launched again as a list of kernels: they compute the same, and step aside for all that would see."""

from __future__ import annotations

import dataclasses
import gc
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("numba")

from small_families import FAMILIES, load
from softcfg import CFG, SoftCFG
from softcfg.decoding import decode, image_uniforms
from softcfg.guidance.weakened import Decay, LowConfidence, SelfAttention, Shuffled, Window
from softcfg.models import rar
from softcfg.models.alitok import AliTokBlock
from softcfg.models.base import Generator
from softcfg.models.llamagen import LlamaGenBlock
from softcfg.nn import AttentionBackend, AttentionCall, AttentionContext, Position, choices, fused, replay, use_backend
from softcfg.nn.backends import BACKENDS, numba_decode
from softcfg.nn.kernels.available import without_cpu_kernels
from softcfg.nn.linear import PREPARED, Linear, prepared_linear_layers
from softcfg.nn.norm import RMSNorm
from softcfg.nn.products import use_product

IMAGES = 3
REPLAYING = ("alitok", "rar", "robustok", "llamagen", "llamagen-t2i", "emu3", "lumina-mgpt-2", "janus-pro")
GUIDANCE = {
    "none": CFG(1.0),
    "CFG": CFG(3.0),
    "interval": CFG(3.0, interval=(1, 3)),
    "SoftCFG": SoftCFG(3.0),
    "both": SoftCFG.released(guidance_scale=3.0, target="both"),
    "window": CFG(3.0, perturbation=Window(size=2)),
    "low confidence": CFG(3.0, perturbation=LowConfidence()),
    "decay": CFG(3.0, perturbation=Decay(half_life=2.0, target="value")),
    "PAG as a third branch": CFG(3.0, perturbation=SelfAttention(), perturbation_scale=1.5),
    "SoftCFG as a third branch": SoftCFG(3.0, perturbation_scale=1.5),
    "third branch alone": CFG(1.0, perturbation=Decay(half_life=2.0), perturbation_scale=1.5),
    "TPG": CFG(3.0, perturbation=Shuffled(window=3)),
    "weak model": CFG(3.0, weak_share=0.5),
}
PASSES = {name: 2 if "branch" in name or name == "weak model" else 1 for name in GUIDANCE}


@pytest.fixture(autouse=True)
def replays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What programs computed, in turn, step by step; attention by kernel is the fastest on any machine."""
    monkeypatch.setenv(choices.FOLDER_VARIABLE, str(tmp_path / "choices"))
    monkeypatch.setattr(choices, "MADE", {})
    monkeypatch.setattr(numba_decode, "is_faster", lambda: True)
    monkeypatch.setattr(fused, "UNAVAILABLE", set())
    monkeypatch.setattr(BACKENDS["numba_decode"], "unavailable", {})
    found: list[Tensor] = []
    run, ahead = replay._Program.replay, replay._Program.ahead

    def noted(*arguments: Any) -> Tensor:
        logits = run(*arguments)
        found.append(logits.clone())  # may be the program's own memory
        return logits

    def noted_ahead(program: replay._Program, of: Callable[[], Any], most: int) -> int:
        steps = ahead(program, of, 1)
        if steps:
            found.append(program._output.clone())
        return steps

    monkeypatch.setattr(replay._Program, "replay", noted)
    monkeypatch.setattr(replay._Program, "ahead", noted_ahead)
    return found


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The logits of all passes, in turn."""
    found: list[Tensor] = []
    forward = Generator.forward

    def noted(*arguments: Any, **named: Any) -> Tensor:
        logits = forward(*arguments, **named)
        found.append(logits.clone())
        return logits

    monkeypatch.setattr(Generator, "forward", noted)
    return found


def inputs_of(generator: Generator) -> list[Any]:
    """Examples; captions are of different lengths, as some prompts are."""
    inputs = generator.example_inputs(IMAGES)
    return [each[:length] if isinstance(each, Tensor) else each for each, length in zip(inputs, (4, 1, 3), strict=True)]


def tokens_of(generator: Generator) -> int:
    return generator.condition(inputs_of(generator), guided=False).num_tokens


def drawn(
    generator: Generator, guidance: CFG = GUIDANCE["SoftCFG"], seed: int = 0, named: str = "panels", **more: Any
) -> Tensor:
    uniforms = image_uniforms(seed, range(IMAGES), tokens_of(generator))
    with use_product(named):
        return decode(generator, inputs_of(generator), guidance, uniforms=uniforms, **more)


def without_replay(run: Callable[[], Tensor]) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        for each in (Generator, *every_subclass(Generator)):
            patch.setattr(each, "steps_replay", False)
        return run()


def every_subclass(of: type) -> Iterator[type]:
    for each in of.__subclasses__():
        yield each
        yield from every_subclass(each)


def test_these_are_the_families_whose_steps_are_kernels_alone() -> None:
    serving = set()
    for family in FAMILIES:
        generator = load(family)
        with pytest.MonkeyPatch.context() as patch:
            served: list[int] = []
            run = replay._Program.replay
            patch.setattr(
                replay._Program, "replay", lambda *given, run=run, served=served: served.append(1) or run(*given)
            )
            drawn(generator)
        if served:
            serving.add(family)
            assert generator.steps_replay
    assert serving == set(REPLAYING)


@pytest.mark.parametrize("family", REPLAYING)
@pytest.mark.parametrize("name", GUIDANCE)
def test_replayed_steps_compute_the_same_bits(
    family: str, name: str, replays: list[Tensor], passes: list[Tensor]
) -> None:
    generator, guidance = load(family), GUIDANCE[name]
    more: dict[str, Any] = {}
    if guidance.has_weak_model:
        more["weak"] = load(family)
        for parameter in more["weak"].parameters():
            parameter.requires_grad_(False).mul_(0.8)
    wanted = without_replay(lambda: drawn(generator, guidance, **more))
    assert not replays
    logits = [each.clone() for each in passes]
    passes.clear()
    assert torch.equal(drawn(generator, guidance, **more), wanted)
    # The first step has no program, and the second is the one that is recorded.
    assert len(replays) == PASSES[name] * (tokens_of(generator) - 2) > 0
    assert len(logits) == PASSES[name] * tokens_of(generator)
    assert all(map(torch.equal, passes, logits))
    assert all(map(torch.equal, replays, logits[2 * PASSES[name] :]))
    assert not any(torch.equal(one, other) for one, other in zip(replays, replays[PASSES[name] :], strict=False))


@pytest.mark.parametrize("family", ["alitok", "emu3"])
def test_steps_over_a_cache_of_integers_are_replayed(
    family: str, replays: list[Tensor], passes: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = load(family)
    monkeypatch.setattr(generator, "cache_dtype", torch.int8)
    wanted = without_replay(lambda: drawn(generator))
    logits = [each.clone() for each in passes]
    passes.clear()
    assert torch.equal(drawn(generator), wanted)
    assert len(replays) == tokens_of(generator) - 2
    assert all(map(torch.equal, passes, logits))
    assert all(map(torch.equal, replays, logits[2:]))
    with fused.without_fused_kernels():
        assert torch.equal(drawn(generator), wanted)


@pytest.mark.parametrize("ahead", [1, 3])
@pytest.mark.parametrize("name", ["none", "SoftCFG", "SoftCFG as a third branch", "weak model"])
def test_what_is_computed_for_some_steps_ahead_stays_where_kernels_read_it(
    name: str, ahead: int, replays: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, guidance = load("rar"), GUIDANCE[name]
    monkeypatch.setattr(rar, "WINDOW_ROWS", ahead * (IMAGES + 1))
    more = {"weak": load("rar")} if guidance.has_weak_model else {}
    wanted = without_replay(lambda: drawn(generator, guidance, **more))
    assert torch.equal(drawn(generator, guidance, **more), wanted)
    assert len(replays) == PASSES[name] * (tokens_of(generator) - 2)


def test_another_cache_or_other_things_ahead_need_another_program(replays: list[Tensor]) -> None:
    """Conditions and caches that are put together anew for every step."""
    generator = load("rar")
    found = []
    with use_product("panels"), prepared_linear_layers(generator, 2 * IMAGES), torch.inference_mode():
        conditions = [generator.condition(labels, guided=True) for labels in ([0, 1, 2], [2, 1, 0])]
        caches = [generator.new_cache(conditions[0]) for _ in range(2)]
        for which in ((0, 0), (1, 1), (0, 1), (1, 0)):
            condition, cache = conditions[which[0]], caches[which[1]]
            logits = [generator(condition, torch.empty(2 * IMAGES, 0, dtype=torch.int64), cache=cache)]
            for number in range(3):
                tokens = torch.full((2 * IMAGES, 1), number)
                logits.append(generator(condition, tokens, cache=cache, slot=condition.slots + number))
            found.append(torch.cat(logits))
    assert len(replays) == 2 * 2
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("family", ["llamagen-t2i", "lumina-mgpt-2"])
def test_rows_of_prompts_of_different_lengths_are_padded(family: str) -> None:
    generator = load(family)
    condition = generator.condition(inputs_of(generator), guided=True)
    assert condition.padding is not None
    assert len(set(condition.padding.tolist())) > 1


@pytest.mark.parametrize("threads", [1, 2])
def test_replayed_steps_compute_the_same_bits_on_two_threads(threads: int, replays: list[Tensor]) -> None:
    generator = load("lumina-mgpt-2")
    wanted = without_replay(lambda: drawn(generator))
    found = choices.on_threads(threads, lambda: drawn(generator))
    assert torch.equal(found, wanted)
    assert replays


@pytest.mark.parametrize(
    "part", ["layers.1", "layers.0.attention", "layers.0.attention.wqkv", "layers.1.feed_forward.w2",
             "layers.0.attention_norm", "layers.1.ffn_norm", "norm", "output"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
def test_a_hook_is_called_at_every_step(part: str, kind: str, replays: list[Tensor]) -> None:
    generator, calls = load("llamagen"), []
    wanted = drawn(generator)
    assert replays
    replays.clear()
    module = generator.get_submodule(part)
    getattr(module, f"register_{kind}_hook")(lambda *_: calls.append(1))
    assert torch.equal(drawn(generator), wanted)
    assert len(calls) == tokens_of(generator)
    assert not replays


@pytest.mark.parametrize("part", ["", "model.layers.1", "model.layers.0.input_layernorm", "lm_head"])
def test_a_hook_that_comes_and_goes_between_steps_is_called(part: str, replays: list[Tensor]) -> None:
    generator, calls, handles = load("lumina-mgpt-2"), [], []
    module, total = generator.get_submodule(part), tokens_of(generator)
    wanted = drawn(generator)
    replays.clear()

    def on_step(done: int) -> None:
        if done == 4:
            handles.append(module.register_forward_hook(lambda *_: calls.append(1)))
        elif done == 9:
            handles[0].remove()

    assert torch.equal(drawn(generator, on_step=on_step), wanted)
    assert len(calls) == 5
    assert len(replays) == total - 2 - 5


def test_what_a_hook_did_while_it_was_there_is_not_repeated() -> None:
    """Even if it was done by a kernel."""
    generator = load("lumina-mgpt-2")

    def run() -> Tensor:
        hook = generator.get_submodule("model.layers.1").register_forward_hook(
            lambda module, inputs, out: fused.silu_product(out, out)
        )
        return drawn(generator, on_step=lambda done: hook.remove() if done == 4 else None)

    assert torch.equal(run(), without_replay(run))


def test_a_hook_that_changes_what_is_drawn_does(replays: list[Tensor]) -> None:
    """One token can be drawn alone, as soon as the hook is there."""
    generator = load("lumina-mgpt-2")
    plain = drawn(generator)

    def only(module: nn.Module, inputs: Any, logits: Tensor) -> Tensor:
        return logits.index_fill(-1, torch.tensor([25]), 1e6)

    handles = []

    def on_step(done: int) -> None:
        if done == 3:
            handles.append(generator.get_submodule("lm_head").register_forward_hook(only))

    found = drawn(generator, CFG(1.0), on_step=on_step)
    assert not torch.equal(found, plain)
    codes = generator.is_code(torch.arange(tokens_of(generator)), generator.condition(
        inputs_of(generator), guided=False
    ))  # fmt: skip
    assert codes is not None
    assert (found[:, codes[: found.shape[1]]][:, 3:] == 25).all()


def test_a_step_under_a_mode_is_not_recorded(replays: list[Tensor]) -> None:
    class Counting(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen += func._schema.name == "aten::silu"
            return func(*args, **(kwargs or {}))

    generator = load("llamagen")
    wanted = drawn(generator)
    replays.clear()
    with Counting() as counting:
        assert torch.equal(drawn(generator), wanted)
    assert counting.seen == 2 * tokens_of(generator)
    assert not replays


@pytest.mark.parametrize("how", ["math", "without kernels", "plain product", "constant shapes"])
def test_steps_that_have_no_program(how: str, replays: list[Tensor], passes: list[Tensor]) -> None:
    generator = load("emu3")
    wanted = without_replay(lambda: drawn(generator))
    logits = [each.clone() for each in passes]

    def run() -> Tensor:
        passes.clear()
        if how == "without kernels":
            with fused.without_fused_kernels():
                return drawn(generator)
        if how == "math":
            with use_backend("math"):
                return drawn(generator)
        return drawn(generator, named="plain" if how == "plain product" else "panels", static=how == "constant shapes")

    found = run()
    assert torch.equal(found, wanted)
    for one, other in zip(passes, logits, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-3)
    assert torch.equal(found, without_replay(run))
    assert not replays


SETTINGS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "attention by name": lambda: use_backend("numba_decode"),
    "no kernels": fused.without_fused_kernels,
    "gradients": torch.enable_grad,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_a_later_step_hold(name: str, replays: list[Tensor]) -> None:
    generator = load("emu3").requires_grad_(False)
    with use_product("panels"), prepared_linear_layers(generator, 2 * IMAGES), torch.no_grad():
        wanted = steps_by_hand(generator)
        assert len(replays) == 4
        replays.clear()
        # The second step is the last that is replayed, and the fourth the next.
        found = steps_by_hand(generator, {2: SETTINGS[name], 3: SETTINGS[name]})
        torch.testing.assert_close(found, wanted, rtol=0, atol=0 if name == "attention by name" else 1e-3)
    assert len(replays) == 2


@pytest.mark.parametrize("start", [1, 4])
def test_a_backend_from_outside_is_asked_at_every_step(
    start: int, replays: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that is registered while a model draws."""
    generator, asked = load("alitok"), []
    wanted = drawn(generator)
    replays.clear()

    class Asked(AttentionBackend):
        name = "asked"

        def why_not(self, call: AttentionCall) -> str:
            asked.append(call.context.slots)
            return "it serves nothing"

        def attend(self, call: AttentionCall) -> Tensor:
            raise AssertionError

    def on_step(done: int) -> None:
        if done == start:
            monkeypatch.setitem(BACKENDS, "asked", Asked())

    assert torch.equal(drawn(generator, on_step=on_step), wanted)
    assert asked == [slots for slots in range(start + 1, tokens_of(generator) + 1) for _ in generator.blocks]
    assert len(replays) == max(0, start - 2)


def steps_by_hand(
    generator: Generator, settings: Mapping[int, Callable[[], AbstractContextManager[None]]] | None = None
) -> Tensor:
    """The logits of five steps, all tokens being those of their number; some of the steps in a context."""
    condition = generator.condition(inputs_of(generator), guided=True)
    cache = generator.new_cache(condition)
    generator(condition, torch.empty(2 * IMAGES, 0, dtype=torch.int64), cache=cache)
    found = []
    for number in range(5):
        tokens = torch.full((2 * IMAGES, 1), 40 + number)
        with (settings or {}).get(number, nullcontext)():
            found.append(generator(condition, tokens, cache=cache, slot=Position.shared(condition.slots + number)))
    return torch.stack(found)


OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "a new tensor": lambda x: x + 0,
    "in place": lambda x: x.mul_(1),
    "onto given memory": lambda x: torch.add(x, 0, out=torch.empty_like(x)),
    "a number": lambda x: (x, x.amax().item())[0],
    "a copy": lambda x: x.clone(),
    "numbers of its own": lambda x: x + torch.zeros(()),
    "at random": lambda x: x + 0 * torch.rand(1, generator=torch.Generator().manual_seed(0)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_operation_in_a_block_is_done(
    name: str, replays: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, calls = load("llamagen"), []
    wanted = drawn(generator)
    assert replays
    replays.clear()
    forward = LlamaGenBlock.forward

    def more(*arguments: Any) -> Tensor:
        calls.append(1)
        return OTHERS[name](forward(*arguments))

    monkeypatch.setattr(LlamaGenBlock, "forward", more)
    assert torch.equal(drawn(generator), wanted)
    assert len(calls) == 2 * tokens_of(generator)
    assert not replays


def test_views_and_new_memory_in_a_block_are_no_operations(
    replays: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = load("llamagen")
    wanted = drawn(generator)
    replays.clear()
    forward = LlamaGenBlock.forward

    def more(*arguments: Any) -> Tensor:
        torch.empty(7)
        return forward(*arguments).transpose(0, 1).view(1, -1, 32).unflatten(1, (-1, 1))[0]

    monkeypatch.setattr(LlamaGenBlock, "forward", more)
    assert torch.equal(drawn(generator), wanted)
    assert replays


READ: dict[str, Callable[[AttentionContext], int]] = {
    "slots": lambda context: context.slots,
    "position": lambda context: context.position.shifted(1).slot or 0,
    "weights": lambda context: context.value_weights.shape[-1],
    "a copy": lambda context: dataclasses.replace(context, padding=None).slots,
}


@pytest.mark.parametrize("name", READ)
def test_a_block_that_asks_for_the_slot_is_called_at_every_step(
    name: str, replays: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = load("alitok")
    plain, forward, half = drawn(generator), AliTokBlock.forward, tokens_of(generator) // 2
    assert replays
    replays.clear()

    def early(block: AliTokBlock, x: Tensor, layer: int, context: AttentionContext) -> Tensor:
        return forward(block, x, layer, context) if READ[name](context) < half else x

    monkeypatch.setattr(AliTokBlock, "forward", early)
    found = drawn(generator)
    assert not replays
    assert torch.equal(found, without_replay(lambda: drawn(generator)))
    assert not torch.equal(found, plain)


def test_a_forward_of_one_module_alone_is_called(replays: list[Tensor]) -> None:
    generator, calls = load("llamagen"), []
    wanted = drawn(generator)
    replays.clear()
    block = generator.get_submodule("layers.1")
    forward = block.forward
    block.forward = lambda *given: calls.append(1) or forward(*given)
    assert torch.equal(drawn(generator), wanted)
    assert len(calls) == tokens_of(generator)
    assert not replays


def test_large_results_have_no_program(replays: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    generator = load("llamagen")
    wanted = drawn(generator)
    assert replays
    replays.clear()
    monkeypatch.setattr(replay, "MOST_BYTES", 0)
    assert torch.equal(drawn(generator), wanted)
    assert not replays


class Ended(Exception):  # noqa: N818
    pass


def test_programs_are_kept_inside_the_context_alone() -> None:
    generator, seen = load("llamagen"), []

    def on_step(done: int) -> None:
        seen.append(len(vars(generator)[PREPARED].programs))
        if ends and done == 3:
            raise Ended

    for ends in (False, True):
        if ends:
            with pytest.raises(Ended):
                drawn(generator, on_step=on_step)
        else:
            drawn(generator, on_step=on_step)
        assert not hasattr(generator, PREPARED)
        assert seen == [0] + [1] * (2 if ends else tokens_of(generator) - 1)
        seen.clear()
    assert all(layer.product is layer.laid_out is None for layer in generator.modules() if isinstance(layer, Linear))


@pytest.mark.parametrize("product", ["panels", "plain"])
def test_the_outer_one_of_two_contexts_keeps_the_programs(product: str) -> None:
    generator = load("llamagen")
    with use_product(product), prepared_linear_layers(generator, 4):
        programs = vars(generator)[PREPARED].programs
        with prepared_linear_layers(generator, 4):
            assert vars(generator)[PREPARED].programs is programs
        assert vars(generator)[PREPARED].programs is programs
    assert not hasattr(generator, PREPARED)


def test_without_the_context_nothing_is_recorded(replays: list[Tensor]) -> None:
    generator = load("emu3")
    with torch.inference_mode():
        steps_by_hand(generator)
    assert not replays


def test_a_program_lives_as_long_as_its_cache(replays: list[Tensor]) -> None:
    generator = load("llamagen")
    with use_product("panels"), prepared_linear_layers(generator, 2 * IMAGES):
        for seed in range(2):
            assert torch.equal(
                drawn(generator, seed=seed), without_replay(lambda seed=seed: drawn(generator, seed=seed))
            )
        kept = vars(generator)[PREPARED]
        assert len(kept.programs) == 1  # the second batch has taken the cache of the first
        assert len(replays) == 2 * (tokens_of(generator) - 1) - 1
        kept.caches.clear()
        gc.collect()
        assert not len(kept.programs)


def test_a_program_keeps_the_weights_that_it_reads() -> None:
    """While another thread, whose context ends, gives them back."""
    generator, memory = load("llamagen"), []

    def on_step(done: int) -> None:
        if done == 2:
            ((_, program),) = vars(generator)[PREPARED].programs.items()
            laid_out = [layer.laid_out for layer in generator.modules() if isinstance(layer, Linear)]
            assert {id(each) for each in laid_out} <= {id(each) for each in program._kept}
            memory.extend(weakref.ref(each) for each in program._kept if each is not None)

    drawn(generator, on_step=on_step)
    gc.collect()
    assert memory
    assert not any(each() is not None for each in memory)


@pytest.mark.parametrize("slot", [0, 1])
def test_a_step_beyond_the_cache_is_an_error(slot: int) -> None:
    generator = load("emu3")
    with use_product("panels"), prepared_linear_layers(generator, 2 * IMAGES), torch.inference_mode():
        condition = generator.condition(inputs_of(generator), guided=True)
        cache = generator.new_cache(condition)
        tokens = torch.full((2 * IMAGES, 1), 41)
        for number in range(3):
            generator(condition, tokens, cache=cache, slot=condition.slots + number)
        before = [each.clone() for each in (*cache.keys, *cache.values)]
        with pytest.raises(ValueError, match="does not fit"):
            generator(condition, tokens, cache=cache, slot=cache.slots + slot)
        assert all(map(torch.equal, before, (*cache.keys, *cache.values)))


def test_other_numbers_of_rows_are_not_replayed(replays: list[Tensor]) -> None:
    """The first rows of a cache alone, whose program is that of all rows."""
    generator = load("emu3")
    with use_product("panels"), prepared_linear_layers(generator, 2 * IMAGES), torch.inference_mode():
        condition = generator.condition(inputs_of(generator), guided=True)
        cache = generator.new_cache(condition)
        tokens = torch.full((2 * IMAGES, 1), 41)
        wanted = [generator(condition, tokens, cache=cache, slot=condition.slots + number) for number in range(3)]
        assert len(replays) == 2
        for contents in (*cache.keys, *cache.values):
            contents[:, :, condition.slots :] = 0
        cache.keys, cache.values = ([each[:2] for each in half] for half in (cache.keys, cache.values))
        for number, logits in enumerate(wanted):
            found = generator(condition[:2], tokens[:2], cache=cache, slot=condition.slots + number)
            assert torch.equal(found, logits[:2])
    assert len(replays) == 2


def test_logits_of_a_step_stay_after_the_next() -> None:
    generator = load("emu3")
    with use_product("panels"), prepared_linear_layers(generator, 2 * IMAGES), torch.inference_mode():
        condition = generator.condition(inputs_of(generator), guided=True)
        cache = generator.new_cache(condition)
        found, copies = [], []
        for number in range(4):
            tokens = torch.full((2 * IMAGES, 1), 40 + number)
            found.append(generator(condition, tokens, cache=cache, slot=condition.slots + number))
            copies.append(found[-1].clone())
        assert all(map(torch.equal, found, copies))
        assert not torch.equal(found[2], found[3])


@pytest.mark.parametrize("kind", [Linear, RMSNorm, nn.LayerNorm, nn.Embedding])
def test_weights_that_change_between_two_decodings_are_seen(kind: type[nn.Module], replays: list[Tensor]) -> None:
    family = "lumina-mgpt-2"
    generator = load(family)
    before = drawn(generator, CFG(1.0))
    other = load(family)
    for each in (generator, other):
        torch.manual_seed(1)
        for module in each.modules():
            if isinstance(module, kind):
                for parameter in module.parameters():
                    parameter.requires_grad_(False).add_(torch.randn(parameter.shape))
    replays.clear()
    found = drawn(generator, CFG(1.0))
    assert replays
    assert not torch.equal(found, before)
    assert torch.equal(found, without_replay(lambda: drawn(other, CFG(1.0))))


@pytest.mark.parametrize("outer", [False, True], ids=["each with its context", "inside of one"])
def test_two_threads_decode_with_one_generator_what_each_does_alone(
    outer: bool, replays: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, made = load("lumina-mgpt-2"), []
    new_cache = generator.new_cache
    monkeypatch.setattr(generator, "new_cache", lambda condition: made.append(new_cache(condition)) or made[-1])
    methods = [SoftCFG(3.0), CFG(3.0, perturbation=Window(size=2))]
    wanted = [[drawn(generator, method, seed) for seed in range(4)] for method in methods]
    alone = len(replays)
    replays.clear()
    made.clear()
    found: list[list[Tensor]] = [[], []]
    errors: list[BaseException] = []
    together = threading.Barrier(2, timeout=60)

    def run(index: int) -> None:
        try:
            for seed in range(4):
                together.wait()
                found[index].append(drawn(generator, methods[index], seed))
        except BaseException as error:
            errors.append(error)
            together.abort()
            raise

    def run_both() -> None:
        threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    if outer:
        with use_product("panels"), prepared_linear_layers(generator, 2 * IMAGES):
            run_both()
        # A batch that takes the cache of another has its program, too, and records none.
        assert len(replays) == alone + 8 - len(made)
    else:
        run_both()
    assert not errors
    assert replays
    for one, other in zip(found, wanted, strict=True):
        assert all(map(torch.equal, one, other))
    assert not hasattr(generator, PREPARED)


def test_an_error_while_recording_leaves_nothing_behind(replays: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    generator = load("llamagen")
    wanted = drawn(generator)
    replays.clear()
    forward, calls = LlamaGenBlock.forward, []

    def failing(*arguments: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 4:  # the second block of the step that is recorded
            raise Ended
        return forward(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(LlamaGenBlock, "forward", failing)
        with pytest.raises(Ended):
            drawn(generator)
    assert replay.recorded.get() is None
    assert torch._C._len_torch_dispatch_stack() == 0
    assert torch.equal(drawn(generator), wanted)
    assert len(replays) == tokens_of(generator) - 2


def test_a_cache_lies_as_what_reads_it_likes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """By slot where that is the kernel, so that what is filled is in one piece; by head otherwise."""

    def lies_by_slot(generator: Generator) -> bool:
        cache = generator.new_cache(generator.condition(inputs_of(generator), guided=True))
        rows, _, slots, _ = cache.keys[1].stride()
        assert cache.values[0].stride() == cache.keys[1].stride()
        return slots > rows

    generator = load("alitok")
    for generator.cache_dtype in (None, torch.int8):
        assert lies_by_slot(generator)
        with without_cpu_kernels():
            assert not lies_by_slot(generator)
    for name in ("math", "numba_decode"):
        with use_backend(name):
            assert lies_by_slot(generator) == (name == "numba_decode")
    assert not lies_by_slot(load("alitok", torch.bfloat16))
    monkeypatch.setattr(numba_decode, "is_faster", lambda: False)
    assert not lies_by_slot(generator)
