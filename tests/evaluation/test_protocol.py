"""Whole evaluations: files in, report out."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from goldens import Golden, golden
from image_files import write_pngs
from made_runs import of_images
from softcfg import UserError
from softcfg.evaluation import (
    METRICS,
    Extractor,
    Features,
    evaluate,
    frechet_distance,
    inception_score,
    load_extractor,
    precision_recall,
    read_statistics,
    register_extractor,
    statistics,
)
from softcfg.evaluation.extractors import EXTRACTORS
from softcfg.files import hash_file
from stand_in import Counting, describe, extractor, factory


@pytest.fixture(scope="module")
def case() -> Golden:
    return golden("adm-metrics/golden-npz-pipeline")


@pytest.fixture
def files(case: Golden, tmp_path: Path) -> dict[str, Path]:
    """Files as the ADM evaluator reads them: with statistics of more images than there are, and without."""
    arrays = {name: tensor.numpy() for name, tensor in case.arrays.items()}
    paths = {name: tmp_path / f"{name}.npz" for name in ("samples", "reference", "images", "statistics")}
    moments = {name: arrays[f"ref_{name}"] for name in ("mu", "sigma", "mu_s", "sigma_s")}
    np.savez(paths["samples"], arrays["sample_arr_0"], np.zeros(200, dtype=np.int64))
    np.savez(paths["reference"], arr_0=arrays["ref_arr_0"], **moments)
    np.savez(paths["images"], arrays["ref_arr_0"])
    np.savez(paths["statistics"], **moments)
    return paths


def test_the_extractor_of_the_golden_files(case: Golden) -> None:
    for side in ("sample", "ref"):
        features = extractor().describe(case.arrays[f"{side}_arr_0"].permute(0, 3, 1, 2))
        torch.testing.assert_close(features.pooled, case.arrays[f"{side}_pool"])
        if side == "sample":
            assert torch.equal(features.spatial, case.arrays["sample_spatial"])


def test_files_of_the_evaluator(case: Golden, files: dict[str, Path]) -> None:
    expected = case.about["evaluator"]
    report = evaluate(files["samples"], files["reference"], extractor())
    assert list(report.metrics) == list(METRICS[:5])
    assert not any("class accuracy" in note for note in report.notes)  # nobody asks that of Inception
    for name in ("fid", "sfid"):
        assert report[name] == pytest.approx(expected[name], abs=2e-6)
    for name in ("precision", "recall"):
        assert report[name] == expected[name]
    report = evaluate(files["samples"], files["images"], extractor(), ("fid", "sfid"))
    assert list(report.metrics) == ["fid", "sfid"]
    for name in ("fid", "sfid"):
        assert report[name] == pytest.approx(expected[f"{name}_if_the_reference_file_had_arr_0_only"], abs=2e-6)


def test_statistics_in_the_sample_file_count(case: Golden, files: dict[str, Path]) -> None:
    report = evaluate(files["reference"], files["images"], extractor(), ["fid"])
    images = statistics(case.arrays["ref_pool"])
    given = read_statistics(files["reference"])
    assert given is not None
    assert report["fid"] == pytest.approx(frechet_distance(given.pooled, images), abs=1e-9)
    assert report["fid"] > 0.1
    assert any("use the statistics in" in note for note in report.notes)


def test_every_way_to_give_images_gives_the_same(case: Golden, files: dict[str, Path], tmp_path: Path) -> None:
    arrays = {side: case.arrays[f"{side}_arr_0"] for side in ("sample", "ref")}
    first = evaluate(arrays["sample"], arrays["ref"], extractor()).metrics
    pngs = write_pngs(tmp_path / "pngs", arrays["sample"].numpy())
    run = of_images(tmp_path / "run", arrays["ref"].numpy(), 64)
    assert evaluate(pngs, run.path, extractor()).metrics == first
    assert evaluate(files["samples"], files["images"], extractor(), batch_size=7).metrics == pytest.approx(first)
    features = [extractor().describe(arrays[side].permute(0, 3, 1, 2)) for side in ("sample", "ref")]
    assert first["inception_score"] == pytest.approx(inception_score(features[0].logits))
    assert (first["precision"], first["recall"]) == precision_recall(features[1].pooled, features[0].pooled)


def test_a_reference_of_statistics(files: dict[str, Path]) -> None:
    full = evaluate(files["samples"], files["reference"], extractor())
    report = evaluate(files["samples"], files["statistics"], extractor())
    assert report.metrics == {name: full[name] for name in ("fid", "sfid", "inception_score")}
    assert [note for note in report.notes if "holds statistics, but no images" in note] == report.notes[:2]
    with pytest.raises(UserError, match=r"statistics\.npz holds statistics, but no images"):
        evaluate(files["samples"], files["statistics"], extractor(), ["fid", "recall"])


def test_no_reference(files: dict[str, Path]) -> None:
    report = evaluate(files["samples"], extractor=extractor())
    assert list(report.metrics) == ["inception_score"]
    assert "no FID: it needs a reference" in report.notes
    with pytest.raises(UserError, match="needs a reference"):
        evaluate(files["samples"], extractor=extractor(), metrics=["fid"])


def test_saved_statistics_stand_for_their_images(files: dict[str, Path], tmp_path: Path) -> None:
    saved = tmp_path / "saved.npz"
    evaluate(files["images"], extractor=extractor(), save_stats=saved)
    by_images = evaluate(files["samples"], files["images"], extractor())
    report = evaluate(files["samples"], saved, extractor())
    assert report.metrics == {name: by_images[name] for name in ("fid", "sfid", "inception_score")}
    about = report.settings["reference"]
    assert about["statistics_of"]["count"] == "150"
    assert about["statistics_of"]["fingerprint"] == by_images.settings["reference"]["sha256"]
    with np.load(saved, allow_pickle=False) as content:  # the layout of ADM reference batches
        assert content["mu"].shape == (12,)
        assert content["sigma"].shape == (12, 12)
        assert content["mu_s"].shape == (28,)
        assert content["sigma_s"].shape == (28, 28)


def test_saved_statistics_know_what_they_are_of(files: dict[str, Path], tmp_path: Path) -> None:
    saved = tmp_path / "saved.npz"
    evaluate(files["images"], extractor=extractor(), save_stats=saved)
    with pytest.raises(UserError, match="made with other weights of the extractor stand-in"):
        evaluate(files["samples"], saved, extractor("others"))
    other = Extractor("other", extractor().describe, "stand-in of the golden files")
    with pytest.raises(UserError, match="statistics of the extractor stand-in, not of other"):
        evaluate(files["samples"], saved, other)
    with pytest.raises(UserError, match="samples are 8 x 12 and the reference images 8 x 8"):
        evaluate(np.zeros((9, 8, 12, 3), dtype=np.uint8), saved, extractor())


# ---- what the report says


def test_the_report(files: dict[str, Path]) -> None:
    report = evaluate(files["samples"], files["images"], extractor())
    content = json.loads(report.to_json())
    assert content["metrics"] == report.metrics
    assert content["settings"]["samples"] == {
        "name": str(files["samples"]),
        "count": 200,
        "size": [8, 8],
        "sha256": hash_file(files["samples"]),
        "statistics": "of the images",
    }
    assert content["settings"]["extractor"]["identity"] == "stand-in of the golden files"
    assert content["settings"]["parameters"] == {"split_size": 5000, "neighbour": 3, "batch_size": 64}
    assert content["settings"]["versions"]["torch"] == torch.__version__
    table = report.to_table().splitlines()
    assert table[0].split() == ["FID", f"{report['fid']:.3f}"]
    assert any("200 images of 8 x 8" in line for line in table)
    assert not report.notes


def test_few_images_are_remarked_upon(case: Golden, files: dict[str, Path]) -> None:
    report = evaluate(case.arrays["sample_arr_0"][:12], files["images"], extractor())
    assert report.notes == [
        "array has 12 images for 12 features: FID is far above its value for many images, "
        "and compares only with figures of as many"
    ]


# ---- what is refused


def test_input_that_is_refused(case: Golden, files: dict[str, Path]) -> None:
    samples = case.arrays["sample_arr_0"]
    for given, reference, text in (
        (samples[:1], files["images"], "at least 2 images, got 1"),
        (samples[:3], files["images"], "at least 4 images on both sides, got 3"),
        (samples[:, :4], files["images"], "samples are 4 x 8 and the reference images 8 x 8"),
        (samples.float() / 255, files["images"], "must be uint8, 0 to 255, got float32"),
        (files["statistics"], files["images"], "has no array arr_0|holds statistics, but no images"),
    ):
        with pytest.raises(UserError, match=text):
            evaluate(given, reference, extractor(), ("fid", "sfid", "precision", "recall"))
    with pytest.raises(UserError, match="no metric named 'fdi'; did you mean fid"):
        evaluate(files["samples"], files["images"], extractor(), ["fdi"])
    with pytest.raises(UserError, match="batch size must be at least 1"):
        evaluate(files["samples"], files["images"], extractor(), batch_size=0)
    with pytest.raises(UserError, match="no images of which statistics could be saved"):
        evaluate(files["statistics"], files["images"], extractor(), save_stats="x.npz")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"sigma": None}, "statistics without sigma"),
        ({"mu_s": None}, "statistics without mu_s"),
        ({"mu_s": None, "sigma_s": None}, "those for sFID, mu_s and sigma_s"),
        ({"mu": np.zeros(3)}, r"mu must be \[D\] and sigma \[D, D\], got \[3\] and \[12, 12\]"),
        ({"mu": np.zeros(3), "sigma": np.eye(3)}, "width 12 and 3"),
        ({"mu": np.full(12, np.nan)}, "mu of .* not finite"),
        ({"mu": np.zeros(12, dtype=int)}, "must be float32 or float64, got int64"),
        ({"sigma": np.triu(np.ones((12, 12)))}, "not symmetric"),
        ({"sigma": np.array([{}] * 144, dtype=object).reshape(12, 12)}, "cannot be read"),
    ],
)
def test_statistics_that_are_refused(
    change: dict[str, Any], text: str, case: Golden, files: dict[str, Path], tmp_path: Path
) -> None:
    moments: dict[str, Any] = {name: case.arrays[f"ref_{name}"].numpy() for name in ("mu", "sigma", "mu_s", "sigma_s")}
    moments.update(change)
    np.savez(tmp_path / "bad.npz", **{name: array for name, array in moments.items() if array is not None})
    with pytest.raises(UserError, match=text):
        evaluate(files["samples"], tmp_path / "bad.npz", extractor(), ("fid", "sfid"))


# ---- extractors


def test_an_extractor_without_spatial_features(files: dict[str, Path]) -> None:
    def describe(pixels: Tensor) -> Features:
        return Features(pixels.float().mean(dim=(2, 3)))

    report = evaluate(files["samples"], files["images"], Extractor("means", describe, ""))
    assert list(report.metrics) == ["fid", "precision", "recall"]
    assert report.notes == [
        "no sFID: the extractor means gives no spatial features",
        "no Inception Score: the extractor means gives no logits features",
    ]
    with pytest.raises(UserError, match="gives no spatial features"):
        evaluate(files["samples"], files["images"], Extractor("means", describe, ""), ["sfid"])


def test_an_extractor_of_ones_own(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = evaluate(files["samples"], files["images"], extractor()).metrics
    assert evaluate(files["samples"], files["images"], "stand_in:factory").metrics == expected
    monkeypatch.setattr("softcfg.evaluation.extractors.EXTRACTORS", dict(EXTRACTORS))
    register_extractor("mine", factory)
    assert evaluate(files["samples"], files["images"], "mine").metrics == expected
    for name, text in (
        ("inceptoin", "no feature extractor named 'inceptoin'; did you mean inception"),
        ("stand_in:gone", "cannot be imported"),
        ("gone_module:factory", "cannot be imported"),
    ):
        with pytest.raises(UserError, match=text):
            load_extractor(name)


@pytest.mark.parametrize(
    ("features", "text"),
    [
        (lambda x: Features(torch.full((len(x), 3), torch.nan)), "returned pooled that are not finite"),
        (lambda x: Features(torch.zeros(1, 3)), r"must return pooled of shape \[64, width\] .* got \[1, 3\]"),
        (lambda x: Features(x.float()), r"got \[64, 3, 8, 8\]"),
    ],
)
def test_extractors_that_misbehave(features: Any, text: str, files: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=text):
        evaluate(files["samples"], files["images"], Extractor("odd", features, ""))


def test_fashion(tmp_path: Path) -> None:
    from softcfg.evaluation.fashion_classifier import FashionClassifier

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = FashionClassifier().eval()
        pixels = torch.randint(256, (40, 32, 32, 3), dtype=torch.uint8)
    save_file(network.state_dict(), tmp_path / "classifier.safetensors")
    loaded = load_extractor("fashion", tmp_path / "classifier.safetensors")
    with torch.inference_mode():
        features = loaded.describe(pixels.permute(0, 3, 1, 2))
        images = pixels.permute(0, 3, 1, 2) / 255
        torch.testing.assert_close(features.pooled, network.features(images))
        torch.testing.assert_close(features.logits, network(images))
    report = evaluate(pixels, pixels.flip(0), loaded)
    assert list(report.metrics) == ["fid", "inception_score", "precision", "recall"]
    assert report["fid"] == pytest.approx(0, abs=1e-6)
    assert report["precision"] == report["recall"] == 1
    predicted = features.logits.argmax(dim=1)
    wrong = torch.where(torch.arange(40) < 10, (predicted + 1) % 10, predicted)
    report = evaluate(pixels, extractor=loaded, labels=wrong)
    assert report.metrics.keys() == {"inception_score", "class_accuracy"}
    assert report["class_accuracy"] == 0.75
    np.savez(tmp_path / "samples.npz", pixels.numpy(), predicted.numpy())
    assert evaluate(tmp_path / "samples.npz", extractor=loaded)["class_accuracy"] == 1
    with pytest.raises(UserError, match="does not say of which classes"):
        evaluate(pixels, extractor=loaded, metrics=["class_accuracy"])
    unknowing = Extractor("other", loaded.describe, "")
    with pytest.raises(UserError, match="extractor other does not know the classes"):
        evaluate(pixels, extractor=unknowing, labels=wrong, metrics=["class_accuracy"])
    with pytest.raises(UserError, match="32 x 32 pixels, these have 8 x 8"):
        evaluate(pixels[:, :8, :8], extractor=loaded)


# ---- the cache


def test_the_same_images_are_described_once(case: Golden, files: dict[str, Path], tmp_path: Path) -> None:
    cache = tmp_path / "some" / "cache"
    counting = Counting()
    counted = Extractor("counting", counting, "1")
    first = evaluate(files["samples"], files["images"], counted, ["fid"], cache=cache)
    assert counting.batches == [64, 64, 64, 8, 64, 64, 22]
    again = evaluate(files["samples"], files["reference"], counted, cache=cache)
    # The reference file has another content; its images are the same.
    assert counting.batches == [64, 64, 64, 8, 64, 64, 22, 64, 64, 22]
    all_of_it = evaluate(files["samples"], files["images"], counted, cache=cache)
    assert len(counting.batches) == 10
    assert all_of_it["fid"] == first["fid"]
    assert all_of_it["recall"] == again["recall"]
    # Other weights, another dtype or other images are described anew.
    evaluate(files["samples"], extractor=Extractor("counting", counting, "2"), cache=cache)
    evaluate(files["samples"], extractor=Extractor("counting", counting, "1", dtype=torch.float64), cache=cache)
    evaluate(case.arrays["sample_arr_0"][1:], extractor=counted, cache=cache)
    assert len(counting.batches) == 22
    assert not [path for path in cache.iterdir() if path.suffix != ".safetensors"]


def test_a_damaged_cache_is_made_anew(files: dict[str, Path], tmp_path: Path) -> None:
    counting = Counting()
    counted = Extractor("counting", counting, "1")
    expected = evaluate(files["samples"], extractor=counted, cache=tmp_path / "cache").metrics
    (path,) = (tmp_path / "cache").iterdir()
    for content in (path.read_bytes()[:-20], b"", b"nonsense" * 40):
        before = len(counting.batches)
        path.write_bytes(content)
        assert evaluate(files["samples"], extractor=counted, cache=tmp_path / "cache").metrics == expected
        assert len(counting.batches) == before + 4
        assert load_file(path)["pooled"].shape == (200, 12)


def test_a_cache_that_cannot_be_written(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.warns(UserWarning, match="features are not kept: cannot write into folder"):
        found = evaluate(files["samples"], extractor=extractor(), cache=tmp_path / "file" / "cache")
    assert found.metrics == evaluate(files["samples"], extractor=extractor()).metrics


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"reference": 3}, "images must be the path of"),
        ({"metrics": 5}, "metrics must be a list of names, got 5"),
        ({"metrics": [None]}, "no metric named 'None'"),
        ({"labels": "abc"}, "labels must be the class of every sample"),
        ({"labels": [1.5] * 6}, "labels must be whole numbers, got float32"),
        ({"batch_size": "64"}, "batch size must be a whole number, got '64'"),
        ({"dtype": torch.bfloat16}, "dtype must be float32 or float64"),
        ({"device": "nonsense"}, "device 'nonsense' is not available"),
        ({"device": "meta"}, "device 'meta' is not available"),
        ({"extractor": None}, "the extractor must be a name or an Extractor"),
        ({"weights": 5}, "weights must be a path"),
        ({"cache": 5}, "cache must be a path"),
        ({"save_stats": 5}, "save_stats must be a path"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_arguments_that_mean_nothing(settings: dict[str, Any], text: str) -> None:
    images = np.zeros((6, 8, 8, 3), dtype=np.uint8)
    with pytest.raises(UserError, match=text):
        evaluate(images, **{"extractor": extractor(), **settings})


def test_pictures_in_lists_measure_like_arrays(case: Golden, files: dict[str, Path], tmp_path: Path) -> None:
    samples = case.arrays["sample_arr_0"].numpy()
    folder = write_pngs(tmp_path / "samples", samples[:20])
    mixed = [*folder.glob("*.png"), *map(Image.fromarray, samples[20:100]), *samples[100:]]
    found = evaluate(mixed, [*map(Image.fromarray, case.arrays["ref_arr_0"].numpy())], extractor(), dtype="float32")
    assert found.metrics == pytest.approx(evaluate(files["samples"], files["images"], extractor()).metrics, abs=1e-9)
    assert list(evaluate(files["samples"], files["images"], extractor(), "fid").metrics) == ["fid"]


def brightness(pixels: Tensor) -> Features:
    return replace(describe(pixels), answers=pixels.float().mean((1, 2, 3))[:, None])


def reads_prompts(answers: Tensor, prompts: Sequence[str]) -> dict[str, float]:
    """Knows bright and dark pictures alone."""
    if set(prompts) - {"bright", "dark"}:
        raise UserError("there is no such picture")
    bright = answers[:, 0] > 128
    return {"all": float((bright == torch.tensor([prompt == "bright" for prompt in prompts])).float().mean())}


def test_agreement_with_prompts() -> None:
    pixels = np.stack([np.full((16, 16, 3), level, np.uint8) for level in (10, 250, 240, 20)])
    judge = replace(extractor(), describe=brightness, agreement=reads_prompts)
    prompts = ["dark", "bright", "dark", "dark"]
    assert evaluate(pixels, extractor=judge, prompts=prompts, metrics="agreement").metrics == {"agreement": 0.75}
    report = evaluate(pixels, extractor=judge)
    assert "agreement" not in report.metrics
    assert "no agreement: array does not say from which prompts its images were drawn" in report.notes
    report = evaluate(pixels, extractor=judge, prompts=["blue"] * 4)
    assert [note for note in report.notes if "agreement" in note] == ["no agreement: there is no such picture"]
    assert not any("agreement" in note for note in evaluate(pixels, extractor=extractor(), prompts=prompts).notes)
    for settings, message in (
        ({"prompts": prompts[:3]}, "agreement needs one prompt per sample, got 3 for 4"),
        ({"prompts": "dark"}, "prompts must be a list of texts, one per sample, got 'dark'"),
        (
            {"prompts": prompts, "metrics": ["colour_agreement"]},
            "colour right cannot be computed: no prompt says a colour",
        ),
        ({"metrics": ["agreement"]}, "agreement cannot be computed: array does not say from which prompts"),
        ({"prompts": prompts, "metrics": ["agreement"], "extractor": extractor()}, "stand-in does not read prompts"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(pixels, **{"extractor": judge, **settings})


def test_statistics_do_not_overwrite_what_they_are_of(tmp_path: Path) -> None:
    path = tmp_path / "samples.npz"
    np.savez(path, np.zeros((4, 8, 8, 3), dtype=np.uint8))
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"save_stats: .* would overwrite the samples, an input; give another file"):
        evaluate(path, extractor=extractor(), save_stats=tmp_path / "." / "samples.npz")
    assert path.read_bytes() == before
