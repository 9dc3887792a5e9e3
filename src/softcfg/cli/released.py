"""Command lines of the released samplers: `config=FILE`, `--config FILE` and dotted overrides.

    softcfg sample config=configs/alitok_xl.yaml experiment.output_dir=out model.generator.guidance_scale=9

A flag given besides wins over an override, an override over the file, and the file over the model's defaults.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from os.path import expanduser
from pathlib import Path
from typing import Any

from softcfg.configuration import dotted, parse_yaml, read_yaml
from softcfg.decoding.filtering import Sampling
from softcfg.errors import UserError
from softcfg.guidance import ConfidenceWeights, SoftCFG, settings_of
from softcfg.interpolation import interpolated
from softcfg.zoo.registry import GENERATORS, MODELS, TOKENIZERS, Component, ModelEntry, resolve

NUM_SAMPLES = 50_000
SOFTCFG = "softcfg"  # the perturbation
OF_SOFTCFG = {setting.dest for setting in settings_of(ConfidenceWeights).values()}
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
_OVERRIDE = re.compile(r"(--)?([A-Za-z]\w*(?:\.[A-Za-z][\w-]*)+)(?:=(.*))?", re.DOTALL)


def as_flags(words: Iterable[str]) -> list[str]:
    """Write `config=FILE` as `--config FILE`, and `a.b=c`, `--a.b=c` and `--a.b c` as `--set a.b=c`."""
    result: list[str] = []
    waiting = iter(words)
    for word in waiting:
        found = _OVERRIDE.fullmatch(word)
        if word.startswith("config="):
            result += ["--config", word.removeprefix("config=")]
        elif found and (found[3] is not None or found[1]):
            value = found[3] if found[3] is not None else next(waiting, "")
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


def apply(args: argparse.Namespace) -> None:
    """Fill in the arguments that were not given from `args.config` and `args.set`; `args.model` becomes an entry.

    Raises:
        UserError: an unknown override (the nearest name is suggested), or no model that the configuration fits.
    """
    config = read_yaml(args.config) if args.config else {}
    values = dotted(config)
    sizes = _sizes()
    if args.perturbation not in (None, SOFTCFG):  # what the file says of SoftCFG is not meant
        values = {name: value for name, value in values.items() if SAMPLING.get(name) not in OF_SOFTCFG}
    known = {*values, *SAMPLING, *sizes}
    for override in args.set:
        name, equals, text = override.partition("=")
        if name not in known or not equals:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"unknown override {name!r}{hint}")
        values[name] = _parsed(name, text)
    # What is not needed may stand for anything.
    nested = _nested(values)
    values = {
        name: interpolated(nested, name) if name in sizes or name in SAMPLING else values[name] for name in values
    }
    if args.model is None and not args.config:
        raise UserError("MODEL is missing: give a name that 'softcfg models' lists, a model folder, or --config FILE")
    args.model = _entry(args.model, values, args.config)
    for name, argument in SAMPLING.items():
        value = values.get(name)
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
        folders = [Path("weights"), *([Path(args.generator_checkpoint).parent] if args.generator_checkpoint else [])]
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
    """Whether a configuration or an override was given."""
    return bool(args.config or args.set)
