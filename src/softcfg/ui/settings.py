"""What a drawing is made of: the methods of guidance, the settings, their ranges and their links."""

from __future__ import annotations

import math
import urllib.parse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from softcfg.decoding import Sampling
from softcfg.errors import UserError
from softcfg.guidance import CFG, PERTURBATIONS, RULES, SoftCFG, View, compose, settings_of, titled
from softcfg.pipeline import Pipeline


class Method(NamedTuple):
    """How the page names a method, and what it says of it in one line."""

    title: str
    line: str


def _methods_by_key() -> dict[str, Method]:
    """All methods: those of the package, and what is registered besides as PERTURBATION+RULE."""
    known = {
        "none": Method("No guidance", "the conditional branch alone"),
        "cfg": Method("CFG", "plain guidance by two branches"),
        "softcfg": Method("SoftCFG", "as the paper defines it"),
        "released": Method("SoftCFG (released code)", "as the released code computes it"),
    }
    rules = [rule for rule in RULES if rule != "cfg"]
    for rule in rules:
        known[f"none+{rule}"] = Method(titled(PERTURBATIONS["none"], RULES[rule]), RULES.description(rule))
    for weak in PERTURBATIONS:
        if weak not in ("none", "softcfg"):
            title, line = titled(PERTURBATIONS[weak], RULES["cfg"]), PERTURBATIONS.description(weak)
            known[f"{weak}+cfg"] = Method(title, f"unconditional branch: {line}")
    for rule in rules:
        title = titled(PERTURBATIONS["softcfg"], RULES[rule])
        known[f"softcfg+{rule}"] = Method(title, "the rule, with the weights of SoftCFG")
    return known


METHODS = View(_methods_by_key)


@dataclass(frozen=True)
class Settings:
    """All that decides the images of one drawing; every method draws the same subject from the same seeds.

    Attributes:
        subject: a class id, or the prompt of a model that takes prompts.
        negative_prompt: what the unconditional branch reads, of models where it reads a text.
        width, height: in pixels, of models that draw images of any size.
        methods: keys of `METHODS`.
        strength, step_norm: of the SoftCFG methods.
        seed: the first of them.
        seeds: how many; each method draws a picture from each.
    """

    model: str
    subject: int | str
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    methods: tuple[str, ...] = ("cfg", "softcfg")
    scale: float = CFG.guidance_scale
    power: float = CFG.guidance_scale_pow
    schedule: str = CFG.schedule
    strength: float = SoftCFG.strength
    step_norm: bool = SoftCFG.step_norm
    temperature: float = Sampling.temperature
    top_k: int = Sampling.top_k
    seed: int = 0
    seeds: int = 1

    @property
    def pictures(self) -> list[tuple[str, int]]:
        """Method and seed of each picture, as they are laid out: a method after the other."""
        return [(method, self.seed + number) for method in self.methods for number in range(self.seeds)]

    @property
    def uses_power(self) -> bool:
        """Whether the schedule depends on the power."""
        scales = [CFG(4.0, power, self.schedule).scales(8) for power in (1.0, 2.0)]
        return bool((scales[0] != scales[1]).any())

    def describe(self) -> dict[str, Any]:
        """The settings by name, without those that the model does not have."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def query(self) -> str:
        """The settings as the query of a link; numbers come back to the last bit."""
        values = self.describe()
        values["methods"] = ",".join(self.methods)
        values["step_norm"] = int(self.step_norm)
        return urllib.parse.urlencode(values)

    def guidance(self, method: str, pipeline: Pipeline) -> CFG:
        """The guidance of one of the methods."""
        numbers: dict[str, Any] = {
            "guidance_scale": self.scale,
            "guidance_scale_pow": self.power,
            "schedule": self.schedule,
        }
        if method == "none":
            return pipeline.default_guidance(CFG, guidance_scale=1.0)
        if method == "cfg":
            return pipeline.default_guidance(CFG, **numbers)
        preset = "released" if method == "released" else None
        perturbation, _, rule = method.partition("+")
        parts = {"perturbation": perturbation, "rule": rule} if rule else {}
        if parts.get("perturbation", "softcfg") == "softcfg":
            numbers |= {"strength": self.strength, "step_norm": self.step_norm}
        return pipeline.default_guidance(compose, preset=preset, **parts, **numbers)


_SHOWN = {name: known.shown for kind in (SoftCFG, Sampling) for name, known in settings_of(kind).items() if known.shown}
RANGES: dict[str, tuple[float, float]] = {  # of the settings that are numbers
    "scale": _SHOWN["guidance_scale"],
    "power": _SHOWN["guidance_scale_pow"],
    "strength": _SHOWN["strength"],
    "temperature": _SHOWN["temperature"],
    "top_k": (0, 2**20),
    "width": (1, 2**14),
    "height": (1, 2**14),
    "seed": (0, 2**32 - 1),
    "seeds": (1, 8),
}
NAMES = {"seeds": "number of seeds", "top_k": "top-k"}  # of settings, where the field's is no word


def check_methods(values: Any) -> tuple[str, ...]:
    """The methods in the order of the list; raises `UserError` where there is none, or one that is not known."""
    if not isinstance(values, Sequence) or not values:
        raise UserError("Choose at least one method.")
    for value in values:
        if not isinstance(value, str) or value not in METHODS:
            raise UserError(f"There is no method {value!r} here; choose from the list.")
    return tuple(method for method in METHODS if method in values)


def check_number(key: str, value: Any) -> float | int:
    """A setting as a number of its kind; raises `UserError`. Links hold text, forms may hold 3 for 3.0."""
    low, high = RANGES[key]
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    whole = isinstance(low, int)
    if not low <= number <= high or (whole and number != int(number)):
        kind = "a whole number" if whole else "a number"
        raise UserError(f"The {NAMES.get(key, key)} must be {kind} from {low:g} to {high:.0f}, not {value!r}.")
    return int(number) if whole else number
