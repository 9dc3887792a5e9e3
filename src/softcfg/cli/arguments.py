"""Arguments that several commands share, and what they mean."""

from __future__ import annotations

import argparse
import os
import re
import sys
import textwrap
from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING, Any

from softcfg.decoding.filtering import Sampling
from softcfg.errors import UserError, quote, require_uint64
from softcfg.files import as_path, is_folder, iterate_lines, read_text, refuse_overwriting
from softcfg.guidance import CFG, PRESETS, Setting, all_settings, compose, settings_of

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from softcfg.pipeline import Pipeline


HELP_WIDTH = 80  # columns
LARGEST_LIST = 1 << 24  # bytes of a file of labels or prompts
MOST_PROMPTS = 100_000
# Arguments that are files to read.
FILES_READ = (
    "labels", "prompts", "image", "tokens", "reference", "config", "generator_checkpoint", "tokenizer_checkpoint",
    "extractor_weights",
)  # fmt: skip
EXTRACTORS = ("inception", "fashion", "emoji")  # those of `softcfg.evaluation.extractors`, which imports PyTorch
WINDOW = 16  # of speculative Jacobi decoding


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Fills the paragraphs of descriptions to 80 columns, keeps lists and examples as they are."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26, width=HELP_WIDTH)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.replace(" \\\n      ", " ").split("\n\n")
        return "\n\n".join(
            "\n".join(map(_command if part.startswith("examples:") else _item, part.splitlines()))
            if "\n  " in part
            else textwrap.fill(part, width)
            for part in paragraphs
        )


def _item(line: str) -> str:
    """An entry of a list, a long one in several lines below each other."""
    name = re.match(r" *\S+ *", line)
    return textwrap.fill(line, HELP_WIDTH, subsequent_indent=" " * len(name[0] if name else ""))


def _command(line: str) -> str:
    """An example, a long one in several lines as a shell takes them."""
    if len(line) <= HELP_WIDTH:
        return line
    whole = re.sub('"[^"]*"', lambda quoted: quoted[0].replace(" ", "\0"), line)
    lines = textwrap.wrap(
        whole, HELP_WIDTH - 2, subsequent_indent=" " * 6, break_long_words=False, break_on_hyphens=False
    )
    return " \\\n".join(lines).replace("\0", " ")


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
    add_memory_arguments(group)
    group.add_argument(
        "--weak-model",
        metavar="NAME",
        help="a weaker model with the same image tokenizer, which guidance leads away from (autoguidance): in place of "
        "the unconditional branch or, with a --weak-share below 1, together with it",
    )


def add_memory_arguments(group: argparse._ArgumentGroup) -> None:
    """Where a model is, and what it takes there."""
    group.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "fastest"),
        help="of the generator; fastest: float32 or bfloat16, whichever a measurement finds faster here (default: the "
        "model's own, float32 for all but the largest)",
    )
    group.add_argument(
        "--quantize",
        choices=("int8", "int4"),
        help="round the weights of the generator and, where it has one, of its text encoder; needs torchao",
    )
    group.add_argument(
        "--kv-cache-dtype",
        choices=("int8",),
        help="round the cached keys and values (default: of the generator's dtype)",
    )
    add_tokenizer_dtype_argument(group)
    group.add_argument(
        "--device-map", choices=("auto",), help="spread the generator over all GPUs, and the CPU; needs Accelerate"
    )


def add_tokenizer_dtype_argument(group: argparse._ActionsContainer) -> None:
    """In what the image tokenizer computes."""
    group.add_argument(
        "--tokenizer-dtype",
        choices=("float32", "bfloat16"),
        help="of the image tokenizer; bfloat16 is faster where there are instructions for it (default: float32)",
    )


def add_extractor_arguments(group: argparse._ArgumentGroup, default: str | None = "inception", note: str = "") -> None:
    """The network that describes images for metrics, and where its features are kept."""
    note = note or f"default: {default}"
    names = f"{', '.join(EXTRACTORS)} or your own as package.module:factory"
    group.add_argument("--extractor", default=default, metavar="NAME", help=f"{names} ({note})")
    group.add_argument(
        "--extractor-weights",
        "--inception-weights",
        metavar="FILE",
        help="weights of the extractor, instead of its own",
    )
    group.add_argument("--cache-dir", metavar="DIR", help="keep features in this folder")


def parse_metrics(text: str | None) -> list[str] | None:
    """The names in a list of metrics; None for all."""
    return [name.strip().replace("-", "_") for name in text.split(",")] if text else None


def add_output_size_argument(group: argparse._ActionsContainer, what: str = "") -> None:
    """`--image-size-eval`, as LlamaGen's released sampler has it; see `Pipeline.with_image_size`."""
    usual = "resize images to SIZE x SIZE pixels, before they are rounded to 8 bits (default: the model's own size)"
    group.add_argument("--image-size-eval", type=int, metavar="SIZE", help=what or usual)


def add_guidance_arguments(parser: argparse.ArgumentParser) -> None:
    """Guidance and token sampling: a flag for every setting; the names are those of the released code."""
    group = parser.add_argument_group("guidance")
    known = all_settings().values()
    for setting in known:
        if setting.part is None:
            _add_setting(group, setting)
    group.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help="SoftCFG as the paper defines it (default) or as the released code computes it",
    )
    for setting in known:
        if setting.part is not None:
            _add_setting(group, setting)
    group = parser.add_argument_group("token sampling")
    for setting in settings_of(Sampling).values():
        _add_setting(group, setting)
    group.add_argument("--seed", type=int, help="image n draws from the random stream (seed, n) (default: 0)")


def add_speed_arguments(parser: argparse.ArgumentParser) -> None:
    """Speculative Jacobi decoding."""
    parser.add_argument_group("speed").add_argument(
        "--speculative-jacobi",
        nargs="?",
        type=int,
        const=WINDOW,
        default=0,
        metavar="WINDOW",
        help=f"draft WINDOW tokens (default: {WINDOW}) and verify them in one pass: fewer passes, other images of the "
        "same distribution",
    )


def _add_setting(group: argparse._ArgumentGroup, setting: Setting) -> None:
    """The flag of a setting, None where it is not given; the setting itself checks the value later."""
    what = [part for part in (setting.help, _listed(setting.choices or ())) if part]
    if setting.part is not None and setting.flag.startswith(f"--{setting.part[1]}-"):
        what = [f"of the {setting.part[0]} {setting.part[1]}", *what]
    words = f"{': '.join(what)} (default: {_usual(setting)})"
    options: dict[str, Any] = {"help": words.replace("%", "%%")}
    if setting.kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        options["type"] = parse_interval if setting.kind is tuple else setting.kind
        options["metavar"] = setting.metavar
    group.add_argument(setting.flag, **options)


def _listed(names: Iterable[str]) -> str:
    *some, last = [*names] or [""]
    return f"{', '.join(some)} or {last}" if some else last


def _usual(setting: Setting) -> str:
    """The default of a setting, as help says it."""
    if setting.name == "weak_share":
        return f"{setting.default:g}, or 1 with --weak-model"
    if setting.of_model or setting.name == "rule":
        return "the model's own"
    values = {getattr(preset(), setting.name, setting.default) for preset in PRESETS.values()}
    if len(values) > 1:
        return "the preset's"
    if setting.kind is bool:
        return "on" if setting.default else "off"
    if setting.kind is tuple:
        return "in all"
    return f"{setting.default:g}" if setting.kind is float else str(setting.default)


def parse_interval(text: str) -> tuple[int, int]:
    """Two steps from START-STOP."""
    from softcfg.configuration import read_interval

    try:
        return read_interval(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_device(name: str | None) -> torch.device | None:
    """The device called `name`; None for None. Raises `UserError` if it is not available."""
    from softcfg.nn.precision import as_device

    return as_device(name) if name else None


def load_pipeline(
    args: argparse.Namespace, device: torch.device | str | None = None, *, random_weights: bool = False
) -> Pipeline:
    """The pipeline that the model arguments ask for, or one of that architecture with random weights.

    Args:
        device: in place of that of the arguments.
    """
    from softcfg.pipeline import Pipeline

    device = parse_device(str(device)) if device else parse_device(args.device)
    common: dict[str, Any] = {
        "device": device,
        "dtype": args.dtype,
        "kv_cache_dtype": args.kv_cache_dtype,
        "tokenizer_dtype": args.tokenizer_dtype,
        "weak": args.weak_model,
    }
    if random_weights:
        if args.quantize or args.device_map:
            raise UserError("--quantize and --device-map are not for random weights")
        return Pipeline.with_random_weights(args.model, **common)
    return Pipeline.from_pretrained(
        args.model,
        generator_checkpoint=args.generator_checkpoint,
        tokenizer_checkpoint=args.tokenizer_checkpoint,
        quantize=args.quantize,
        device_map=args.device_map,
        image_size_eval=getattr(args, "image_size_eval", None),
        **common,
    )


def guidance_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of guidance that the arguments give a value, by name; see `softcfg.guidance.compose`."""
    return _given(args, all_settings().values())


def sampling_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of `Sampling` that the arguments give a value."""
    return _given(args, settings_of(Sampling).values())


def _given(args: argparse.Namespace, settings: Iterable[Setting]) -> dict[str, Any]:
    values = {setting.name: getattr(args, setting.dest) for setting in settings}
    return {name: value for name, value in values.items() if value is not None}


def guidance_from(args: argparse.Namespace, pipeline: Pipeline) -> CFG:
    """The guidance that the arguments ask for, with the model's scale, power and schedule as defaults."""
    return pipeline.default_guidance(compose, preset=args.preset, **guidance_settings(args))


def sampling_from(args: argparse.Namespace, pipeline: Pipeline) -> Sampling:
    """Temperature (the model's by default), top-k and top-p; the seed is checked, and 0 by default."""
    args.seed = 0 if args.seed is None else args.seed
    require_uint64(args.seed, "seed")
    return pipeline.sampling(**sampling_settings(args))


def add_prompt_arguments(group: argparse._ArgumentGroup) -> None:
    """What text-to-image models draw."""
    group.add_argument(
        "--prompt", action="append", metavar="TEXT", help="text to draw, for text-to-image models; may be repeated"
    )
    group.add_argument("--prompts", metavar="FILE", help="texts to draw, one per line")
    add_negative_argument(group)
    add_size_arguments(group)


def add_negative_argument(group: argparse._ArgumentGroup) -> None:
    """The text of the unconditional branch."""
    group.add_argument(
        "--negative-prompt", metavar="TEXT", help="what the unconditional branch reads, for models that read one there"
    )


def add_size_arguments(group: argparse._ArgumentGroup) -> None:
    """The size of what text-to-image models draw."""
    group.add_argument("--width", type=int, metavar="W", help="of the images, in pixels (default: the model's own)")
    group.add_argument("--height", type=int, metavar="H", help="of the images, in pixels (default: the model's own)")
    group.add_argument(
        "--ratio", metavar="W:H", help="such as 16:9, in place of a size, for models that choose the number of pixels"
    )


def parse_prompts(args: argparse.Namespace, pipeline: Pipeline) -> list[str] | None:
    """The texts to draw, those of `--prompt` before those of `--prompts`; None for a model that draws classes.

    Without either, those are drawn that the model has as examples.

    Raises:
        UserError: no prompts for a text-to-image model, labels for one, or prompts or a size for another.
    """
    flags = ("prompt", "prompts", "negative_prompt", "width", "height", "ratio", "images_per_prompt")
    given = [f"--{name.replace('_', '-')}" for name in flags if getattr(args, name, None) is not None]
    if not pipeline.conditioning.takes_prompts:
        if given:
            raise UserError(f"{given[0]}: {pipeline.name} draws classes, not texts; choose them with --labels")
        return None
    if args.labels is not None:
        raise UserError(f"--labels: {pipeline.name} draws texts, not classes; give them with --prompt or --prompts")
    prompts = list(args.prompt or ())
    if args.prompts is not None:
        prompts += read_lines(args.prompts, "--prompts", MOST_PROMPTS)
        if not prompts:
            raise UserError(f"--prompts: {args.prompts} holds no text")
    if not prompts and pipeline.entry is not None and pipeline.entry.examples:
        prompts = list(pipeline.entry.examples)
        print(f"no --prompt and no --prompts: the examples of {pipeline.name} are drawn", file=sys.stderr)
    if not prompts:
        raise UserError(f"{pipeline.name} draws texts: give one with --prompt, or a file of them with --prompts")
    return prompts


def parse_inputs(args: argparse.Namespace, pipeline: Pipeline) -> tuple[list[Any], list[str]]:
    """What the generator is conditioned on, one input per image: class ids or prompts; and a short name for each."""
    from softcfg.prompts import Prompt

    conditioning = pipeline.conditioning
    texts = parse_prompts(args, pipeline)
    if texts is not None:
        prompts = [Prompt(text, negative_text=args.negative_prompt) for text in texts]
        width, height = image_size(args, pipeline)
        requests = conditioning.requests(prompts=prompts, width=width, height=height)
    elif args.labels is None:
        raise UserError(f"{pipeline.name} draws classes: give them with --labels")
    else:
        requests = conditioning.requests(parse_labels(args.labels, pipeline))
    return conditioning.inputs(requests), [conditioning.title(request) for request in requests]


def image_size(args: argparse.Namespace, pipeline: Pipeline) -> tuple[int, int]:
    """Width and height, in pixels, of what a text-to-image model is to draw.

    Raises:
        UserError: the model does not draw images of this size.
    """
    from softcfg.models.conditioning import PromptConditioning

    conditioning = pipeline.conditioning
    if args.ratio is None:
        return conditioning.image_size(args.width, args.height)
    if args.width is not None or args.height is not None:
        raise UserError("give --ratio, or --width and --height")
    assert isinstance(conditioning, PromptConditioning)  # others were refused
    return conditioning.image_size(*conditioning.size_of_ratio(args.ratio))


def files_read(args: argparse.Namespace, pipeline: Pipeline | None = None) -> list[tuple[str, str | Path]]:
    """The files that the arguments name for reading, each with its flag; and those of the loaded model."""
    from softcfg.zoo.files import find_file

    found: list[tuple[str, str | Path]] = []
    for name in FILES_READ:
        value = getattr(args, name, None)
        if name == "labels" and value is not None:
            value = value[1:] or None if value.startswith("@") else None
        if value is not None and not is_folder(as_path(value)):
            found.append((f"--{name.replace('_', '-')}", as_path(value)))
    for each in (pipeline, None if pipeline is None else pipeline.weak):
        if each is not None and each.entry is not None:
            files = [find_file(file) for file in each.entry.files]
            found += [("a file of the model", file) for file in files if file is not None]
            if each.entry.folder is not None:
                found.append(("a file of the model", each.entry.folder / "model.yaml"))
    return found


def refuse_own_inputs(
    args: argparse.Namespace, folder: str | Path, written: Iterable[str], pipeline: Pipeline | None = None
) -> None:
    """Raise `UserError` if one of the files `written` into the folder of `--output-dir` is read by the command."""
    from pathlib import Path

    read = files_read(args, pipeline)
    for name in written:
        refuse_overwriting({"--output-dir": Path(folder, name)}, read)


def refuse_inputs_in_run(args: argparse.Namespace, folder: str | Path) -> None:
    """Raise `UserError` if the command reads a file that the run in `folder` replaces: one of its own."""
    from softcfg.runs.folder import is_own_file

    for flag, path in files_read(args):
        if is_own_file(as_path(folder), as_path(path)):
            raise UserError(f"{flag}: {path} is where the run in {folder} has a file of its own; give a copy elsewhere")


def parse_labels(text: str, pipeline: Pipeline) -> list[int]:
    """Class ids from "all", or a list of ids, ranges "0-9" and class names; see `softcfg.models.class_names`.

    "@FILE" stands for the content of a file; there, line ends separate as well.
    """
    from softcfg.models.class_names import ClassNames
    from softcfg.runs.plan import MOST_LABELS

    if text == "@":
        raise UserError("--labels: give a file after the @, such as @labels.txt")
    names = ClassNames(pipeline.classes, pipeline.generator.num_classes, pipeline.name)
    lines = read_lines(text.removeprefix("@"), "--labels", MOST_LABELS) if text.startswith("@") else [text]
    if [line.strip().lower() for line in lines] == ["all"]:
        return list(range(names.count))
    if sum(line.count(",") + 1 for line in lines) > MOST_LABELS:
        raise UserError(f"--labels: more than {MOST_LABELS:,} labels, the limit")
    labels: list[int] = []
    for line in lines:
        try:
            labels += names.read(line)
        except UserError as error:
            raise UserError(f"--labels: {error}") from None
        if len(labels) > MOST_LABELS:
            raise UserError(f"--labels: more than {MOST_LABELS:,} labels, the limit")
    if not labels:
        raise UserError(f"--labels {quote(text)} names no class: {names.model} has classes 0 to {names.count - 1}")
    return labels


def read_lines(path: str, flag: str, most: int) -> list[str]:
    """The lines of a file that a flag names, at most so many, without those that are empty."""
    try:
        text = read_text(os.path.expanduser(path), LARGEST_LIST)
    except OSError as error:
        raise UserError(f"{flag}: {path} cannot be read: {error.strerror}") from None
    lines = list(islice(filter(None, map(str.strip, iterate_lines(text))), most + 1))
    if len(lines) > most:
        raise UserError(f"{flag}: {path} holds more than {most:,} lines, the limit")
    return lines
