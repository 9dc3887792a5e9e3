"""Model configurations: dataclasses read from mappings and YAML files in the layout of the released code."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from softcfg.errors import UserError, clean, quote, suggestion, user_errors
from softcfg.files import read_text, reading
from softcfg.interpolation import interpolated

ConfigT = TypeVar("ConfigT")
LARGEST_YAML = 1 << 18  # bytes
MOST_VALUES = 100_000  # in a YAML text
MOST_LEVELS = 100  # of brackets within brackets in it
LARGEST_INTEGER = 1 << 31  # in a configuration

ConfigSource = Any  # a dataclass instance, a mapping, or a path to a YAML file


class _Loader(yaml.SafeLoader):
    """A loader that gives up deep nesting at once: its time grows with the square of the levels."""

    def fetch_flow_collection_start(self, *token: Any) -> None:
        if self.flow_level >= MOST_LEVELS:
            raise RecursionError
        super().fetch_flow_collection_start(*token)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping; raises `UserError` if it is anything else."""
    with reading(path, what="configuration file "):
        text = read_text(path, LARGEST_YAML)
    try:
        content = parse_yaml(text)
    except UserError as error:
        raise UserError(f"configuration file {path} {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"configuration file {path} must hold a mapping of names to values")
    return content


def parse_yaml(text: str) -> Any:
    """Return the plain values in a YAML text.

    Raises:
        UserError: it is not valid YAML, or holds more than `MOST_VALUES` values; an alias counts as all it stands for.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            _count_values(node, {})
            return None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except UserError:
        raise
    except RecursionError as error:
        raise UserError("is not valid YAML: it is nested too deeply") from error
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, KeyError, AttributeError, IndexError) as error:
        raise UserError(f"is not valid YAML: {' '.join(str(error).split())}") from error


def _count_values(node: yaml.Node | None, counted: dict[int, int]) -> int:
    """How many values a node stands for; `counted` has those of the nodes seen so far, 0 while at work on one."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in counted:
        counted[id(node)] = 0
        if isinstance(node, yaml.MappingNode):
            _refuse_doubled_keys(node)
        children = (
            [child for pair in node.value for child in pair] if isinstance(node, yaml.MappingNode) else node.value
        )
        counted[id(node)] = 1 + sum(_count_values(child, counted) for child in children)
    elif not counted[id(node)]:
        raise UserError("is not valid YAML: a value contains itself")
    if counted[id(node)] > MOST_VALUES:
        raise UserError(f"holds more than {MOST_VALUES:,} values, the limit; an alias counts as all it stands for")
    return counted[id(node)]


def _refuse_doubled_keys(node: yaml.MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            if (key.tag, key.value) in seen:
                raise UserError(
                    f"is not valid YAML: it says {quote(key.value)} twice, again in line {key.start_mark.line + 1}"
                )
            seen.add((key.tag, key.value))


def read_interval(text: str) -> tuple[int, int]:
    """The two steps of START-STOP; raises `ValueError` if `text` is anything else."""
    steps = re.fullmatch(r"([0-9]{1,9})-([0-9]{1,9})", text)
    if not steps:
        raise ValueError(f"{quote(text)} is not START-STOP, two steps such as 32-192")
    return int(steps[1]), int(steps[2])


def load_config(
    config_type: type[ConfigT], source: ConfigSource, sections: Sequence[str] = ("model.vq_model", "model.generator")
) -> ConfigT:
    """Build `config_type` (a dataclass) from an instance of it, a mapping, or the path of a YAML file.

    `${a.b}` and `${oc.env:NAME}` mean what they mean to OmegaConf (see `softcfg.interpolation`).
    A mapping is either flat (field name -> value) or in the released layout, where the fields stand in
    `sections` (dotted paths, a later section overrides an earlier one) and everything else is ignored.
    Unknown names inside a flat mapping are ignored with a warning, since released files carry training
    settings too.

    Raises:
        UserError: a required field is missing, or a value has the wrong type or range; the field is named.
    """
    if isinstance(source, config_type):
        return source
    if isinstance(source, (str, Path)):
        source = read_yaml(source)
    if dataclasses.is_dataclass(source) and not isinstance(source, type):
        source = dataclasses.asdict(source)
    if not isinstance(source, Mapping):
        raise UserError(
            f"config must be a {config_type.__name__}, a mapping or the path of a YAML file, "
            f"got {type(source).__name__}"
        )
    values = _flatten(source, sections) if "model" in source else {name: (source, name) for name in source}
    if strange := [name for name in values if not isinstance(name, str)]:
        raise UserError(f"the names of config fields are texts, got {quote(strange[0])}")

    fields = {field.name: field for field in dataclasses.fields(config_type)}  # type: ignore[arg-type]
    types_of = typing.get_type_hints(config_type)
    if "model" not in source:
        _warn_unknown(set(values) - set(fields), fields, config_type)
    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(
            f"{config_type.__name__} needs {', '.join(missing)}; found {clean(', '.join(values), 300) or 'nothing'}"
        )
    given = {name: interpolated(*values[name]) for name in fields if name in values}
    checked = {name: _coerce(name, value, types_of[name]) for name, value in given.items()}
    with user_errors():
        return config_type(**checked)


def dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings: {"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat.update(dotted(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value})
    return flat


def _flatten(source: Mapping[str, Any], sections: Sequence[str]) -> dict[str, tuple[Mapping[str, Any], str]]:
    """Where each field stands: the mapping and its dotted name there."""
    values: dict[str, tuple[Mapping[str, Any], str]] = {}
    for section in sections:
        node: Any = source
        for part in section.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        if node is None:
            continue
        if not isinstance(node, Mapping):
            raise UserError(f"config section {section} must be a mapping, got {quote(node)}")
        values.update({name: (source, f"{section}.{name}") for name in node})
    return values


def _warn_unknown(names: set[str], fields: Mapping[str, Any], config_type: type) -> None:
    # Only a likely misspelling of a field is worth a word: released files hold many names that we do not need.
    for name in sorted(names):
        hint = suggestion(name, fields, most=1, cutoff=0.85)
        if hint:
            warnings.warn(f"{config_type.__name__} has no field {quote(name)} ({hint}); it is ignored", stacklevel=3)


def _coerce(name: str, value: Any, expected: Any) -> Any:
    """Return `value` as the annotated type `expected`, where that loses nothing."""
    arguments = typing.get_args(expected)
    if typing.get_origin(expected) in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _coerce(name, value, next(kind for kind in arguments if kind is not type(None)))
    if typing.get_origin(expected) is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(_coerce(f"{name}[{i}]", item, arguments[0]) for i, item in enumerate(value))
        raise UserError(f"config field {name} must be a list, got {quote(value)}")
    if typing.get_origin(expected) is dict:
        if isinstance(value, Mapping):
            return {str(key): _coerce(f"{name}.{key}", item, arguments[1]) for key, item in value.items()}
        raise UserError(f"config field {name} must be a mapping, got {quote(value)}")
    if expected is bool and isinstance(value, bool):
        return value
    if expected is str and isinstance(value, str):
        return value
    if expected is int and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) > LARGEST_INTEGER:
            raise UserError(f"config field {name} must be at most {LARGEST_INTEGER:,}, got {quote(value)}")
        return value
    if expected is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        # YAML 1.1 reads "1e-5", without a dot, as a string.
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    kind = {int: "an integer", float: "a finite number", bool: "true or false", str: "a string"}[expected]
    raise UserError(f"config field {name} must be {kind}, got {quote(value)}")


def require_positive(config: Any, *names: str) -> None:
    """Raise `ValueError` naming the first of the fields `names` that is not greater than zero."""
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"config field {name} must be greater than 0, got {getattr(config, name)!r}")


def require_multiple(config: Any, *pairs: tuple[str, str]) -> None:
    """Raise `ValueError` for the first pair of fields of which the one is no multiple of the other."""
    for whole, part in pairs:
        if getattr(config, whole) % getattr(config, part):
            raise ValueError(f"{whole} {getattr(config, whole)} must be a multiple of {part} {getattr(config, part)}")
