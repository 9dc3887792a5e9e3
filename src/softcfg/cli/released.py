"""Command lines of the released samplers: `config=FILE`, `--config FILE`, dotted overrides, and the flags of others.

    softcfg sample config=configs/alitok_xl.yaml experiment.output_dir=out model.generator.guidance_scale=9
    softcfg sample --model_path DIR --save_path DIR --cfg 9.0 --softcfg_disable_step_norm false
    softcfg sample --vq-ckpt FILE --gpt-ckpt FILE --gpt-model GPT-L --image-size 384 --cfg-scale 2.0

A flag given besides wins over an override, an override over the file, and the file over the model's defaults.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from os.path import expanduser
from pathlib import Path
from typing import Any

from softcfg.configuration import dotted, parse_yaml, read_yaml
from softcfg.decoding.filtering import Sampling
from softcfg.errors import UserError, quote, suggestion
from softcfg.files import is_file, is_folder
from softcfg.guidance import ConfidenceWeights, SoftCFG, settings_of
from softcfg.interpolation import interpolated
from softcfg.zoo.registry import GENERATORS, MODELS, TOKENIZERS, Component, ModelEntry, ModelFile, resolve

NUM_SAMPLES = 50_000
SOFTCFG = "softcfg"  # the perturbation
SOFTCFG_ARGUMENTS = {setting.dest for setting in settings_of(ConfidenceWeights).values()}
# Released name -> the argument that it sets.
SAMPLING = {
    f"model.generator.{setting.released}": setting.dest
    for owner in (SoftCFG, Sampling)
    for setting in settings_of(owner).values()
    if setting.released
} | {
    "model.generator.seed": "seed",
    "experiment.output_dir": "output_dir",
    "experiment.generator_checkpoint": "generator_checkpoint",
    "experiment.tokenizer_checkpoint": "tokenizer_checkpoint",
    "model.vq_model.pretrained_tokenizer_weight": "tokenizer_checkpoint",
    "model.vq_ckpt": "tokenizer_checkpoint",
}
# Flags of Lumina-mGPT 2.0 and LlamaGen -> what they are called here.
SYNONYMS = {
    "--cfg": ["--guidance-scale"],
    "--cfg-scale": ["--guidance-scale"],
    "--save-path": ["--output-dir"],
    "--input-image-path": ["--image"],
    "--quant": ["--quantize", "int4"],
    "--gpt-ckpt": ["--generator-checkpoint"],
    "--vq-ckpt": ["--tokenizer-checkpoint"],
    "--from-fsdp": [],  # files are recognised here
}
SWITCHES = {
    "--step-norm": ("--step-norm", "--no-step-norm"),
    "--softcfg-disable-step-norm": ("--no-step-norm", "--step-norm"),
}
LUMINA = "lumina-mgpt-2"
MOVQ_FOLDERS = ("movqgan/270M", "lumina_mgpt/movqgan/270M")  # where its code keeps the image tokenizer
EXAMPLE_PROMPTS = (  # its program has prompts of its own
    "a lighthouse on a cliff in a storm, waves breaking on the rocks",
    "a red fox asleep in fresh snow, photograph",
    "a bowl of ramen on a wooden table, seen from above",
    "an old harbour town at dusk, watercolour",
)
LLAMAGEN_LABELS = "207,360,387,974,88,979,417,279"  # of its demo
_OVERRIDE = re.compile(r"(--)?([A-Za-z]\w*(?:\.[A-Za-z][\w-]*)+)(?:=(.*))?", re.DOTALL)


def as_flags(words: Iterable[str], with_value: Collection[str] = ()) -> list[str]:
    """Write the words of the released command lines as those of `softcfg sample`.

    `config=FILE` becomes `--config FILE`; `a.b=c`, `--a.b=c` and `--a.b c` become `--set a.b=c`. The flags of
    `SYNONYMS` get their names here, and those of `SWITCHES` take true, false or nothing.

    Args:
        with_value: flags that take a value: what follows one is that value, whatever it looks like.
    """
    result: list[str] = []
    waiting = deque(words)
    while waiting:
        word = waiting.popleft()
        if result and result[-1].replace("_", "-") in with_value and not word.startswith("-"):
            result.append(word)
            continue
        found = _OVERRIDE.fullmatch(word)
        flag, equals, text = word.partition("=")
        flag = flag.replace("_", "-")
        if flag in SYNONYMS:
            result += [*SYNONYMS[flag], *([text] if equals else [])]
            continue
        if flag in SWITCHES:
            if not equals and waiting and waiting[0].lower() in ("true", "false"):
                text = waiting.popleft()
            if text.lower() not in ("", "true", "false"):
                raise UserError(f"{flag} takes true, false or nothing, got {quote(text)}")
            result.append(SWITCHES[flag][text.lower() == "false"])
            continue
        if word.startswith("config="):
            result += ["--config", word.removeprefix("config=")]
        elif found and (found[3] is not None or found[1]):
            value = found[3] if found[3] is not None else (waiting.popleft() if waiting else "")
            result += ["--set", f"{found[2].replace('-', '_')}={value}"]
        else:
            result.append(word)
    return result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--config` and overrides."""
    group = parser.add_argument_group("released command lines")
    group.add_argument("--config", metavar="FILE", help="a configuration of the released code; also config=FILE")
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="override an entry of the configuration, such as model.generator.guidance_scale=9; also without --set",
    )
    group.add_argument(
        "--model-path",
        metavar="DIR",
        help="a checkpoint of Lumina-mGPT 2.0 as published, with --cfg, --save_path, --quant and the other flags of "
        "its program (docs/released.md)",
    )
    group.add_argument(
        "--gpt-model",
        metavar="GPT-L",
        help="a size of LlamaGen, with --image-size, --gpt-ckpt, --vq-ckpt and --cfg-scale of its program",
    )
    group.add_argument("--image-size", type=int, metavar="N", help="with --gpt-model, the size of its images")


def apply(args: argparse.Namespace) -> None:
    """Fill in the arguments that were not given from `args.config` and `args.set`; `args.model` becomes an entry.

    Raises:
        UserError: an unknown override (the nearest name is suggested), or no model that the configuration fits.
    """
    config = read_yaml(args.config) if args.config else {}
    values = dotted(config)
    sizes = _sizes()
    if args.perturbation not in (None, SOFTCFG):  # what the file says of SoftCFG is not meant
        values = {name: value for name, value in values.items() if SAMPLING.get(name) not in SOFTCFG_ARGUMENTS}
    known = {*values, *SAMPLING, *sizes}
    for override in args.set:
        name, equals, text = override.partition("=")
        if name not in known or not equals:
            hint = suggestion(name, known, most=1, cutoff=0.4)
            raise UserError(f"unknown override {name!r}{hint and '; '}{hint}")
        values[name] = _parsed(name, text)
    # What is not needed may stand for anything.
    nested = _nested(values)
    values = {
        name: interpolated(nested, name) if name in sizes or name in SAMPLING else values[name] for name in values
    }
    if args.model_path is not None:
        _read_as_lumina(args)
    elif args.gpt_model is not None:
        _read_as_llamagen(args)
    if args.model is None and not args.config:
        raise UserError("MODEL is missing: give a name that 'softcfg models' lists, a model folder, or --config FILE")
    args.model = _entry(args.model, values, args.config)
    for name, argument in SAMPLING.items():
        value = values.get(name)
        if value == "":
            raise UserError(f"{name} must not be empty")
        if value is not None and getattr(args, argument) is None:
            setattr(args, argument, value)
    for argument in ("output_dir", "generator_checkpoint", "tokenizer_checkpoint"):
        value = getattr(args, argument)
        setattr(args, argument, None if value is None else expanduser(str(value)))
    if args.config:
        _fill_as_released(args)
    if args.seed is not None and (isinstance(args.seed, bool) or not isinstance(args.seed, int)):
        raise UserError(f"model.generator.seed must be an integer, got {args.seed!r}")
    _find_weights(args)


def _read_as_lumina(args: argparse.Namespace) -> None:
    """Take `--model-path`, `--task t2i` and the rest as the program of Lumina-mGPT 2.0 does."""
    args.task = None if args.task == "t2i" else args.task
    _fill_prompts(args)
    published = [entry for entry in MODELS.values() if entry.generator.file.repository == args.model_path]
    folder = Path(args.model_path)
    if args.model is None and (published or is_file(folder / "model.yaml")):
        args.model = published[0] if published else resolve(folder)
        return
    entry = resolve(args.model or LUMINA)
    if not is_folder(folder):
        raise UserError(f"--model-path: there is no folder {args.model_path}")
    text, component = entry.text, entry.generator
    if text is None:
        raise UserError(f"--model-path is for models that draw texts, which {entry.name} does not")
    wanted = [*component.files, *text.files.values()]
    if missing := [file.name for file in wanted if not is_file(folder / file.name)]:
        raise UserError(f"--model-path {args.model_path} lacks {', '.join(missing)} of {entry.name}")
    there = {file: ModelFile(file.name, folder=folder) for file in wanted}
    config_file = None if component.config_file is None else there[component.config_file]
    args.generator_checkpoint = args.generator_checkpoint or str(folder / component.file.name)
    args.model = dataclasses.replace(
        entry,
        generator=dataclasses.replace(component, config_file=config_file),
        text=dataclasses.replace(text, files={role: there[file] for role, file in text.files.items()}),
    )


def _fill_prompts(args: argparse.Namespace) -> None:
    if args.prompt is None and args.prompts is None:
        args.prompt, args.images_per_prompt = list(EXAMPLE_PROMPTS), args.images_per_prompt or 1
        print(f"no --prompt and no --prompts: {len(EXAMPLE_PROMPTS)} examples are drawn", file=sys.stderr)


def _read_as_llamagen(args: argparse.Namespace) -> None:
    """Take `--gpt-model` and the rest as the programs of LlamaGen do, whose guidance is plain."""
    name = Path(args.generator_checkpoint or "").name
    by_file = [entry for entry in MODELS.values() if entry.generator.file.name == name]
    size = args.gpt_model.lower().removeprefix("gpt-")
    args.model = args.model or (by_file[0].name if by_file else f"llamagen-{size}-{args.image_size or 384}")
    args.softcfg_strength = 0.0 if args.softcfg_strength is None else args.softcfg_strength
    if by_file and by_file[0].text is not None:
        _fill_prompts(args)
        return
    args.top_k = (0 if args.image_size_eval else 2000) if args.top_k is None else args.top_k
    if args.image_size_eval is None:  # the demo
        args.labels, args.num_samples = args.labels or LLAMAGEN_LABELS, args.num_samples or 8
        args.guidance_scale = 4.0 if args.guidance_scale is None else args.guidance_scale
        return
    args.labels, args.num_samples = args.labels or "random", args.num_samples or NUM_SAMPLES
    args.npz = True if args.npz is None else args.npz


def _fill_as_released(args: argparse.Namespace) -> None:
    """What the released samplers do without being told."""
    defaults = {
        "num_samples": NUM_SAMPLES,
        "preset": "released",
        "softcfg_strength": 0.0,  # configurations without that entry are those of plain guidance
        "seed": args.model.sampling.get("seed", 42),
        "npz": True,
    }
    if args.perturbation not in (None, SOFTCFG):
        del defaults["preset"], defaults["softcfg_strength"]
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def _find_weights(args: argparse.Namespace) -> None:
    """A file named as published that is not there is looked for where the zoo keeps it, and the other way round."""
    from softcfg.zoo.files import find_file

    for argument, part in (
        ("generator_checkpoint", args.model.generator),
        ("tokenizer_checkpoint", args.model.tokenizer),
    ):
        given = getattr(args, argument)
        if given is not None and Path(given).name == part.file.name and not Path(given).exists():
            setattr(args, argument, None)
    if args.tokenizer_checkpoint is None and find_file(args.model.tokenizer.file) is None:
        folders = [Path("weights"), *map(Path, MOVQ_FOLDERS)]
        folders += [Path(args.generator_checkpoint).parent] if args.generator_checkpoint else []
        beside = [folder / args.model.tokenizer.file.name for folder in folders]
        args.tokenizer_checkpoint = next((str(path) for path in beside if path.is_file()), None)


def _entry(model: str | None, values: Mapping[str, Any], config: str | None) -> ModelEntry:
    """The model of a configuration: the one named, with the configuration's sizes, or the one that has them."""
    sizes = {**_section(values, "model.vq_model."), **_section(values, "model.generator.")}
    if model is not None:
        entry = resolve(model)
        generator = _resized(entry.generator, sizes)
        return dataclasses.replace(
            entry, generator=generator, tokenizer=_resized(entry.tokenizer, _section(values, "model.vq_model."))
        )
    for entry in MODELS.values():
        if all(sizes.get(name) == value for name, value in entry.generator.config.items()):
            return entry
    raise UserError(
        f"no known model has the sizes in {config}; give MODEL too, and its architecture is taken with these sizes"
    )


def _resized(part: Component, sizes: Mapping[str, Any]) -> Component:
    fields = {field.name for field in dataclasses.fields(part.family.classes()[1])}
    return dataclasses.replace(
        part, config={**part.config, **{name: value for name, value in sizes.items() if name in fields}}
    )


def _sizes() -> set[str]:
    """The names that configurations of known families have in the released layout."""
    return {
        f"{section}.{field.name}"
        for families in (GENERATORS, TOKENIZERS)
        for family in families.values()
        for field in dataclasses.fields(family.classes()[1])
        for section in family.sections
    }


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """The opposite of `dotted`."""
    nested: dict[str, Any] = {}
    for name, value in values.items():
        *sections, last = name.split(".")
        node = nested
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise UserError(f"{name} cannot be set: {section} is no section of the configuration")
        node[last] = value
    return nested


def _section(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def _parsed(name: str, text: str) -> Any:
    try:
        return parse_yaml(text)
    except UserError:
        raise UserError(f"override {name}={text} is not a YAML value") from None


def is_used(args: argparse.Namespace) -> bool:
    """Whether there are words of a released command line."""
    return bool(args.config or args.set or args.model_path or args.gpt_model)
