"""Images a second: batches of one job, which leave what they prepare to the next, and batches that are each a job.

python -m benchmarks.jobs fashion-small fashion --batch-size 1 8 80 --threads 1
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
from collections.abc import Callable

from benchmarks.timing import machine, medians, parsed, table
from softcfg import Pipeline, SoftCFG
from softcfg.zoo.registry import resolve


def batches(pipeline: Pipeline, batch: int, count: int, *, as_job: bool) -> Callable[[], None]:
    """Draw so many batches, each with other random numbers."""
    inputs = pipeline.generator.example_inputs(batch)
    what = {"prompts": ["a red apple"] * batch} if pipeline.conditioning.takes_prompts else {"labels": inputs}
    seeds = itertools.count()

    def run() -> None:
        with pipeline.in_use() if as_job else contextlib.nullcontext():
            for _ in range(count):
                pipeline(**what, guidance=SoftCFG(guidance_scale=3.0), seed=next(seeds), progress=False)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="names of the zoo; those that are not bundled get random weights")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8, 80])
    parser.add_argument("--batches", type=int, default=4, help="of a job")
    args = parsed(parser, repeats=5)

    rows = []
    for model in args.models:
        bundled = resolve(model).bundled
        pipeline = Pipeline.from_pretrained(model) if bundled else Pipeline.with_random_weights(model)
        for batch in args.batch_size:
            sides = {
                name: batches(pipeline, batch, args.batches, as_job=as_job)
                for name, as_job in (("alone", False), ("in a job", True))
            }
            found = medians(sides, args.repeats)
            speeds = [batch * args.batches / seconds for seconds in found.values()]
            rows.append([model, batch, *speeds, speeds[1] / speeds[0]])
    print(f"float32, {args.batches} batches, {machine()}; images a second\n")
    print(table(["model", "batch", *sides, "times as fast"], rows))


if __name__ == "__main__":
    main()
