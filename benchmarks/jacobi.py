"""Speculative Jacobi decoding against token by token decoding: passes through the generator, and seconds.

    python -m benchmarks.jacobi --model fashion --window 4 8 16 32 --batch-size 1 8

All sides draw the same labels (or prompts) in turn, `--repeats` times, other images each time; passes are means, the
rest medians. On a CPU, seconds are those of the processor, so that other work on the machine does not count. How many
drafts are kept depends on the distributions, so the model needs its real weights.
"""

from __future__ import annotations

import argparse
import statistics
import time

from benchmarks.timing import machine, parsed, table
from softcfg import CFG, Pipeline, SoftCFG
from softcfg.decoding import ImageStreams, decode, image_uniforms, jacobi_decode

PROMPTS = ("red apple", "octopus", "grinning face", "blue cat")


def run(pipeline: Pipeline, guidance: CFG, batch: int, window: int, turn: int) -> tuple[int, float]:
    """Passes and seconds of drawing the tokens of a batch; a window of 0 is token by token."""
    generator = pipeline.generator
    images = range(turn * batch, (turn + 1) * batch)
    if pipeline.conditioning.takes_prompts:
        prompts = [PROMPTS[image % len(PROMPTS)] for image in images]
        inputs = pipeline.conditioning.inputs(pipeline.conditioning.requests(prompts=prompts))
    else:
        inputs = [image % generator.num_classes for image in images]
    clock = time.perf_counter if generator.device.type == "cuda" else time.process_time
    started = clock()
    if window:
        tokens, passes = jacobi_decode(
            generator, inputs, guidance, streams=ImageStreams(0, images), window=window, sampling=pipeline.sampling()
        )
    else:
        passes = generator.num_tokens
        uniforms = image_uniforms(0, images, passes)
        tokens = decode(generator, inputs, guidance, uniforms=uniforms, sampling=pipeline.sampling())
    tokens.tolist()  # waits for the device
    return passes, clock() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fashion")
    parser.add_argument("--window", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8])
    args = parsed(parser, repeats=3)

    pipeline = Pipeline.from_pretrained(args.model)
    print(f"{args.model}, {pipeline.generator.num_tokens} tokens, {pipeline.generator.dtype}, {machine()}\n")
    rows = []
    for method in (CFG, SoftCFG):
        guidance = pipeline.default_guidance(method)
        for batch in args.batch_size:
            taken: dict[int, list[tuple[int, float]]] = {window: [] for window in (0, *args.window)}
            run(pipeline, guidance, batch, max(args.window), 0)  # warms up
            for turn in range(args.repeats):
                for window, results in taken.items():
                    results.append(run(pipeline, guidance, batch, window, turn))
            baseline = [seconds for _, seconds in taken[0]]
            for window, results in taken.items():
                seconds = [seconds for _, seconds in results]
                rows.append(
                    [
                        method.__name__,
                        batch,
                        window or "token by token",
                        statistics.fmean(passes for passes, _ in results),
                        statistics.median(seconds),
                        statistics.median(one / other for one, other in zip(baseline, seconds, strict=True)),
                    ]
                )
    print(table(["guidance", "batch", "window", "passes", "seconds", "token by token / this"], rows))


if __name__ == "__main__":
    main()
