"""`softcfg sample`: draw images."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softcfg.cli import arguments
from softcfg.errors import UserError
from softcfg.files import make_folder, write_atomically
from softcfg.version import __version__

if TYPE_CHECKING:
    from PIL.Image import Image

    from softcfg.decoding import Sampling
    from softcfg.guidance import CFG
    from softcfg.pipeline import Pipeline

PER_LABEL = 8
COMPARE_UP_TO = 100  # images
COMPARED_PER_LABEL = 4

DESCRIPTION = """\
Draw images and write them as PNG files.

The folder receives 000000.png, 000001.png, ... (image n shows the n-th label, taken in turn), grid.png
(one row a label), comparison.png (the same seeds without guidance, with CFG and with SoftCFG) and
run.json (the settings)."""

EXAMPLES = """\
examples:
  softcfg sample fashion --labels all --output-dir out
  softcfg sample fashion --labels Sneaker,Bag --guidance-scale 6 --softcfg-strength 0   # plain CFG
  softcfg sample alitok-xl --labels 207,360 --guidance-scale 9 --guidance-scale-pow 1.5"""


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
    arguments.add_model_arguments(parser)
    group = parser.add_argument_group("what to draw")
    group.add_argument("--labels", default="all", help="class ids, ranges or names: 0,3,7 or 0-9 or all (default: all)")
    group.add_argument("--num-samples", type=int, metavar="N", help=f"images in all (default: {PER_LABEL} a label)")
    group.add_argument("--batch-size", type=int, metavar="B", help="images drawn at once (default: at most 100)")
    group.add_argument("--output-dir", default="out", metavar="DIR", help="folder for the results (default: out)")
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the results of a run with other settings in that folder",
    )
    group.add_argument(
        "--compare",
        action=argparse.BooleanOptionalAction,
        help=f"write comparison.png (default: for up to {COMPARE_UP_TO} images)",
    )
    arguments.add_guidance_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    for name, value in (("--num-samples", args.num_samples), ("--batch-size", args.batch_size)):
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    pipeline = arguments.load_pipeline(args)
    guidance = arguments.guidance_from(args, pipeline)
    sampling = arguments.sampling_from(args, pipeline)
    chosen = arguments.parse_labels(args.labels, pipeline)
    count = args.num_samples or PER_LABEL * len(chosen)
    labels = [chosen[n % len(chosen)] for n in range(count)]
    batch_size = args.batch_size or min(count, 100)

    folder = make_folder(args.output_dir)
    settings = {
        "softcfg_version": __version__,
        "model": str(args.model),
        "guidance": {"method": type(guidance).__name__, **dataclasses.asdict(guidance)},
        "sampling": dataclasses.asdict(sampling),
        "seed": args.seed,
        "dtype": args.dtype,
        "labels": chosen,
        "num_samples": count,
        "batch_size": batch_size,
    }
    _claim(folder, settings, args.overwrite)

    draw = _Drawer(pipeline, sampling, args.seed, batch_size)
    started = time.perf_counter()
    images = draw(labels, list(range(count)), guidance, "sampling")
    seconds = time.perf_counter() - started
    for index, image in enumerate(images):
        _write_png(folder / f"{index:06d}.png", image)
    names = _label_names(chosen, pipeline)
    _write_grid(folder / "grid.png", images, names)
    print(f"{count} images in {seconds:.1f} s ({count / seconds:.2f} images/s) in {folder}")
    if args.compare or (args.compare is None and count <= COMPARE_UP_TO):
        _write_comparison(folder / "comparison.png", draw, guidance, labels, images, names)
        print(f"the same seeds without guidance, with CFG and with SoftCFG: {folder / 'comparison.png'}")
    return 0


class _Drawer:
    """Draws images of given indices with a progress bar; everything but the guidance stays the same."""

    def __init__(self, pipeline: Pipeline, sampling: Sampling, seed: int, batch_size: int) -> None:
        self.pipeline = pipeline
        self.sampling = sampling
        self.seed = seed
        self.batch_size = batch_size

    def __call__(self, labels: list[int], indices: list[int], guidance: CFG, title: str) -> list[Image]:
        from tqdm import tqdm

        batch_size = min(self.batch_size, len(labels))
        steps = -(-len(labels) // batch_size) * self.pipeline.generator.num_tokens
        with tqdm(total=steps, desc=title, unit="step") as bar:

            def advance(done: int) -> None:
                bar.update(done - bar.n)

            output = self.pipeline(
                labels,
                guidance,
                seed=self.seed,
                indices=indices,
                batch_size=batch_size,
                on_step=advance,
                **dataclasses.asdict(self.sampling),
            )
        return output.images


def _claim(folder: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Write run.json, unless the folder holds a run with other settings."""
    path = folder / "run.json"
    if path.exists() and not overwrite:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            differing = sorted(name for name in settings if found.get(name) != settings[name])
        except (OSError, ValueError, AttributeError):
            raise UserError(f"{path} is not readable; give another --output-dir, or --overwrite") from None
        if differing:
            raise UserError(
                f"{folder} holds a run with another {', '.join(differing)}; "
                "give another --output-dir, or --overwrite to replace it"
            )
    write_atomically(path, json.dumps(settings, indent=2).encode() + b"\n")


def _write_png(path: Path, image: Image) -> None:
    from softcfg.images import png_bytes

    write_atomically(path, png_bytes(image))


def _label_names(labels: list[int], pipeline: Pipeline) -> list[str]:
    return [pipeline.classes[label] if pipeline.classes else str(label) for label in labels]


def _by_label(images: list[Image], labels: int) -> list[list[Image]]:
    """One row a label, for images whose labels were taken in turn."""
    return [images[row::labels] for row in range(min(labels, len(images)))]


def _write_grid(path: Path, images: list[Image], names: list[str]) -> None:
    from softcfg.images import grid

    rows = _by_label(images, len(names))
    _write_png(path, grid(rows, row_labels=names[: len(rows)]))


def _write_comparison(
    path: Path, draw: _Drawer, guidance: CFG, labels: list[int], images: list[Image], names: list[str]
) -> None:
    """Three panels with the same seeds; the panel of the run's own method reuses its images."""
    from softcfg.guidance import CFG, SoftCFG
    from softcfg.images import grid, side_by_side

    count = min(len(labels), COMPARED_PER_LABEL * len(names))
    plain = {field.name: getattr(guidance, field.name) for field in dataclasses.fields(CFG)}
    soft = guidance if isinstance(guidance, SoftCFG) and guidance.perturbs else SoftCFG.paper(**plain)
    methods = {
        "no guidance": CFG(guidance_scale=0),
        f"CFG, scale {guidance.guidance_scale:g}": CFG(**plain),
        f"SoftCFG, scale {guidance.guidance_scale:g}": soft,
    }
    panels: list[Image] = []
    for title, method in methods.items():
        drawn = images[:count]
        if method != guidance:
            drawn = draw(labels[:count], list(range(count)), method, title.partition(",")[0])
        rows = _by_label(drawn, len(names))
        panels.append(grid(rows, row_labels=() if panels else names[: len(rows)], title=title))
    _write_png(path, side_by_side(panels))
