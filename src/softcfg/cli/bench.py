"""`softcfg bench`: how fast this machine draws, and with which batch size."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from typing import TYPE_CHECKING

from softcfg.cli import arguments
from softcfg.errors import UserError, quote

if TYPE_CHECKING:
    from softcfg.models.base import Condition
    from softcfg.tokenizers.base import Tokenizer

HELP = "measure how fast this machine draws"
USAGE = "softcfg bench MODEL [options]"
DESCRIPTION = """\
Measure how fast this machine draws images of a model at several batch sizes, and name the smallest batch size
that comes within 5 % of the best. Steps are timed at several positions of the sequence; their mean stands for all.
The set-up is what every batch does once: laying out weights, and on a GPU the capture of the CUDA graph. Texts are
taken to have 64 tokens. The memory of a batch is that of the cache, of what is computed ahead and of the logits; a
batch for which it is not enough is left out."""

EXAMPLES = """\
examples:
  softcfg bench fashion
  softcfg bench alitok-b --random-weights --batch-sizes 1 4 16"""

NEAR_BEST = 0.95


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    arguments.add_model_arguments(parser)
    group = parser.add_argument_group("measurement")
    group.add_argument("--random-weights", action="store_true", help="measure without the model's files")
    group.add_argument("--batch-sizes", type=int, nargs="+", metavar="B", default=[1, 4, 16, 64])
    group.add_argument("--repeats", type=int, default=3, metavar="N", help="how often each step is timed (default: 3)")
    group.add_argument("--no-pixels", action="store_true", help="leave out the decoding of pixels")
    arguments.add_guidance_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    import torch

    from softcfg.decoding.throughput import MOST_IMAGES, batch_bytes, time_steps
    from softcfg.nn.choices import choices, forget_choices, machine
    from softcfg.nn.memory import free_memory

    if min(args.batch_sizes) < 1 or args.repeats < 1:
        raise UserError("--batch-sizes and --repeats must be at least 1")
    if max(args.batch_sizes) > MOST_IMAGES:
        raise UserError(f"--batch-sizes must be at most {MOST_IMAGES:,}, got {quote(max(args.batch_sizes))}")
    pipeline = arguments.load_pipeline(args, random_weights=args.random_weights)
    generator = pipeline.generator
    guidance = arguments.guidance_from(args, pipeline)
    where = torch.cuda.get_device_name(generator.device) if generator.device.type == "cuda" else machine()
    forget_choices()
    print(f"{pipeline.name} on {where}, {torch.get_num_threads()} threads, {generator.dtype}, {guidance}\n")
    print(
        f"{'batch':>5} {'set-up, s':>9} {'ms/step':>9} {'tokens/s':>9} {'pixels, s/image':>16} {'images/s':>9} "
        f"{'memory, MiB':>11}"
    )
    speed: dict[int, float] = {}
    for batch in sorted(set(args.batch_sizes)):
        weak = pipeline.weak_generator if guidance.has_weak_model else None
        needed, free = batch_bytes(generator, batch, guidance, weak=weak), free_memory(generator.device)
        if free is not None and needed > free:
            print(f"{batch:5} needs {needed / 2**20:.0f} MiB beside the weights, {free / 2**20:.0f} MiB are free")
            continue
        step, set_up = time_steps(generator, batch, guidance, repeats=args.repeats, weak=weak)
        condition = generator.condition(generator.example_inputs(batch), guided=guidance.has_unconditional_branch)
        pixels = 0.0 if args.no_pixels else _pixel_seconds(pipeline.tokenizer, condition, batch) / batch
        seconds = (set_up + step * condition.num_tokens) / batch + pixels
        speed[batch] = 1 / seconds
        print(
            f"{batch:5} {set_up:9.2f} {1e3 * step:9.3f} {batch / step:9.0f} {pixels:16.4f} {1 / seconds:9.3f} "
            f"{needed / 2**20:11.0f}",
            flush=True,
        )
    if not speed:
        raise UserError("there is not enough memory for any of --batch-sizes; give smaller ones")
    best = max(speed.values())
    chosen = min(batch for batch, images in speed.items() if images >= NEAR_BEST * best)
    counts = Counter(choices("product").values())
    if counts:
        shares = ", ".join(f"{name} for {count}" for name, count in counts.most_common())
        print(f"\nmatrix products, by shapes of linear layers: {shares}")
    print(f"\nrecommended: --batch-size {chosen}")
    return 0


def _pixel_seconds(tokenizer: Tokenizer, condition: Condition, batch: int) -> float:
    import torch

    tokens = torch.randint(tokenizer.codebook_size, (batch, condition.num_codes))
    tokenizer.decode(tokens[:1], condition.grid)
    started = time.perf_counter()
    tokenizer.decode(tokens, condition.grid).cpu()
    return time.perf_counter() - started
