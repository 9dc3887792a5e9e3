"""`softcfg plot`: figures of what guidance did."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from softcfg.cli import arguments
from softcfg.errors import UserError, how_to_install, require_index
from softcfg.files import make_folder, remove_temporary, write_atomically

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from softcfg.guidance import CFG
    from softcfg.inspection.trace import Trace
    from softcfg.pipeline import Pipeline

HELP = "draw figures of what guidance did"
USAGE = "softcfg plot MODEL (--labels LABELS | --prompt TEXT) [options]"
DESCRIPTION = """\
Draw images (or take a given one), trace them, and write figures:

  confidence   the images, and the confidence in each token over them
  gap          how far apart the branches are over the steps, of CFG and SoftCFG
  budget       the perturbation of each step, with and without Step Normalisation
  weights      the weight of every earlier token at every step, of one image
  candidates   the likeliest codes of one token, in both branches and guided"""

EXAMPLES = """\
examples:
  softcfg plot fashion --labels Sneaker,Bag,Dress --output-dir plots
  softcfg plot fashion --labels Sneaker --figures weights,candidates --step 150 --token 120
  softcfg plot emoji --prompt "red apple, flat style" --prompt octopus
  softcfg plot fashion --labels Sneaker --image shoe.png --format svg"""

FIGURES = ("confidence", "gap", "budget", "weights", "candidates")
MAX_IMAGES = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    arguments.add_model_arguments(parser)
    group = parser.add_argument_group("what to plot")
    group.add_argument("--labels", help="class ids, ranges or names, one image each: 0,3,7 or 0-9")
    arguments.add_prompt_arguments(group)
    group.add_argument("--image", metavar="FILE", help="trace this picture (of the one label) instead of drawing")
    group.add_argument(
        "--figures", default="all", help=f"some of {', '.join(FIGURES)}, separated by commas (default: all)"
    )
    group.add_argument("--step", type=int, metavar="T", help="step shown over the picture (default: the last)")
    group.add_argument("--token", type=int, metavar="I", help="token whose candidates are shown (default: the middle)")
    group.add_argument("--format", choices=("png", "svg"), default="png", help="of the figures (default: png)")
    group.add_argument("--output-dir", default="plots", metavar="DIR", help="folder for the figures (default: plots)")
    arguments.add_guidance_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    figures = FIGURES if args.figures == "all" else tuple(name.strip() for name in args.figures.split(","))
    if unknown := [name for name in figures if name not in FIGURES]:
        raise UserError(f"--figures: there is no figure {unknown[0]!r}; choose from {', '.join(FIGURES)}")
    try:
        from softcfg.inspection import plots
    except ModuleNotFoundError as error:
        raise UserError(f"figures need the package {error.name}: {how_to_install('plot')}") from None
    import torch

    from softcfg.inspection import trace

    pipeline = arguments.load_pipeline(args)
    paths = {name: Path(args.output_dir, f"{name}.{args.format}") for name in figures}
    arguments.refuse_own_inputs(args, args.output_dir, [path.name for path in paths.values()], pipeline)
    guidance = arguments.guidance_from(args, pipeline)
    sampling = arguments.sampling_from(args, pipeline)
    inputs, names = arguments.parse_inputs(args, pipeline)
    if len(inputs) > MAX_IMAGES:
        raise UserError(f"these are {len(inputs)} images; a figure holds at most {MAX_IMAGES}")
    condition = pipeline.generator.condition(inputs, guided=False)
    geometry = condition.geometry.codes_only()
    codes = pipeline.generator.is_code(torch.arange(condition.num_tokens), condition)
    total = condition.num_codes
    step = total - 1 if args.step is None else args.step
    token = total // 2 if args.token is None else args.token
    for name, value in (("--step", step), ("--token", token)):
        require_index(value, name, total)
    tokens = None if args.image is None else _encode(args.image, pipeline, len(inputs))
    remove_temporary(make_folder(args.output_dir))

    def traced(method: CFG) -> Trace:
        return trace(
            pipeline.generator,
            labels=inputs,
            guidance=method,
            tokens=tokens,
            sampling=sampling,
            seed=args.seed,
            value_weights=False,
            weak=pipeline.weak_generator,
        )

    def of_codes(made: Trace) -> Trace:
        return made if codes is None else made.at(codes)

    drawn = traced(guidance)
    image = pipeline.tokenizer.decode(pipeline.generator.image_codes(drawn.tokens, condition), condition.grid)
    pixels: np.ndarray = pipeline.tokenizer.to_uint8(image).cpu().numpy()
    main = of_codes(drawn)
    for name in figures:
        if name == "confidence":
            figure = plots.plot_confidence(main, pixels, names=names, geometry=geometry)
        elif name == "gap":
            curves = {"CFG": main if guidance.is_plain else of_codes(traced(guidance.plain()))}
            figure = plots.plot_gap(curves if guidance.is_plain else {**curves, guidance.title: main})
        elif name == "budget":
            figure = plots.plot_budget(main)
        elif name == "weights":
            figure = plots.plot_weights(main, step=step, pixels=pixels[0], geometry=geometry)
        else:
            figure = plots.plot_candidates(main, token=token)
        write_atomically(paths[name], plots.figure_bytes(figure, args.format))
        print(paths[name])
    return 0


def _encode(path: str, pipeline: Pipeline, count: int) -> Tensor:
    """The tokens [1, T] of a picture, cropped to a square and resized to the tokenizer's size."""
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    from softcfg.images import read_picture

    if pipeline.conditioning.takes_prompts:
        raise UserError(f"--image: {pipeline.name} draws texts; only pictures of classes can be traced")
    if count != 1:
        raise UserError(f"--image is one picture and needs one label, got {count}")
    size = pipeline.tokenizer.image_size
    square = ImageOps.fit(read_picture(path), (size, size), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None].float() / 255
    return pipeline.tokenizer.encode(pixels)
