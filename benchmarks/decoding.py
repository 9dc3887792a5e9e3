"""Seconds a decoding step: ours against the released manner, SoftCFG against CFG, and both against the linear layers.

    python -m benchmarks.decoding --model alitok-b --batch-size 4 16

A step's cost grows with the filled part of the cache, so steps are timed at several positions spread evenly over the
sequence; their mean stands for the sequence. The weights are random: they do not change the arithmetic.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.released import Released, check
from benchmarks.timing import machine, medians, table
from softcfg.decoding.throughput import POSITIONS, decoding_step
from softcfg.guidance import CFG, SoftCFG
from softcfg.models.base import ClassGenerator
from softcfg.nn.linear import prepared_linear_layers
from softcfg.zoo.checkpoints import random_weights
from softcfg.zoo.registry import resolve


def released_step(generator: ClassGenerator, batch: int, guidance: CFG, position: int) -> Callable[[], object]:
    """One step of the baseline at `position`; what it appends is taken back, outside of nothing it pays for."""
    baseline = Released(generator, list(range(batch)), guidance)
    layers, heads, head_dim = generator.cache_shape
    slots = generator.condition_slots + position - 1
    contents = [tuple(torch.randn(2, 1, heads, slots, head_dim).repeat(1, 2 * batch, 1, 1, 1)) for _ in range(layers)]
    tokens = torch.randint(generator.vocab_size, (batch, position))
    confidence = list(torch.rand(position, batch))

    def step() -> object:
        baseline.cache = list(contents)
        baseline.tokens = tokens
        baseline.confidence = list(confidence)
        baseline.applied = torch.ones(batch, max(position - 2, 0))
        return baseline.step()

    return step


def linear_layers(generator: ClassGenerator, rows: int) -> Callable[[], None]:
    """All linear layers of a step alone, one after the other."""
    layers = [module for module in generator.modules() if isinstance(module, nn.Linear)]
    inputs = [torch.randn(rows, layer.in_features) for layer in layers]

    @torch.inference_mode()
    def run() -> None:
        for layer, x in zip(layers, inputs, strict=True):
            layer(x)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="alitok-b")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    generator = random_weights(resolve(args.model).generator)
    baseline = random_weights(resolve(args.model).generator)  # the same weights, never prepared
    cfg, soft = CFG(guidance_scale=4.0), SoftCFG.released(guidance_scale=4.0)
    print(f"{args.model}, float32, {machine()}")
    print(f"largest difference of the baseline's logits from ours: {check(baseline, soft):.1e}\n")
    rows = []
    for batch in args.batch_size:
        collected: dict[str, list[float]] = {}
        cache = generator.new_cache(generator.condition(range(batch), guided=True))
        for contents in (*cache.keys, *cache.values):
            contents.normal_()
        for fraction in POSITIONS:
            position = round(fraction * generator.num_tokens)
            sides: dict[str, Callable[[], object]] = {
                "released CFG": released_step(baseline, batch, cfg, position),
                "released SoftCFG": released_step(baseline, batch, soft, position),
                "CFG": decoding_step(generator, range(batch), cfg, position, cache),
                "SoftCFG": decoding_step(generator, range(batch), soft, position, cache),
                "linear layers": linear_layers(baseline, 2 * batch),
            }
            with prepared_linear_layers(generator, 2 * batch):
                for name, seconds in medians(sides, args.repeats).items():
                    collected.setdefault(name, []).append(seconds)
        mean = {name: statistics.fmean(values) for name, values in collected.items()}
        rows.append(
            [
                batch,
                *(1e3 * mean[name] for name in collected),
                mean["released SoftCFG"] / mean["SoftCFG"],
                f"{100 * (mean['SoftCFG'] / mean['CFG'] - 1):+.1f} %",
                f"{100 * (mean['released SoftCFG'] / mean['released CFG'] - 1):+.1f} %",
                mean["SoftCFG"] / mean["linear layers"],
                batch / (mean["SoftCFG"] * generator.num_tokens),
            ]
        )
    header = [
        "batch", "released CFG, ms", "released SoftCFG, ms", "CFG, ms", "SoftCFG, ms", "linear layers, ms",
        "released / ours", "SoftCFG over CFG", "released SoftCFG over CFG", "step / linear layers", "images/s",
    ]  # fmt: skip
    print(table(header, rows))


if __name__ == "__main__":
    main()
