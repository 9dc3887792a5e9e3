"""How fast this machine decodes: seconds of a step at given positions of the sequence."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from softcfg.decoding.filtering import Sampling
from softcfg.decoding.graphs import WARM_UP, captured
from softcfg.decoding.randomness import on_device
from softcfg.decoding.sequential import Decoder, Step, steps_are_static
from softcfg.decoding.threads import AT_ONCE
from softcfg.decoding.weak import weak_model
from softcfg.errors import UserError
from softcfg.guidance import CFG, SoftCFG
from softcfg.models.base import Condition, Generator
from softcfg.nn import linear
from softcfg.nn.choices import time_sides
from softcfg.nn.kv_cache import KVCache
from softcfg.nn.linear import prepared_linear_layers
from softcfg.nn.position import Position
from softcfg.nn.products import DTYPES, choose_dtype

# A step's cost grows with the filled part of the cache; the mean over these positions stands for the whole sequence.
POSITIONS = (0.1, 0.3, 0.5, 0.7, 0.9)
LOGITS_OF_AN_IMAGE = 8  # times the float32 logits: guided, filtered, softmax, and the float64 sums
MOST_IMAGES = 4096  # at once; more are no faster
FIRST_LAYERS, LARGEST_PART = 2, 1 << 27  # of a model that is measured, and weights of these and what stands around them


def filled_cache(generator: Generator, condition: Condition) -> KVCache:
    """A key/value cache of random contents."""
    cache = generator.new_cache(condition)
    for contents in (*cache.keys, *cache.values):  # the same for all rows, quick to make
        contents.copy_(torch.randn(contents.shape[1:], device=contents.device).expand_as(contents))
    return cache


class TimedStep:
    """One step of decoding a batch at token `position`, on a cache and confidences of random contents.

    It is the step of `decode`; call it inside `prepared_linear_layers`, as `decode` does.

    Args:
        inputs: what the images are conditioned on.
        cache: to use, with its contents, in place of a new one.
        weak: the weak model of guidance with a `weak_share`.
    """

    def __init__(
        self,
        generator: Generator,
        inputs: Sequence[Any],
        guidance: CFG,
        position: int,
        cache: KVCache | None = None,
        weak: Generator | None = None,
    ) -> None:
        condition = generator.condition(inputs, guided=guidance.has_unconditional_branch)
        weaker = weak_model(guidance, generator, condition, weak, inputs)
        cache = cache or filled_cache(generator, condition)
        self._decoder = decoder = Decoder(generator, condition, guidance, Sampling(), cache, weaker)
        self._position, self._total = position, condition.num_tokens
        decoder.confidence[:, :position].uniform_()
        shape, device = (decoder.batch, condition.num_tokens), generator.device
        self._tokens = torch.randint(generator.vocab_size, shape, device=device)
        self._uniforms = on_device(torch.rand(shape, dtype=torch.float64), device)
        self._replay: Callable[[], object] | None = None
        if all(steps_are_static(each) for each in decoder.generators):
            at = Step(torch.tensor([position], device=device))
            run = torch.inference_mode()(lambda: decoder.advance(at, self._tokens, self._uniforms))
            for _ in range(WARM_UP):
                run()
            self._replay = captured(run, device)

    def __call__(self) -> Tensor:
        """Run it; the tokens drawn, int64 [B]."""
        return self.several(1)

    @torch.inference_mode()
    def several(self, count: int) -> Tensor:
        """Run so many, at most half of the sequence of them around `position`, as `decode` does; the tokens of one."""
        if self._replay is not None:
            for _ in range(count):
                self._replay()
            return self._tokens[:, self._position]
        stretch = min(count, max(1, self._total // 2))
        first = max(1, min(self._position - stretch // 2, self._total - stretch))
        done = 0
        while done < count:
            place = done % stretch
            most = min(stretch - place, count - done)
            done += self._decoder.advance_from(first + place, most, self._tokens, self._uniforms)
        return self._tokens[:, self._position]


def batch_bytes(generator: Generator, batch: int, guidance: CFG, *, weak: Generator | None = None) -> int:
    """The memory that drawing a batch takes beside the weights, without pixels: what is sure to be there at once.

    That is the cache, that of a third branch too, what the generator computes ahead, and the logits of a step: of the
    rows, and of what they become until a token is drawn, the cumulated distribution in float64 the largest of it.

    Args:
        weak: the weak model of the guidance, which has a cache of its own.
    """
    passes = _passes(generator, batch, guidance, weak)
    total = sum(each.cache_bytes(condition) + each.ahead_bytes(condition) for each, condition in passes)
    logits = 4 * generator.vocab_size  # of a row, in float32
    return total + (2 * passes[0][1].rows + LOGITS_OF_AN_IMAGE * batch) * logits


def _passes(
    generator: Generator, batch: int, guidance: CFG, weak: Generator | None
) -> list[tuple[Generator, Condition]]:
    """The generator and the condition of each pass of a step, that of the guided rows first."""
    condition = generator.condition(generator.example_inputs(batch), guided=guidance.has_unconditional_branch)
    passes = [(generator, condition)]
    if guidance.has_third_branch:
        passes.append((generator, condition[:batch]))
    if weak is not None:
        passes.append((weak, weak.condition(weak.example_inputs(batch), guided=False)))
    return passes


def largest_batch(generator: Generator, guidance: CFG, free: int) -> int:
    """The most images at once for which `free` bytes are enough, beside the weights and without pixels; 0 for none."""
    fits, too_many = 0, 1
    while too_many <= MOST_IMAGES and batch_bytes(generator, too_many, guidance) <= free:
        fits, too_many = too_many, 2 * too_many
    if fits == MOST_IMAGES:
        return fits
    while too_many - fits > max(1, fits // 64):
        middle = (fits + too_many) // 2
        if batch_bytes(generator, middle, guidance) <= free:
            fits = middle
        else:
            too_many = middle
    return fits


def seconds_ahead(generator: Generator, condition: Condition) -> float:
    """Seconds a step of what a batch computes for several steps at once; call it inside `prepared_linear_layers`.

    On other devices than a CPU that is done once before the steps, and not counted here.
    """
    steps = min(generator.steps_ahead(condition), condition.num_tokens)
    if not steps or generator.device.type != "cpu":
        return 0.0
    times = []
    with torch.inference_mode():
        # What is done for one slot serves those after it, so the slot before takes it anew, in the same memory.
        for slot in (condition.slots, condition.slots - 1):
            started = time.perf_counter()
            generator.prepare(condition, Position.shared(slot), 1)
            times.append(time.perf_counter() - started)
    return min(times) / steps


class StepTimes(NamedTuple):
    """Seconds of a decoding step, and of what a batch does once before its steps.

    Attributes:
        step: the mean over positions of the median of a step, with its share of what is computed for several.
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
    weaker = weak if guidance.has_weak_model else None
    places = [min(max(1, round(part * condition.num_tokens)), condition.num_tokens - 1) for part in positions]

    @contextlib.contextmanager
    def prepared() -> Iterator[None]:
        with contextlib.ExitStack() as layers:
            layers.enter_context(prepared_linear_layers(generator, condition.rows))
            if weaker is not None:
                layers.enter_context(prepared_linear_layers(weaker, batch))
            yield

    if generator.device.type == "cpu":  # what a machine measures and loads once is nothing that a batch pays for
        with prepared():
            TimedStep(generator, inputs, guidance, places[0], weak=weak)()
    started = time.perf_counter()
    with prepared():
        for position in places:
            step = TimedStep(generator, inputs, guidance, position, weak=weak)
            set_up = set_up or time.perf_counter() - started
            _seconds(step, 1)  # warms up
            in_a_row = max(1, int(AT_ONCE / _seconds(step, 1)))
            means.append(statistics.median(_seconds(step, in_a_row) for _ in range(repeats)))
        ahead = sum(seconds_ahead(*each) for each in _passes(generator, batch, guidance, weaker))
    return StepTimes(statistics.fmean(means) + ahead, set_up)


def _seconds(step: TimedStep, in_a_row: int) -> float:
    """Of one of so many steps."""
    started = time.perf_counter()
    step.several(in_a_row).tolist()  # waits for the device
    return (time.perf_counter() - started) / in_a_row


def fastest_dtype(generator: Generator, device: torch.device) -> torch.dtype:
    """float32 or bfloat16, in whichever steps of the generator, which may hold no numbers yet, are faster.

    On a CPU with instructions for bfloat16 that is measured, once for each machine and model: first its matrix
    products, and where bfloat16 wins, a step of 8 images with guidance through its first layers. What stands between
    the products has kernels for float32 alone, so that a step can take twice as long although its products are faster.
    """
    found = linear.fastest_dtype(generator, device)
    if (
        found is torch.float32
        or device.type != "cpu"
        or not isinstance(getattr(generator, "blocks", None), nn.ModuleList)
    ):
        return found
    part = _first_layers(generator)
    try:
        inputs = part.example_inputs(linear.GUIDED_ROWS // 2)
    except UserError:
        return found
    if sum(each.numel() for each in part.parameters()) > LARGEST_PART:
        return found  # so large that its products are all that counts

    def measure() -> dict[str, float]:
        steps = {}
        guidance, middle = SoftCFG(guidance_scale=2.0), max(1, part.num_tokens // 2)
        with contextlib.ExitStack() as prepared, torch.random.fork_rng(devices=[]):
            for name, dtype in DTYPES.items():
                model = _filled(deepcopy(part).to(dtype))
                prepared.enter_context(prepared_linear_layers(model, linear.GUIDED_ROWS))
                steps[name] = TimedStep(model, inputs, guidance, middle)
            return time_sides(steps)

    return choose_dtype("steps", f"{type(generator).__qualname__} {generator.config}", measure)


def _first_layers(generator: Generator) -> Generator:
    """The generator with few of its layers, and without numbers: none are copied."""
    copies: dict[int, Any] = {id(each): each.detach().to("meta") for each in generator.buffers()}
    for each in generator.parameters():
        copies[id(each)] = nn.Parameter(each.detach().to("meta"), requires_grad=False)
    part = deepcopy(generator, copies)
    del part.blocks[FIRST_LAYERS:]
    part.cache_shape = (len(part.blocks), *part.cache_shape[1:])
    return part


def _filled(generator: Generator) -> Generator:
    """The generator, which holds no numbers, with random ones on the CPU."""
    generator.to_empty(device="cpu")
    for each in chain(generator.parameters(), generator.buffers()):
        with torch.no_grad():
            each.normal_(std=0.02) if each.is_floating_point() else each.zero_()
    return generator.eval()
