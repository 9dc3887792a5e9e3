"""Fields of dataclasses that are settings.

What a field may be is declared once, at its definition: `strength: float = setting(1.0, low=0, help="...")`. The
checks, the command line, sweeps and the web page are made from that. A field without `setting` is one too if it is a
number, a string or a boolean; it then has no help and no range.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

_METADATA = "setting"
LARGEST = 3.4e38  # settings meet logits in float32, where larger numbers are infinite
MOST_STEPS = 999_999_999
_KINDS: dict[str, type] = {"float": float, "int": int, "bool": bool, "str": str, "tuple[int, int] | None": tuple}


@dataclass(frozen=True)
class Setting:
    """What is known of a setting.

    Attributes:
        name: of the field; unique among all settings.
        kind: float, int, bool, str, or tuple for an interval of two steps (None: all).
        help: what it does, as the command line says it.
        low, high: bounds of a number; `low` itself is excluded where `above` is set.
        off: the value that switches it off, for messages.
        choices: names it must be one of.
        flag: of the command line.
        metavar: what stands for the value in help.
        of_model: whether a model may have a value of its own that suits it.
        released: the name in configurations of the released code.
        shown: bounds of a slider.
        part: for settings of a rule or perturbation, the kind of the part, its name, and the field of its class.
    """

    name: str
    kind: type
    default: Any
    help: str = ""
    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    off: Any = None
    choices: Collection[str] | None = None
    flag: str = ""
    metavar: str | None = None
    of_model: bool = False
    released: str | None = None
    shown: tuple[float, float] | None = None
    part: tuple[str, str, str] | None = None

    @property
    def dest(self) -> str:
        """The attribute in which the command line keeps the value."""
        return self.flag.removeprefix("--").replace("-", "_")

    def check(self, value: Any) -> None:
        """Raise `ValueError` unless `value` is of the kind and in the range; it says what it must be."""
        if isinstance(value, numbers.Real) and _is_too_large(value):
            raise ValueError(f"{self.name} must be at most {LARGEST:g}, the most that float32 holds")
        if not self._fits(value):
            off = "" if self.off is None else f" ({self.off}: off)"
            raise ValueError(f"{self.name} must be {self._wanted()}{off}, got {value!r}")

    def plain(self, value: Any) -> Any:
        """A value that `check` has passed, such as a fraction or one of NumPy's, as a number of Python.

        Whole numbers stay whole where others are allowed: 2 and 2.0 are not one text in the settings of a run.
        """
        if self.kind is tuple:
            return None if value is None else tuple(map(int, value))
        if self.kind in (int, float):
            return int(value) if isinstance(value, numbers.Integral) else float(value)
        return value

    def _fits(self, value: Any) -> bool:
        if self.kind is tuple:
            return value is None or _is_interval(value)
        if self.kind is bool:
            return isinstance(value, bool)
        if self.kind is str:
            return isinstance(value, str) and (self.choices is None or value in self.choices)
        kind = numbers.Integral if self.kind is int else numbers.Real
        if not isinstance(value, kind) or isinstance(value, bool) or not math.isfinite(value):
            return False
        number = float(value)
        return (self.low < number if self.above else self.low <= number) and number <= self.high

    def _wanted(self) -> str:
        if self.kind is tuple:
            return f"two steps 0 <= start <= stop <= {MOST_STEPS:,}"
        if self.kind is bool:
            return "True or False"
        if self.kind is str:
            return "a text" if self.choices is None else f"one of {', '.join(self.choices)}"
        if self.high < math.inf:
            kind = "an integer " if self.kind is int else "a number " if self.off is None else ""
            return f"{kind}in {'(' if self.above else '['}{self.low:g}, {self.high:g}]"
        kind = "an integer" if self.kind is int else "a finite number"
        return kind if self.low == -math.inf else f"{kind} {'>' if self.above else '>='} {self.low:g}"


def setting(default: Any, *, kw_only: bool = False, **known: Any) -> Any:
    """A field of a dataclass that is a setting; the arguments are attributes of `Setting`."""
    return dataclasses.field(default=default, kw_only=kw_only, metadata={_METADATA: known})


def settings_of(owner: type) -> Mapping[str, Setting]:
    """The settings of a dataclass by name; fields of other kinds are left out."""
    return _settings_of(owner)


def require_settings(owner: type) -> None:
    """Raise `ValueError` for the first field of a dataclass that is no setting, and so would be left out of files."""
    for field in dataclasses.fields(owner):
        if field.name not in settings_of(owner):
            kind = field.type.__name__ if isinstance(field.type, type) else field.type
            where = f"{owner.__name__}.{field.name}"
            raise ValueError(f"the setting {where} is of kind {kind}; settings are numbers, texts and booleans")


@functools.cache
def _settings_of(owner: type) -> Mapping[str, Setting]:
    found = {}
    for field in dataclasses.fields(owner):
        kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", "")
        if kind not in _KINDS and not isinstance(field.type, str):
            kind = str(field.type)
        if kind in _KINDS:
            known = {"flag": "--" + field.name.replace("_", "-")} | field.metadata.get(_METADATA, {})
            found[field.name] = Setting(field.name, _KINDS[kind], field.default, **known)
    return found


def check(owner: Any) -> None:
    """Raise `ValueError` for the first setting of a dataclass that is out of its range, and make numbers Python's."""
    for name, known in settings_of(type(owner)).items():
        value = getattr(owner, name)
        known.check(value)
        object.__setattr__(owner, name, known.plain(value))  # of a frozen dataclass


def _is_too_large(value: numbers.Real) -> bool:
    """Whether it is finite and float32 does not hold it."""
    try:
        return LARGEST < abs(float(value)) < math.inf
    except OverflowError:  # of whole numbers and fractions
        return True


def _is_interval(value: Any) -> bool:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        return False
    whole = all(isinstance(step, numbers.Integral) and not isinstance(step, bool) for step in value)
    return whole and 0 <= value[0] <= value[1] <= MOST_STEPS
