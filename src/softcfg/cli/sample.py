"""`softcfg sample`: draw images."""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softcfg.cli import arguments, released
from softcfg.errors import UserError
from softcfg.files import make_folder, write_atomically
from softcfg.runs.signals import termination_raises

if TYPE_CHECKING:
    from PIL.Image import Image

    from softcfg.decoding import Sampling
    from softcfg.guidance import CFG
    from softcfg.pipeline import Pipeline
    from softcfg.runs.folder import RunFolder
    from softcfg.runs.processes import Processes
    from softcfg.runs.shards import Shard
    from softcfg.runs.tracking import Tracker
    from softcfg.runs.worker import Artist, Progress

PER_LABEL = 8
PER_PROMPT = 4
WINDOW = 16  # of speculative Jacobi decoding
COMPARE_UP_TO = 100  # images
COMPARE_UP_TO_TOKENS = 1024
COMPARED_PER_LABEL = 4
GRID_IMAGES = 320
GRID_ROWS = 40
GRID_COLUMNS = 16  # where there are too many labels for a row each

DESCRIPTION = """\
Draw images into a folder: a few, or a run of any size by any number of processes.

The folder receives 000000.png, 000001.png, ... (image n shows the n-th label or prompt, taken in turn),
grid.png (one row a label or prompt), comparison.png (the same seeds without guidance, with CFG and with
SoftCFG), run.json (the settings) and shards/ (codes, labels and pixels, from which the rest is made).

The same command continues a run that was stopped; what is there is not drawn again. Started by torchrun
or 'accelerate launch', all processes share the work; see docs/cluster.md."""

EXAMPLES = """\
examples:
  softcfg sample fashion --labels all --output-dir out
  softcfg sample fashion --labels Sneaker,Bag --guidance-scale 6 --softcfg-strength 0   # plain CFG
  softcfg sample emoji --prompt "red apple" --prompt "cat face"
  softcfg sample lumina-mgpt-2 --prompts prompts.txt --images-per-prompt 2 --width 768 --height 768
  softcfg sample lumina-mgpt-2 --prompt "a lighthouse" --task depth --image photo.jpg --height 1024
  softcfg sample alitok-xl --labels 207,360 --guidance-scale 9 --guidance-scale-pow 1.5
  torchrun --nproc-per-node 8 -m softcfg sample alitok-xl --num-samples 50000 --npz --output-dir run
  softcfg sample config=configs/alitok_xl.yaml experiment.output_dir=out model.generator.guidance_scale=9"""


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers."""
    parser = commands.add_parser(
        "sample",
        help="draw images",
        usage="softcfg sample MODEL [options]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=arguments.HelpFormatter,
        allow_abbrev=False,
    )
    arguments.add_model_arguments(parser, required=False)
    group = parser.add_argument_group("what to draw")
    group.add_argument(
        "--labels",
        help="class ids, ranges or names taken in turn: 0,3,7 or 0-9 or all (default: all); @FILE with one a line; "
        "or random, from the seed",
    )
    arguments.add_prompt_arguments(group)
    group.add_argument("--images-per-prompt", type=int, metavar="N", help=f"default: {PER_PROMPT}, or 1 with --prompts")
    group.add_argument(
        "--task",
        help="a picture in two halves: an image above its depth, canny, hed or openpose map; or with --image depth, "
        "canny or subject, which say what that is",
    )
    group.add_argument("--image", metavar="FILE", help="the upper half, from which the lower one is drawn")
    group.add_argument("--num-samples", type=int, metavar="N", help=f"images in all (default: {PER_LABEL} a label)")
    group.add_argument("--batch-size", type=int, metavar="B", help="images drawn at once (default: at most 100)")
    group = parser.add_argument_group("results")
    group.add_argument("--output-dir", metavar="DIR", help="folder for the results (default: out)")
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="discard the run in that folder and begin anew",
    )
    group.add_argument("--png", action=argparse.BooleanOptionalAction, default=True, help="one file an image (default)")
    group.add_argument(
        "--npz",
        action=argparse.BooleanOptionalAction,
        help="all images in one file beside the folder, DIR.npz, for ADM's evaluation (default: with --config)",
    )
    group.add_argument(
        "--compare",
        action=argparse.BooleanOptionalAction,
        help=f"write comparison.png (default: for up to {COMPARE_UP_TO} images of up to {COMPARE_UP_TO_TOKENS} codes)",
    )
    group.add_argument("--track", choices=("tensorboard", "wandb"), help="report settings, throughput and a grid")
    arguments.add_guidance_arguments(parser)
    group = parser.add_argument_group("speed")
    group.add_argument(
        "--speculative-jacobi",
        nargs="?",
        type=int,
        const=WINDOW,
        default=0,
        metavar="WINDOW",
        help=f"draft WINDOW tokens (default: {WINDOW}) and verify them in one pass: fewer passes, other images of the "
        "same distribution",
    )
    released.add_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from softcfg.runs.processes import Processes

    with termination_raises():
        if released.is_used(args):
            released.apply(args)
        elif args.model is None:
            raise UserError("MODEL is missing: give a name that 'softcfg models' lists, or the path of a model folder")
        args.output_dir = args.output_dir or "out"
        for name in ("num_samples", "batch_size", "images_per_prompt"):
            value = getattr(args, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if args.speculative_jacobi < 0:
            raise UserError(f"--speculative-jacobi must be at least 1 (0: off), got {args.speculative_jacobi}")
        processes = Processes(args.device)
        try:
            draw(args, processes, _subjects, _png_writer, _finish)
        finally:
            processes.leave()
    return 0


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A run whose images are all there, some drawn just now, `images` in `seconds`."""

    run: RunFolder
    artist: Artist
    guidance: CFG
    images: int
    seconds: float
    tracker: Tracker | None


def draw(
    args: argparse.Namespace,
    processes: Processes,
    subjects: Callable[[argparse.Namespace, Pipeline], dict[str, Any]],
    writer: Callable[[argparse.Namespace, RunFolder], Callable[[Shard], None] | None],
    finish: Callable[[argparse.Namespace, Drawn], None],
) -> None:
    """Draw the run of the folder `args.output_dir`, from the start or from where it was left.

    Args:
        subjects: what is drawn and how often, as arguments of `run_settings`.
        writer: what to do with every shard that is written, off the main thread.
        finish: what to do in the end, in the first process.
    """
    from softcfg.runs.folder import RunFolder
    from softcfg.runs.lock import Lock, holder
    from softcfg.runs.plan import Prompts
    from softcfg.runs.worker import Artist, Progress, draw_shards

    folder = Path(args.output_dir)

    def refuse_if_busy() -> None:  # before anything is loaded
        if busy := holder(folder):
            raise UserError(f"{folder} is in use by {busy}; wait for it or end it first")

    processes.agree(refuse_if_busy)
    pipeline = arguments.load_pipeline(args, processes.device)
    guidance = arguments.guidance_from(args, pipeline)
    sampling = arguments.sampling_from(args, pipeline)
    locks: list[Lock] = []

    def claim() -> tuple[dict[str, Any], list[int]]:
        settings = _settings(args, pipeline, guidance, sampling, subjects(args, pipeline))
        if args.speculative_jacobi:
            settings["speculative_jacobi"] = args.speculative_jacobi
        locks.append(Lock(make_folder(folder)))
        run = RunFolder.claim(folder, settings, overwrite=args.overwrite)
        return run.settings, run.missing()

    settings, todo = processes.agree(claim)
    run = RunFolder(folder, settings)
    progress = None
    try:
        prompts = Prompts.of(run.settings)
        artist = Artist(pipeline, guidance, sampling, args.seed, run.plan.batch_size, args.speculative_jacobi, prompts)
        tracker = _tracker(args, run, processes)
        if processes.first:
            _announce(run, guidance, todo)
            progress = Progress(run, todo, tracker)
        draw_shards(run, todo, artist, processes, written=writer(args, run), progress=progress)
        if progress is not None:
            images = sum(len(run.plan.indices(number)) for number in todo)
            finish(args, Drawn(run, artist, guidance, images, progress.seconds, tracker))
    except UserError as error:
        raise UserError(f"{error}; {_how_to_continue(args, progress)}") from None
    except KeyboardInterrupt:
        if processes.first:
            print(f"\nsoftcfg: stopped; {_how_to_continue(args, progress)}", file=sys.stderr)
        raise
    finally:
        for lock in locks:
            lock.release()


def _png_writer(args: argparse.Namespace, run: RunFolder) -> Callable[[Shard], None] | None:
    from softcfg.runs.export import write_pngs

    return functools.partial(write_pngs, run, folder=run.path) if args.png else None


def _subjects(args: argparse.Namespace, pipeline: Pipeline) -> dict[str, Any]:
    """What is drawn and how often, as arguments of `run_settings`."""
    from softcfg.runs.plan import RANDOM, Prompts

    texts = arguments.parse_prompts(args, pipeline)
    if texts is not None:
        if args.images_per_prompt and args.num_samples:
            raise UserError("give --images-per-prompt or --num-samples, not both")
        prompts = Prompts(tuple(texts), *arguments.image_size(args, pipeline), args.task, args.image)
        prompts.check(pipeline)
        each = args.images_per_prompt or (PER_PROMPT if args.prompts is None else 1)
        return {
            "labels": range(len(texts)),
            "num_samples": args.num_samples or each * len(texts),
            "prompts": prompts,
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


def _settings(
    args: argparse.Namespace, pipeline: Pipeline, guidance: CFG, sampling: Sampling, subjects: dict[str, Any]
) -> dict[str, Any]:
    """The content of run.json."""
    from softcfg.runs.settings import run_settings

    return run_settings(
        args.model,
        pipeline,
        guidance,
        sampling,
        **subjects,
        batch_size=args.batch_size,
        seed=args.seed,
        dtype="/".join([str(pipeline.generator.dtype).removeprefix("torch."), *filter(None, [args.quantize])]),
        command=_command(args),
        generator_checkpoint=args.generator_checkpoint,
        tokenizer_checkpoint=args.tokenizer_checkpoint,
    )


def _command(args: argparse.Namespace) -> str:
    return shlex.join(["softcfg", *args.words])


def _tracker(args: argparse.Namespace, run: RunFolder, processes: Processes) -> Tracker | None:
    if args.track is None or not processes.first:
        return None
    from softcfg.runs.tracking import Tracker

    return Tracker(args.track, run.path, run.settings, cpu=str(processes.device) == "cpu")


def _announce(run: RunFolder, guidance: CFG, todo: Sequence[int]) -> None:
    count = run.plan.num_samples
    left = sum(len(run.plan.indices(number)) for number in todo)
    if left < count:
        print(f"{count - left} of {count} images are there already")
    environments = run.settings["environment"]
    if todo and left < count and len(environments) > 1:
        print("they were drawn in another environment (see run.json); bits may differ from those of one environment")
    from softcfg.guidance import describe

    settings = describe(guidance)
    method = settings.pop("method")
    shown = ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)
    print(f"{method}: {shown}" if guidance.is_active else "no guidance", flush=True)


def _how_to_continue(args: argparse.Namespace, progress: Progress | None) -> str:
    done = ""
    if progress is not None:
        with contextlib.suppress(UserError):  # the folder may be what went wrong
            done = f"{progress.look()} of {progress.total} images are done and kept; "
    return f"{done}continue with: {_command(args)}"


def _finish(args: argparse.Namespace, drawn: Drawn) -> None:
    """Make everything that is made from shards."""
    from softcfg.runs.export import export_npz, export_pngs, first_images, npz_beside

    run, artist, images, seconds = drawn.run, drawn.artist, drawn.images, drawn.seconds
    if args.png:
        export_pngs(run, run.path, absent_only=True)
    shown = list(first_images(run, GRID_IMAGES))
    names = _names(artist)
    picture = _grid(shown, names)
    _write_png(run.path / "grid.png", picture)
    print(f"{images} images in {seconds:.1f} s ({images / seconds:.2f} images/s) in {run.path}")
    count = run.plan.num_samples
    comparison = run.path / "comparison.png"
    drawn_fast = count <= COMPARE_UP_TO and len(run.require(0).tokens[0]) <= COMPARE_UP_TO_TOKENS
    wanted = drawn_fast if args.compare is None else args.compare
    if wanted and (images or not comparison.exists()):
        title = _write_comparison(comparison, artist, drawn.guidance, shown, names)
        print(f"the same seeds without guidance, with CFG and with {title}: {comparison}")
    if args.npz:
        path = npz_beside(run.path)
        shape = export_npz(run, path)
        print(f"{path}: arr_0 uint8 {list(shape)}")
    if drawn.tracker is not None:
        drawn.tracker.finish(count, images / seconds, picture)


def _write_png(path: Path, image: Image) -> None:
    from softcfg.images import png_bytes

    write_atomically(path, png_bytes(image))


def _names(artist: Artist) -> Sequence[str]:
    """What labels stand for, short enough for the title of a row."""
    if artist.prompts is None:
        return artist.pipeline.classes or [str(label) for label in range(artist.pipeline.generator.num_classes)]
    return [arguments.short(text) for text in artist.prompts.texts]


def _grid(shown: Sequence[tuple[int, Any]], names: Sequence[str] = (), title: str = "") -> Image:
    """One row a label, in the order of their first images; plain rows where there are too many labels."""
    from PIL import Image

    from softcfg.images import grid

    rows: dict[Any, list[Any]] = {}
    for label, pixels in shown:
        rows.setdefault(label, []).append(Image.fromarray(pixels))
    if len(rows) > GRID_ROWS:
        images = [image for row in rows.values() for image in row]
        return grid([images[i : i + GRID_COLUMNS] for i in range(0, len(images), GRID_COLUMNS)], title=title)
    return grid(list(rows.values()), row_labels=[names[label] for label in rows] if names else (), title=title)


def _write_comparison(
    path: Path, artist: Artist, guidance: CFG, shown: Sequence[tuple[int, Any]], names: Sequence[str]
) -> str:
    """Three panels with the same seeds; the panel of the run's own method reuses its images.

    The third is of the run's method, or of SoftCFG where that is plain CFG. Returns its title.
    """
    from softcfg.guidance import CFG, SoftCFG, settings_of
    from softcfg.images import side_by_side

    shown = shown[: COMPARED_PER_LABEL * len({label for label, _ in shown})]
    labels = [label for label, _ in shown]
    plain = guidance.plain()
    third = guidance
    if guidance.is_plain:
        third = SoftCFG.paper(**{name: getattr(plain, name) for name in settings_of(CFG)})
    methods = {
        "no guidance": CFG(guidance_scale=0),
        f"CFG, scale {guidance.guidance_scale:g}": plain,
        f"{third.title}, scale {guidance.guidance_scale:g}": third,
    }
    panels: list[Image] = []
    for title, method in methods.items():
        images = list(shown)
        if method != guidance:
            other = copy.copy(artist)
            other.guidance, other.at_once = method, min(artist.at_once, len(shown))
            images = list(zip(labels, other.draw(range(len(shown)), labels).pixels, strict=True))
        panels.append(_grid(images, () if panels else names, title))
    _write_png(path, side_by_side(panels))
    return third.title
