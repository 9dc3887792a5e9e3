"""How fast this machine decodes: seconds of a step at given positions of the sequence."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softcfg.decoding.filtering import Sampling
from softcfg.decoding.graphs import WARM_UP, captured
from softcfg.decoding.randomness import on_device
from softcfg.decoding.sequential import Decoder, Step, steps_are_static
from softcfg.decoding.weak import weak_model
from softcfg.guidance import CFG
from softcfg.models.base import Condition, Generator
from softcfg.nn.kv_cache import KVCache
from softcfg.nn.linear import prepared_linear_layers

# A step's cost grows with the filled part of the cache; the mean over these positions stands for the whole sequence.
POSITIONS = (0.1, 0.3, 0.5, 0.7, 0.9)


def filled_cache(generator: Generator, condition: Condition) -> KVCache:
    """A key/value cache of random contents."""
    cache = generator.new_cache(condition)
    for contents in (*cache.keys, *cache.values):  # the same for all rows, quick to make
        contents.copy_(torch.randn(contents.shape[1:], device=contents.device).expand_as(contents))
    return cache


def decoding_step(
    generator: Generator,
    inputs: Sequence[Any],
    guidance: CFG,
    position: int,
    cache: KVCache | None = None,
    weak: Generator | None = None,
) -> Callable[[], Tensor]:
    """One step of decoding a batch at token `position`, on a cache and confidences of random contents.

    It is the step of `decode`; call it inside `prepared_linear_layers`, as `decode` does.

    Args:
        inputs: what the images are conditioned on.
        cache: to use, with its contents, in place of a new one.
        weak: the weak model of guidance with a `weak_share`.
    """
    condition = generator.condition(inputs, guided=guidance.has_unconditional_branch)
    weaker = weak_model(guidance, generator, condition, weak, inputs)
    decoder = Decoder(generator, condition, guidance, Sampling(), cache or filled_cache(generator, condition), weaker)
    batch = decoder.batch
    decoder.confidence[:, :position].uniform_()
    tokens = torch.randint(generator.vocab_size, (batch, condition.num_tokens), device=generator.device)
    uniforms = on_device(torch.rand(batch, condition.num_tokens, dtype=torch.float32), generator.device)

    static = all(steps_are_static(each) for each in decoder.generators)
    at = Step(torch.tensor([position], device=generator.device)) if static else decoder.step(position)

    @torch.inference_mode()
    def step() -> Tensor:
        decoder.advance(at, tokens, uniforms)
        return tokens[:, position]

    if not static:
        return step
    for _ in range(WARM_UP):
        step()
    replay = captured(step, generator.device)

    def replayed() -> Tensor:
        replay()
        return tokens[:, position]

    return replayed


class StepTimes(NamedTuple):
    """Seconds of a decoding step, and of what a batch does once before its steps.

    Attributes:
        step: the mean over positions of the median of a step.
        set_up: laying out weights; on a GPU the first steps, in which kernels compile, and the capture of the graph.
    """

    step: float
    set_up: float


def time_steps(
    generator: Generator,
    batch: int,
    guidance: CFG,
    *,
    positions: Sequence[float] = POSITIONS,
    repeats: int = 3,
    weak: Generator | None = None,
) -> StepTimes:
    """Time the steps of a batch at `positions` (parts of the sequence)."""
    inputs = generator.example_inputs(batch)
    condition = generator.condition(inputs, guided=guidance.has_unconditional_branch)
    means, set_up = [], 0.0
    started = time.perf_counter()
    with contextlib.ExitStack() as prepared:
        prepared.enter_context(prepared_linear_layers(generator, condition.rows))
        if weak is not None and guidance.has_weak_model:
            prepared.enter_context(prepared_linear_layers(weak, batch))
        for part in positions:
            step = decoding_step(generator, inputs, guidance, max(1, round(part * condition.num_tokens)), weak=weak)
            times = []
            set_up = set_up or time.perf_counter() - started
            for turn in range(repeats + 1):
                started = time.perf_counter()
                step().tolist()  # waits for the device
                if turn:  # the first one warms up
                    times.append(time.perf_counter() - started)
            means.append(statistics.median(times))
    return StepTimes(statistics.fmean(means), set_up)
