"""What a batch leaves to the next one of a job: laid out weights, its cache, its programs; the images are the same."""

from __future__ import annotations

import functools
import gc
import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from small_families import FAMILIES, load
from softcfg import CFG, Pipeline, SoftCFG
from softcfg.decoding import ImageStreams, decode, image_uniforms, jacobi_decode
from softcfg.decoding.at_once import DrawnAtOnce
from softcfg.decoding.jacobi import JacobiDecoder
from softcfg.decoding.sequential import Decoder
from softcfg.errors import UserError
from softcfg.guidance.weakened import Decay
from softcfg.models import base
from softcfg.models.base import Generator
from softcfg.nn.kernels.available import without_cpu_kernels
from softcfg.nn.kv_cache import KVCache
from softcfg.nn.linear import PREPARED, Linear, Prepared, weights_in_use
from softcfg.nn.products import use_product
from softcfg.nn.replay import _Program
from softcfg.runs.job import RunRequest, draw_run

GUIDANCE = {
    "none": CFG(1.0),
    "CFG": CFG(3.0),
    "SoftCFG": SoftCFG.released(guidance_scale=3.0),
    "third branch": CFG(3.0, perturbation=Decay(half_life=2.0), perturbation_scale=1.5),
    "weak model": CFG(3.0, weak_share=0.5),
}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[KVCache]:
    """The caches that were made anew."""
    found: list[KVCache] = []
    new_cache = Generator.new_cache

    def noted(*arguments: Any) -> KVCache:
        found.append(new_cache(*arguments))
        return found[-1]

    monkeypatch.setattr(Generator, "new_cache", noted)
    return found


def drawn(
    generator: Generator,
    guidance: CFG = GUIDANCE["SoftCFG"],
    seed: int = 0,
    images: int = 2,
    named: str | None = None,
    **more: Any,
) -> Tensor:
    """Draw images; `named` is the product of the linear layers."""
    inputs = generator.example_inputs(images)
    uniforms = image_uniforms(seed, range(images), generator.condition(inputs, guided=False).num_tokens)
    with use_product(named):
        return decode(generator, inputs, guidance, uniforms=uniforms, **more)


def jacobi(generator: Generator, guidance: CFG = GUIDANCE["SoftCFG"], seed: int = 0, **more: Any) -> Tensor:
    streams = ImageStreams(seed, range(2))
    return jacobi_decode(generator, generator.example_inputs(2), guidance, streams=streams, window=3, **more)[0]


def kept_of(generator: Generator) -> Prepared:
    return vars(generator)[PREPARED]


def layers_of(generator: Generator) -> list[Linear]:
    return [layer for layer in generator.modules() if isinstance(layer, Linear)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", GUIDANCE)
def test_what_a_batch_had_is_free_at_once(family: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not when Python next looks for circles of references: batch after batch would take more memory."""
    generator, guidance = load(family), GUIDANCE[name]
    more = {"weak": load(family)} if guidance.has_weak_model else {}
    alive = []

    def watched(of: type) -> None:
        begin = of.__init__

        def noted(self: object, *arguments: Any, **named: Any) -> None:
            alive.append(weakref.ref(self))
            begin(self, *arguments, **named)

        monkeypatch.setattr(of, "__init__", noted)

    for of in (KVCache, Decoder, DrawnAtOnce, JacobiDecoder, _Program):
        watched(of)
    gc.collect()
    gc.disable()
    try:
        drawn(generator, guidance, **more)
        jacobi(generator, guidance, **more)
        with weights_in_use(generator, *more.values()):
            drawn(generator, guidance, **more)
            drawn(generator, guidance, **more)
        assert len(alive) >= 6
        assert not [found for each in alive if (found := each()) is not None]
    finally:
        gc.enable()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", GUIDANCE)
def test_batches_of_a_job_are_those_drawn_alone(family: str, name: str, made: list[KVCache]) -> None:
    generator, guidance = load(family), GUIDANCE[name]
    more = {"weak": load(family)} if guidance.has_weak_model else {}
    with torch.no_grad():
        for parameter in more["weak"].parameters() if more else ():
            parameter.mul_(0.8)
    wanted = [drawn(generator, guidance, seed, **more) for seed in range(3)]
    made.clear()
    with weights_in_use(generator, *more.values()):
        found = [drawn(generator, guidance, seed, **more) for seed in range(3)]
        # Whatever a cache holds that is left, nothing of it is seen.
        with torch.inference_mode():
            for cache in (each for caches in kept_of(generator).caches.values() for each in caches):
                for contents in (*cache.keys, *cache.values):
                    contents.fill_(float("nan"))
        found.append(drawn(generator, guidance, 0, **more))
    assert all(map(torch.equal, found, [*wanted, wanted[0]]))
    assert not torch.equal(wanted[0], wanted[1])
    assert len(made) == 1 + (guidance.has_third_branch or guidance.has_weak_model)
    assert torch.equal(drawn(generator, guidance, 0, **more), wanted[0])


def test_a_cache_of_integers_is_left_too(made: list[KVCache], monkeypatch: pytest.MonkeyPatch) -> None:
    generator = load("alitok")
    monkeypatch.setattr(generator, "cache_dtype", torch.int8)
    wanted = [drawn(generator, seed=seed) for seed in range(2)]
    made.clear()
    with weights_in_use(generator):
        assert all(torch.equal(drawn(generator, seed=seed), wanted[seed]) for seed in (0, 1, 0))
        monkeypatch.setattr(generator, "cache_dtype", None)
        drawn(generator)
    assert [cache.stored for cache in made] == [torch.int8, None]


def test_speculative_jacobi_decoding_takes_what_is_left(made: list[KVCache]) -> None:
    generator = load("alitok")
    wanted = [jacobi(generator, seed=seed) for seed in range(2)]
    made.clear()
    with weights_in_use(generator):
        assert all(torch.equal(jacobi(generator, seed=seed), wanted[seed]) for seed in (0, 1, 0))
    assert len(made) == 2  # of the branches, which go through the model one after the other


def test_layers_are_laid_out_once_for_batches_of_a_size(made: list[KVCache]) -> None:
    generator = load("llamagen")
    weight = layers_of(generator)[0].weight.clone()
    with weights_in_use(generator):
        seen = []
        for images in (2, 2, 3, 3, 2):
            drawn(generator, images=images, named="panels")
            seen.append(layers_of(generator)[0].laid_out)
            assert sum(map(len, kept_of(generator).caches.values())) == 1
        assert seen[0] is seen[1]
        assert seen[2] is seen[3]
        assert len({id(each) for each in seen}) == 3
    assert [cache.keys[0].shape[0] for cache in made] == [4, 6, 4]
    assert PREPARED not in vars(generator)
    assert not any(layer.is_prepared for layer in layers_of(generator))
    assert torch.equal(layers_of(generator)[0].weight, weight)


@pytest.mark.parametrize("change", ["product", "kernels", "layer", "weight"])
def test_a_batch_that_wants_other_layers_has_them(change: str) -> None:
    """In place of those that a batch before it has left."""
    pytest.importorskip("numba")
    generator, used = load("llamagen"), []
    head = generator.output
    other = Linear(head.in_features, head.out_features, bias=False).requires_grad_(False)
    panels = functools.partial(drawn, generator, named="panels")
    before = panels()
    with weights_in_use(generator):
        assert torch.equal(panels(on_step=lambda done: used.append(head.product.name)), before)
        assert set(used) == {"panels"}
        used.clear()
        if change == "product":
            drawn(generator, named="columns", on_step=lambda done: used.append(head.product.name))
            assert set(used) == {"columns"}
        elif change == "kernels":
            with without_cpu_kernels():
                panels(on_step=lambda done: used.append(head.product))
            assert set(used) == {None}
        elif change == "layer":
            generator.output = other
        else:
            head.weight = other.weight
        found = panels()
    assert torch.equal(found, panels())
    assert torch.equal(found, before) == (change in ("product", "kernels"))


def test_weights_cannot_change_between_batches() -> None:
    generator = load("alitok")
    with weights_in_use(generator):
        drawn(generator, named="panels")
        with pytest.raises(UserError, match="in use"):
            generator.bfloat16()
        with pytest.raises(UserError, match="in use"):
            generator.load_state_dict(generator.state_dict())
    generator.bfloat16()
    assert generator.dtype is torch.bfloat16


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_gives_all_back(error: type[BaseException]) -> None:
    generator = load("llamagen")
    wanted = drawn(generator)

    def on_step(done: int) -> None:
        if done == 3:
            raise error

    def job() -> None:
        with weights_in_use(generator):
            drawn(generator, named="panels")
            drawn(generator, named="panels", on_step=on_step)

    with pytest.raises(error):
        job()
    assert PREPARED not in vars(generator)
    assert not any(layer.is_prepared for layer in layers_of(generator))
    assert torch.equal(drawn(generator), wanted)


def test_a_large_cache_is_not_left(made: list[KVCache], monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside it there might be no memory for pixels."""
    generator = load("alitok")
    size = generator.cache_bytes(generator.condition(generator.example_inputs(2), guided=True))
    for free, count in ((size / base.LEFT_SHARE, 1), (size / base.LEFT_SHARE - 1, 2), (None, 2)):
        monkeypatch.setattr(base, "free_memory", lambda device, free=free: free)
        made.clear()
        with weights_in_use(generator):
            drawn(generator)
            drawn(generator)
        assert len(made) == count


def test_another_thread_draws_between_the_batches_of_a_job() -> None:
    generator = load("llamagen")
    wanted = {images: drawn(generator, images=images) for images in (2, 3)}
    found: list[Tensor] = []
    with weights_in_use(generator):
        for images in (3, 2, 3):
            assert torch.equal(drawn(generator), wanted[2])
            thread = threading.Thread(target=lambda images=images: found.append(drawn(generator, images=images)))
            thread.start()
            thread.join()
    assert all(map(torch.equal, found, (wanted[3], wanted[2], wanted[3])))
    assert PREPARED not in vars(generator)


def test_calls_of_a_pipeline_in_use(made: list[KVCache]) -> None:
    pipe = Pipeline.with_random_weights("fashion-small")
    wanted = [pipe([1, 2], seed=seed).pixels for seed in range(2)]
    made.clear()
    with pipe.in_use():
        for seed in (0, 1, 0):
            assert (pipe([1, 2], seed=seed).pixels == wanted[seed]).all()
        with pytest.raises(UserError, match="in use"):
            pipe.to(torch.bfloat16)
    assert len(made) == 1
    pipe.to(torch.bfloat16)


@pytest.mark.parametrize("draws", ["call", "run"])
def test_a_job_prepares_once(draws: str, made: list[KVCache], tmp_path: Path) -> None:
    pipe = Pipeline.with_random_weights("fashion-small")
    jobs: dict[str, Callable[[], object]] = {
        "call": lambda: pipe([0] * 6, batch_size=2),
        "run": lambda: draw_run(RunRequest(pipe, num_samples=6, batch_size=2), tmp_path / "run"),
    }
    jobs[draws]()
    assert len(made) == 1
    assert PREPARED not in vars(pipe.generator)


@pytest.mark.parametrize("ends", [None, 3])
def test_weights_are_not_there_twice_when_a_batch_ends(ends: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was laid out is free as soon as the weights of a layer are back."""
    generator, restore, freed = load("llamagen"), Linear.restore, []

    def watched(layer: Linear) -> None:
        laid_out = weakref.ref(layer.laid_out)
        restore(layer)
        freed.append(laid_out() is None)

    def on_step(done: int) -> None:
        if done == ends:
            raise RuntimeError("enough")

    monkeypatch.setattr(Linear, "restore", watched)
    expected = nullcontext() if ends is None else pytest.raises(RuntimeError, match="enough")
    with expected:
        drawn(generator, named="panels", on_step=on_step)
    assert len(freed) == len(layers_of(generator))
    assert all(freed)
