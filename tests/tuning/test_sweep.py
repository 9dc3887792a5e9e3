import os
import random
import shlex
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.trial import TrialState, create_trial

import softcfg.runs.worker
import softcfg.tuning.sweep
from made_runs import settings as made_settings
from softcfg import Pipeline, UserError
from softcfg.calls import PipelineOutput
from softcfg.cli.main import main
from softcfg.evaluation import evaluate
from softcfg.runs.folder import RunFolder
from softcfg.runs.lock import Lock
from softcfg.tuning import Range, Sweep, SweepConfig, write_results
from softcfg.tuning.report import pareto_front, write_plots
from stand_in import extractor

SAMPLES, BATCH = 32, 4
SEARCH = {"guidance_scale": Range(1.0, 8.0), "confidence": ["max", "entropy"]}

Maker = Callable[..., Sweep]


def made_up(drawer: Any, indices: Sequence[int], labels: Sequence[int], *_: Any) -> PipelineOutput:
    """Images that depend on what images of a run depend on, in no time; tests/cli/test_sweep.py draws real ones."""
    guidance = drawer.guidance
    pixels = np.empty((len(indices), 8, 8, 3))
    for image, index, label in zip(pixels, indices, labels, strict=True):
        numbers = np.random.default_rng([drawer.seed, index, label])
        spread = 10 + guidance.guidance_scale + 5 * (guidance.confidence == "max")
        image[:] = 128 + numbers.normal(0, spread, image.shape) + drawer.sampling.temperature
    tokens = torch.zeros(len(indices), 16, dtype=torch.int64)
    return PipelineOutput(torch.tensor(labels), list(indices), tokens, tokens, pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The settings and the index of every image drawn since."""
    calls: list[tuple[str, int]] = []

    def draw(drawer: Any, indices: Sequence[int], *rest: Any, **settings: Any) -> PipelineOutput:
        calls.extend((str(drawer.guidance), index) for index in indices)
        return made_up(drawer, indices, *rest)

    monkeypatch.setattr(softcfg.runs.worker.BatchDrawer, "draw", draw)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # these tests outlive no machine
    return calls


@pytest.fixture(scope="module")
def make(model_folder: Path, reference: Path) -> Maker:
    pipeline = Pipeline.from_pretrained(model_folder)

    def make_sweep(folder: Path, search: Any = SEARCH, **settings: Any) -> Sweep:
        where = {name: settings.pop(name) for name in ("storage", "study") if name in settings}
        usual = {"num_samples": SAMPLES, "batch_size": BATCH, "metrics": ["inception_score"]}
        given = {"search": search, **usual, "reference": reference, "extractor": extractor(), **settings}
        return Sweep.open(folder, SweepConfig(pipeline, **given), **where)

    return make_sweep


def test_a_row_is_a_run_that_its_command_draws_again(make: Maker, tmp_path: Path, reference: Path) -> None:
    search = {"guidance_scale": Range(1.0, 8.0), "interval": [(2, 9), None], "preset": ["released", "paper"]}
    sweep = make(tmp_path / "sweep", search, fixed={"top_k": 9}, seed=5, labels="random", metrics=None)
    sweep.run(3)
    assert [row.trial for row in sweep.rows()] == [0, 1, 2]
    assert sweep.metrics == ["fid", "sfid", "inception_score", "precision", "recall"]
    for row in sweep.rows():
        again = tmp_path / f"again-{row.trial}"
        assert main([*shlex.split(row.command)[1:], "--output-dir", str(again)]) == 0
        runs = RunFolder.open(sweep.trial_folder(row.trial)), RunFolder.open(again)
        assert runs[0].fingerprint == runs[1].fingerprint
        assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(runs[0].shards(), runs[1].shards(), strict=True))
        assert runs[0].settings["guidance"]["guidance_scale"] == row.settings["guidance_scale"]
        assert runs[0].settings["guidance"]["interval"] == (row.settings["interval"] and [2, 9])
        assert runs[0].settings["guidance"]["floor"] == (0.05 if row.settings["preset"] == "released" else 0)
        assert runs[0].settings["sampling"]["top_k"] == 9
        assert evaluate(again, reference, extractor()).metrics == pytest.approx(row.metrics)
        # The command of the run itself continues it where it lies.
        assert main(shlex.split(runs[0].settings["command"])[1:]) == 0


def test_trials_are_stopped_by_comparison_at_equal_numbers(
    make: Maker, tmp_path: Path, reference: Path, drawn: list[tuple[str, int]]
) -> None:
    """Against the rule itself, written down once more over the images in the folders."""
    sweep = make(tmp_path / "sweep", early_stop=0.5)
    sweep.run(10)
    rungs = [4, 8, 16]
    seen: dict[int, list[float]] = {rung: [] for rung in rungs}
    for row in sweep.rows():
        pixels = np.concatenate([shard.pixels for shard in RunFolder.open(sweep.trial_folder(row.trial)).shards()])
        assert len(pixels) == row.samples
        end = SAMPLES
        for rung in rungs:
            fid = evaluate(pixels[:rung], reference, extractor(), ["fid"])["fid"]
            rank = sum(other < fid - 1e-9 for other in seen[rung])
            hopeless = len(seen[rung]) >= 4 and rank >= 0.5 * (len(seen[rung]) + 1)
            seen[rung].append(fid)
            if hopeless:
                end = rung
                break
        assert (row.samples, row.stopped) == (end, end < SAMPLES)
        assert row.metrics["fid"] == pytest.approx(evaluate(pixels, reference, extractor(), ["fid"])["fid"])
        assert row.metrics.keys() == ({"fid"} if row.stopped else {"fid", "inception_score"})
    assert len({row.samples for row in sweep.rows()}) >= 2
    # Nothing was drawn twice, and the best is a trial of all samples.
    assert len(set(drawn)) == len(drawn) == sum(row.samples for row in sweep.rows())
    best = sweep.best()
    whole = [row for row in sweep.rows() if not row.stopped]
    assert best is not None
    assert best.metrics["fid"] == min(row.metrics["fid"] for row in whole)
    assert len(sweep.ranked()) == len(whole) < len(sweep.rows())
    paths = write_plots(sweep)
    assert [path.name for path in paths] == ["settings.png", "front.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_more_is_better_of_other_metrics(make: Maker, tmp_path: Path) -> None:
    sweep = make(tmp_path / "sweep", {"guidance_scale": [1, 4, 9]}, objective="inception_score", sampler="grid")
    sweep.run()
    scores = [row.metrics["inception_score"] for row in sweep.ranked()]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == 3
    assert sweep.study.best_trial.value == scores[0]
    assert sweep.metrics == ["inception_score"]


def table(sweep: Sweep) -> tuple[bytes, bytes]:
    csv, json = write_results(sweep)
    return csv.read_bytes(), json.read_bytes()


@pytest.mark.parametrize("sampler", ["tpe", pytest.param("random", marks=pytest.mark.slow)])
def test_a_sweep_that_died_anywhere_ends_with_the_same_table(
    make: Maker, tmp_path: Path, sampler: str, monkeypatch: pytest.MonkeyPatch, drawn: list[tuple[str, int]]
) -> None:
    """Errors before and after whatever is done, until all is done."""
    monkeypatch.setattr(softcfg.tuning.space, "STARTUP", 3)
    settings = {"early_stop": 0.5, "sampler": sampler}
    undisturbed = make(tmp_path / "undisturbed" / "sweep", **settings)
    undisturbed.run(5)
    drawn.clear()
    chance = random.Random(0)

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if chance.random() < 0.15:
                raise MemoryError("out of luck")
            result = function(*args, **kwargs)
            if chance.random() < 0.15:
                raise MemoryError("out of luck")
            return result

        return call

    for owner, name in (
        (softcfg.tuning.sweep, "evaluate"),
        (softcfg.tuning.sweep, "draw_run"),
        (softcfg.tuning.space.Space, "store"),
        (optuna.trial.Trial, "report"),
        (optuna.Study, "tell"),
    ):
        monkeypatch.setattr(owner, name, dying(getattr(owner, name)))
    deaths = 0
    disturbed = make(tmp_path / "disturbed" / "sweep", **settings)
    while True:
        try:
            disturbed.run(5)
            break
        except MemoryError:
            deaths += 1
    assert deaths > 10
    assert table(disturbed) == table(undisturbed)
    assert len(set(drawn)) == len(drawn)  # nor was an image drawn again


def test_more_trials_go_on_from_those_there_are(make: Maker, tmp_path: Path) -> None:
    sweep = make(tmp_path / "sweep")
    sweep.run(3)
    few = sweep.rows()
    told: list[int] = []
    make(tmp_path / "sweep").run(5, on_trial=lambda row: told.append(row.trial))
    assert told == [0, 1, 2, 3, 4]
    assert sweep.rows()[:3] == few
    at_once = make(tmp_path / "other" / "sweep")
    at_once.run(5)
    assert at_once.rows() == sweep.rows()


def test_a_grid_ends_by_itself(make: Maker, tmp_path: Path) -> None:
    sweep = make(tmp_path / "sweep", {"guidance_scale": [2, 3], "strength": [0, 1]}, sampler="grid")
    sweep.run(100)
    pairs = [(row.settings["guidance_scale"], row.settings["strength"]) for row in sweep.rows()]
    assert pairs == [(2, 0), (2, 1), (3, 0), (3, 1)]


def test_a_search_in_another_order_is_another_sweep(make: Maker, tmp_path: Path) -> None:
    """A grid, and numbers drawn at random, are taken in the order of the settings."""
    search = {"guidance_scale": [2, 3], "strength": [0, 1]}
    make(tmp_path / "sweep", search, sampler="grid").run(3)
    with pytest.raises(UserError, match="sweep is a sweep with another order of --search; give another folder"):
        make(tmp_path / "sweep", dict(reversed(search.items())), sampler="grid")


def test_the_order_of_the_metrics_changes_nothing(make: Maker, tmp_path: Path) -> None:
    names = ["inception_score", "precision"]
    make(tmp_path / "sweep", metrics=names).run(1)
    assert len(make(tmp_path / "sweep", metrics=names[::-1]).rows()) == 1


def test_files_of_others_are_not_replaced(make: Maker, tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text("mine")
    with pytest.raises(UserError, match=r"holds results\.csv, which was not made by this command"):
        make(tmp_path)


def test_links_in_the_folder_are_replaced_not_followed(make: Maker, tmp_path: Path) -> None:
    sweep, victim = make(tmp_path / "sweep"), tmp_path / "victim"
    sweep.run(1)
    victim.write_text("precious")
    for name in ("results.csv", "results.json"):
        (sweep.folder / name).symlink_to(victim)
    write_results(sweep)
    assert victim.read_text() == "precious"


def test_images_can_be_discarded(make: Maker, tmp_path: Path) -> None:
    kept, discarded = make(tmp_path / "kept"), make(tmp_path / "discarded", discard_images=True)
    kept.run(2)
    discarded.run(2)
    assert discarded.rows() == kept.rows()
    assert not list((tmp_path / "discarded").rglob("shard-*"))
    run = RunFolder.open(discarded.trial_folder(1))
    assert main(shlex.split(run.settings["command"])[1:]) == 0
    assert run.require(3).pixels.tolist() == RunFolder.open(kept.trial_folder(1)).require(3).pixels.tolist()


def test_a_trial_of_a_clock_that_runs_far_ahead_is_taken_up(make: Maker, tmp_path: Path) -> None:
    sweep = make(tmp_path / "sweep", sampler="random")
    owner = {"host": "elsewhere", "pid": 1, "folder": "/gone", "beat": time.time() + 86_400}
    sweep.study.add_trial(create_trial(state=TrialState.RUNNING, user_attrs={"owner": owner}))
    sweep.run(1)
    assert [row.trial for row in sweep.rows()] == [0]


def test_a_trial_of_another_machine_is_waited_for_or_taken_up(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(softcfg.tuning.sweep, "SECONDS_OF_GRACE", 2.0)
    sweep = make(tmp_path / "sweep", sampler="random")
    owner = {"host": "elsewhere", "pid": 1, "folder": "/gone", "beat": time.time()}
    sweep.study.add_trial(create_trial(state=TrialState.RUNNING, user_attrs={"owner": owner}))
    started = time.time()
    times: dict[int, float] = {}
    sweep.run(2, on_trial=lambda row: times.setdefault(row.trial, time.time()))
    assert times[1] - started < times[0] - started
    assert times[0] - owner["beat"] > 2.0
    alone = make(tmp_path / "alone" / "sweep", sampler="random")
    alone.run(2)
    assert alone.rows() == sweep.rows()


def test_a_trial_of_this_machine_is_left_while_its_folder_is_locked(make: Maker, tmp_path: Path) -> None:
    sweep = make(tmp_path / "sweep", sampler="random")
    owner = {"host": socket.gethostname(), "pid": 1, "folder": str(tmp_path / "sweep"), "beat": 0.0}
    sweep.study.add_trial(create_trial(state=TrialState.RUNNING, user_attrs={"owner": owner}))
    sweep.trial_folder(0).mkdir(parents=True)
    lock = Lock(sweep.trial_folder(0))
    told: list[int] = []

    def release(row: Any) -> None:
        told.append(row.trial)
        lock.release()

    sweep.run(2, on_trial=release)
    assert told == [1, 0]


def test_a_trial_that_another_machine_finished_meanwhile_is_left_as_it_is(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = make(tmp_path / "sweep")
    original = softcfg.tuning.sweep.draw_run

    def finished_elsewhere(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        if sweep.study.trials[-1].number == 0:
            trial = optuna.trial.Trial(sweep.study, sweep.study.trials[0]._trial_id)
            trial.set_user_attr("metrics", {"fid": 12.5, "inception_score": 2.0})
            trial.report(12.5, SAMPLES)
            sweep.study.tell(trial, 12.5)

    monkeypatch.setattr(softcfg.tuning.sweep, "draw_run", finished_elsewhere)
    sweep.run(2)
    assert [row.trial for row in sweep.rows()] == [0, 1]
    assert sweep.rows()[0].metrics == {"fid": 12.5, "inception_score": 2.0}


def test_a_study_is_of_one_sweep(make: Maker, tmp_path: Path) -> None:
    make(tmp_path / "sweep")
    make(tmp_path / "sweep")
    with pytest.raises(UserError) as caught:
        make(tmp_path / "sweep", {"guidance_scale": Range(2.0, 8.0)}, num_samples=28, seed=3)
    text = str(caught.value)
    assert text.startswith("sweep is a sweep with another run.seed (0 there, 3 here), ")
    assert "search.guidance_scale" in text
    assert "search.confidence" in text
    assert "samples ([32] there, [28] here)" in text
    with pytest.raises(UserError, match="objective"):
        make(tmp_path / "sweep", objective="recall")
    make(tmp_path / "sweep", num_samples=28, study="another")


@pytest.mark.parametrize("name", ["is it good?", "p%41 a#b", "{x} ü&=@:"])
def test_the_study_lies_in_the_folder_whatever_its_name(make: Maker, tmp_path: Path, name: str) -> None:
    pytest.importorskip("sqlalchemy", "2.1")  # older ones have it refused where there is a ?
    make(tmp_path / name)
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()] == [Path(name, "study.db")]
    with pytest.raises(UserError, match="objective"):
        make(tmp_path / name, objective="recall")


def test_a_foreign_run_in_the_place_of_a_trial(make: Maker, tmp_path: Path) -> None:
    sweep = make(tmp_path / "sweep")
    RunFolder.claim(sweep.trial_folder(0), made_settings())
    with pytest.raises(UserError, match=r"holds a run with another .*; give another folder \(--output-dir\)$"):
        sweep.run(1)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"objective": "kid"}, "there is no metric named 'kid'"),
        ({"reference": None}, "FID cannot be computed: it needs a reference"),
        ({"metrics": ["class_accuracy"]}, "class accuracy cannot be computed: the extractor stand-in does not know"),
        ({"fixed": {"confidence": "max"}}, "confidence is both fixed and searched"),
        ({"fixed": {"strenght": 1}}, "there is no setting named 'strenght'; did you mean strength"),
        ({"fixed": {"floor": 2}}, "floor must be a number in"),
        ({"search": {"temperature": Range(0.0, 1.0)}}, "temperature must be a finite number > 0, got 0.0"),
        ({"sampler": "gird"}, "there is no sampler named 'gird'; did you mean grid?"),
        ({"sampler": "grid"}, "a grid needs a step or a list"),
        ({"search": {"guidance_scale": 5}}, "the values of guidance_scale must be a Range or a list, got 5"),
        ({"num_samples": "5"}, "num_samples must be a whole number, got '5'"),
        ({"early_stop": "half"}, "early_stop must be a share between 0 and 1, got 'half'"),
        ({"early_stop": 0.5, "rungs": 8}, "rungs must be a Sequence, got 8"),
        ({"objective": 3}, "there is no metric named 3; known: "),
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"early_stop": 1.5}, "early_stop must be a share between 0 and 1, got 1.5"),
        ({"early_stop": 0.5, "batch_size": 32}, "early_stop needs rungs between 0 and 32 samples"),
        ({"early_stop": 0.5, "rungs": [8, 32]}, "early_stop needs rungs between 0 and 32 samples"),
        ({"rungs": [8]}, "rungs mean nothing without early_stop"),
        ({"seed": -1}, "seed must be a whole number in 0..2^64-1, got -1"),
        ({"labels": [1] * 20_000}, "20000 labels do not fit"),
        ({"storage": "somewhere"}, "'somewhere' is not a storage URL such as sqlite:///study.db"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(
    make: Maker, tmp_path: Path, settings: dict[str, Any], text: str
) -> None:
    with pytest.raises(UserError, match=r"^[^\n]*$") as caught:
        make(tmp_path / "sweep", **settings)
    assert text in str(caught.value)
    assert not list(tmp_path.rglob("*.db"))


def test_a_storage_out_of_reach(make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(UserError, match=r"the storage mysql://me:\*\*\*@host/name cannot be used: [^\n]*$"):
        make(tmp_path / "sweep", storage="mysql://me:secret@host/name")
    with pytest.raises(UserError, match=r"cannot be used: .*unable to open database file"):
        make(tmp_path / "sweep", storage=f"sqlite:///{tmp_path}/gone/study.db")


def test_the_front_against_brute_force() -> None:
    numbers = np.random.default_rng(3).integers(0, 12, (60, 2)).astype(float)
    points = [(float(a), float(b)) for a, b in numbers]
    front = pareto_front(points)
    expected = {
        point
        for point in points
        if not any(other[0] >= point[0] and other[1] <= point[1] and other != point for other in points)
    }
    assert {points[i] for i in front} == expected
    assert len(front) == len(expected)
    assert [points[i][0] for i in front] == sorted((points[i][0] for i in front), reverse=True)
    assert pareto_front([]) == []


def test_a_sweep_without_trials(make: Maker, tmp_path: Path) -> None:
    empty = make(tmp_path / "sweep")
    assert write_plots(empty) == []
    assert empty.best() is None
    with pytest.raises(UserError, match=r"number of trials must be a whole number, got 2\.5"):
        empty.run(2.5)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="config must be a SweepConfig, got 'fashion'"):
        Sweep.open(tmp_path / "other", "fashion")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="number of trials must be at least 1, got 0"):
        empty.run(0)


def test_every_trial_is_measured_against_one_reference(make: Maker, tmp_path: Path, reference: Path) -> None:
    path = tmp_path / "reference.npz"
    path.write_bytes(reference.read_bytes())
    sweep = make(tmp_path / "sweep", reference=path)
    sweep.run(1)
    np.savez(path, np.zeros((40, 8, 8, 3), dtype=np.uint8))
    with pytest.raises(UserError, match="is not what the other trials were measured against; put that back"):
        sweep.run(2)
    assert len(sweep.rows()) == 1
    path.write_bytes(reference.read_bytes())
    sweep.run(2)
    undisturbed = make(tmp_path / "other")
    undisturbed.run(2)
    assert [row.metrics for row in sweep.rows()] == [row.metrics for row in undisturbed.rows()]
