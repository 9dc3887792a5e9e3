"""`softcfg decode`: make pixels from the tokens of a run again."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import TYPE_CHECKING

from softcfg.cli import arguments, drawing

if TYPE_CHECKING:
    from softcfg.runs.folder import RunFolder

HELP = "make pixels from the tokens of a run again"
DESCRIPTION = """\
Decode the tokens of a run again, for example with another tokenizer, into the folder of a new run.

Nothing is drawn: the new run has the same tokens and labels, and other pixels. Like 'softcfg sample' it can
be stopped and continued (without --overwrite), and shared by many processes."""

EXAMPLES = """\
examples:
  softcfg decode run --tokenizer-checkpoint finetuned.safetensors --output-dir run-finetuned --npz
  softcfg decode run --image-size-eval 256 --output-dir run-256 --npz"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("folder", metavar="DIR", help="folder of the run whose tokens are decoded")
    parser.add_argument("--output-dir", required=True, metavar="NEW", help="folder of the new run")
    parser.add_argument("--tokenizer", metavar="MODEL", help="the model whose tokenizer decodes (default: the run's)")
    parser.add_argument("--tokenizer-checkpoint", metavar="FILE", help="its weights, instead of the model's own")
    arguments.add_tokenizer_dtype_argument(parser)
    arguments.add_output_size_argument(parser, "resize images to SIZE x SIZE pixels (default: as in the run)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument(
        "--png", action=argparse.BooleanOptionalAction, default=True, help="one file per image (default)"
    )
    parser.add_argument("--npz", action=argparse.BooleanOptionalAction, help="all images in one file, NEW.npz")
    parser.add_argument("--overwrite", action="store_true", help="discard the run in NEW and begin anew, each time")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from softcfg.runs.export import export_npz, export_pngs, npz_beside, write_pngs
    from softcfg.runs.folder import RunFolder
    from softcfg.runs.job import decode_run
    from softcfg.runs.processes import Processes
    from softcfg.runs.progress import ProgressBar

    folder = Path(args.output_dir)

    def finish(run: RunFolder) -> None:
        if args.png:
            export_pngs(run, folder, absent_only=True)
        print(f"{drawing.counted(run.plan.num_samples, 'image')} decoded in {folder}")
        if args.npz:
            path = npz_beside(folder)
            print(f"{path}: arr_0 uint8 {list(export_npz(run, path))}")

    with Processes(args.device) as processes:
        arguments.parse_device(args.device)
        arguments.refuse_inputs_in_run(args, folder)
        decode_run(
            RunFolder.open(args.folder),
            folder,
            model=args.tokenizer,
            tokenizer_checkpoint=args.tokenizer_checkpoint,
            tokenizer_dtype=args.tokenizer_dtype,
            image_size_eval=args.image_size_eval,
            processes=processes,
            overwrite=args.overwrite,
            advice=drawing.ADVICE,
            command=drawing.command_of(args),
            on_shard=functools.partial(write_pngs, folder=folder) if args.png else None,
            on_progress=ProgressBar(),
            on_finish=finish,
        )
    return 0
