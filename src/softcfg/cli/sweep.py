"""`softcfg sweep`: search for the settings with the best metric."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from softcfg.cli import arguments
from softcfg.errors import UserError, how_to_install, needing, require_whole

if TYPE_CHECKING:
    from softcfg.runs.processes import Processes
    from softcfg.tuning import Row, Sweep

SHOWN = 10  # rows of the last table

HELP = "search for the settings with the best metric"
USAGE = "softcfg sweep MODEL --search NAME=VALUES ... [options]"
DESCRIPTION = """\
Search for the settings of guidance and sampling that give the best metric, with Optuna.

  --search NAME=LOW:HIGH        all numbers between    guidance_scale=2:16
  --search NAME=LOW:HIGH:STEP   in steps               guidance_scale=2:8:0.5
  --search NAME=LOW:HIGH:log    uniform in logarithm   temperature=0.5:2:log
  --search NAME=A,B,...         one of these           confidence=max,entropy

NAME is a flag of 'softcfg sample' (without --), a field of SoftCFG or Sampling, or preset. Flags fix the other
settings. Settings of a rule or perturbation are for the trials that have it. Every trial is a run folder,
DIR/trials/0000 and so on, of the same seed; results.csv and results.json hold its settings, its metrics and the
command that draws it again; settings.png and front.png show them.

The same command continues a sweep that was stopped or killed. Several processes, also on several machines, share
one sweep: start the same command in each, with one --storage. See docs/tuning.md."""

EXAMPLES = """\
examples:
  softcfg sweep fashion --search guidance_scale=1:8 --search guidance_scale_pow=0.25:3 --reference test-images \\
      --extractor fashion --num-samples 1000 --trials 40 --early-stop 0.5
  softcfg sweep fashion --search softcfg_strength=0,1 --search guidance_scale=1.5:4:0.5 --sampler grid \\
      --objective class_accuracy --extractor fashion
  softcfg sweep alitok-xl --search guidance_scale=4:20 --search guidance_scale_pow=1:3 --num-samples 5000 \\
      --reference VIRTUAL_imagenet256_labeled.npz --storage postgresql://user@host/sweeps --device cuda:1"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    arguments.add_model_arguments(parser)
    group = parser.add_argument_group("search")
    group.add_argument(
        "--search", action="append", required=True, metavar="NAME=VALUES", help="a setting and where to search it"
    )
    group.add_argument(
        "--sampler",
        choices=("tpe", "random", "grid"),
        default="tpe",
        help="tpe learns from the trials so far (default); grid takes every combination in turn",
    )
    group.add_argument(
        "--sampler-seed", type=int, default=0, metavar="S", help="another seed proposes other settings (default: 0)"
    )
    group.add_argument(
        "--trials", type=int, metavar="N", help="in all, of all processes and starts (default: 50; grid: all of it)"
    )
    group.add_argument(
        "--early-stop",
        type=float,
        metavar="SHARE",
        help="stop a trial at an eighth, a quarter or half of its samples, unless it is among the best SHARE of the "
        "trials that came as far (try 0.5; default: stop none)",
    )
    group.add_argument("--rungs", metavar="LIST", help="numbers of samples at which to look instead, such as 500,2000")
    group = parser.add_argument_group("metric")
    group.add_argument("--objective", default="fid", metavar="METRIC", help="the metric to improve (default: fid)")
    group.add_argument("--metrics", metavar="LIST", help="what to measure besides (default: all that can be)")
    group.add_argument("--reference", metavar="PATH", help="images or statistics, as of 'softcfg eval'")
    arguments.add_extractor_arguments(group)
    group = parser.add_argument_group("what to draw")
    group.add_argument("--num-samples", type=int, default=1000, metavar="N", help="images of a trial (default: 1000)")
    group.add_argument("--batch-size", type=int, metavar="B", help="images drawn at once (default: at most 100)")
    group.add_argument("--labels", default="all", help="as of 'softcfg sample' (default: all, in turn)")
    arguments.add_output_size_argument(group)
    group = parser.add_argument_group("where")
    group.add_argument("--output-dir", default="sweep", metavar="DIR", help="folder of the sweep (default: sweep)")
    group.add_argument(
        "--storage",
        metavar="URL",
        help="of Optuna, to share the sweep between machines (default: an SQLite file in the folder)",
    )
    group.add_argument("--study", metavar="NAME", help="of the sweep in the storage (default: that of the folder)")
    group.add_argument(
        "--discard-images", action="store_true", help="remove the images of a trial when it has been measured"
    )
    arguments.add_guidance_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    with needing("sweeps need optuna", "tune"):
        import optuna  # noqa: F401
    from softcfg.runs.processes import Processes

    with Processes(args.device) as processes:
        try:
            return _run(args, processes)
        except KeyboardInterrupt:
            if processes.first:
                print("softcfg: stopped; the same command continues the sweep", file=sys.stderr)
            raise


def _run(args: argparse.Namespace, processes: Processes) -> int:
    from softcfg.tuning import write_results
    from softcfg.tuning.report import Table

    if args.trials is not None:  # before the study is made
        require_whole(args.trials, "the number of trials", 1)
    sweep = _sweep(args, processes)
    table = Table(sweep)
    if processes.first:
        print(f"{sweep.objective} of {sweep.config.num_samples} samples, {sweep.config.sampler}, in {sweep.folder}")
        print(table.header, flush=True)

    def show(row: Row) -> None:
        if processes.first:
            print(table.line(row, remark=True), flush=True)
            write_results(sweep)

    sweep.run(args.trials, on_trial=show, progress=processes.first and sys.stderr.isatty())
    if processes.first:
        _finish(sweep, table)
    return 0


def _sweep(args: argparse.Namespace, processes: Processes) -> Sweep:
    from softcfg.evaluation import load_extractor
    from softcfg.evaluation.features import cache_folder
    from softcfg.runs.plan import RANDOM
    from softcfg.tuning import Sweep, SweepConfig, parse_search
    from softcfg.tuning.sweep import DATABASE, FIGURES, RESULTS

    arguments.refuse_own_inputs(args, args.output_dir, (*RESULTS, *FIGURES, DATABASE))
    search = parse_search(args.search)
    try:
        rungs = None if args.rungs is None else [int(rung) for rung in args.rungs.split(",")]
    except ValueError:
        raise UserError(f"--rungs must be numbers of samples such as 500,2000, got {args.rungs!r}") from None
    for name in ("quantize", "kv_cache_dtype", "tokenizer_dtype"):
        if getattr(args, name):
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} is not for sweeps: their trials are drawn in full precision")
    pipeline = arguments.load_pipeline(args, processes.device)
    labels: list[int] | str | None = None
    if args.labels.strip().lower() == RANDOM:
        labels = RANDOM
    elif args.labels.strip().lower() != "all":
        labels = arguments.parse_labels(args.labels, pipeline)
    fixed = {**arguments.guidance_settings(args), **arguments.sampling_settings(args)}
    if args.preset is not None:
        fixed["preset"] = args.preset
    config = SweepConfig(
        pipeline,
        search,
        fixed=fixed,
        objective=args.objective.replace("-", "_"),
        metrics=arguments.parse_metrics(args.metrics),
        reference=args.reference,
        extractor=load_extractor(args.extractor, args.extractor_weights, pipeline.generator.device),
        num_samples=args.num_samples,
        batch_size=args.batch_size,
        labels=labels,
        seed=args.seed or 0,
        sampler=args.sampler,
        sampler_seed=args.sampler_seed,
        early_stop=args.early_stop,
        rungs=rungs,
        discard_images=args.discard_images,
        cache=args.cache_dir or cache_folder(),
    )
    return Sweep.open(args.output_dir, config, storage=args.storage, study=args.study)


def _finish(sweep: Sweep, table: Any) -> None:
    """The best trials, and the files."""
    from softcfg.tuning import write_results
    from softcfg.tuning.report import write_plots

    rows = sweep.ranked()
    print(f"\nthe best of {len(sweep.rows())} trials\n{table.header}")
    for row in rows[:SHOWN]:
        print(table.line(row))
    print("\n".join(("", *(row.command for row in rows[:1]), "")))
    paths = write_results(sweep)
    try:
        paths += write_plots(sweep)
    except ModuleNotFoundError as error:
        print(f"no figures: they need {error.name}: {how_to_install('plot')}")
    print("\n".join(map(str, paths)))
