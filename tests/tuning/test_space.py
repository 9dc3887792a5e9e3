import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from softcfg import CFG, Pipeline, Sampling, SoftCFG, UserError
from softcfg.cli import arguments
from softcfg.cli.main import build_parser
from softcfg.tuning import SETTINGS, Range, Space, parse_search
from softcfg.tuning.space import methods, sample_flags


@pytest.fixture(scope="module")
def pipeline(model_folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(model_folder)


def test_the_command_lines_words() -> None:
    words = [
        "guidance_scale=2:16", "--softcfg-strength=0:2:0.5", "temperature=0.5:2:log", "top-k=0:100:10",
        "confidence=max,entropy", "step-norm=on,off", "interval=all,0-8", "floor=0.05", "preset=paper,released",
    ]  # fmt: skip
    assert parse_search(words) == {
        "guidance_scale": Range(2.0, 16.0),
        "strength": Range(0.0, 2.0, 0.5),
        "temperature": Range(0.5, 2.0, log=True),
        "top_k": Range(0, 100, 10),
        "confidence": ["max", "entropy"],
        "step_norm": [True, False],
        "interval": [None, (0, 8)],
        "floor": [0.05],
        "preset": ["paper", "released"],
    }
    assert parse_search([f"{name}={text}" for name, text in Space(parse_search(words)).describe().items()]) == (
        parse_search(words)
    )


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("guidance_scales=1:2", "no setting named 'guidance_scales'; did you mean guidance_scale"),
        ("guidance_scale", "does not say where to search; write guidance_scale=LOW:HIGH"),
        ("guidance_scale=a:3", "guidance_scale must be a number, got 'a'"),
        ("guidance_scale=3:1", "from a number to a greater one, got 3:1"),
        ("guidance_scale=1:inf", "from a number to a greater one, got 1:inf"),
        ("guidance_scale=1:2:0", "the step of a range must be greater than 0, got 0"),
        ("guidance_scale=0:2:log", "a logarithmic range starts above 0"),
        ("guidance_scale=1:2:3:4", "write guidance_scale=VALUE,VALUE"),
        ("confidence=max:entropy", "'confidence=max:entropy' is not a search"),
        ("confidence=max,max", "confidence lists a value twice: max,max"),
        ("top_k=0.5:3", "top_k must be a whole number, got '0.5'"),
        ("step_norm=maybe", "step_norm must be on or off, got 'maybe'"),
        ("interval=3", "interval: '3' is not START-STOP, two steps such as 32-192; or write"),
    ],
)
def test_words_that_mean_nothing(word: str, text: str) -> None:
    with pytest.raises(UserError, match=r"^[^\n]*$") as caught:
        Space(parse_search([word]))
    assert text in str(caught.value)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("word", "text"),
    [
        (
            "guidance_scale=1:2:1e-30",
            "a range holds at most 1,000,000 numbers, which 1.0:2.0:1e-30 exceeds; give a lar",
        ),
        ("guidance_scale=0:1e300:0.5", "a range holds at most 1,000,000 numbers"),
        ("top_k=0:99999999999:2", "a range holds at most 1,000,000 numbers"),
        (f"top_k=0:{'9' * 400}", "a range goes from a number to a greater one, got 0:9999"),
        ("guidance_scale=1:2:1e999", "the step of a range must be greater than 0, got inf"),
    ],
)
def test_no_endless_list_is_made(word: str, text: str) -> None:
    with pytest.raises(UserError, match=r"^[^\n]*$") as caught:
        Space(parse_search([word]))
    assert text in str(caught.value)


@pytest.mark.timeout(20)
def test_a_range_of_many_whole_numbers_is_no_list() -> None:
    space = Space(parse_search(["top_k=1:99999999999"]))
    assert 1 <= space.propose("random", 0, 0, [], minimize=True)["top_k"] <= 99_999_999_999
    assert space.distributions["top_k"].high == 99_999_999_999  # type: ignore[attr-defined]
    assert Space({"top_k": Range(3, 100, 10)}).distributions["top_k"].high == 93  # type: ignore[attr-defined]
    assert Space({"strength": Range(0.5, 2.2, 0.5)}).distributions["strength"].high == 2.0  # type: ignore[attr-defined]


def test_a_setting_is_searched_once() -> None:
    with pytest.raises(UserError, match="strength is searched twice"):
        parse_search(["strength=0:1", "softcfg-strength=0,1"])
    with pytest.raises(UserError, match="nothing to search"):
        Space({})
    with pytest.raises(UserError, match="confidence is not a number; list its values"):
        Space({"confidence": Range(0, 1)})
    for values, text in (("max", "'max'"), (5, "5"), (None, "None"), ([], r"\[\]")):
        with pytest.raises(UserError, match=f"must be a Range or a list, got {text}"):
            Space({"confidence": values})  # type: ignore[dict-item]
    with pytest.raises(UserError, match=r"values of guidance_scale must be numbers or words, got \[\[1\]\]"):
        Space({"guidance_scale": [[1]]})
    with pytest.raises(UserError, match="the search must be a Mapping, got 'guidance_scale'"):
        Space("guidance_scale")  # type: ignore[arg-type]


@pytest.mark.parametrize("bounds", [("a", 2), (1, None), (True, 2), (1, 2, "a"), (1, 2, 0), ([1], 2)])
def test_a_range_is_of_numbers(bounds: tuple[Any, ...]) -> None:
    with pytest.raises(UserError, match=r"^(a range goes from a number to a greater one|the step of a range must be)"):
        Range(*bounds)


def test_every_setting_can_be_searched_and_reaches_the_methods(pipeline: Pipeline) -> None:
    values: dict[str, Any] = {
        "guidance_scale": 7, "guidance_scale_pow": 2.0, "schedule": "linear", "interval": (2, 9),
        "confidence": "margin", "step_norm": False, "strength": 0.1 + 0.2, "floor": 0.01, "eps": 1e-3, "target": "both",
        "alignment": "successor", "temperature": 1.1, "top_k": 7, "top_p": 0.9, "entropy_gain": 2.5,
        "entropy_decay": 4.0, "entropy_base": 0.5, "entropy_top_p": 0.6, "min_candidates": 3,
        "perturbation_scale": 1.5, "weak_share": 0.0,
    }  # fmt: skip
    fields = [field.name for kind in (SoftCFG, Sampling) for field in dataclasses.fields(kind)]
    assert sorted(fields) == sorted([*values, "rule", "perturbation"])
    of_parts = [name for name, setting in SETTINGS.items() if setting.part and setting.part[1] != "softcfg"]
    assert sorted(SETTINGS) == sorted([*values, *of_parts, "preset", "rule", "perturbation"])
    guidance, sampling = methods(pipeline, values)
    for name, value in values.items():
        assert getattr(guidance if hasattr(guidance, name) else sampling, name) == value
        space = Space({name: [value]})
        params = space.propose("random", 0, 0, [], minimize=True)
        assert space.settings(params) == {name: value}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"guidance_scale": 1 / 3, "strength": 0.1 + 0.2, "floor": 1e-7, "eps": 1e-5, "step_norm": False},
        {"preset": "released", "guidance_scale": 9, "temperature": 1},
        {"preset": "released", "step_norm": False},
        {"interval": (3, 12), "schedule": "constant", "top_k": 5, "top_p": 0.25, "target": "key"},
        {"confidence": "margin", "alignment": "successor", "temperature": 2.5, "guidance_scale_pow": 0.0},
    ],
)
def test_flags_say_all_to_the_last_bit(pipeline: Pipeline, settings: dict[str, Any]) -> None:
    guidance, sampling = methods(pipeline, settings)
    args = build_parser().parse_args(["sample", "any", *sample_flags(guidance, sampling)])
    other = Pipeline(pipeline.generator, pipeline.tokenizer, sampling_defaults={"temperature": 3, "guidance_scale": 8})
    assert arguments.guidance_from(args, other) == guidance
    assert arguments.sampling_from(args, other) == sampling


def test_a_value_out_of_range_is_refused(pipeline: Pipeline) -> None:
    with pytest.raises(UserError, match="floor must be a number in"):
        methods(pipeline, {"floor": 2})
    with pytest.raises(UserError, match="did you mean paper"):
        methods(pipeline, {"preset": "papers"})


def test_a_grid_is_every_combination_in_turn() -> None:
    space = Space(parse_search(["guidance_scale=1:2:0.5", "confidence=max,margin", "top_k=0:7:3"]))
    points = [space.settings(space.propose("grid", 0, number, [], minimize=True)) for number in range(18)]
    expected = itertools.product([1.0, 1.5, 2.0], ["max", "margin"], [0, 3, 6])
    assert [tuple(point[name] for name in space.search) for point in points] == list(expected)
    with pytest.raises(UserError, match=r"such as eps=0\.0:1\.0:STEP or eps=A,B,C"):
        Space({"eps": Range(0.0, 1.0)}).grid()


def finished(space: Space, params: dict[str, Any], value: float) -> FrozenTrial:
    return create_trial(params=params, distributions=space.distributions, value=value)


SPACE = Space({"guidance_scale": Range(0.0, 10.0), "confidence": ["max", "margin"]})


def loss(params: dict[str, Any]) -> float:
    return (params["guidance_scale"] - 3) ** 2 + 4 * (params["confidence"] == "max")


def history(sampler: str, count: int, seed: int = 0, sign: int = 1) -> list[FrozenTrial]:
    trials: list[FrozenTrial] = []
    for number in range(count):
        params = SPACE.propose(sampler, seed, number, trials, minimize=sign > 0)
        trials.append(finished(SPACE, params, sign * loss(params)))
    return trials


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_proposals_depend_on_seed_number_and_history_alone(sampler: str) -> None:
    trials = history(sampler, 14)
    np.random.seed(1)
    assert [trial.params for trial in history(sampler, 14)] == [trial.params for trial in trials]
    again = [SPACE.propose(sampler, 0, number, trials[:number], minimize=True) for number in (13, 5, 12, 0)]
    assert again == [trials[number].params for number in (13, 5, 12, 0)]
    assert len({trial.params["guidance_scale"] for trial in trials}) == 14
    assert trials[3].params != history(sampler, 4, seed=1)[3].params


@pytest.mark.parametrize("sign", [1, -1])
def test_tpe_learns_in_both_directions(sign: int) -> None:
    def late(sampler: str) -> float:
        return float(np.mean([loss(trial.params) for trial in history(sampler, 40, sign=sign)[25:]]))

    assert late("tpe") < late("random") / 2


def test_tpe_keeps_away_from_trials_at_work() -> None:
    trials = history("tpe", 25)
    alone = SPACE.propose("tpe", 0, 25, trials, minimize=True)
    at_work = create_trial(state=TrialState.RUNNING, params=alone, distributions=SPACE.distributions)
    bare = create_trial(state=TrialState.RUNNING)
    assert SPACE.propose("tpe", 0, 25, [*trials, bare], minimize=True) == alone
    assert SPACE.propose("tpe", 0, 25, [*trials, *[at_work] * 10], minimize=True) != alone


def test_methods_are_softcfg_unless_their_strength_is_zero(pipeline: Pipeline) -> None:
    guidance, _ = methods(pipeline, {"strength": 0})
    assert isinstance(guidance, CFG)
    assert not guidance.perturbs
