"""`softcfg compare`: the same seeds under several guidance methods and scales."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from softcfg.cli import arguments, drawing, sample
from softcfg.errors import UserError, how_to_install

if TYPE_CHECKING:
    from softcfg.comparison import Entry
    from softcfg.runs.processes import Processes

METHODS = "none,cfg,softcfg"

HELP = "the same seeds under several guidance methods"
USAGE = "softcfg compare MODEL --methods LIST [--scales LIST] [options]"
DESCRIPTION = """\
Draw the same seeds under several guidance methods and scales, and measure them.

A method is 'none' (the conditional branch alone), a rule, a perturbation, PERTURBATION+RULE such as softcfg+apg,
or the preset 'released'; docs/guidance.md lists them. Flags fix the other settings, such as --apg-eta 0.2; each
method takes those of its own parts.

The folder receives runs/ (a run folder for each method, scale and seed), grid.png (the first images, a row each),
comparison.json and table.md (the metrics, mean and standard error over the seeds), recall.png and front.png (FID
against recall and Inception Score). The same command continues a comparison that was stopped, also with more
methods, scales and seeds. Started by torchrun or 'accelerate launch', all processes share the work."""

EXAMPLES = """\
examples:
  softcfg compare emoji --methods none,cfg,softcfg,apg --extractor emoji
  softcfg compare fashion-small --methods none,cfg,softcfg,apg,pag --num-samples 20
  softcfg compare fashion --methods cfg,softcfg,apg,softcfg+apg --scales 2,4,8 --num-samples 5000 --seeds 0,1,2 \\
      --reference test-images --extractor fashion"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    arguments.add_model_arguments(parser)
    group = parser.add_argument_group("what to compare")
    group.add_argument("--methods", default=METHODS, metavar="LIST", help=f"see above (default: {METHODS})")
    group.add_argument("--scales", metavar="LIST", help="guidance scales, such as 2,4,8 (default: the model's own)")
    group.add_argument("--seeds", metavar="LIST", help="a run of each (default: the --seed, or 0)")
    sample.add_subject_arguments(parser)
    group = parser.add_argument_group("metrics")
    group.add_argument("--reference", metavar="PATH", help="images or statistics, as of 'softcfg eval'")
    note = "default: inception with --reference, else nothing is measured"
    arguments.add_extractor_arguments(group, None, note)
    group = parser.add_argument_group("results")
    arguments.add_output_size_argument(group)
    group.add_argument("--output-dir", default="comparison", metavar="DIR", help="folder for the results")
    arguments.add_guidance_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from softcfg.runs.processes import Processes

    with Processes(args.device) as processes:
        _run(args, processes)
    return 0


def _run(args: argparse.Namespace, processes: Processes) -> None:
    from pathlib import Path

    from softcfg.comparison import FIGURES, RESULTS, compare, entries, table, write_plots
    from softcfg.evaluation import load_extractor
    from softcfg.evaluation.features import cache_folder
    from softcfg.runs.job import RunRequest
    from softcfg.runs.progress import ProgressBar

    if args.preset is not None:
        raise UserError("--preset: name the method 'released' in --methods")
    settings = arguments.guidance_settings(args)
    if given := [name for name in ("rule", "perturbation", "guidance_scale") if name in settings]:
        other = "--scales" if given[0] == "guidance_scale" else "--methods"
        raise UserError(f"--{given[0].replace('_', '-')}: a comparison takes these from {other}")
    scales, seeds = _numbers("--scales", args.scales, float), _numbers("--seeds", args.seeds, int)
    sample.check_counts(args)
    arguments.refuse_own_inputs(args, args.output_dir, (*RESULTS, *FIGURES))
    pipeline = arguments.load_pipeline(args, processes.device)
    sampling = arguments.sampling_from(args, pipeline)
    chosen = entries(pipeline, [name.strip() for name in args.methods.split(",")], scales, settings)
    extractor = None
    if args.reference is not None or args.extractor is not None:
        name = args.extractor or "inception"
        extractor = load_extractor(name, args.extractor_weights, pipeline.generator.device)
    request = RunRequest(
        pipeline,
        **sample.subjects(args, pipeline),
        sampling=sampling,
        batch_size=args.batch_size,
        command=drawing.command_of(args),
    )

    def tell(entry: Entry) -> None:
        print(table([entry]).splitlines()[-1] if entry.metrics else entry.title, flush=True)

    folder = Path(args.output_dir)
    compare(
        request,
        chosen,
        folder,
        seeds=seeds or [args.seed],
        reference=args.reference,
        extractor=extractor,
        cache=args.cache_dir or cache_folder(),
        processes=processes,
        on_progress=ProgressBar("drawing", keep=False) if sys.stderr.isatty() else None,
        on_entry=tell,
    )
    if processes.first:
        if extractor is not None:
            print(f"\n{table(chosen)}", end="")
        try:
            write_plots(folder, chosen)
        except ModuleNotFoundError as error:
            print(f"no figures: they need {error.name}: {how_to_install('plot')}")
        print(f"{folder}: grid.png, table.md, comparison.json")


def _numbers(flag: str, text: str | None, kind: type) -> list[Any]:
    try:
        return [kind(word) for word in text.split(",")] if text is not None else []
    except ValueError:
        raise UserError(f"{flag} must be numbers separated by commas, got {text!r}") from None
