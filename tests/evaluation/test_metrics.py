"""The metrics equal the ADM evaluator's, and brute force."""

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from goldens import FOLDER, golden
from softcfg import UserError
from softcfg.evaluation import (
    Extractor,
    Features,
    Statistics,
    class_accuracy,
    extract,
    frechet_distance,
    inception_score,
    open_source,
    precision_recall,
    statistics,
)
from softcfg.evaluation.metrics import radii


def normal(rows: int, width: int, seed: int, rank: int | None = None, offset: float = 0.0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    latent = torch.randn(rows, rank or width, generator=draw, dtype=torch.float64)
    return (latent @ torch.randn(rank or width, width, generator=draw, dtype=torch.float64) + offset).float()


# ---- Frechet distance


def test_statistics_of_the_evaluator() -> None:
    arrays = golden("adm-metrics/golden-metrics").arrays
    for side in ("ref", "sample"):
        for kind, suffix in (("features", ""), ("spatial", "_s")):
            ours = statistics(arrays[f"{side}_{kind}"])
            torch.testing.assert_close(ours.covariance, arrays[f"{side}_sigma{suffix}"], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(ours.mean.float(), arrays[f"{side}_mu{suffix}"], rtol=0, atol=5e-6)


def test_distances_of_the_evaluator() -> None:
    case = golden("adm-metrics/golden-metrics")
    for metric, kind, suffix in (("fid", "features", ""), ("sfid", "spatial", "_s")):
        ours = frechet_distance(*(statistics(case.arrays[f"{side}_{kind}"]) for side in ("sample", "ref")))
        assert ours == pytest.approx(case.about["independent_float64"][metric], rel=1e-11)
        assert ours == pytest.approx(case.about["evaluator"][metric], abs=6e-6)
        stored = [
            Statistics(case.arrays[f"{side}_mu{suffix}"], case.arrays[f"{side}_sigma{suffix}"])
            for side in ("sample", "ref")
        ]
        assert frechet_distance(*stored) == pytest.approx(case.about["evaluator"][metric], abs=1e-7)


NEAR_SINGULAR = json.loads((FOLDER / "adm-metrics/golden-near-singular.json").read_text())["cases"]


def near_singular_side(how: dict[str, Any]) -> Tensor:
    features = golden("adm-metrics/golden-near-singular").arrays[how["array"]][slice(*how["rows"])].clone()
    for column in how.get("constant_columns", ()):
        features[:, column] = how["constant"]
    for to, origin in how.get("copied_columns", ()):
        features[:, to] = features[:, origin]
    return features


@pytest.mark.parametrize("name", NEAR_SINGULAR)
def test_rank_deficient_distances(name: str) -> None:
    case = NEAR_SINGULAR[name]
    sides = [near_singular_side(case[side]) for side in ("sample", "reference")]
    if min(map(len, sides)) < 2:
        with pytest.raises(UserError, match="at least 2 images, got 1"):
            frechet_distance(*map(statistics, sides))
        return
    ours = frechet_distance(*map(statistics, sides))
    assert ours >= 0
    assert ours == pytest.approx(case["independent_float64"], abs=1e-6)
    assert ours == pytest.approx(case["evaluator"]["value"], abs=2e-5)


@pytest.mark.parametrize(("rows", "rank", "offset"), [(400, 24, 0.0), (400, 24, 1000.0), (400, 5, 0.0), (12, 24, 3.0)])
def test_against_exact_factors(rows: int, rank: int, offset: float) -> None:
    """The trace as singular values of the features' own triangular factors, which no square root of S blurs."""
    features = [normal(rows, 24, seed, rank, offset).numpy().astype(np.float64) for seed in (1, 2)]
    factors, total = [], 0.0
    for x in features:
        centred = (x - x.mean(axis=0)) / np.sqrt(len(x) - 1)
        factors.append(scipy.linalg.qr(centred, mode="economic")[1])
        total += np.square(centred).sum()
    total += np.square(features[0].mean(axis=0) - features[1].mean(axis=0)).sum()
    exact = total - 2 * scipy.linalg.svdvals(factors[0] @ factors[1].T).sum()
    ours = frechet_distance(*(statistics(torch.from_numpy(x)) for x in features))
    assert ours == pytest.approx(exact, rel=1e-7)


def test_against_the_matrix_square_root_of_scipy() -> None:
    one, other = statistics(normal(500, 30, 3)), statistics(normal(600, 30, 4) + 0.5)
    root = scipy.linalg.sqrtm((one.covariance @ other.covariance).numpy())
    expected = (one.mean - other.mean).square().sum() + (one.covariance + other.covariance).trace() - 2 * root.trace()
    assert frechet_distance(one, other) == pytest.approx(float(expected.real), rel=1e-9)
    assert frechet_distance(one, other) == pytest.approx(frechet_distance(other, one), rel=1e-12)


def test_statistics_of_many_features_in_many_rows() -> None:
    """More than one block of rows and one panel of columns."""
    x = normal(4500, 40, 6, offset=2.0).repeat(1, 30)[:, :1100]
    ours = statistics(x)
    np.testing.assert_allclose(ours.mean.numpy(), x.double().mean(dim=0).numpy(), rtol=1e-12)
    expected = np.cov(x.numpy().astype(np.float64), rowvar=False)
    np.testing.assert_allclose(ours.covariance.numpy(), expected, rtol=1e-9, atol=1e-10)


def test_distance_to_itself_is_nought() -> None:
    for rank in (3, 40):
        given = statistics(normal(200, 40, 5, rank))
        assert frechet_distance(given, given) == pytest.approx(0, abs=1e-9 * float(given.covariance.trace()))


@pytest.mark.parametrize(
    ("covariance", "text"),
    [
        (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), "not symmetric"),
        (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), "negative eigenvalue"),
        (torch.tensor([[1.0, torch.nan], [torch.nan, 1.0]]), "not finite"),
        (torch.eye(3), r"must be \[2, 2\]"),
    ],
)
def test_what_is_no_covariance_is_refused(covariance: Tensor, text: str) -> None:
    sound = Statistics(torch.zeros(2), torch.eye(2))
    with pytest.raises(UserError, match=text):
        frechet_distance(sound, Statistics(torch.zeros(2), covariance))


@pytest.mark.parametrize(("mean", "variances"), [(1e160, (1.0, 1.0)), (0.0, (1.0, 1e308)), (1e150, (1e307, 1.7e307))])
def test_numbers_too_large_for_a_distance_are_refused(mean: float, variances: tuple[float, float]) -> None:
    one, other = (torch.eye(128, dtype=torch.float64) * variance for variance in variances)
    with pytest.raises(UserError, match="too large for a distance"):
        frechet_distance(
            Statistics(torch.zeros(128, dtype=torch.float64), one),
            Statistics(torch.full((128,), mean, dtype=torch.float64), other),
        )


def test_other_widths_are_refused() -> None:
    with pytest.raises(UserError, match="width 3 and 4"):
        frechet_distance(statistics(normal(9, 3, 0)), statistics(normal(9, 4, 0)))
    with pytest.raises(UserError, match="width 3 and 4"):
        precision_recall(normal(9, 3, 0), normal(9, 4, 0))


# ---- Inception Score


def test_scores_of_the_evaluator() -> None:
    case = golden("adm-metrics/golden-inception-score")
    logits = case.arrays["logits"].float()
    for expected, tolerance in ((case.about["evaluator"], 2e-6), (case.about["independent_float64"], 1e-12)):
        ours = {
            "first_rows": {count: inception_score(logits[: int(count)]) for count in expected["first_rows"]},
            "reversed_rows": inception_score(logits.flip(0)),
            "rows_sorted_by_argmax_stable": inception_score(logits[logits.argmax(dim=1).argsort(stable=True)]),
            "other_split_sizes": {size: inception_score(logits, int(size)) for size in expected["other_split_sizes"]},
        }
        assert ours["first_rows"] == pytest.approx(expected["first_rows"], rel=tolerance)
        assert ours["other_split_sizes"] == pytest.approx(expected["other_split_sizes"], rel=tolerance)
        for name in ("reversed_rows", "rows_sorted_by_argmax_stable"):
            assert ours[name] == pytest.approx(expected[name], rel=tolerance)


def test_a_vanishing_probability_does_not_spoil_the_score() -> None:
    case = golden("adm-metrics/golden-inception-score")
    expected = case.about["evaluator"]["one_logit_far_below_the_maximum"]["scores"]
    for gap in (60.0, 80.0, 100.0, 1e4):
        logits = case.arrays["logits"][:8].float()
        logits[3, 5] = logits[3].max() - gap
        # The evaluator itself returns nan where a probability underflows; the limit is that of the finite cases.
        assert inception_score(logits) == pytest.approx(expected["80"], rel=2e-6)


def test_scores_at_the_extremes() -> None:
    assert inception_score(torch.zeros(40, 10)) == pytest.approx(1)
    assert inception_score(1000 * torch.eye(10).repeat(4, 1)) == pytest.approx(10)


# ---- precision and recall


def brute_force(reference: Tensor, samples: Tensor, k: int) -> tuple[float, float, np.ndarray]:
    def distances(one: Tensor, other: Tensor) -> np.ndarray:
        x, y = one.numpy().astype(np.float64), other.numpy().astype(np.float64)
        return np.square(x[:, None] - y[None]).sum(axis=2)

    reach = [np.sort(distances(each, each), axis=1)[:, k] for each in (reference, samples)]
    cross = distances(reference, samples)
    precision = (cross <= reach[0][:, None]).any(axis=0).mean()
    recall = (cross <= reach[1][None]).any(axis=1).mean()
    return precision, recall, reach[0]


def test_coverage_of_the_evaluator() -> None:
    case = golden("adm-metrics/golden-metrics")
    reference, samples = case.arrays["ref_features"], case.arrays["sample_features"]
    precision, recall = precision_recall(reference, samples)
    exact = case.about["independent_float64"]
    assert (precision, recall) == (exact["precision"], exact["recall"])
    # The evaluator's half-precision arithmetic decides a sample or two in the other way.
    assert precision == pytest.approx(case.about["evaluator"]["precision"], abs=3 / len(samples))
    assert recall == pytest.approx(case.about["evaluator"]["recall"], abs=3 / len(reference))
    for side, features in (("ref", reference), ("sample", samples)):
        expected = case.arrays[f"{side}_radii_float32"].double()
        torch.testing.assert_close(radii(features), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("block", [7, 32, 2048])
def test_ties_and_equal_rows(block: int) -> None:
    case = golden("adm-metrics/golden-precision-recall-cases")
    expected = case.about["evaluator"]["lattice"]
    reference, samples = case.arrays["lattice_ref"], case.arrays["lattice_sample"]
    for column, k in enumerate(expected["k"]):
        for side, features in (("ref", reference), ("sample", samples)):
            assert torch.equal(radii(features, k, block).float(), case.arrays[f"lattice_{side}_radii"][:, column])
        assert precision_recall(reference, samples, k, block) == (
            expected["precision"][column],
            expected["recall"][column],
        )


def test_offset_and_scale_change_nothing() -> None:
    case = golden("adm-metrics/golden-precision-recall-cases")
    for about in case.about["evaluator"]["offset_and_scale"]["results"].values():
        sides = [(case.arrays[name] + about["offset"]) * about["scale"] for name in ("base_ref", "base_sample")]
        assert precision_recall(*sides) == (about["float64"]["precision"], about["float64"]["recall"])


def test_an_outlier() -> None:
    case = golden("adm-metrics/golden-precision-recall-cases")
    reference, samples = case.arrays["base_ref"] + 8, case.arrays["base_sample"] + 8
    reference[37] *= 30
    expected = case.about["evaluator"]["outlier"]["results"]["rows 10000, columns 10000"]
    assert precision_recall(reference, samples) == (expected["precision"], expected["recall"])


@pytest.mark.parametrize(("block", "k"), [(2048, 3), (50, 3), (33, 1), (17, 8), (12, 5)])
def test_against_brute_force(block: int, k: int) -> None:
    reference, samples = normal(150, 6, 1), normal(130, 6, 2) * 1.1
    precision, recall, reach = brute_force(reference, samples, k)
    assert precision_recall(reference, samples, k, block) == (precision, recall)
    np.testing.assert_allclose(radii(reference, k, block).numpy(), reach, rtol=1e-9)


def test_equal_rows_in_many_dimensions() -> None:
    """Where rounding could make the distance of equal rows differ from 0, or that of one pair from itself."""
    features = normal(40, 500, 3, offset=30.0)
    assert float(radii(features.repeat(4, 1), block=7).max()) == 0
    # Samples that are references: each lies on the rim of balls, computed in other blocks.
    reference, samples = features, torch.cat([features[::3], features[1::3] + 100])
    precision, recall, _ = brute_force(reference, samples, 3)
    for block in (2048, 11, 5):
        assert precision_recall(reference, samples, block=block) == (precision, recall)


def test_too_few_rows_are_refused() -> None:
    case = golden("adm-metrics/golden-precision-recall-cases")
    expected = case.about["evaluator"]["few_references"]["results"]
    base, samples = case.arrays["base_ref"], case.arrays["base_sample"]
    assert precision_recall(base[:4], samples) == (expected["4"]["precision"], expected["4"]["recall"])
    with pytest.raises(UserError, match="at least 4 images on both sides, got 3"):
        precision_recall(base[:3], samples)


def test_class_accuracy() -> None:
    logits = torch.tensor([[0.1, 2.0, -1.0], [3.0, 2.9, 2.8], [-3.0, -2.0, -1.0], [0.0, 1.0, 0.0]])
    assert class_accuracy(logits, torch.tensor([1, 0, 2, 1])) == 1
    assert class_accuracy(logits, torch.tensor([1, 1, 2, 2])) == 0.5
    for labels, text in (
        (torch.tensor([0, 1]), "one label per image"),
        (torch.tensor([0, 1, 3, 0]), "found 3"),
    ):
        with pytest.raises(UserError, match=text):
            class_accuracy(logits, labels)


@pytest.mark.parametrize("value", [0, -1, True, 2.5, "3", None])
def test_numbers_that_are_no_counts_are_refused(value: Any) -> None:
    features = normal(9, 4, 0)
    source = open_source(np.zeros((2, 4, 4, 3), np.uint8))
    extractor = Extractor("mean", lambda pixels: Features(pixels.float().mean(dim=(2, 3))), "0")
    for name, call in {
        "k": lambda: precision_recall(features, features, k=value),
        "block": lambda: precision_recall(features, features, block=value),
        "split_size": lambda: inception_score(features, value),
        "batch_size": lambda: extract(extractor, source, batch_size=value),
    }.items():
        with pytest.raises(UserError, match=rf"{name} must be (a whole number|at least 1), got"):
            call()


def test_what_are_no_features_is_refused() -> None:
    spoilt = normal(9, 4, 0)
    spoilt[5, 2] = torch.nan
    for function in (statistics, inception_score, radii):
        with pytest.raises(UserError, match="not finite"):
            function(spoilt)
        with pytest.raises(UserError, match="floating-point"):
            function(torch.ones(9, 4, dtype=torch.int64))
        with pytest.raises(UserError, match=r"must be \[N, width\]"):
            function(torch.ones(9))
        with pytest.raises(UserError, match=r"must be a tensor \[N, width\]"):
            function([[0.5]])
    with pytest.raises(UserError, match=r"must be a tensor \[N, width\]"):
        precision_recall([[0.5]], spoilt)


MEMORY = """
import resource, sys, torch
from softcfg.evaluation import precision_recall
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
torch.set_num_threads(1)
draw = torch.Generator().manual_seed(0)
reference, samples = (torch.randn(count, 32, generator=draw) for count in (10_000, 50_000))
before = peak()
print(*precision_recall(reference, samples), peak() - before)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fifty_thousand_samples_need_little_memory() -> None:
    """All distances at once would take 10 GB for the samples among themselves."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    precision, recall, megabytes = map(float, done.stdout.split())
    assert megabytes < 400
    assert precision > 0.5
    assert recall > 0.5
