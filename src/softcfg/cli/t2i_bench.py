"""`softcfg t2i-bench`: draw the prompts of a text-to-image benchmark for its own scorer."""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softcfg.cli import arguments, drawing
from softcfg.errors import UserError, clean
from softcfg.files import is_same_file, make_folder, refuse_foreign, remove_temporary
from softcfg.runs.suites import IMAGES_PER_PROMPT, SUITES

if TYPE_CHECKING:
    from softcfg.pipeline import Pipeline
    from softcfg.runs.folder import RunFolder
    from softcfg.runs.job import DrawnRun

SHOWN = 3  # names of files that are not of the run

HELP = "draw the prompts of DPG-Bench or GenEval for their scorers"
USAGE = "softcfg t2i-bench MODEL --suite SUITE --prompts PATH [options]"
DESCRIPTION = """\
Draw four images for every prompt of a benchmark, laid out as its own scorer expects.

  dpg      DPG-Bench: PROMPTS holds a text file per prompt; DIR receives a
           picture of 2 x 2 images for each, under the name of the text file
  geneval  GenEval: PROMPTS holds evaluation_metadata.jsonl; DIR receives
           00000/metadata.jsonl and 00000/samples/0000.png ... 0003.png for its
           first line, and so on

DIR holds nothing else. The run itself, its settings and all images, is in the folder DIR.run beside it.
The same command, without --overwrite, continues a run that was stopped, and can be shared by many processes, as
'softcfg sample'."""

EXAMPLES = """\
examples:
  softcfg t2i-bench lumina-mgpt-2 --suite dpg --prompts ELLA/dpg_bench/prompts --output-dir dpg
  softcfg t2i-bench lumina-mgpt-2 --suite geneval --prompts geneval/prompts --output-dir geneval"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    arguments.add_model_arguments(parser)
    group = parser.add_argument_group("what to draw")
    group.add_argument("--suite", choices=SUITES, required=True, help="the benchmark")
    group.add_argument("--prompts", metavar="PROMPTS", required=True, help="folder of its prompts")
    arguments.add_negative_argument(group)
    arguments.add_size_arguments(group)
    group.add_argument(
        "--batch-size",
        type=int,
        default=IMAGES_PER_PROMPT,
        metavar="B",
        help=f"images drawn at once, a multiple of {IMAGES_PER_PROMPT} (default: {IMAGES_PER_PROMPT})",
    )
    group = parser.add_argument_group("results")
    group.add_argument("--output-dir", metavar="DIR", required=True, help="folder for the pictures")
    group.add_argument("--overwrite", action="store_true", help="discard the run in DIR.run and begin anew, each time")
    arguments.add_guidance_arguments(parser)
    arguments.add_speed_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from softcfg.runs.folder import SETTINGS
    from softcfg.runs.plan import Prompts
    from softcfg.runs.processes import Processes

    suite = SUITES[args.suite](args.prompts)
    if args.batch_size < 1 or args.batch_size % IMAGES_PER_PROMPT:
        raise UserError(
            f"--batch-size must be a multiple of {IMAGES_PER_PROMPT}, the images of a prompt, got {args.batch_size}"
        )
    pictures = Path(args.output_dir).absolute()
    if pictures.name in ("", ".."):
        pictures = pictures.resolve()
    if not pictures.name:
        raise UserError(f"--output-dir {pictures} has no name for a folder of the run beside it; give another")

    run_folder = pictures.with_name(f"{pictures.name}.run")
    if is_same_file(pictures, args.prompts):
        raise UserError(f"--output-dir {args.output_dir} is the folder of the prompts; give another")

    def subjects(pipeline: Pipeline) -> dict[str, Any]:
        if not pipeline.conditioning.takes_prompts:
            raise UserError(f"{pipeline.name} draws classes, not texts; t2i-bench is for text-to-image models")
        width, height = arguments.image_size(args, pipeline)
        if args.suite == "dpg" and width != height:
            raise UserError(f"the scorer of DPG-Bench takes square images, got {width} x {height}")
        if not args.overwrite:
            files = (path for number in range(len(suite.prompts)) for path in suite.files(pictures, number))
            refuse_foreign(pictures, run_folder / SETTINGS, (path.relative_to(pictures) for path in files))
        return {
            "labels": [number for number in range(len(suite.prompts)) for _ in range(IMAGES_PER_PROMPT)],
            "prompts": Prompts(tuple(suite.prompts), width, height, negative_text=args.negative_prompt),
            "speculative_jacobi": args.speculative_jacobi,
        }

    def start(run: RunFolder) -> None:
        make_folder(pictures)
        if processes.first:
            files = (path for number in range(len(suite.prompts)) for path in suite.files(pictures, number))
            for folder in {path.parent for path in files}:
                remove_temporary(folder)

    def finish(drawn: DrawnRun) -> None:
        suite.write_missing(pictures, drawn.run)
        if strangers := suite.strangers(pictures):
            shown = ", ".join([*strangers[:SHOWN], *(["..."] if len(strangers) > SHOWN else [])])
            said = clean(f"{pictures} also holds {shown}, which this run did not draw: remove it")
            print(f"softcfg: {said}", file=sys.stderr)
        done = f"{drawing.counted(drawn.images, 'image')} in {drawn.seconds:.1f} s"
        print(f"{done}; all of {drawing.counted(len(suite.prompts), 'prompt')} are in {pictures}")
        print(f"score them with: {suite.scorer.format(folder=pictures, size=drawn.run.settings['width'])}")

    with Processes(args.device) as processes:
        drawing.draw(
            args,
            processes,
            run_folder,
            subjects,
            on_start=start,
            on_shard=functools.partial(suite.write_shard, pictures),
            on_finish=finish,
        )
    return 0
