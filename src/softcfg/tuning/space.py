"""The search space of a sweep: settings of guidance and sampling, their ranges, and which values come next."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from softcfg.configuration import read_interval
from softcfg.decoding import Sampling
from softcfg.errors import UserError, quote, require_kind, require_name
from softcfg.guidance import CFG, PRESETS, Setting, View, all_settings, compose, describe, settings_of
from softcfg.pipeline import Pipeline

MOST_NUMBERS = 1_000_000  # of a range with a step
SAMPLERS = ("tpe", "random", "grid")
STARTUP = 10  # trials that TPE draws at random before it models what it has seen

PRESET = Setting("preset", str, "paper", choices=PRESETS, flag="--preset")
# Everything that can be searched, by name; what is registered later is there too.
SETTINGS = View(lambda: {PRESET.name: PRESET, **all_settings(), **settings_of(Sampling)})
BOOLEAN_WORDS = {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}
ALL_STEPS = "all"  # the interval None, as a word


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included.

    Attributes:
        step: distance of the numbers, from `low` on; None for all numbers between. Whole numbers have a step of 1.
        log: uniform in the logarithm; excludes a step.

    Raises:
        UserError: there is no such range.
    """

    low: float
    high: float
    step: float | None = None
    log: bool = False

    def __post_init__(self) -> None:
        if not (_is_number(self.low) and _is_number(self.high)) or self.low > self.high:
            raise UserError(f"a range goes from a number to a greater one, got {_short(self.low)}:{_short(self.high)}")
        if self.step is not None and not (_is_number(self.step) and self.step > 0):
            raise UserError(f"the step of a range must be greater than 0, got {_short(self.step)}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise UserError("a logarithmic range starts above 0 and has no step")

        if self.step is not None and (self.high - self.low) / self.step >= MOST_NUMBERS:
            raise UserError(
                f"a range holds at most {MOST_NUMBERS:,} numbers, which {_text(self)} exceeds; give a larger step, or "
                "none for all numbers between"
            )

    def numbers(self) -> list[float]:
        """The numbers of a range with a step."""
        assert self.step is not None
        return [self._number(i, self.step) for i in range(self._steps(self.step) + 1)]

    def last(self, step: float) -> float:
        """The greatest number of the range that is a multiple of `step` away from its start."""
        return self._number(self._steps(step), step)

    def _steps(self, step: float) -> int:
        return math.floor((self.high - self.low) / step + 1e-9)

    def _number(self, place: int, step: float) -> float:
        return round(self.low + place * step, 12)


Values = Range | Sequence[Any]


def parse_search(words: Sequence[str]) -> dict[str, Values]:
    """Read "NAME=LOW:HIGH", "NAME=LOW:HIGH:STEP", "NAME=LOW:HIGH:log" and "NAME=VALUE,VALUE,...".

    Raises:
        UserError: a word is none of these, or there is no such setting.
    """
    search: dict[str, Values] = {}
    for word in words:
        name, equals, text = word.partition("=")
        name = setting_named(name)
        if not equals or not text.strip():
            raise UserError(f"{word!r} does not say where to search; write {name}=LOW:HIGH or {name}=VALUE,VALUE")
        if name in search:
            raise UserError(f"{name} is searched twice")
        parts = [part.strip() for part in text.split(":")]
        if len(parts) == 1:
            search[name] = [parse_value(name, part.strip()) for part in text.split(",")]
        elif SETTINGS[name].kind in (int, float) and len(parts) <= 3:
            low, high = (parse_value(name, part) for part in parts[:2])
            log = parts[2:] == ["log"]
            search[name] = Range(low, high, parse_value(name, parts[2]) if len(parts) == 3 and not log else None, log)
        else:
            raise UserError(f"{word!r} is not a search; write {name}=VALUE,VALUE,... or, of numbers, {name}=LOW:HIGH")
    return search


def setting_named(name: str) -> str:
    """The setting called `name`, or like the flag of `softcfg sample` called `name`; raises `UserError`."""
    require_kind(name, "the name of a setting", str)
    name = name.strip().lstrip("-").replace("-", "_")
    known = {setting.dest: setting.name for setting in SETTINGS.values()} | {name: name for name in SETTINGS}
    return known[require_name(name, known, "there is no setting named")]


def parse_value(name: str, text: str) -> Any:
    """A value of the setting `name` from its text, as flags of `softcfg sample` have it; raises `UserError`."""
    kind = SETTINGS[name].kind
    if kind is tuple:
        try:
            return None if text == ALL_STEPS else read_interval(text)
        except ValueError as error:
            raise UserError(f"{name}: {error}; or write {ALL_STEPS}") from error
    if kind is bool:
        if text.lower() not in BOOLEAN_WORDS:
            raise UserError(f"{name} must be on or off, got {text!r}")
        return BOOLEAN_WORDS[text.lower()]
    try:
        return kind(text)
    except ValueError as error:
        raise UserError(f"{name} must be {'a whole number' if kind is int else 'a number'}, got {text!r}") from error


def format_value(value: Any) -> str:
    """A value as text that `parse_value` reads back to the last bit."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None:
        return ALL_STEPS
    return "-".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def methods(pipeline: Pipeline, settings: Mapping[str, Any]) -> tuple[CFG, Sampling]:
    """Guidance and sampling with `settings` on top of what suits the model.

    Raises:
        UserError: a value is out of its range.
    """
    known = dict(SETTINGS)
    # 2 and 2.0 are one value, but not one text in the settings of a run.
    chosen: dict[str, Any] = {
        name: float(value) if name in known and known[name].kind is float and type(value) is int else value
        for name, value in settings.items()
    }
    preset = str(chosen.pop("preset", PRESET.default))
    require_name(preset, PRESETS, "there is no preset named")
    sampling = {name: chosen.pop(name) for name in settings_of(Sampling) if name in chosen}
    # A search over rules has settings of each; a trial has those of its own.
    guidance = pipeline.default_guidance(compose, preset=preset, drop_unused=True, **chosen)
    pipeline.check_guidance(guidance, pipeline.num_tokens())
    return guidance, pipeline.sampling(**sampling)


def sample_flags(guidance: CFG, sampling: Sampling) -> list[str]:
    """The flags with which `softcfg sample` uses these methods, whatever the model's own settings are."""
    words: list[str] = []
    known, values = dict(SETTINGS), {**describe(guidance), **dataclasses.asdict(sampling)}
    if values.pop("method") != "SoftCFG":
        values.setdefault("perturbation", "none")
    for name, value in values.items():
        flag = known[name].flag
        if value == known[name].default and not known[name].of_model:
            continue
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words += [flag, format_value(value)]
    return words


class Space:
    """The settings that are searched, as Optuna knows them.

    Attributes:
        search: the values of each setting.
        distributions: the same for Optuna; a value that Optuna cannot store is stored as text.
    """

    def __init__(self, search: Mapping[str, Values]) -> None:
        """Check the settings.

        Raises:
            UserError: there is nothing to search, or no such setting.
        """
        require_kind(search, "the search", Mapping)
        self.search = {setting_named(name): values for name, values in search.items()}
        if not self.search:
            raise UserError("there is nothing to search; name a setting and its values, such as guidance_scale=2:16")
        self.distributions = {name: _distribution(name, values) for name, values in self.search.items()}

    def describe(self) -> dict[str, str]:
        """The search as `parse_search` reads it."""
        return {name: _text(values) for name, values in self.search.items()}

    def settings(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of a trial whose parameters Optuna stored as `params`."""
        return {
            name: parse_value(name, params[name]) if SETTINGS[name].kind is tuple else params[name]
            for name in self.search
        }

    def check_parts(self, fixed: Mapping[str, Any]) -> None:
        """Raise `UserError` for a setting, searched or fixed, of a rule or perturbation that no trial can have."""
        known = dict(SETTINGS)
        for name in (*self.search, *fixed):
            if (part := known[name].part) is None:
                continue
            kind, entry, _ = part
            searched = self.search.get(kind, [fixed.get(kind, known[kind].default)])
            if isinstance(searched, Range) or entry not in searched:
                raise UserError(f"{name} is a setting of the {kind} {entry}, which no trial has; add {kind}={entry}")

    def corners(self) -> Iterator[dict[str, Any]]:
        """Every listed value and every end of a range, one setting at a time, with the rule it needs."""
        for name, values in self.search.items():
            part = SETTINGS[name].part
            for value in (values.low, values.high) if isinstance(values, Range) else values:
                yield {name: value} if part is None else {name: value, part[0]: part[1]}

    def grid(self) -> list[list[Any]]:
        """The values of each setting, as Optuna stores them.

        Raises:
            UserError: a setting has no finite number of values.
        """
        lists: list[list[Any]] = []
        for name, distribution in self.distributions.items():
            values = self.search[name]
            if isinstance(distribution, CategoricalDistribution):
                lists.append(list(distribution.choices))
            elif isinstance(values, Range) and values.step is not None:
                lists.append([SETTINGS[name].kind(number) for number in values.numbers()])
            else:
                raise UserError(f"a grid needs a step or a list, such as {name}={_text(values)}:STEP or {name}=A,B,C")
        return lists

    def propose(
        self, sampler: str, seed: int, number: int, trials: Sequence[FrozenTrial], *, minimize: bool
    ) -> dict[str, Any]:
        """The parameters of trial `number`: a function of the arguments alone, whichever process asks and when.

        Args:
            sampler: one of `SAMPLERS`.
            trials: the other trials, for TPE: those that are finished, and those at work whose parameters are set.
        """
        if sampler == "grid":
            point = {}
            for name, values in reversed(list(zip(self.distributions, self.grid(), strict=True))):
                number, place = divmod(number, len(values))
                point[name] = values[place]
            return point
        # Random numbers of the trial's own, not of a process: a trial that is begun again gets the same.
        own = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        with quiet():
            method: optuna.samplers.BaseSampler = optuna.samplers.RandomSampler(own)
            if sampler == "tpe":
                method = optuna.samplers.TPESampler(
                    seed=own, multivariate=True, constant_liar=True, n_startup_trials=STARTUP
                )
            study = optuna.create_study(direction="minimize" if minimize else "maximize", sampler=method)
            if sampler == "tpe":
                study.add_trials([_copy(trial) for trial in trials if self._is_known(trial)])
            return study.ask(self.distributions).params

    def store(self, trial: Trial, params: Mapping[str, Any]) -> None:
        """Give a trial its parameters."""
        for name, distribution in self.distributions.items():
            stored = distribution.to_internal_repr(params[name])
            trial.storage.set_trial_param(trial._trial_id, name, stored, distribution)

    def _is_known(self, trial: FrozenTrial) -> bool:
        states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
        return trial.state in states and trial.distributions == self.distributions


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence Optuna's notes on every study and every experimental option."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)


def _distribution(name: str, values: Values) -> BaseDistribution:
    if isinstance(values, Range):
        if SETTINGS[name].kind is float:
            high = values.high if values.step is None else values.last(values.step)
            return FloatDistribution(values.low, high, log=values.log, step=values.step)
        if SETTINGS[name].kind is not int:
            raise UserError(f"{name} is not a number; list its values, such as {name}=A,B")
        if any(int(number) != number for number in (values.low, values.high, values.step or 1)):
            raise UserError(f"{name} takes whole numbers, got the range {_text(values)}")
        step = int(values.step or 1)
        low, high = int(values.low), int(values.high)
        return IntDistribution(low, high - (high - low) % step, values.log, step)
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise UserError(f"the values of {name} must be a Range or a list, got {quote(values)}")
    stored = [format_value(value) if SETTINGS[name].kind is tuple else value for value in values]
    if not all(value is None or isinstance(value, (str, int, float)) for value in stored):
        raise UserError(f"the values of {name} must be numbers or words, got {quote(values)}")
    if len(set(stored)) < len(stored):
        raise UserError(f"{name} lists a value twice: {_text(values)}")
    return CategoricalDistribution(stored)


def _text(values: Values) -> str:
    if not isinstance(values, Range):
        return ",".join(map(format_value, values))
    end = ":log" if values.log else "" if values.step is None else f":{values.step}"
    return f"{values.low}:{values.high}{end}"


def _is_number(value: object) -> bool:
    """Whether a value is a finite number that a float can be."""
    known = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    return known and bool(abs(value) <= sys.float_info.max)  # type: ignore[arg-type]


def _short(value: object) -> str:
    """What should be a number, for a message, however large it is."""
    return f"{value:g}" if _is_number(value) else quote(value)


def _copy(trial: FrozenTrial) -> FrozenTrial:
    """What a proposal may depend on: not the number and the times of a trial."""
    names = ("state", "value", "params", "distributions", "intermediate_values")
    return create_trial(**{name: getattr(trial, name) for name in names})
