"""Draw a run from the command line, with messages at the start, on the way and at the end."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softcfg.cli import arguments
from softcfg.errors import UserError

if TYPE_CHECKING:
    from softcfg.guidance import CFG
    from softcfg.pipeline import Pipeline
    from softcfg.runs.folder import RunFolder
    from softcfg.runs.job import DrawnRun
    from softcfg.runs.processes import Processes
    from softcfg.runs.progress import Progress
    from softcfg.runs.shards import Shard

ADVICE = "give another --output-dir, or --overwrite to replace it"  # of a folder with another run


def counted(number: int, what: str) -> str:
    """A number of things in words, such as "1 image" and "2 images"."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def command_of(args: argparse.Namespace) -> str:
    """The command line that continues what this one draws, as it is written into run.json."""
    return shlex.join(["softcfg", *without_overwrite(args.words)])


def without_overwrite(words: Sequence[str]) -> list[str]:
    """The words of a command without the flag by which it would begin anew each time."""
    return [word for word in words if word != "--overwrite"]


def draw(
    args: argparse.Namespace,
    processes: Processes,
    folder: Path,
    what: Callable[[Pipeline], dict[str, Any]],
    *,
    on_shard: Callable[[Shard], None] | None,
    on_finish: Callable[[DrawnRun], None],
    on_start: Callable[[RunFolder], object] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> None:
    """Draw the run in `folder` with the model, guidance and sampling of the arguments.

    Args:
        what: the other fields of the `RunRequest`, of the loaded model; called in the first process.
        on_start: called in every process with the run.
        on_shard, on_progress, on_finish: see `draw_run`.

    Raises:
        UserError: as `draw_run`; once the run has begun, with the command that continues it.
    """
    from softcfg.runs.folder import SHARDS
    from softcfg.runs.job import RunRequest, draw_run, refuse_if_busy
    from softcfg.runs.progress import ProgressBar

    arguments.refuse_inputs_in_run(args, folder)
    refuse_if_busy(folder, processes)  # before anything is loaded
    pipeline = arguments.load_pipeline(args, processes.device)
    guidance = arguments.guidance_from(args, pipeline)
    sampling = arguments.sampling_from(args, pipeline)
    request = RunRequest(
        pipeline,
        guidance=guidance,
        sampling=sampling,
        batch_size=args.batch_size,
        seed=args.seed,
        command=command_of(args),
        **processes.agree(lambda: what(pipeline)),
    )
    begun = False
    latest: Progress | None = None
    bar = ProgressBar()

    def start(run: RunFolder, todo: Sequence[int]) -> None:
        nonlocal begun
        begun = True
        if on_start is not None:
            on_start(run)
        if processes.first:
            _announce(run, guidance, todo)

    def report(progress: Progress) -> None:
        nonlocal latest
        latest = progress
        bar(progress)
        if on_progress is not None:
            on_progress(progress)

    def how_to_continue() -> str:
        done = ""
        if latest is not None and (folder / SHARDS).is_dir():  # the folder may be what went wrong
            done = f"{latest.done} of {latest.total} images are done and kept; "
        return f"{done}continue with: {request.command}"

    try:
        draw_run(
            request,
            folder,
            processes=processes,
            overwrite=args.overwrite,
            advice=ADVICE,
            on_start=start,
            on_shard=on_shard,
            on_progress=report,
            on_finish=on_finish,
        )
    except UserError as error:
        if not begun:
            raise
        raise UserError(f"{error}; {how_to_continue()}") from None
    except KeyboardInterrupt:
        if begun and processes.first:
            print(f"\nsoftcfg: stopped; {how_to_continue()}", file=sys.stderr)
        raise


def _announce(run: RunFolder, guidance: CFG, todo: Sequence[int]) -> None:
    count = run.plan.num_samples
    left = sum(len(run.plan.indices(number)) for number in todo)
    if not todo:
        print(f"the run is finished: all of its {count} images are there")
    elif left < count:
        print(f"{count - left} of {count} images are there already")
    environments = run.settings["environment"]
    if todo and left < count and len(environments) > 1:
        print("they were drawn in another environment (see run.json); bits may differ from those of one environment")
    print(guidance_sentence(guidance), flush=True)


def guidance_sentence(guidance: CFG) -> str:
    """Method and settings in words: of what acts, so that SoftCFG of strength 0 is CFG."""
    from softcfg.guidance import describe

    if not guidance.is_active and not guidance.perturbs:
        return "no guidance"
    settings = describe(guidance.plain() if guidance.is_plain else guidance)
    method = settings.pop("method")
    return f"{method}: " + ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)
