"""The study of guidance: which points it has, that a kill costs one point at most, and the document it becomes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from recipes.fashion_mnist.data import Split
from recipes.study import command as study
from recipes.study import report
from recipes.study.measure import Laboratory
from recipes.study.methods import NONE, WITHOUT_SOFTCFG, without_softcfg
from recipes.study.patches import PatchSoftCFG, find_black_codes
from recipes.study.points import (
    ELSEWHERE,
    HALF_TRAINED,
    METHODS,
    TUNING_SEED,
    Comparison,
    Design,
    Point,
    at_scale_of,
    key,
)
from recipes.study.results import Results, rows_of
from softcfg import CFG, Pipeline, SoftCFG, UserError, evaluation
from softcfg.guidance import RULES
from softcfg.models.alitok import AliTok, AliTokConfig
from softcfg.tokenizers.maskgit_vq import MaskGITVQ, MaskGITVQConfig

SCALARS = ("background_share", "background_confidence", "object_confidence")
SMALL = Design(samples=20, seeds=2, tuning_samples=8, candidates={})
BLOCKS = "\n".join(f"<!-- begin {name} -->\nold\n<!-- end {name} -->" for name in report.BLOCKS)


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty training images and forty test images of noise."""
    folder = tmp_path_factory.mktemp("data")
    numbers = np.random.default_rng(0)
    for split in ("train", "t10k"):
        (folder / f"{split}-images-idx3-ubyte").write_bytes(idx(numbers.integers(0, 256, (40, 28, 28))))
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(idx(np.arange(40) % 10))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, four tokens an image."""
    folder = tmp_path_factory.mktemp("model")
    generator = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "codebook_size": 16,
        "condition_num_classes": 10, "image_seq_len": 4, "grid_size": 2, "prefix_tokens": 0,
    }  # fmt: skip
    tokenizer = {
        "channel_mult": [1, 1, 1, 1, 1], "hidden_channels": 32, "num_res_blocks": 1, "resolution": 32,
        "z_channels": 4, "codebook_size": 16,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(AliTok(AliTokConfig(**generator)).state_dict(), folder / "generator.safetensors")
        save_file(MaskGITVQ(MaskGITVQConfig(**tokenizer)).state_dict(), folder / "tokenizer.safetensors")
    card = {
        "name": "tiny",
        "generator": {"family": "alitok", "config": generator},
        "tokenizer": {"family": "maskgit-vq", "config": tokenizer},
        "sampling": {"temperature": 1.0},
    }
    (folder / "model.yaml").write_text(yaml.safe_dump(card))
    return folder


@pytest.fixture
def command(model: Path, data: Path, tmp_path: Path) -> list[str]:
    document = tmp_path / "study.md"
    document.write_text(f"before\n{BLOCKS}\nafter\n")
    return [
        "study", "--model", str(model), "--data", str(data), "--samples", "20", "--seeds", "2", "--tuning-samples", "8",
        "--batch-size", "10", "--workers", "1", "--softcfg-alone", "--results", str(tmp_path / "results.jsonl"),
        "--document", str(document),
    ]  # fmt: skip


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def made_up(design: Design, fid: Callable[[CFG], float]) -> dict[str, dict[str, Any]]:
    """Rows of the tuning with chosen FIDs."""
    return dict(row_of(point, fid(point.guidance)) for point in design.tuning())


def row_of(point: Point, fid: float) -> tuple[str, dict[str, Any]]:
    """A row with a chosen FID, of which the jackknife says an error of 3 %."""
    values = dict.fromkeys(report.METRICS, 0.5) | {"fid": fid, "fid_without": [0.99 * fid, 1.01 * fid] * 5}
    about = {"model": "m", "device": "cpu", "versions": {"softcfg": "1", "torch": "2"}}
    return key(point.settings()), {**about, **point.settings(), "values": values}


def document_of(folder: Path, *rows: Any) -> str:
    """The document that the results become."""
    (folder / "study.md").write_text(BLOCKS)
    report.write(folder / "study.md", *rows)
    return (folder / "study.md").read_text()


class TestPoints:
    def test_first_the_methods_are_tuned(self) -> None:
        points = SMALL.points({})
        assert {point.seed for point in points} == {TUNING_SEED}
        assert {point.samples for point in points} == {8}
        assert len(points) == len(set(points)) == 30
        assert {type(point.guidance) for point in points} == {CFG, SoftCFG}

    def test_the_best_have_the_least_fid_of_their_own_method(self) -> None:
        def fid(guidance: CFG) -> float:
            wanted = 2.0 if type(guidance) is CFG else 3.0 if guidance.step_norm else 5.0
            return abs(guidance.guidance_scale - wanted) + abs(guidance.guidance_scale_pow - 2.0)

        best = SMALL.best(made_up(SMALL, fid))
        assert best == {
            "CFG": CFG(2.0, 2.0),
            "SoftCFG without Step Normalisation": SoftCFG(5.0, 2.0, step_norm=False),
            "SoftCFG": SoftCFG(3.0, 2.0),
        }

    def test_points_that_follow(self) -> None:
        rows = made_up(SMALL, lambda guidance: abs(guidance.guidance_scale - 3) + guidance.guidance_scale_pow)
        points = SMALL.points(rows)
        assert len(points) == len(set(points))
        images = [p for p in points if p.measure == "images" and p.samples == 20]
        first = [p.guidance for p in images if p.seed == 0]
        assert first == [p.guidance for p in images if p.seed == 1]
        assert images[: len(first)] == [Point(guidance, 0, 20) for guidance in first]  # a whole seed before the next
        best = SoftCFG(3.0, 1.0)
        assert first[:4] == [NONE, CFG(3.0, 1.0), SoftCFG(3.0, 1.0, step_norm=False), best]
        assert {CFG(8.0, 1.0), SoftCFG(8.0, 1.0)} < set(first)
        assert {replace(best, target="key"), replace(best, target="both"), replace(best, confidence="margin")} < set(
            first
        )
        assert SoftCFG.released(guidance_scale=3.0, guidance_scale_pow=1.0) in first
        assert {PatchSoftCFG(3.0, 1.0, patches="black"), PatchSoftCFG(3.0, 1.0, patches="other")} < set(first)
        assert {p.guidance for p in points if p.measure == "trace"} == {NONE, *at_scale_of(CFG(3.0, 1.0)).values()}


def test_the_other_methods_are_tuned_and_their_best_drawn() -> None:
    candidates = {
        "a": [CFG(2.0, rule="apg"), CFG(3.0, rule="apg")],
        "b": [CFG(2.0, rule="tcfg"), CFG(3.0, rule="tcfg")],
    }  # type: ignore[arg-type]
    design = replace(SMALL, candidates=candidates)
    rows = made_up(design, lambda guidance: guidance.guidance_scale)
    tuning = design.tuning_of_candidates()
    assert {(point.seed, point.samples) for point in tuning} == {(TUNING_SEED, 8)}
    assert [point.guidance for point in tuning] == [*candidates["a"], *candidates["b"]]
    assert set(tuning) <= set(design.points(rows))
    assert design.best_candidates(rows) == {}
    for point in tuning[:3]:  # all of one method, one of another
        rows[key(point.settings())] = {**point.settings(), "values": {"fid": -point.guidance.guidance_scale}}
    assert design.best_candidates(rows) == {"a": candidates["a"][1]}
    points = design.points(rows)
    assert {Point(candidates["a"][1], seed, 20) for seed in range(2)} <= set(points)
    assert not any(point.guidance in candidates["b"] and point.samples == 20 for point in points)


@pytest.mark.filterwarnings("ignore:No artists with labels")  # of traces, which are not drawn here
class TestOtherMethods:
    """Part 7 and 8, from rows of which the FID is chosen."""

    apg = (CFG(2.0, rule="apg"), CFG(5.0, rule=RULES["apg"](momentum=-0.5)))
    softcfg = (SoftCFG(2.0, rule="apg"), SoftCFG(5.0, rule="apg"))
    design = replace(SMALL, candidates={"APG": apg, "SoftCFG and APG": softcfg})

    def rows(self, **finals: float) -> dict[str, dict[str, Any]]:
        """All is tuned; the last candidates are best, and have FIDs at both seeds."""
        best = {"CFG": CFG(3.0, 1.0), "APG": self.apg[-1], "SoftCFG and APG": self.softcfg[-1]}
        rows = made_up(self.design, lambda guidance: abs(guidance.guidance_scale - 3) + guidance.guidance_scale_pow)
        for point in self.design.tuning_of_candidates():
            other = 2.5 if isinstance(point.guidance, SoftCFG) else 2
            rows |= [row_of(point, 0.5 if point.guidance in best.values() else other)]
        for name, guidance in best.items():
            seeds = range(2 if name.replace(" ", "_") in finals else 0)
            rows |= [row_of(Point(guidance, seed, 20), finals[name.replace(" ", "_")] + seed) for seed in seeds]
        return rows

    def test_each_stands_at_its_best_beside_cfg(self, tmp_path: Path) -> None:
        text = document_of(tmp_path, self.rows(CFG=1.5, APG=1.25, SoftCFG_and_APG=1.75), self.design, {})
        assert "| CFG | scale 3, power 1 (1.000) | 2 | 2.000 ± 0.707 |" in text
        (line,) = [line for line in text.splitlines() if line.startswith("| APG |")]
        assert line.startswith("| APG | scale 5, momentum -0.5 (0.500) | 2 | 1.750 ± 0.707 |")
        assert line.endswith("| -0.250 ± 0.005 |")
        assert "| SoftCFG and APG | APG | 2.250 ± 0.707 | 1.750 ± 0.707 | +0.500 ± 0.011 |" in text
        difference = "+0.500 ± 0.015"  # of the one setting at which both were tuned
        assert f"| SoftCFG and APG | 1 | {difference} | {difference} | {difference} | 0 | 1 | – |" in text
        assert "<text" in (tmp_path / "images" / "study" / "methods.svg").read_text()

    def test_what_is_not_drawn_yet_is_told(self, tmp_path: Path) -> None:
        text = document_of(tmp_path, self.rows(CFG=1.5, APG=1.25), self.design, {})
        assert "| SoftCFG and APG | scale 5 (0.500) | 0 | – | – | – | – | – | – |" in text
        assert "| SoftCFG and APG | APG |" not in text
        assert "not there yet" in text
        assert text.count(f"begin half_trained -->\n{report.NOT_DRAWN}\n") == 1

    def test_other_models_have_tables_of_their_own(self, tmp_path: Path) -> None:
        elsewhere: dict[str, dict[str, Any]] = {}
        for model, design in ELSEWHERE.items():
            points = design.tuning_of_candidates()
            rows = dict(row_of(point, point.guidance.guidance_scale) for point in points)
            best = design.best_candidates(rows)
            assert best["no guidance"] == NONE  # which there is nothing to tune of
            assert {guidance.guidance_scale for name, guidance in best.items() if name != "no guidance"} == {
                min(guidance.guidance_scale for guidance in design.candidates["CFG"])
            }
            rows |= [row_of(Point(best["CFG"], 0, design.samples), 1.0)]
            softcfg = design.candidates["SoftCFG of strength 0.5"]
            rows |= [row_of(design.tuned_with(guidance), guidance.guidance_scale - 0.125) for guidance in softcfg]
            rows |= [row_of(Point(best["SoftCFG of strength 0.5"], 0, design.samples), 0.875)]
            elsewhere[model] = rows
        text = document_of(tmp_path, self.rows(CFG=1.5), self.design, elsewhere)
        for design in ELSEWHERE.values():
            assert f"{design.samples:,} images per point. Tuned: the best of" in text
        lines = [line for line in text.splitlines() if line.startswith("| SoftCFG of strength 0.5 |")]
        assert len(lines) == 2 * len(ELSEWHERE)  # at its best, and at every setting
        assert all(line.endswith("| -0.125 ± 0.004 |") for line in lines[::2])
        count = len(design.candidates["CFG"])
        assert (
            lines[-1]
            == f"| SoftCFG of strength 0.5 | {count} {3 * '| -0.125 ± 0.004 '}| {count} | 0 | -0.125 ± 0.004 |"
        )

    def test_every_composition_is_compared_with_what_it_composes(self) -> None:
        candidates = Comparison().candidates
        assert {"CFG", *candidates} >= set(WITHOUT_SOFTCFG.values())
        with_softcfg = {name for name, each in candidates.items() if any(isinstance(g, SoftCFG) for g in each)}
        assert set(WITHOUT_SOFTCFG) == with_softcfg
        assert {len(settings) for settings in candidates.values()} == {10}  # equal budgets
        for design in ELSEWHERE.values():
            assert len({len(each) for name, each in design.candidates.items() if name != "no guidance"}) == 1


def test_a_setting_without_softcfg() -> None:
    rule = RULES["apg"](eta=0.5)
    softcfg = SoftCFG(4.0, 2.0, interval=(2, 5), rule=rule, strength=0.3)
    assert without_softcfg(softcfg) == CFG(4.0, 2.0, interval=(2, 5), rule=rule)


def test_rows_of_a_model_are_those_of_its_last_weights(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    points = [Point(CFG(scale), 0, 10).settings() for scale in (1.0, 2.0, 3.0)]
    for model, weights, point in (("a", "old", 0), ("a", "new", 1), ("b", "other", 2), ("a", "new", 2)):
        Results(path, weights).append({**points[point], "model": model, "values": {}})
    assert list(rows_of("a", path)) == [key(points[1]), key(points[2])]
    assert list(rows_of("b", path)) == [key(points[2])]
    assert rows_of("c", path) == {}


def test_a_point_is_measured_as_the_evaluation_measures(model: Path, data: Path) -> None:
    from recipes.fashion_mnist.data import load

    guidance = SoftCFG(guidance_scale=3.0)
    row = Laboratory(str(model), data, batch_size=10).run(Point(guidance, seed=4, samples=20))
    labels = [index % 10 for index in range(20)]
    drawn = Pipeline.from_pretrained(model)(labels, guidance, seed=4, batch_size=10).pixels
    reference = load(data, "test").images[..., None].expand(-1, -1, -1, 3)
    expected = evaluation.evaluate(drawn, reference, "fashion", labels=labels).metrics
    without = row["values"].pop("fid_without")
    assert row["values"] == pytest.approx(expected)
    fewer = evaluation.evaluate(drawn[2:], reference, "fashion", ["fid"])
    assert without[0] == pytest.approx(fewer["fid"])
    assert len(without) == 10
    assert row["guidance"]["method"] == "SoftCFG"
    assert (row["seed"], row["samples"]) == (4, 20)


def test_bounds_are_of_training_images(model: Path, data: Path) -> None:
    from recipes.fashion_mnist.data import load

    laboratory = Laboratory(str(model), data, batch_size=10)
    real, reconstructed = (laboratory.run(point)["values"] for point in SMALL.bounds())
    train, test = load(data, "train"), load(data, "test")
    reference = test.images[..., None].expand(-1, -1, -1, 3)
    images = train.images[:20, ..., None].expand(-1, -1, -1, 3)
    expected = evaluation.evaluate(images, reference, "fashion", labels=train.labels[:20]).metrics
    assert {name: real[name] for name in expected} == pytest.approx(expected)
    assert reconstructed["fid"] > real["fid"]  # the tokenizer is untrained


def test_a_trace_is_the_mean_over_images(model: Path, data: Path) -> None:
    laboratory = Laboratory(str(model), data, batch_size=10)
    values = laboratory.run(Point(SoftCFG(guidance_scale=3.0), seed=0, samples=30, measure="trace"))["values"]
    # Some share f of the patches is black; both means and their weights make the mean confidence.
    share, black, others = (values.pop(name) for name in SCALARS)
    whole = np.mean(values["confidence"])
    f = (whole - others) / (black - others)
    assert 0 < f < 1
    assert share == pytest.approx(f * black / whole, abs=0.005)  # the means are rounded
    assert all(len(value) == 4 for value in values.values())
    assert values["budget"] == pytest.approx([0, 1, 1, 1], abs=1e-3)
    sums = np.cumsum([0, *values["confidence"][:-1]])
    assert values["budget_without"] == pytest.approx(sums, rel=1e-2)
    assert all(error >= 0 for error in values["branch_distance_error"])


def test_codes_of_black_patches(model: Path) -> None:
    tokenizer = Pipeline.from_pretrained(model).tokenizer
    images = torch.zeros(4, 32, 32, dtype=torch.uint8)
    black = find_black_codes(tokenizer, Split(images, torch.zeros(4)))
    assert black.nonzero().flatten().tolist() == tokenizer.encode(torch.zeros(1, 3, 32, 32)).unique().tolist()
    assert not find_black_codes(tokenizer, Split(images + 40, torch.zeros(4))).any()


def test_one_kind_of_patches_is_weakened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PatchSoftCFG, "black_codes", torch.tensor([True, False, True]))
    logits, tokens = torch.randn(2, 5, 3), torch.randint(3, (2, 5))
    black, other = (PatchSoftCFG(patches=kind).token_confidence(logits, tokens, 0.7) for kind in ("black", "other"))
    assert ((black > 0) == (tokens != 1)).all()
    torch.testing.assert_close(black + other, SoftCFG().token_confidence(logits, tokens, 0.7))


def test_a_model_that_is_not_trained_is_left_out(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["study", "--only", HALF_TRAINED, "--draw-only"])
    study.main()
    assert (
        f"left out: {HALF_TRAINED} is not there; recipes/fashion_mnist/README.md trains it" in capsys.readouterr().err
    )


def test_a_model_that_the_options_leave_out_cannot_be_the_only_one(command, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", [*command, "--only", "fashion"])
    with pytest.raises(SystemExit) as end:
        study.main()
    assert end.value.code == 2
    assert "nothing is drawn with fashion" in capsys.readouterr().err


@pytest.mark.slow
class TestCommand:
    def test_all_points_are_drawn_once_and_the_document_is_made(self, command, tmp_path, monkeypatch) -> None:
        monkeypatch.setattr(sys, "argv", command)
        study.main()
        rows = lines(tmp_path / "results.jsonl")
        assert len({key(row) for row in rows}) == len(rows)
        text = (tmp_path / "study.md").read_text()
        assert text.startswith("before\n<!-- begin about -->\n- Model")
        assert text.endswith(f"<!-- end {[*report.BLOCKS][-1]} -->\nafter\n")
        assert "old" not in text
        assert "not there yet" not in text
        none = Point(NONE, 0, 20).settings()["guidance"]
        (fid,) = [
            r["values"]["fid"] for r in rows if r["guidance"] == none and r["seed"] == 0 and r["measure"] == "images"
        ]
        (other,) = [r["values"]["fid"] for r in rows if r["guidance"] == none and r["seed"] == 1]
        spread = f"{(fid + other) / 2:.3f} ± {abs(fid - other) / 2**0.5:.3f}"
        assert f"| no guidance | – | 2 | {spread} |" in text
        pictures = {path.name: path.read_bytes() for path in (tmp_path / "images" / "study").iterdir()}
        assert set(pictures) == {"samples.png", *(f"{name}.svg" for name in report.PICTURES)}

        study.main()  # nothing is left to draw, and the document stays as it is
        assert lines(tmp_path / "results.jsonl") == rows
        assert (tmp_path / "study.md").read_text() == text
        assert {path.name: path.read_bytes() for path in (tmp_path / "images" / "study").iterdir()} == pictures

    def test_a_line_that_is_no_text(self, tmp_path) -> None:
        (tmp_path / "results.jsonl").write_bytes(b"\xff\xfe\x00\n")
        with pytest.raises(UserError, match="line 1, is no result; take it out"):
            rows_of("fashion-small", tmp_path / "results.jsonl")

    @pytest.mark.timeout(1200)  # six processes that import PyTorch
    def test_killed_it_goes_on_and_comes_to_the_same(self, command, tmp_path) -> None:
        path = tmp_path / "results.jsonl"
        killed = [sys.executable, "-m", "recipes.study", *command[1:], "--workers", "2", "--draw-only"]
        process = subprocess.Popen(killed, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE)
        assert process.stdout is not None
        for _ in range(5):
            assert process.stdout.readline()  # of a point that was written
        process.kill()
        process.communicate()  # until its workers, who write there too, have finished their points and ended
        before = [row["values"] for row in lines(path)]
        with path.open("a") as file:
            file.write('{"measure": "ima')  # as if the kill had come while it wrote
        again = [sys.executable, "-m", "recipes.study", *command[1:], "--draw-only"]
        parts = [subprocess.Popen(again, cwd=Path(__file__).parents[2]) for _ in range(2)]  # sharing what is left
        assert [part.wait() for part in parts] == [0, 0]
        rows = lines(path)
        assert [row["values"] for row in rows[: len(before)]] == before
        assert len({key(row) for row in rows}) == len(rows) == len(SMALL.points({key(row): row for row in rows}))

    def test_the_document_before_the_results(self, command, monkeypatch, capsys) -> None:
        monkeypatch.setattr(sys, "argv", [*command, "--document-only"])
        with pytest.raises(SystemExit) as end:
            study.main()
        assert end.value.code == 2
        assert "no results for all points of the tuning" in capsys.readouterr().err


class TestResults:
    def test_rows_of_other_weights_do_not_count(self, tmp_path: Path) -> None:
        row = {**Point(CFG(), 0, 10).settings(), "values": {}}
        Results(tmp_path / "r.jsonl", "one").append(row)
        assert not Results(tmp_path / "r.jsonl", "two").rows()
        assert list(Results(tmp_path / "r.jsonl", "one").rows()) == [key(row)]

    def test_a_point_is_claimed_by_one(self, tmp_path: Path) -> None:
        settings = Point(METHODS["CFG"], 0, 10).settings()
        one, other = (Results(tmp_path / "r.jsonl", "w") for _ in range(2))
        with one.claim(settings) as mine, other.claim(settings) as theirs:
            assert mine
            assert not theirs
        with other.claim(settings) as theirs:
            assert theirs
            other.append({**settings, "values": {}})
        with one.claim(settings) as mine:
            assert not mine

    def test_what_is_no_result_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "r.jsonl").write_text("hello\n")
        with pytest.raises(UserError, match=r"r\.jsonl, line 1, is no result"):
            Results(tmp_path / "r.jsonl", "w").rows()
