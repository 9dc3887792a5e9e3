"""Seconds a decoding step: ours against the released manner, SoftCFG against CFG, and both against the linear layers.

    python -m benchmarks.decoding --model alitok-b --batch-size 4 16

The limit of a step is what none can leave out: its linear layers, those of each shape with the fastest of all known
products, and one reading of the filled part of the cache at the machine's measured bandwidth. A step's cost grows with
the filled part of the cache, so steps are timed at several positions spread evenly over the sequence; their mean stands
for the sequence. The weights are random: they do not change the arithmetic. Pixels are decoded by the same network on
both sides.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.released import Released, check
from benchmarks.timing import machine, means_over_sequence, medians, parsed, table
from softcfg.decoding.throughput import TimedStep, filled_cache, seconds_ahead
from softcfg.guidance import CFG, SoftCFG
from softcfg.models.base import ClassGenerator
from softcfg.nn.kv_cache import KVCache
from softcfg.nn.linear import Linear, prepared_linear_layers
from softcfg.nn.products import PRODUCTS
from softcfg.tokenizers.base import Tokenizer
from softcfg.zoo.loading import random_weights
from softcfg.zoo.registry import resolve

PIXELS = 4  # images whose pixels are decoded at once


def released_step(generator: ClassGenerator, batch: int, guidance: CFG, position: int) -> Callable[[], object]:
    """One step of the baseline at `position`; what it appends is taken back, outside of nothing it pays for."""
    baseline = Released(generator, generator.example_inputs(batch), guidance)
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
        drawn = baseline.step()
        baseline.cache = []  # it is as large as the contents
        return drawn

    return step


def linear_layers(generator: ClassGenerator, rows: int) -> Callable[[], None]:
    """All linear layers of a step alone, as PyTorch runs them, one after the other."""
    layers = [module for module in generator.modules() if isinstance(module, nn.Linear)]
    inputs = [torch.randn(rows, layer.in_features) for layer in layers]

    @torch.inference_mode()
    def run() -> None:
        for layer, x in zip(layers, inputs, strict=True):
            layer(x)

    return run


def fastest_products(generator: ClassGenerator, batch: int, repeats: int) -> float:
    """Seconds of a step's linear layers, those of each shape with the fastest of all known products.

    The layers of a shape follow one another, so that their weights come from where they come from in a step. RAR's
    modulations are computed for many slots at once, of every class and once of the null class.
    """
    shapes: dict[tuple[Any, ...], list[Linear]] = defaultdict(list)
    for layer in generator.modules():
        if isinstance(layer, Linear):
            shapes[(layer.weight.shape, layer.usual_rows)].append(layer)
    total = 0.0
    for layers in shapes.values():
        usual = layers[0].usual_rows
        rows, used = (2 * batch, 1.0) if usual is None else (usual, (batch + 1) / usual)
        x = torch.randn(rows, layers[0].in_features)
        weights = [layer.weight.detach() for layer in layers]
        sides = {}
        for name, product in PRODUCTS.items():
            if product.can_serve(weights[0]):
                laid_out = [product.lay_out(weight, rows) for weight in weights]
                sides[name] = product.as_in_steps(x, laid_out, weights, layers[0].bias, rows)
        with torch.inference_mode():
            total += used * min(medians(sides, repeats).values())
    return total


def bandwidth(repeats: int = 5) -> float:
    """Bytes per second at which this machine reads memory: the sum of 256 MiB of float32."""
    content = torch.ones(1 << 26)
    return 4 * content.numel() / medians({"read": content.sum}, repeats)["read"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="alitok-b")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[4, 16])
    args = parsed(parser, repeats=3)

    generator = random_weights(resolve(args.model).generator)
    baseline = random_weights(resolve(args.model).generator)  # the same weights, never prepared
    tokenizer: Tokenizer = random_weights(resolve(args.model).tokenizer)
    cfg, soft = CFG(guidance_scale=4.0), SoftCFG.released(guidance_scale=4.0)
    print(f"{args.model}, float32, {machine()}")
    print(f"largest difference of the baseline's logits from ours: {check(baseline, soft):.1e}\n")
    rows = []
    layers, heads, head_dim = generator.cache_shape
    for batch in args.batch_size:
        inputs = generator.example_inputs(batch)
        cache = filled_cache(generator, generator.condition(inputs, guided=True))

        def sides_at(
            position: int, batch: int = batch, inputs: list[Any] = inputs, cache: KVCache = cache
        ) -> dict[str, Callable[[], object]]:
            return {
                "released CFG": released_step(baseline, batch, cfg, position),
                "released SoftCFG": released_step(baseline, batch, soft, position),
                "CFG": TimedStep(generator, inputs, cfg, position, cache),
                "SoftCFG": TimedStep(generator, inputs, soft, position, cache),
                "linear layers": linear_layers(baseline, 2 * batch),
            }

        with prepared_linear_layers(generator, 2 * batch):
            mean = means_over_sequence(sides_at, generator.num_tokens, args.repeats)
            for name in ("CFG", "SoftCFG"):
                mean[name] += seconds_ahead(generator, generator.condition(inputs, guided=True))
        products, speed = fastest_products(baseline, batch, args.repeats), bandwidth()
        filled = generator.condition_slots + generator.num_tokens / 2
        read = 4 * 2 * layers * heads * head_dim * 2 * batch * filled / speed
        mean |= {"products": products, "reading": read, "limit": products + read}
        tokens = torch.randint(generator.vocab_size, (PIXELS, generator.num_tokens))
        pixels = medians({"pixels": partial(tokenizer.decode, tokens)}, 2)["pixels"] * batch / PIXELS
        whole = {name: seconds * generator.num_tokens + pixels for name, seconds in mean.items()}
        rows.append(
            [
                batch,
                *(1e3 * seconds for seconds in mean.values()),
                mean["released CFG"] / mean["CFG"],
                mean["released SoftCFG"] / mean["SoftCFG"],
                f"{100 * (mean['SoftCFG'] / mean['CFG'] - 1):+.1f} %",
                f"{100 * (mean['released SoftCFG'] / mean['released CFG'] - 1):+.1f} %",
                mean["SoftCFG"] / mean["linear layers"],
                mean["SoftCFG"] / mean["limit"],
                speed / 1e9,
                pixels / batch,
                whole["released CFG"] / whole["CFG"],
                whole["released SoftCFG"] / whole["SoftCFG"],
                batch / whole["SoftCFG"],
            ]
        )
    header = [
        "batch", "released CFG, ms", "released SoftCFG, ms", "CFG, ms", "SoftCFG, ms", "linear layers, ms",
        "fastest products, ms", "reading the cache, ms", "limit, ms",
        "released / ours, CFG", "released / ours, SoftCFG", "SoftCFG over CFG", "released SoftCFG over CFG",
        "SoftCFG / linear layers", "SoftCFG / limit", "memory, GB/s", "pixels, s an image", "with pixels, CFG",
        "with pixels, SoftCFG", "images/s",
    ]  # fmt: skip
    weights = sum(layer.weight.numel() for layer in generator.modules() if isinstance(layer, Linear))
    print(
        f"a step of one image: {4e-9 * weights:.3g} GFLOP in linear layers; on average "
        f"{2e-6 * layers * heads * head_dim * generator.num_tokens * 4:.3g} MB read from the cache\n"
    )
    print(table(header, rows))


if __name__ == "__main__":
    main()
