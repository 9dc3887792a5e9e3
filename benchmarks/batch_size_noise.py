"""How many images change when they are drawn in batches of another size.

Image n of seed s draws the same numbers in every batch, but matrix products of another shape round differently,
and now and then a token falls to the other side of its draw; from there on the image is another one.

    python -m benchmarks.batch_size_noise fashion --images 1000 --batch-sizes 100 50 8 --dtypes float32 bfloat16
"""

from __future__ import annotations

import argparse
import hashlib

import torch

from benchmarks.timing import machine, table
from softcfg import Pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a name that 'softcfg models' lists, or a model folder")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[100, 50, 8], help="the first is the reference")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--device", default=None)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rows = []
    for dtype in args.dtypes:
        pipeline = Pipeline.from_pretrained(args.model, device=args.device, dtype=getattr(torch, dtype))
        labels = [n % pipeline.generator.num_classes for n in range(args.images)]
        reference = None
        # The reference once more at the end: with one batch size nothing may change.
        for batch_size in [*args.batch_sizes, args.batch_sizes[0]]:
            drawn = pipeline(labels, seed=args.seed, batch_size=batch_size)
            digest = hashlib.sha256(drawn.pixels.tobytes()).hexdigest()[:8]
            print(f"{dtype}, batches of {batch_size}: {digest}", flush=True)
            if reference is None:
                reference = drawn
                continue
            tokens = (drawn.tokens != reference.tokens).any(dim=1)
            pixels = (drawn.pixels != reference.pixels).reshape(args.images, -1).any(axis=1)
            kept = ~tokens.numpy()
            step = abs(drawn.pixels[kept].astype(int) - reference.pixels[kept]).max(initial=0)
            rows.append(
                [dtype, args.batch_sizes[0], batch_size, int(tokens.sum()), int((pixels & kept).sum()), int(step)]
            )
    print(f"\n{args.model}, {args.images} images, {machine()}\n")
    header = ["dtype", "batch", "other batch", "images with other tokens", "same tokens, other pixels", "largest step"]
    print(table(header, rows))


if __name__ == "__main__":
    main()
