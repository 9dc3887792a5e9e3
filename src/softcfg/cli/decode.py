"""`softcfg decode`: make pixels from the tokens of a run again."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softcfg.cli import arguments
from softcfg.errors import UserError
from softcfg.runs.signals import termination_raises

if TYPE_CHECKING:
    from softcfg.runs.folder import RunFolder
    from softcfg.runs.processes import Processes
    from softcfg.runs.shards import Shard
    from softcfg.tokenizers.base import Tokenizer

DESCRIPTION = """\
Decode the tokens of a run again, for example with another tokenizer, into the folder of a new run.

Nothing is drawn: the new run has the same tokens and labels, and other pixels. Like 'softcfg sample' it can
be stopped and continued, and shared by many processes."""

EXAMPLES = """\
examples:
  softcfg decode run --tokenizer-checkpoint finetuned.safetensors --output-dir run-finetuned --npz"""


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers."""
    parser = commands.add_parser(
        "decode",
        help="make pixels from the tokens of a run again",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=arguments.HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="DIR", help="folder of the run whose tokens are decoded")
    parser.add_argument("--output-dir", required=True, metavar="NEW", help="folder of the new run")
    parser.add_argument("--tokenizer", metavar="MODEL", help="the model whose tokenizer decodes (default: the run's)")
    parser.add_argument("--tokenizer-checkpoint", metavar="FILE", help="its weights, instead of the model's own")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument(
        "--png", action=argparse.BooleanOptionalAction, default=True, help="one file an image (default)"
    )
    parser.add_argument("--npz", action=argparse.BooleanOptionalAction, help="all images in one file, NEW.npz")
    parser.add_argument("--overwrite", action="store_true", help="discard the run in NEW and begin anew")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from softcfg.runs.processes import Processes

    with termination_raises():
        processes = Processes(args.device)
        try:
            return _run(args, processes)
        finally:
            processes.leave()


def _run(args: argparse.Namespace, processes: Processes) -> int:
    import torch

    from softcfg.runs.export import export_npz, export_pngs, npz_beside
    from softcfg.runs.folder import RunFolder
    from softcfg.runs.lock import Lock
    from softcfg.runs.shards import write_shard
    from softcfg.runs.worker import Progress
    from softcfg.zoo.files import require_file
    from softcfg.zoo.loading import load_tokenizer
    from softcfg.zoo.reading import hash_weights
    from softcfg.zoo.registry import resolve

    source = RunFolder.open(args.folder)
    folder = Path(args.output_dir)
    if folder.resolve() == source.path.resolve():
        raise UserError(f"--output-dir {folder} is the run itself; give another folder")
    entry = resolve(args.tokenizer or source.settings["model"])
    config = entry.tokenizer.config if args.tokenizer else source.settings["tokenizer"]["config"]
    checkpoint = args.tokenizer_checkpoint or require_file(entry.tokenizer.file, entry)
    chosen = arguments.parse_device(str(processes.device)) if processes.device else None
    device = chosen or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(entry, config, checkpoint, device)
    locks: list[Lock] = []

    def claim() -> tuple[dict[str, Any], list[int]]:
        settings = {
            **source.settings,
            "tokenizer": {
                "family": entry.tokenizer.family.name,
                "config": dict(config),
                "sha256": hash_weights(checkpoint),
            },
            "decoded_from": str(source.path.resolve()),
            "command": shlex.join(["softcfg", *args.words]),
        }
        folder.mkdir(parents=True, exist_ok=True)
        locks.append(Lock(folder))
        target = RunFolder.claim(folder, settings, overwrite=args.overwrite)
        return target.settings, target.missing()

    settings, todo = processes.agree(claim)
    target = RunFolder(folder, settings)
    progress = Progress(target, todo) if processes.first else None
    for number in todo[processes.rank :: processes.world]:
        write_shard(target.shard_path(number), _decoded(source.require(number), tokenizer, target))
        if progress is not None:
            progress.look()
    if progress is not None:
        progress.wait(processes)
        progress.close()
        if args.png:
            export_pngs(target, folder)
        print(f"{target.plan.num_samples} images decoded in {folder}")
        if args.npz:
            path = npz_beside(folder)
            print(f"{path}: arr_0 uint8 {list(export_npz(target, path))}")
    for lock in locks:
        lock.release()
    return 0


def _decoded(shard: Shard, tokenizer: Tokenizer, target: RunFolder) -> Shard:
    """The shard with new pixels; a partial batch is padded as when it was drawn."""
    import dataclasses

    import numpy as np

    from softcfg.models.geometry import Geometry
    from softcfg.runs.plan import Prompts

    count = len(shard.tokens)
    grid = None
    if tokenizer.any_size and (prompts := Prompts.of(target.settings)) is not None:
        grid = Geometry.of_image(prompts.width, prompts.height, tokenizer.patch_size).grid
    padded = np.concatenate([shard.tokens, shard.tokens[-1:].repeat(target.plan.batch_size - count, axis=0)])
    pixels = [
        tokenizer.to_uint8(tokenizer.decode(padded[start : start + shard.drawn_at_once], grid)).cpu().numpy()
        for start in range(0, count, shard.drawn_at_once)
    ]
    return dataclasses.replace(shard, run=target.run, pixels=np.concatenate(pixels)[:count])
