"""How fast this machine decodes: seconds of a step at given positions of the sequence."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from softcfg.decoding.filtering import Sampling, draw
from softcfg.decoding.sequential import Perturbation
from softcfg.guidance import CFG, SoftCFG
from softcfg.models.base import Generator
from softcfg.nn.linear import prepared_linear_layers

# A step's cost grows with the filled part of the cache; the mean over these parts of the sequence stands for all of it.
POSITIONS = (0.1, 0.3, 0.5, 0.7, 0.9)


def decoding_step(generator: Generator, batch: int, guidance: CFG, position: int) -> Callable[[], Tensor]:
    """One step of decoding a batch at token `position`, on a cache and confidences of random contents.

    It does what `decode` does in a step; call it under `prepared_linear_layers`, as `decode` does.
    """
    active = guidance.is_active
    condition = generator.condition([row % generator.num_classes for row in range(batch)], guided=active)
    device = generator.device
    cache = generator.new_cache(condition.rows)
    for contents in (cache.keys, cache.values):  # the same for all rows, which is fast to make
        contents.copy_(torch.randn(contents.shape[2:], device=device).expand_as(contents))
    tokens = torch.randint(generator.vocab_size, (condition.rows, 1), device=device)
    uniforms = torch.rand(batch, device=device)
    scale = float(guidance.scales(generator.num_tokens)[position])
    perturbation = None
    if isinstance(guidance, SoftCFG) and active and guidance.perturbs:
        perturbation = Perturbation(guidance, batch, generator.num_tokens, generator.condition_slots, device)
        perturbation.confidence[:, :position].uniform_()

    @torch.inference_mode()
    def step() -> Tensor:
        weights = perturbation.row_weights() if perturbation else {}
        slot = generator.condition_slots + position - 1
        logits = generator(condition, tokens, cache=cache, slot=slot, **weights)[:, -1].float()
        guided = guidance.guide(logits[:batch], logits[batch:], scale) if active else logits
        drawn = draw(Sampling().probabilities(guided), uniforms)
        if perturbation:
            perturbation.record(position, logits[:batch], drawn, 1.0)
        return drawn

    return step


def seconds_per_step(
    generator: Generator,
    batch: int,
    guidance: CFG,
    *,
    positions: Sequence[float] = POSITIONS,
    repeats: int = 3,
) -> float:
    """Mean over `positions` (parts of the sequence) of the median seconds of a decoding step."""
    rows = batch * (2 if guidance.is_active else 1)
    means = []
    with prepared_linear_layers(generator, rows):
        for part in positions:
            step = decoding_step(generator, batch, guidance, max(1, round(part * generator.num_tokens)))
            times = []
            for turn in range(repeats + 1):
                started = time.perf_counter()
                step().tolist()  # waits for the device
                if turn:  # the first one warms up
                    times.append(time.perf_counter() - started)
            means.append(statistics.median(times))
    return statistics.fmean(means)
