"""What an int8 key/value cache saves and costs: memory, seconds a step, and the distance of the images (FID).

    python -m benchmarks.kv_cache alitok-b --batch-size 16
    python -m benchmarks.kv_cache fashion-small --batch-size 250 --images 10000 --seeds 3

Steps are timed with random weights. Images, of a model of Fashion-MNIST, are drawn with its own: image n of a seed
draws the same random numbers with both caches.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.timing import machine, means_over_sequence, table
from recipes.fashion_mnist.data import DEFAULT_FOLDER
from recipes.study.measure import CLASSES, Laboratory
from softcfg import SoftCFG
from softcfg.decoding.throughput import TimedStep
from softcfg.models.base import Generator
from softcfg.nn.linear import prepared_linear_layers
from softcfg.zoo.loading import random_weights
from softcfg.zoo.registry import resolve

CACHES: dict[str, torch.dtype | None] = {"the generator's dtype": None, "int8": torch.int8}


def time_steps(generator: Generator, batch: int, repeats: int) -> list[list[object]]:
    """Rows of the table: cache, MiB, milliseconds a step."""
    generators = {}
    for name, dtype in CACHES.items():
        generators[name] = copy.copy(generator)  # of the same weights
        generators[name].cache_dtype = dtype
    guidance = SoftCFG(guidance_scale=4.0)
    inputs = generator.example_inputs(batch)
    condition = generator.condition(inputs, guided=True)

    def sides_at(position: int) -> dict[str, Callable[[], object]]:
        return {name: TimedStep(each, inputs, guidance, position) for name, each in generators.items()}

    with prepared_linear_layers(generator, condition.rows):
        seconds = means_over_sequence(sides_at, condition.num_tokens, repeats, warmup=2)
    return [
        [name, f"{each.cache_bytes(condition) / 2**20:.0f}", 1e3 * seconds[name]] for name, each in generators.items()
    ]


def compare_images(model: str, images: int, seeds: int, batch: int, data: Path) -> list[list[object]]:
    """Rows of the table: cache, seed, share of images with other tokens, FID, Inception Score, class accuracy."""
    laboratory = Laboratory(model, data, batch)
    pipeline, guidance = laboratory.pipeline, laboratory.pipeline.default_guidance()
    labels = torch.arange(images) % CLASSES
    rows: list[list[object]] = []
    for seed in range(seeds):
        tokens = None
        for name, dtype in CACHES.items():
            pipeline.generator.cache_dtype = dtype
            drawn = pipeline(labels, guidance, seed=seed, batch_size=batch)
            tokens = drawn.tokens if tokens is None else tokens
            other = (drawn.tokens != tokens).any(1).float().mean()
            found = laboratory.metrics(torch.from_numpy(drawn.pixels), labels)
            figures = [f"{found[metric]:.4f}" for metric in ("fid", "inception_score", "class_accuracy")]
            rows.append([name, seed, f"{100 * float(other):.1f} %", *figures])
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a class-conditional model of the zoo")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--images", type=int, default=0, help="draw and measure as many; 0: time steps")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--data", type=Path, default=DEFAULT_FOLDER, help="folder of the IDX files of Fashion-MNIST")
    args = parser.parse_args()
    print(f"{args.model}, batch {args.batch_size}, {machine()}\n")
    if args.images:
        header = ["cache", "seed", "images with other tokens", "FID", "IS", "class accuracy"]
        rows = compare_images(args.model, args.images, args.seeds, args.batch_size, args.data)
    else:
        header = ["cache", "MiB", "ms per step"]
        rows = time_steps(random_weights(resolve(args.model).generator), args.batch_size, args.repeats)
    print(table(header, rows))


if __name__ == "__main__":
    main()
