"""Seconds an image that image tokenizers take for pixels, in float32 and in bfloat16, and how far the pixels differ.

    python -m benchmarks.pixels alitok-b rar-b llamagen-b-256 --threads 1

Tokens are random, and so are the weights of models that are not bundled.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch

from benchmarks.timing import machine, medians, parsed, table
from softcfg import load_tokenizer
from softcfg.tokenizers.base import Tokenizer
from softcfg.zoo.loading import random_weights
from softcfg.zoo.registry import resolve

DTYPES = (torch.float32, torch.bfloat16)


def tokenizer_in(model: str, dtype: torch.dtype) -> Tokenizer:
    """The image tokenizer of a model."""
    entry = resolve(model)
    if entry.bundled:
        return load_tokenizer(model, dtype=dtype)
    return random_weights(entry.tokenizer, dtype=dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--batch-size", type=int, default=2)
    args = parsed(parser, repeats=5)
    rows = []
    for model in args.models:
        sides = [tokenizer_in(model, dtype) for dtype in DTYPES]
        tokens = torch.randint(sides[0].codebook_size, (args.batch_size, sides[0].num_tokens))
        seconds = medians({str(each.dtype): partial(each.decode, tokens) for each in sides}, args.repeats).values()
        full, rounded = (each.to_uint8(each.decode(tokens)).int() for each in sides)
        off = (full - rounded).abs()
        float32, bfloat16 = (each / args.batch_size for each in seconds)
        rows.append([model, float32, bfloat16, float32 / bfloat16, float(off.float().mean()), int(off.max())])
    print(f"{machine()}, {args.batch_size} images at once\n")
    print(table(["model", "float32, s", "bfloat16, s", "times as fast", "levels off, mean", "most"], rows))


if __name__ == "__main__":
    main()
