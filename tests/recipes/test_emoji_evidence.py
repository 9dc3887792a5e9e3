"""What guidance does on the text-to-image model: which points there are, how each is measured, and the report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from recipes.emoji import captions, evidence, train, train_generator, train_tokenizer
from recipes.emoji.colours import COLOURS, HUES
from recipes.emoji.data import Collection, Picture
from recipes.emoji.evaluate import chosen, right
from recipes.emoji.evidence import METHODS, SCALES, Laboratory, Plan, at, measure
from recipes.emoji.evidence_report import PICTURES, report
from recipes.emoji.sources import STYLES
from recipes.emoji.train_judge import judge_of, wanted
from recipes.study.points import NONE, TUNING_SEED, key
from softcfg import CFG, Pipeline, UserError, evaluation
from softcfg.evaluation.emoji_judge import VIEWS, agreement, load_judge, look
from softcfg.guidance import describe

SMALL = Plan(samples=20, seeds=2, temperatures=(0.7,))


@pytest.fixture(scope="module")
def collection() -> Collection:
    """Two names in all styles, one pair held out; one of them recoloured, one colour held out. Squares on white."""
    pictures = [
        Picture(name, (), style.word, word, False, "style" if (name, i) == ("leaf", 0) else "", subject)
        for subject, (name, word) in enumerate({"ball": "red", "leaf": "green"}.items())
        for i, style in enumerate(STYLES)
    ]
    pictures += [
        Picture("leaf", (), "flat", word, True, "colour" if word == "blue" else "", 1)
        for word in HUES
        if word != "green"
    ]
    pixels = np.full((len(pictures), 96, 96, 3), 255, np.uint8)
    pixels[:, 24:72, 24:72] = np.random.default_rng(0).integers(200, size=(len(pictures), 1, 1, 3))
    return Collection(pictures, pixels, ["ball", "leaf"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, collection: Collection) -> str:
    """A model folder of random weights, with its judge."""
    folder = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        patch.setattr(train_generator, "CONFIG", replace(train_generator.CONFIG, **sizes, num_codes=16))
        patch.setattr(
            train_tokenizer, "CONFIG", replace(train_tokenizer.CONFIG, ch_mult=(1, 1, 1, 1), n_embed=16, resolution=96)
        )
        judge = judge_of(collection)
        parts = {
            "generator": train_generator.Lumina(train_generator.CONFIG),
            "tokenizer": train_tokenizer.MoVQ(train_tokenizer.CONFIG),
            "judge": judge,
        }
        for name, module in parts.items():
            save_file(
                {name: weight.contiguous() for name, weight in module.state_dict().items()},
                folder / f"{name}.safetensors",
            )
        captions.text_tokenizer(collection.pictures).save(str(folder / "tokenizer.json"))
        words = {"names": collection.names, "styles": [style.word for style in STYLES], "colours": COLOURS}
        (folder / "judge.json").write_text(json.dumps(words))
        train.write_model_card(folder)
    return str(folder)


@pytest.fixture(scope="module")
def laboratory(model: str, collection: Collection) -> Laboratory:
    return Laboratory(collection, model, torch.device("cpu"), batch_size=5)


def made_up(plan: Plan, **best: float) -> dict[str, dict[str, Any]]:
    """Rows of all points, in which a method is best at a scale, by default 3, in FID and in what is right."""

    def values(guidance: CFG, measure: str) -> dict[str, Any]:
        name = type(guidance).__name__ if guidance.rule == CFG().rule else guidance.rule.__class__.__name__
        off = abs(guidance.guidance_scale - best.get(name, 3.0)) / 100
        shares = dict.fromkeys(("name", "style", "colour", "all"), 0.9 - off)
        if measure == "trace":
            curves = {name: [0.5] * 144 for name in ("entropy_gap", "branch_distance", "budget", "budget_without")}
            curves |= {"confidence": [0.25] * 144, "object": [0.75] * 144}
            places = {
                f"{place}_{what}": off for place in ("object", "background") for what in ("confidence", "weakened")
            }
            return {**curves, **{f"{name}_error": [0.1] * 144 for name in curves}, **places, "background_share": 0.5}
        return {**shares, "fid": off, "fid_without": [off] * 10, "precision": 0.5, "recall": 0.25}

    rows: dict[str, dict[str, Any]] = {}
    for _ in range(2):  # the best follow from the tuning
        for point in plan.points(rows):
            row = {
                **point.settings(),
                "values": values(point.guidance, point.measure),
                "model": "made-up",
                "seconds": 0.1,
            }
            rows[key(row)] = {**row, "device": "cpu", "versions": {"softcfg": "1", "torch": "2"}}
    return rows


# ---- points


def test_the_most_telling_points_come_first() -> None:
    points = SMALL.points({})
    first = points[:33]
    assert [point.measure for point in first] == ["seen"] * 11 + ["style"] * 11 + ["colour"] * 11
    assert {(point.seed, point.samples, point.temperature) for point in first} == {(0, 20, 0.7)}
    expected = {NONE, *(at(name, scale) for name in ("CFG", "SoftCFG") for scale in (1.5, 2, 3, 4, 6))}
    assert {point.guidance for point in first[:11]} == expected
    assert len(points) == len(set(points))
    whole = {(NONE, 0), *((at(name, scale), seed) for name in METHODS for scale in SCALES for seed in (0, 1))}
    for kind in ("seen", "style", "colour"):
        assert whole <= {(point.guidance, point.seed) for point in points if point.measure == kind}
    seeds = [point.seed for point in points if point.measure == "seen" and point.seed != TUNING_SEED]
    assert seeds == sorted(seeds)


def test_every_method_is_its_own_setting() -> None:
    settings = [json.dumps(describe(at(name, scale))) for name in METHODS for scale in SCALES]
    assert len(set(settings)) == len(settings) == 49
    assert {evidence.title(at(name, 2.0)) for name in METHODS} == {f"{name} 2" for name in METHODS}


def test_scales_are_tuned_on_seen_prompts_and_a_seed_of_their_own() -> None:
    tuning = [point for point in SMALL.points({}) if point.seed == TUNING_SEED]
    assert {point.measure for point in tuning} == {"seen"}
    assert {point.guidance for point in tuning} >= {at(name, scale) for name in METHODS for scale in SCALES}
    assert SMALL.best({}) == {}
    rows = {name: row for name, row in made_up(SMALL, SoftCFG=6.0).items() if row["seed"] == TUNING_SEED}
    best = SMALL.best(rows)
    assert best.keys() == METHODS.keys()
    assert best["SoftCFG"] == dict.fromkeys(("FID", "prompt"), at("SoftCFG", 6.0))
    assert best["APG"]["FID"] == at("APG", 3.0)
    following = [point for point in SMALL.points(rows) if point.measure == "style" and point.seed == 0]
    assert [p.guidance for p in following[11:13]] == [at("SoftCFG without Step Normalisation", 6.0), at("APG", 3.0)]


def test_other_temperatures_are_drawn_at_the_first_settings() -> None:
    points = Plan(20, 1, (0.7, 1.0)).points({})
    other = [point for point in points if point.temperature == 1.0 and not point.measure.startswith(("real", "tokens"))]
    assert [replace(point, temperature=0.7) for point in other] == points[:33]
    assert len({key(point.settings()) for point in points}) == len(points)
    more = {
        (p.guidance, p.seed, p.measure) for p in Plan(20, 3, (0.7, 1.0)).points({}) if p.temperature == 1.0 and p.seed
    }
    assert more == {(at(name, 2.0), seed, "seen") for name in ("CFG", "SoftCFG") for seed in (1, 2)}


@pytest.mark.parametrize(("count", "expected"), [(1, 1), (2, 2), (1000, 17)])
def test_chosen_pictures_are_spread_over_all_of_them(collection: Collection, count: int, expected: int) -> None:
    found = chosen(collection, "seen", count)
    assert len(found) == len(set(found)) == expected


# ---- measuring


def test_a_point_is_measured_as_the_evaluation_measures(
    laboratory: Laboratory, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence, "LOOKS", VIEWS)
    collection, guidance = laboratory.collection, at("SoftCFG", 3.0)
    point = replace(SMALL.point(guidance, 1, "seen"), samples=12)
    row = laboratory.run(point)
    assert key(row) == key(point.settings())
    pictures = chosen(collection, "seen", 12)
    prompts = [collection.pictures[i].caption for i in pictures]
    pipeline = Pipeline.from_pretrained(model)
    assert row["model"] == pipeline.name != ""
    drawn = pipeline(prompts, guidance, seed=1, batch_size=5, temperature=0.7, progress=False).pixels
    reference = collection.pixels[collection.where(recoloured=False)]
    weights = Path(model) / "judge.safetensors"
    extractor = evaluation.load_extractor("emoji", weights)
    expected = evaluation.evaluate(drawn, reference, extractor, ["fid", "precision", "recall"]).metrics
    said = evaluation.evaluate(
        drawn, None, extractor, ["agreement", "name_agreement", "style_agreement"], prompts=prompts
    )
    expected |= {name.removesuffix("_agreement"): value for name, value in said.metrics.items()}
    expected["all"] = expected.pop("agreement")
    judge, _, _ = load_judge(weights)
    labels = torch.tensor([wanted(collection.pictures[i]) for i in pictures])
    expected["colour"] = agreement(judge, torch.from_numpy(drawn).permute(0, 3, 1, 2), labels)["colour"]
    assert len(row["values"].pop("fid_without")) == 10
    assert row["values"] == pytest.approx(expected, rel=1e-4)


def test_few_prompts_are_drawn_over_again_with_other_random_numbers(laboratory: Laboratory) -> None:
    pictures = laboratory.prompted("colour", 3)
    assert [laboratory.collection.pictures[i].caption for i in pictures] == ["blue leaf, flat style"] * 3
    tokens = laboratory.draw(SMALL.point(NONE, 0, "colour"), pictures).tokens
    assert len(tokens.unique(dim=0)) == 3
    empty = replace(laboratory.collection, pictures=[], pixels=laboratory.collection.pixels[:0])
    laboratory_without = Laboratory.__new__(Laboratory)
    laboratory_without.collection = empty
    with pytest.raises(UserError, match="no pictures for prompts of the kind style"):
        laboratory_without.prompted("style", 3)


@pytest.mark.parametrize("name", ["CFG", "SoftCFG", "SoftCFG without Step Normalisation"])
def test_a_trace_says_where_the_confidence_lies(
    laboratory: Laboratory, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Half of each picture counts as white.
    monkeypatch.setattr(evidence, "brightness", lambda least, size: torch.tensor([1.0, 0.0]).repeat(len(least), 72))
    values = laboratory.run(replace(SMALL.traces()[name], samples=6))["values"]
    assert all(len(value) == 144 for value in values.values() if isinstance(value, list))
    assert values["object"] == [0.0, 1.0] * 72
    white, other = np.mean(values["confidence"][::2]), np.mean(values["confidence"][1::2])
    assert values["background_confidence"] == pytest.approx(white, rel=1e-3)
    assert values["background_share"] == pytest.approx(white / (white + other), rel=0.05)
    if name == "CFG":
        assert "object_weakened" not in values
    else:
        total = 72 * (values["object_weakened"] + values["background_weakened"])
        assert total == pytest.approx(1.0 if name == "SoftCFG" else 72 * (white + other), rel=0.02)


def test_bounds_are_of_the_pictures(laboratory: Laboratory) -> None:
    found = {point.measure: laboratory.run(point)["values"] for point in SMALL.bounds()}
    numbers = laboratory.collection.where(held_out="style")
    pictures = [laboratory.collection.pictures[i] for i in numbers]
    seen = look(laboratory.judge, laboratory.pictures(numbers), views=evidence.LOOKS)[1]
    assert found["real style"] == right(seen, laboratory.words, pictures)
    assert "fid" in found["tokens seen"]
    assert "fid" not in found["real seen"]


class Stub:
    """A laboratory that takes its rows from elsewhere."""

    def __init__(self, *_: object) -> None:
        self.rows = made_up(SMALL)

    def run(self, point: evidence.Drawn) -> dict[str, Any]:
        return self.rows[key(point.settings())]


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "Laboratory", Stub)
    monkeypatch.setattr(evidence, "SCALES", (1.5, 3.0))
    monkeypatch.setattr(evidence, "FIRST_SCALES", (3.0,))


@pytest.mark.usefixtures("stubbed")
def test_each_point_is_kept_at_once_and_drawn_once(
    tmp_path: Path, model: str, collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "r.jsonl"

    class Failing(Stub):
        def run(self, point: evidence.Drawn) -> dict[str, Any]:
            if path.exists() and path.read_bytes().count(b"\n") == 7:
                raise KeyboardInterrupt
            return super().run(point)

    with monkeypatch.context() as patch:
        patch.setattr(evidence, "Laboratory", Failing)
        with pytest.raises(KeyboardInterrupt):
            measure(collection, model, path, images=20, seeds=2)
    before = path.read_bytes()
    with path.open("ab") as file:
        file.write(b'{"measure": "se')  # as if the kill had come while it wrote
    assert measure(collection, model, path, images=20, seeds=2)
    assert path.read_bytes().startswith(before)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    kept = {key(row): row for row in rows}
    assert len(kept) == len(rows) == len(SMALL.points(kept))


@pytest.mark.usefixtures("stubbed")
def test_no_point_is_begun_that_would_pass_the_limit(
    tmp_path: Path, model: str, collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(Stub):
        def run(self, point: evidence.Drawn) -> dict[str, Any]:
            return {**super().run(point), "seconds": 800}

    monkeypatch.setattr(evidence, "Laboratory", Slow)
    path = tmp_path / "r.jsonl"
    assert not measure(collection, model, path, limit=0.0, images=20, seeds=2)
    assert not path.exists()
    assert not measure(collection, model, path, limit=700.0, images=20, seeds=2)
    assert path.read_bytes().count(b"\n") == 1  # the next of the kind is expected to take too long


# ---- report


def test_report_has_every_setting_and_its_spread(tmp_path: Path) -> None:
    rows = made_up(SMALL)
    seen = key(SMALL.point(at("CFG", 2.0), 1, "seen").settings())
    rows[seen] = {**rows[seen], "values": {**rows[seen]["values"], "fid": 0.03, "name": 0.85}}
    text = report(rows, SMALL, tmp_path / "plots")
    images = [row["samples"] for row in rows.values() if row["measure"] in ("seen", "style", "colour")]
    assert f"; {sum(images):,} images in {len(images)} of {len(images)} points, with those of the tuning" in text
    # FID of the seeds: 0.01 and 0.03; names right: 89 % and 85 %
    assert "| CFG 2 | 2 | 0.02 ± 0.01 | 50.00 ± 0.00 | 25.00 ± 0.00 |  | 87.0 ± 2.8 | 89.0 ± 0.0 |" in text
    for name in METHODS:
        assert f"\n| {name} | FID | 3 | 2 | 0.00 ± 0.00 |" in text
        assert all(f"\n| {name} {scale:g} | 2 | 2 | " in text for scale in SCALES)
    assert "| SoftCFG | 0.0000 | 0.0000 | 0.250 |" in text
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {f"emoji-{name}.svg" for name in PICTURES}


def test_report_of_the_tuning_alone() -> None:
    """And of one point, which says that there is something; no method has been drawn at what was found best."""
    tuned = {name: row for name, row in made_up(SMALL, SoftCFG=6.0).items() if row["seed"] == TUNING_SEED}
    point = key(SMALL.point(NONE, 0, "seen").settings())
    text = report({**tuned, point: made_up(SMALL)[point]}, SMALL)
    assert "of 16 images for seen prompts, of a seed of its own; without guidance 0.02, 88.0." in text
    # From 1.5 on: FID is a hundredth of how far the scale is from the best, names right are 90 % less that.
    assert "| SoftCFG | 0.04, 85.5 | 0.04, 86.0 | 0.03, 87.0 | 0.02, 88.0 | 0.00, 90.0 |" in text
    assert "\n| no guidance | – | – | 1 |" in text
    assert "\n| CFG | FID |" not in text  # nothing to show yet


def test_report_of_the_first_points_alone() -> None:
    rows = made_up(SMALL)
    first = {name: rows[name] for name in (key(point.settings()) for point in SMALL.points({})[:11])}
    text = report(first, SMALL)
    assert "| no guidance | 1 | 0.02 |" in text
    assert "held-out" not in text
    assert "The tuning" not in text
    with pytest.raises(UserError, match="no results of 5,000 images per point yet"):
        report(first, Plan())


def test_the_command_reports(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = evidence.results_of(model, tmp_path / "r.jsonl")
    for row in made_up(Plan(20, 1, (train.SAMPLING["temperature"],))).values():
        results.append(row)
    command = ["evidence", model, "--results", str(tmp_path / "r.jsonl"), "--images", "20", "--seeds", "1", "--report"]
    monkeypatch.setattr("sys.argv", command)
    evidence.main()
    assert capsys.readouterr().out.startswith(
        f"Model `made-up`, 20 images per point and kind of prompts, temperature {train.SAMPLING['temperature']:g};"
    )
    monkeypatch.setattr("sys.argv", ["evidence", "fashion-small", "--report"])
    with pytest.raises(SystemExit) as end:
        evidence.main()
    assert end.value.code == 2
    assert "fashion-small is no model folder with a judge" in capsys.readouterr().err
