"""The memory of a job at its peak, against what has to be there: weights, cache, the activations of the decoder.

    python -m benchmarks.memory --model alitok-b --batch-size 16

Products of a CPU that cannot serve all numbers of rows have the linear layers' weights twice while tokens are drawn, as
loaded and as they want them; that is counted as a part of its own, and what a batch computes for several steps at once
as a part of the cache. The activations of the pixel decoder are the peak of decoding one batch with nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import re
from pathlib import Path

import torch
from torch import nn

from benchmarks.timing import machine, table
from softcfg import Pipeline, SoftCFG
from softcfg.decoding import decode, image_uniforms
from softcfg.nn.linear import Linear, prepared_linear_layers

MIB = 2**20


def resident() -> float:
    """MiB in use."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / MIB
    return _status("VmRSS")


def peak() -> float:
    """The most MiB in use since `forget_peak`."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / MIB
    return _status("VmHWM")


def forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> float:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


def size(module: nn.Module) -> float:
    """MiB of a module's weights."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters()) / MIB


def prepared_twice(generator: nn.Module, rows: int) -> float:
    """MiB of linear layers that are there twice while tokens are drawn: as they are, and laid out."""
    with prepared_linear_layers(generator, rows):
        layers = [layer for layer in generator.modules() if isinstance(layer, Linear) and layer.product is not None]
        return sum(size(layer) for layer in layers if layer.weight.numel())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="alitok-b")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--batches", type=int, default=3, help="of the job")
    parser.add_argument("--tokens", type=int, help="stop a batch after so many (the cache is there from the first on)")
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)  # the libraries' own memory
    empty = resident()
    pipeline = Pipeline.with_random_weights(args.model, device=device)
    generator, tokenizer, batch = pipeline.generator, pipeline.tokenizer, args.batch_size
    guidance, labels = SoftCFG(guidance_scale=4.0), [0] * batch
    weights = size(generator) + size(tokenizer)
    condition = generator.condition(labels, guided=True)
    cache = (generator.cache_bytes(condition) + generator.ahead_bytes(condition)) / MIB

    class EnoughError(Exception):
        pass

    def on_step(done: int) -> None:
        if done == args.tokens:
            raise EnoughError

    tokens = torch.randint(generator.vocab_size, (batch, generator.num_tokens), device=device)
    forget_peak()
    before = resident()
    tokenizer.decode(tokens)
    activations = peak() - before

    forget_peak()
    with pipeline.in_use():
        for _ in range(args.batches):
            with contextlib.suppress(EnoughError):
                uniforms = image_uniforms(0, range(batch), generator.num_tokens)
                tokens = decode(generator, labels, guidance, uniforms=uniforms, on_step=on_step)
            tokenizer.to_uint8(tokenizer.decode(tokens))
    found = peak() - empty

    prepared = prepared_twice(generator, 2 * batch)
    print(f"{args.model}, {args.batches} batches of {batch}, {machine()}; MiB\n")
    expected = weights + prepared + cache + activations
    print(
        table(
            ["weights", "prepared weights", "cache", "activations of pixels", "sum", "peak", "peak / sum"],
            [[weights, prepared, cache, activations, expected, found, found / expected]],
        )
    )


if __name__ == "__main__":
    main()
