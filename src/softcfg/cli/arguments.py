"""Arguments that several commands share, and what they mean."""

from __future__ import annotations

import argparse
import re
import textwrap
from typing import TYPE_CHECKING, Any

from softcfg.errors import UserError, quote
from softcfg.files import read_text

if TYPE_CHECKING:
    import torch

    from softcfg.decoding import Sampling
    from softcfg.guidance import CFG
    from softcfg.pipeline import Pipeline


LONGEST_TITLE = 48  # characters
LARGEST_LIST = 1 << 24  # bytes of a file of labels or prompts
MOST_PROMPTS = 100_000


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of descriptions and leaves room for flag names."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=100)


def add_model_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """MODEL and where its files and its arithmetic are."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs=None if required else "?",
        help="a name that 'softcfg models' lists, or the path of a model folder",
    )
    group = parser.add_argument_group("model")
    group.add_argument(
        "--generator-checkpoint", metavar="FILE", help="generator weights to read instead of the model's own"
    )
    group.add_argument(
        "--tokenizer-checkpoint", metavar="FILE", help="tokenizer weights to read instead of the model's own"
    )
    group.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the generator (default: the model's own, float32 for all but the largest)",
    )
    group.add_argument("--quantize", choices=("int8", "int4"), help="round the generator's weights; needs torchao")
    group.add_argument(
        "--kv-cache-dtype",
        choices=("int8",),
        help="round the cached keys and values (default: of the generator's dtype)",
    )
    group.add_argument(
        "--device-map", choices=("auto",), help="spread the generator over all GPUs, and the CPU; needs Accelerate"
    )


def add_guidance_arguments(parser: argparse.ArgumentParser) -> None:
    """Guidance and token sampling; the names are those of the released code."""
    group = parser.add_argument_group("guidance")
    group.add_argument(
        "--guidance-scale",
        type=float,
        metavar="G",
        help="full guidance scale; 0 or 1: no guidance (default: the model's own)",
    )
    group.add_argument(
        "--guidance-scale-pow",
        type=float,
        metavar="K",
        help="power of the cosine ramp from 1 to G (default: the model's own)",
    )
    group.add_argument("--schedule", help="cosine_power, constant or linear (default: the model's own)")
    group.add_argument(
        "--interval",
        type=parse_interval,
        metavar="START-STOP",
        help="guide in the steps START <= step < STOP alone, such as 32-192 (default: in all)",
    )
    group.add_argument(
        "--softcfg-strength",
        type=float,
        metavar="P",
        help="exponent of the weights; 0: plain CFG (default: 1)",
    )
    group.add_argument(
        "--step-norm",
        action=argparse.BooleanOptionalAction,
        help="Step Normalisation: spend a fixed budget at every step (default: on)",
    )
    group.add_argument(
        "--preset",
        choices=("paper", "released"),
        help="SoftCFG as the paper defines it (default) or as the released code computes it",
    )
    group.add_argument("--confidence", help="max, sampled, entropy or margin (default: the preset's)")
    group.add_argument("--target", help="what the weights scale: value, key or both (default: value)")
    group.add_argument("--alignment", help="own or successor (default: the preset's)")
    group.add_argument(
        "--softcfg-floor", type=float, metavar="W", help="least weight, in [0, 1] (default: the preset's)"
    )
    group.add_argument(
        "--softcfg-eps", type=float, metavar="E", help="added to the sum of confidences (default: the preset's)"
    )
    group = parser.add_argument_group("token sampling")
    group.add_argument("--temperature", type=float, help="divides the logits, > 0 (default: the model's own)")
    group.add_argument(
        "--top-k", type=int, metavar="K", help="keep the K most likely codes; 0: all (default: the model's own)"
    )
    group.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="keep codes up to this total probability; 1: all (default)",
    )
    group.add_argument("--seed", type=int, help="image n draws from the random stream (seed, n) (default: 0)")


def parse_interval(text: str) -> tuple[int, int]:
    """Two steps from START-STOP."""
    from softcfg.configuration import read_interval

    try:
        return read_interval(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_device(name: str | None) -> torch.device | None:
    """The device called `name`; None for None. Raises `UserError` if it is not available."""
    import torch

    try:
        device = torch.device(name) if name else None
        if device is not None:
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"device {name!r} is not available here; use cpu, or cuda on a machine with a GPU") from None
    return device


def load_pipeline(
    args: argparse.Namespace, device: torch.device | str | None = None, *, random_weights: bool = False
) -> Pipeline:
    """The pipeline that the model arguments ask for, or one of that architecture with random weights.

    Args:
        device: in place of that of the arguments.
    """
    import torch

    from softcfg.pipeline import Pipeline

    device = parse_device(str(device)) if device else parse_device(args.device)
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    cache_dtype = None if args.kv_cache_dtype is None else getattr(torch, args.kv_cache_dtype)
    if random_weights:
        if args.quantize or args.device_map:
            raise UserError("--quantize and --device-map are not for random weights")
        return Pipeline.with_random_weights(args.model, device=device, dtype=dtype, kv_cache_dtype=cache_dtype)
    return Pipeline.from_pretrained(
        args.model,
        device=device,
        dtype=dtype,
        generator_checkpoint=args.generator_checkpoint,
        tokenizer_checkpoint=args.tokenizer_checkpoint,
        quantize=args.quantize,
        kv_cache_dtype=cache_dtype,
        device_map=args.device_map,
    )


def guidance_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of the guidance method that the arguments give a value."""
    chosen = {
        "guidance_scale": args.guidance_scale,
        "guidance_scale_pow": args.guidance_scale_pow,
        "schedule": args.schedule,
        "interval": args.interval,
        "strength": args.softcfg_strength,
        "step_norm": args.step_norm,
        "confidence": args.confidence,
        "target": args.target,
        "alignment": args.alignment,
        "floor": args.softcfg_floor,
        "eps": args.softcfg_eps,
    }
    return {name: value for name, value in chosen.items() if value is not None}


def guidance_from(args: argparse.Namespace, pipeline: Pipeline) -> CFG:
    """The guidance method that the arguments ask for, with the model's scale, power and schedule as defaults."""
    from softcfg.guidance import SoftCFG

    preset = SoftCFG.released if args.preset == "released" else SoftCFG.paper
    try:
        return pipeline.default_guidance(preset, **guidance_settings(args))
    except ValueError as error:
        raise UserError(str(error)) from None


def sampling_from(args: argparse.Namespace, pipeline: Pipeline) -> Sampling:
    """Temperature (the model's by default), top-k and top-p; the seed is checked, and 0 by default."""
    from softcfg.decoding.randomness import check_word

    args.seed = 0 if args.seed is None else args.seed
    check_word(args.seed, "seed")
    try:
        return pipeline.sampling(args.temperature, args.top_k, args.top_p)
    except ValueError as error:
        raise UserError(str(error)) from None


def add_prompt_arguments(group: argparse._ArgumentGroup) -> None:
    """What text-to-image models draw."""
    group.add_argument(
        "--prompt", action="append", metavar="TEXT", help="text to draw, for text-to-image models; may be repeated"
    )
    group.add_argument("--prompts", metavar="FILE", help="texts to draw, one a line")
    group.add_argument("--width", type=int, metavar="W", help="of the images, in pixels (default: the model's own)")
    group.add_argument("--height", type=int, metavar="H", help="of the images, in pixels (default: the model's own)")


def parse_prompts(args: argparse.Namespace, pipeline: Pipeline) -> list[str] | None:
    """The texts to draw, those of `--prompt` before those of `--prompts`; None for a model that draws classes.

    Raises:
        UserError: no prompts for a text-to-image model, labels for one, or prompts or a size for another.
    """
    flags = ("prompt", "prompts", "width", "height", "images_per_prompt")
    given = [f"--{name.replace('_', '-')}" for name in flags if getattr(args, name, None) is not None]
    if pipeline.prompt_reader is None:
        if given:
            raise UserError(f"{given[0]}: {pipeline.name} draws classes, not texts; choose them with --labels")
        return None
    if args.labels is not None:
        raise UserError(f"--labels: {pipeline.name} draws texts, not classes; give them with --prompt or --prompts")
    prompts = list(args.prompt or ())
    if args.prompts is not None:
        try:
            lines = read_text(args.prompts, LARGEST_LIST).splitlines()
        except OSError as error:
            raise UserError(f"--prompts: {args.prompts} cannot be read: {error.strerror}") from None
        prompts += filter(None, map(str.strip, lines))
        if not prompts:
            raise UserError(f"--prompts: {args.prompts} holds no text")
        if len(prompts) > MOST_PROMPTS:
            raise UserError(f"--prompts: {args.prompts} holds more than {MOST_PROMPTS:,} texts, the limit")
    if not prompts:
        raise UserError(f"{pipeline.name} draws texts: give one with --prompt, or a file of them with --prompts")
    return prompts


def parse_inputs(args: argparse.Namespace, pipeline: Pipeline) -> tuple[list[Any], list[str]]:
    """What the generator is conditioned on, one an image: class ids or prompts; and a short name for each."""
    from softcfg.prompts import as_prompts

    prompts = parse_prompts(args, pipeline)
    if prompts is not None:
        assert pipeline.prompt_reader is not None
        width, height = image_size(args, pipeline)
        asked = as_prompts(prompts, width, height)
        read = pipeline.prompt_reader.read(asked, pipeline.generator, pipeline.tokenizer)
        return list(read), [short(prompt) for prompt in prompts]
    if args.labels is None:
        raise UserError(f"{pipeline.name} draws classes: give them with --labels")
    labels = parse_labels(args.labels, pipeline)
    return labels, [pipeline.classes[label] if pipeline.classes else f"class {label}" for label in labels]


def short(prompt: str) -> str:
    """A prompt as the title of its images."""
    return textwrap.shorten(prompt, LONGEST_TITLE, placeholder="…")


def image_size(args: argparse.Namespace, pipeline: Pipeline) -> tuple[int, int]:
    """Width and height in pixels of what a text-to-image model is to draw.

    Raises:
        UserError: the model does not draw images of this size.
    """
    pipeline.num_tokens(args.width, args.height)
    side = pipeline.generator.config.image_size
    return args.width or side, args.height or side


def parse_labels(text: str, pipeline: Pipeline) -> list[int]:
    """Class ids from "all", or a list of ids, ranges "0-9" and class names, separated by commas.

    "@FILE" stands for the content of a file; there, line ends separate as well.
    """
    from softcfg.runs.plan import MOST_LABELS

    count = pipeline.generator.num_classes
    if text.startswith("@"):
        path = text.removeprefix("@")
        try:
            text = ",".join(filter(None, map(str.strip, read_text(path, LARGEST_LIST).splitlines())))
        except OSError as error:
            raise UserError(f"--labels: {path} cannot be read: {error.strerror}") from None
    if text.strip().lower() == "all":
        return list(range(count))
    names = {name.lower(): index for index, name in enumerate(pipeline.classes)}
    labels: list[int] = []
    for word in (part.strip() for part in text.split(",")):
        ids = re.fullmatch(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", word)
        if word.lower() in names:
            labels.append(names[word.lower()])
        elif ids:
            first, last = int(ids[1]), int(ids[2] or ids[1])
            if max(first, last) >= count:
                outside = first if first >= count else last
                raise UserError(f"label {outside} is out of range: {pipeline.name} has classes 0 to {count - 1}")
            labels.extend(range(first, last + 1))
        else:
            known = f" or one of {', '.join(pipeline.classes)}" if names else ""
            raise UserError(f"--labels: {quote(word)} is not a class id, a range such as 0-9, 'all'{known}")
        if len(labels) > MOST_LABELS:
            raise UserError(f"--labels: more than {MOST_LABELS:,} labels, the limit")
    if not labels:
        raise UserError(f"--labels {quote(text)} names no class: {pipeline.name} has classes 0 to {count - 1}")
    return labels
