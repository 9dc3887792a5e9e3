"""`softcfg runs`: look at, check and export the folder of a run."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softcfg.cli import arguments, drawing
from softcfg.errors import UserError, clean

if TYPE_CHECKING:
    from softcfg.runs.folder import RunFolder

HELP = "look at, check and export the folder of a run"
DESCRIPTION = """\
Look at, check and export the folder that 'softcfg sample' filled.

status says how far a run is; verify reads every shard and checks it; export makes the .npz of ADM's
evaluation and PNG files from the shards, in the memory of one shard."""

EXAMPLES = """\
examples:
  softcfg runs status run
  softcfg runs status run --json
  softcfg runs verify run --discard
  softcfg runs export run --npz samples.npz --png images"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the three subcommands."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)

    def add(name: str, function: Any, text: str) -> argparse.ArgumentParser:
        action = actions.add_parser(
            name, help=text, description=text, formatter_class=arguments.HelpFormatter, allow_abbrev=False
        )
        action.add_argument("folder", metavar="DIR", help="folder of the run")
        action.set_defaults(run=function)
        return action

    status_parser = add("status", status, "say how far a run is, and who works on it")
    status_parser.add_argument("--json", action="store_true", help="print JSON")
    verify_parser = add("verify", verify, "read every shard and check it; exit code 1 if one is missing or damaged")
    verify_parser.add_argument(
        "--discard", action="store_true", help="remove damaged shards and their PNG files, to have them drawn again"
    )
    export_parser = add("export", export, "make files from the shards (default: DIR.npz)")
    export_parser.add_argument("--npz", metavar="FILE", help="all images as arr_0, uint8 [N, H, W, 3]")
    export_parser.add_argument("--png", metavar="FOLDER", help="one file per image: 000000.png, ...")


def status(args: argparse.Namespace) -> int:
    """Say how far a run is; only headers of shards are read."""
    from softcfg.runs.folder import RunFolder
    from softcfg.runs.lock import holder

    run = RunFolder.open(args.folder)
    run.require_own_shards()
    missing = run.missing()
    total = run.plan.num_samples
    left = sum(len(run.plan.indices(number)) for number in missing)
    settings, busy = run.settings, holder(run.path)
    if args.json:
        facts = {
            "folder": str(run.path),
            "finished": not left,
            "images": {"done": total - left, "total": total},
            "shards": {"done": run.plan.num_shards - len(missing), "total": run.plan.num_shards},
            "at_work": busy or None,
            "settings": settings,
        }
        print(json.dumps(facts, indent=2))
        return 0
    print(f"{run.path}: {total - left} of {total} images, {run.plan.num_shards - len(missing)} of {_shards(run)}")
    print(clean(f"{settings.get('model')}, {_guidance(settings.get('guidance', {}))}"))
    print(clean(f"{_sentence(settings.get('sampling', {}))}, seed {settings['seed']}, {settings.get('dtype')}"))
    print(f"at work: {busy}" if busy else "at work: nobody")
    if not left:
        print("the run is finished")
    elif not busy:
        print(clean(f"continue with: {_command(run)}"))
    return 0


def verify(args: argparse.Namespace) -> int:
    """Check every shard; 0 if all is there and sound, 1 if not."""
    from softcfg.images import is_picture
    from softcfg.runs.export import altered_pngs
    from softcfg.runs.folder import PICTURES, RunFolder
    from softcfg.runs.lock import Lock
    from softcfg.runs.shards import DamagedShardError

    run = RunFolder.open(args.folder)
    run.require_own_shards()
    lock = Lock(run.path) if args.discard else None
    missing = damaged = smaller = altered = 0
    try:
        for number, found in run.verify():
            if not isinstance(found, DamagedShardError):
                smaller += found.drawn_at_once != run.plan.batch_size
                names = altered_pngs(found, run.path)
                altered += len(names)
                for name in names:
                    print(f"{run.path / name} does not show the image in its shard")
            elif not os.path.lexists(run.shard_path(number)):
                missing += 1
            else:
                damaged += 1
                print(found)
                if args.discard:
                    run.discard(number)
    finally:
        if lock:
            lock.release()
    for name in PICTURES:
        if os.path.lexists(run.path / name) and not is_picture(run.path / name):
            altered += 1
            print(f"{run.path / name} cannot be read as an image")
    sound = run.plan.num_shards - missing - damaged
    print(f"{run.path}: {sound} of {_shards(run)} sound, {damaged} damaged, {missing} missing")
    if smaller:
        print(f"{smaller} shards were drawn with fewer images at once than the batch size, for want of memory")
    if altered:
        print(f"{altered} PNG files are damaged; the command that drew the run writes them anew")
    if damaged and not args.discard:
        print(f"remove the damaged shards with: softcfg runs verify {run.path} --discard")
    elif damaged or missing or altered:
        print(clean(f"draw what is missing with: {_command(run)}"))
    return 1 if damaged or missing or altered else 0


def export(args: argparse.Namespace) -> int:
    """Make the files that were asked for."""
    from softcfg.runs.export import export_npz, export_pngs, npz_beside
    from softcfg.runs.folder import RunFolder

    run = RunFolder.open(args.folder)
    if args.npz or not args.png:
        path = Path(args.npz) if args.npz else npz_beside(run.path)
        if path.suffix != ".npz":
            raise UserError(f"--npz {path} must end in .npz")
        print(f"{path}: arr_0 uint8 {list(export_npz(run, path))}")
    if args.png:
        export_pngs(run, Path(args.png))
        print(f"{args.png}: {drawing.counted(run.plan.num_samples, 'PNG file')}")
    return 0


def _command(run: RunFolder) -> str:
    command: str = run.settings.get("command") or "the same call of softcfg.draw_run"
    try:
        words = shlex.split(command)
    except ValueError:  # of another program, or altered
        return command
    kept = drawing.without_overwrite(words)  # with which older runs keep it
    return command if kept == words else shlex.join(kept)


def _shards(run: RunFolder) -> str:
    return f"{drawing.counted(run.plan.num_shards, 'shard')} of {drawing.counted(run.plan.batch_size, 'image')}"


def _guidance(settings: dict[str, Any]) -> str:
    """What the run says when it is drawn; of settings that nothing here knows, such as a plugin's, their names."""
    from softcfg.guidance import restore

    try:
        return drawing.guidance_sentence(restore(settings))
    except ValueError:
        return _sentence(settings)


def _sentence(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)
