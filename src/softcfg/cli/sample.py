"""`softcfg sample`: draw images."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softcfg.cli import arguments, drawing, released
from softcfg.errors import UserError
from softcfg.files import refuse_foreign

if TYPE_CHECKING:
    from softcfg.pipeline import Pipeline
    from softcfg.runs.folder import RunFolder
    from softcfg.runs.job import DrawnRun
    from softcfg.runs.processes import Processes
    from softcfg.runs.progress import Progress
    from softcfg.runs.tracking import Tracker
    from softcfg.runs.worker import BatchDrawer

PER_LABEL = 8
PER_PROMPT = 4
LARGE_BATCH = 8  # from which a CPU gains nothing by it
WORTH_IT = 0.7  # share of the passes, each of which costs more than one of token by token decoding
COMPARE_UP_TO = 100  # images
COMPARE_UP_TO_TOKENS = 1024

HELP = "draw images"
USAGE = "softcfg sample MODEL [options]"
DESCRIPTION = """\
Draw images into a folder: a few, or a run of any size by any number of processes.

The folder receives 000000.png, 000001.png, ... (image n shows the n-th label or prompt, taken in turn),
grid.png (one row per label or prompt), comparison.png (the same seeds without guidance, with CFG and with
SoftCFG), run.json (the settings) and shards/ (codes, labels and pixels, from which the rest is made).

The same command, without --overwrite, continues a run that was stopped; what is there is not drawn again.
Started by torchrun or 'accelerate launch', all processes share the work; see docs/cluster.md."""

EXAMPLES = """\
examples:
  softcfg sample fashion --labels all --output-dir out
  softcfg sample fashion --labels Sneaker,Bag --guidance-scale 6 --softcfg-strength 0
  softcfg sample emoji --prompt "red apple, flat style" --prompt "cat face, ink style"
  softcfg sample lumina-mgpt-2 --prompts prompts.txt --images-per-prompt 2 --width 768 --height 768
  softcfg sample lumina-mgpt-2 --prompt "a lighthouse" --task depth --image photo.jpg --height 1024
  softcfg sample alitok-xl --labels 207,360 --guidance-scale 9 --guidance-scale-pow 1.5
  torchrun --nproc-per-node 8 -m softcfg sample alitok-xl --num-samples 50000 --npz --output-dir run
  softcfg sample config=configs/alitok_xl.yaml experiment.output_dir=out model.generator.guidance_scale=9"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    arguments.add_model_arguments(parser, required=False)
    add_subject_arguments(parser)
    group = parser.add_argument_group("results")
    group.add_argument("--output-dir", metavar="DIR", help="folder for the results (default: out)")
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="discard the run in that folder and begin anew, each time",
    )
    group.add_argument(
        "--png", action=argparse.BooleanOptionalAction, default=True, help="one file per image (default)"
    )
    group.add_argument(
        "--npz",
        action=argparse.BooleanOptionalAction,
        help="all images in one file beside the folder, DIR.npz, for ADM's evaluation (default: with --config)",
    )
    arguments.add_output_size_argument(group)
    group.add_argument(
        "--compare",
        action=argparse.BooleanOptionalAction,
        help=f"write comparison.png (default: for up to {COMPARE_UP_TO} images of up to {COMPARE_UP_TO_TOKENS} codes)",
    )
    group.add_argument("--track", choices=("tensorboard", "wandb"), help="report settings, throughput and a grid")
    arguments.add_guidance_arguments(parser)
    arguments.add_speed_arguments(parser)
    released.add_arguments(parser)


def add_subject_arguments(parser: argparse.ArgumentParser) -> None:
    """What to draw, and how often; see `subjects`."""
    group = parser.add_argument_group("what to draw")
    group.add_argument(
        "--labels",
        help="class ids, ranges or names taken in turn: 0,3,7 or 0-9 or all (default: all); @FILE with one per line; "
        'or random, from the seed; a name with commas or of digits goes in quotes, \'"maillot, tank suit","7"\'',
    )
    arguments.add_prompt_arguments(group)
    group.add_argument(
        "--images-per-prompt", type=int, metavar="N", help=f"default: {PER_PROMPT} with --prompt alone, else 1"
    )
    group.add_argument(
        "--task",
        help="for models with tasks (Lumina-mGPT 2.0), a picture in two halves: an image above its depth, canny, hed "
        "or openpose map; or with --image depth, canny or subject, which say what that is",
    )
    group.add_argument("--image", metavar="FILE", help="the upper half, from which the lower one is drawn")
    group.add_argument("--num-samples", type=int, metavar="N", help=f"images in all (default: {PER_LABEL} a label)")
    group.add_argument("--batch-size", type=int, metavar="B", help="images drawn at once (default: at most 100)")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from softcfg.runs.processes import Processes

    check_counts(args)
    if released.is_used(args):
        released.apply(args)
    elif args.model is None:
        raise UserError("MODEL is missing: give a name that 'softcfg models' lists, or the path of a model folder")
    if args.speculative_jacobi < 0:
        raise UserError(f"--speculative-jacobi must be at least 1 (0: off), got {args.speculative_jacobi}")
    with Processes(args.device) as processes:
        _draw(args, processes)
    return 0


def _draw(args: argparse.Namespace, processes: Processes) -> None:
    from softcfg.runs.export import npz_beside, write_pngs
    from softcfg.runs.folder import SETTINGS

    folder = Path(args.output_dir or "out")
    if args.npz and not args.overwrite:
        npz = npz_beside(folder)
        refuse_foreign(npz.parent, folder.absolute() / SETTINGS, [npz.name])
    tracker: Tracker | None = None

    def start(run: RunFolder) -> None:
        nonlocal tracker
        if args.track is not None and processes.first:
            from softcfg.runs.tracking import Tracker

            tracker = Tracker(args.track, run.path, run.settings, cpu=str(processes.device) == "cpu")

    def report(progress: Progress) -> None:
        if tracker is not None:
            tracker.throughput(progress.done, progress.rate)

    drawing.draw(
        args,
        processes,
        folder,
        lambda pipeline: {**subjects(args, pipeline), "speculative_jacobi": args.speculative_jacobi},
        on_start=start,
        on_shard=functools.partial(write_pngs, folder=folder) if args.png else None,
        on_progress=report,
        on_finish=lambda drawn: _finish(args, drawn, tracker),
    )


def _passes(drawer: BatchDrawer) -> str:
    """How many passes speculative decoding took, and whether that can pay (docs/performance.md)."""
    said = f"{drawer.passes} passes in place of {drawer.steps}"
    on_cpu = drawer.pipeline.device.type == "cpu"
    if on_cpu and drawer.batch_size >= LARGE_BATCH:
        return f"{said}; on a CPU this saves little or no time in batches of {drawer.batch_size}, try --batch-size 1"
    if drawer.passes > WORTH_IT * drawer.steps:
        return f"{said}; that is too many to save time with this model, leave out --speculative-jacobi"
    return said


def check_counts(args: argparse.Namespace) -> None:
    """Raise `UserError` for a number of images below 1, of the arguments of `add_subject_arguments`."""
    for name in ("num_samples", "batch_size", "images_per_prompt"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}")


def subjects(args: argparse.Namespace, pipeline: Pipeline) -> dict[str, Any]:
    """What is drawn and how often, as fields of a `RunRequest`."""
    from softcfg.runs.plan import RANDOM, Prompts

    texts = arguments.parse_prompts(args, pipeline)
    if texts is not None:
        if args.images_per_prompt and args.num_samples:
            raise UserError("give --images-per-prompt or --num-samples, not both")
        each = args.images_per_prompt or (PER_PROMPT if args.prompt and args.prompts is None else 1)
        return {
            "prompts": Prompts(
                tuple(texts), *arguments.image_size(args, pipeline), args.task, args.image, args.negative_prompt
            ),
            "num_samples": args.num_samples or each * len(texts),
        }
    if args.task is not None or args.image is not None:
        raise UserError(f"--task and --image: {pipeline.name} draws classes")
    given = "all" if args.labels is None else args.labels
    chosen: list[int] | str = RANDOM
    if given.strip().lower() != RANDOM:
        chosen = arguments.parse_labels(given, pipeline)
    elif args.num_samples is None:
        raise UserError("--labels random needs --num-samples")
    each = 1 if given.startswith("@") else PER_LABEL
    return {"labels": chosen, "num_samples": args.num_samples or each * len(chosen)}


def _finish(args: argparse.Namespace, drawn: DrawnRun, tracker: Tracker | None) -> None:
    """Make everything that is made from shards."""
    from softcfg.images import is_picture
    from softcfg.runs.export import export_npz, export_pngs, npz_beside
    from softcfg.runs.pictures import label_names, write_comparison, write_grid

    run, images, seconds = drawn.run, drawn.images, drawn.seconds
    if args.png:
        export_pngs(run, run.path, absent_only=True)
    grid = write_grid(run, label_names(drawn.drawer))
    if images:
        print(f"{drawing.counted(images, 'image')} in {seconds:.1f} s ({images / seconds:.2f} images/s) in {run.path}")
    if images and args.speculative_jacobi:
        print(_passes(drawn.drawer))
    count = run.plan.num_samples
    drawn_fast = count <= COMPARE_UP_TO and run.require(0).codes.shape[1] <= COMPARE_UP_TO_TOKENS
    wanted = drawn_fast if args.compare is None else args.compare
    if wanted and (images or not is_picture(run.path / "comparison.png")):
        path, title = write_comparison(run, drawn.drawer)
        print(f"the same seeds without guidance, with CFG and with {title}: {path}")
    if args.npz:
        path = npz_beside(run.path)
        print(f"{path}: arr_0 uint8 {list(export_npz(run, path))}")
    if tracker is not None:
        tracker.finish(count, images / seconds, grid)
