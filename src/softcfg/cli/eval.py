"""`softcfg eval`: measure images."""

from __future__ import annotations

import argparse

from softcfg.cli import arguments
from softcfg.errors import UserError

HELP = "measure images: FID, sFID, Inception Score, precision, recall"
DESCRIPTION = """\
Measure images by the protocol of ImageNet papers: FID, sFID, Inception Score, precision and recall.

SAMPLES and --reference are .npz files with arr_0 (uint8 [N, H, W, 3]), folders of PNG, JPEG, WebP, BMP or TIFF
images, or run folders; the reference may also be an .npz file of statistics (mu, sigma, mu_s, sigma_s), as ADM
reference batches and --save-stats have them. Without a reference there is only the Inception Score, and class
accuracy where the extractor knows the classes (fashion) and SAMPLES says what was drawn (a run folder, arr_1).
The extractor emoji also gives the agreement with the prompts of a run: the shares of images that show all that
was asked for, and its name, style and colour.

The Inception weights are downloaded once, into the folder SOFTCFG_CHECKPOINTS (default:
~/.cache/softcfg/checkpoints); features are kept in SOFTCFG_FEATURES (default: ~/.cache/softcfg/features)."""

EXAMPLES = """\
examples:
  softcfg eval samples.npz --reference VIRTUAL_imagenet256_labeled.npz --output metrics.json
  softcfg eval out --reference test-images --extractor fashion --metrics fid,precision,recall
  softcfg eval out --extractor emoji
  softcfg eval train-images --save-stats train.npz --metrics inception_score"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("samples", metavar="SAMPLES", help=".npz file, folder of images or run folder")
    parser.add_argument("--reference", metavar="PATH", help="what to compare with; the same, or statistics")
    parser.add_argument(
        "--metrics",
        metavar="LIST",
        help="some of fid, sfid, inception_score, precision, recall, class_accuracy, agreement, name_agreement, "
        "style_agreement, colour_agreement, separated by commas (default: all that can be computed)",
    )
    arguments.add_output_size_argument(
        parser,
        "first resize images of another size to SIZE x SIZE pixels (bicubic). Figures of papers are of images "
        "that were resized before they were rounded to 8 bits: better give this flag to 'softcfg sample' or 'decode'",
    )
    group = parser.add_argument_group("features")
    arguments.add_extractor_arguments(group)
    group.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    group.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="(default: float32)")
    group.add_argument("--batch-size", type=int, default=64, metavar="B", help="images at once (default: 64)")
    group.add_argument("--no-cache", action="store_true", help="keep no features")
    group = parser.add_argument_group("results")
    group.add_argument("--output", metavar="FILE", help="write the results, and all it takes to get them, as JSON")
    group.add_argument("--json", action="store_true", help="print that JSON instead of a table")
    group.add_argument("--save-stats", metavar="FILE", help="write the statistics of SAMPLES as .npz")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from pathlib import Path

    import torch

    from softcfg.evaluation import evaluate
    from softcfg.evaluation.features import cache_folder
    from softcfg.evaluation.protocol import refuse_overwriting_images
    from softcfg.files import write_atomically

    if args.no_cache and args.cache_dir:
        raise UserError("--no-cache and --cache-dir exclude each other")
    for flag, path in (("--output", args.output), ("--save-stats", args.save_stats)):
        if path and not Path(path).parent.is_dir():
            raise UserError(f"{flag}: the folder {Path(path).parent} does not exist")
    refuse_overwriting_images(
        {"--output": args.output, "--save-stats": args.save_stats},
        {"SAMPLES": args.samples, "--reference": args.reference},
        args.extractor_weights,
    )
    report = evaluate(
        args.samples,
        args.reference,
        args.extractor,
        arguments.parse_metrics(args.metrics),
        weights=args.extractor_weights,
        device=arguments.parse_device(args.device),
        dtype=getattr(torch, args.dtype),
        batch_size=args.batch_size,
        cache=None if args.no_cache else args.cache_dir or cache_folder(),
        save_stats=args.save_stats,
        progress=True,
        image_size_eval=args.image_size_eval,
    )
    if args.output:
        write_atomically(args.output, report.to_json().encode() + b"\n")
    print(report.to_json() if args.json else report.to_table())
    return 0
