"""Seconds a decoding step: ours against the released manner, SoftCFG against CFG, and both against the linear layers.

    python -m benchmarks.decoding --model alitok-b --batch-size 4 16

The limit of a step is taken to be its linear layers, with weights laid out for them, and one reading of the filled
part of the cache; it is measured beside the rest. A step's cost grows with the filled part of the cache, so steps are
timed at several positions spread evenly over the sequence; their mean stands for the sequence. The weights are random:
they do not change the arithmetic. Pixels are decoded by the same network on both sides.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from benchmarks.released import Released, check
from benchmarks.timing import machine, means_over_sequence, medians, table
from softcfg.decoding.throughput import decoding_step, filled_cache
from softcfg.guidance import CFG, SoftCFG
from softcfg.models.base import ClassGenerator
from softcfg.nn.kv_cache import KVCache
from softcfg.nn.linear import Linear, prepared_linear_layers
from softcfg.tokenizers.base import Tokenizer
from softcfg.zoo.loading import random_weights
from softcfg.zoo.registry import resolve

PIXELS = 4  # images whose pixels are decoded at once


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


def linear_layers(generator: ClassGenerator, rows: int, kind: type[nn.Linear] = nn.Linear) -> Callable[[], None]:
    """All linear layers of a step alone, one after the other."""
    layers = [module for module in generator.modules() if isinstance(module, kind)]
    inputs = [torch.randn(rows, layer.in_features) for layer in layers]

    @torch.inference_mode()
    def run() -> None:
        for layer, x in zip(layers, inputs, strict=True):
            layer(x)

    return run


def limit(generator: ClassGenerator, rows: int, position: int, cache: KVCache) -> Callable[[], None]:
    """What no step can leave out: the linear layers on prepared weights, and reading what the cache holds."""
    products = linear_layers(generator, rows, Linear)  # RAR's modulations are not among them

    @torch.inference_mode()
    def run() -> None:
        products()
        for contents in (*cache.keys, *cache.values):
            contents[:, :, :position].amax()

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
    tokenizer: Tokenizer = random_weights(resolve(args.model).tokenizer)
    cfg, soft = CFG(guidance_scale=4.0), SoftCFG.released(guidance_scale=4.0)
    print(f"{args.model}, float32, {machine()}")
    print(f"largest difference of the baseline's logits from ours: {check(baseline, soft):.1e}\n")
    rows = []
    for batch in args.batch_size:
        cache = filled_cache(generator, generator.condition(range(batch), guided=True))

        def sides_at(position: int, batch: int = batch, cache: KVCache = cache) -> dict[str, Callable[[], object]]:
            return {
                "released CFG": released_step(baseline, batch, cfg, position),
                "released SoftCFG": released_step(baseline, batch, soft, position),
                "CFG": decoding_step(generator, range(batch), cfg, position, cache),
                "SoftCFG": decoding_step(generator, range(batch), soft, position, cache),
                "linear layers": linear_layers(baseline, 2 * batch),
                "limit": limit(generator, 2 * batch, position, cache),
            }

        with prepared_linear_layers(generator, 2 * batch):
            mean = means_over_sequence(sides_at, generator.num_tokens, args.repeats)
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
                pixels / batch,
                whole["released CFG"] / whole["CFG"],
                whole["released SoftCFG"] / whole["SoftCFG"],
                batch / whole["SoftCFG"],
            ]
        )
    header = [
        "batch", "released CFG, ms", "released SoftCFG, ms", "CFG, ms", "SoftCFG, ms", "linear layers, ms", "limit, ms",
        "released / ours, CFG", "released / ours, SoftCFG", "SoftCFG over CFG", "released SoftCFG over CFG",
        "SoftCFG / linear layers", "SoftCFG / limit", "pixels, s an image", "with pixels, CFG", "with pixels, SoftCFG",
        "images/s",
    ]  # fmt: skip
    weights = sum(layer.weight.numel() for layer in generator.modules() if isinstance(layer, Linear))
    layers, heads, head_dim = generator.cache_shape
    print(
        f"a step of one image: {4e-9 * weights:.3g} GFLOP in linear layers; on average "
        f"{2e-6 * layers * heads * head_dim * generator.num_tokens * 4:.3g} MB read from the cache\n"
    )
    print(table(header, rows))


if __name__ == "__main__":
    main()
