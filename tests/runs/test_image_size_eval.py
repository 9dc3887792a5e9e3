"""Images of another size than the model's own: resized as LlamaGen's released evaluation does, on every way in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from image_files import write_pngs
from softcfg import Pipeline, UserError
from softcfg.cli.main import main
from softcfg.evaluation import evaluate, open_source
from softcfg.images import resize
from softcfg.runs.folder import RunFolder
from softcfg.runs.job import RunRequest, decode_run, draw_run
from stand_in import extractor

OWN = 8  # pixels a side of the model's images
SIZES = [5, 12, 3]


def weights_of(count: int, size: int) -> np.ndarray:
    """The matrix [size, count] of bicubic interpolation along a side: Keys' kernel with a = -0.75, edges repeated."""

    def kernel(x: float) -> float:
        a, x = -0.75, abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    matrix = np.zeros((size, count))
    for row in range(size):
        centre = (row + 0.5) * count / size - 0.5
        for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            matrix[row, min(max(tap, 0), count - 1)] += kernel(centre - tap)
    return matrix


def bicubic(images: np.ndarray, size: int) -> np.ndarray:
    """Images [..., H, W] as [..., size, size], in float64."""
    height, width = images.shape[-2:]
    return weights_of(height, size) @ images.astype(np.float64) @ weights_of(width, size).T


def to_8_bits(raw: np.ndarray, rounded: bool) -> np.ndarray:
    """[B, 3, H, W], nominally in [0, 1], as uint8 [B, H, W, 3]."""
    return (255 * raw.clip(0, 1) + 0.5 * rounded).astype(np.uint8).transpose(0, 2, 3, 1)


def raw_images(pipe: Pipeline, codes: torch.Tensor) -> np.ndarray:
    """What the decoder gives before anything else, in float64."""
    tokenizer = pipe.tokenizer
    with torch.no_grad():
        return tokenizer.decode_latents(tokenizer.embed_tokens(codes)).double().numpy()


@pytest.fixture(scope="module")
def plain(model_folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(model_folder)


@pytest.mark.parametrize("size", [*SIZES, 256])
@pytest.mark.parametrize("count", [8, 96, 384])
def test_the_interpolation(count: int, size: int) -> None:
    images = np.random.default_rng(0).normal(size=(1, 2, count, count))
    found = resize(torch.from_numpy(images), size).numpy()
    np.testing.assert_allclose(found, images if size == count else bicubic(images, size), atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_raw_images_are_resized_before_they_are_rounded(model_folder: Path, size: int) -> None:
    plain, pipe = Pipeline.from_pretrained(model_folder), Pipeline.from_pretrained(model_folder, image_size_eval=size)
    for each in (plain, pipe):  # so that much lies beyond [0, 1]
        decode = each.tokenizer.decode_latents
        each.tokenizer.decode_latents = lambda latents, decode=decode: 8 * decode(latents) - 3  # type: ignore[method-assign]
    out, own = pipe(labels=[0, 1, 2], seed=3), plain(labels=[0, 1, 2], seed=3)
    assert torch.equal(out.tokens, own.tokens)
    assert out.pixels.shape == (3, size, size, 3)
    assert all(image.size == (size, size) for image in out.images)
    raw = raw_images(plain, own.codes)
    expected, too_late = (to_8_bits(bicubic(images, size), plain.tokenizer.rounds) for images in (raw, raw.clip(0, 1)))
    assert np.abs(out.pixels.astype(int) - expected).max() <= 1
    assert np.mean(out.pixels != expected) < 0.01
    assert np.mean(out.pixels != too_late) > 0.1
    np.testing.assert_array_equal(plain.with_image_size(size)(labels=[0, 1, 2], seed=3).pixels, out.pixels)
    assert plain(labels=[0], seed=3).pixels.shape == (1, OWN, OWN, 3)  # which it was before


def settings_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def sample(folder: Path, out: Path, *flags: str) -> int:
    words = ["sample", str(folder), "--labels", "0,1", "--num-samples", "4", "--no-compare", "--output-dir", str(out)]
    return main([*words, *flags])


def test_runs(model_folder: Path, plain: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Command line and Python, drawn and decoded: the same images; what is the model's own is not written down."""
    request = RunRequest(plain, [0, 1], num_samples=4)
    assert sample(model_folder, tmp_path / "own") == 0
    assert sample(model_folder, tmp_path / "same", "--image-size-eval", str(OWN)) == 0
    own, same = RunFolder.open(tmp_path / "own"), RunFolder.open(tmp_path / "same")
    assert own.fingerprint == same.fingerprint == draw_run(request, tmp_path / "python").fingerprint
    assert "image_size_eval" not in settings_of(tmp_path / "same")

    assert sample(model_folder, tmp_path / "five", "--image_size_eval", "5", "--npz") == 0
    five = RunFolder.open(tmp_path / "five")
    assert settings_of(tmp_path / "five")["image_size_eval"] == 5
    assert np.load(tmp_path / "five.npz")["arr_0"].shape == (4, 5, 5, 3)
    with Image.open(tmp_path / "five" / "000003.png") as image:
        assert image.size == (5, 5)
    by_name = RunRequest(str(model_folder), [0, 1], num_samples=4, image_size_eval=5)
    by_pipeline = RunRequest(plain, [0, 1], num_samples=4, image_size_eval=5)
    for n, request in enumerate((by_name, by_pipeline)):
        run = draw_run(request, tmp_path / f"python{n}")
        assert run.fingerprint == five.fingerprint
        np.testing.assert_array_equal(run.read(0).pixels, five.read(0).pixels)

    capsys.readouterr()
    for flags, text in ((["--image-size-eval", "6"], "5 there, 6 here"), ([], "5 there, None here")):
        assert sample(model_folder, tmp_path / "five", *flags) == 2
        assert f"holds a run with another image_size_eval ({text})" in capsys.readouterr().err

    decode = ["decode", str(tmp_path / "own"), "--output-dir", str(tmp_path / "decoded"), "--image-size-eval", "5"]
    assert main(decode) == 0
    decoded = RunFolder.open(tmp_path / "decoded")
    np.testing.assert_array_equal(decoded.read(0).pixels, five.read(0).pixels)
    assert settings_of(tmp_path / "decoded")["image_size_eval"] == 5
    kept = decode_run(five, tmp_path / "kept")
    np.testing.assert_array_equal(kept.read(0).pixels, five.read(0).pixels)
    back = decode_run(five, tmp_path / "back", image_size_eval=OWN)
    np.testing.assert_array_equal(back.read(0).pixels, own.read(0).pixels)
    assert "image_size_eval" not in settings_of(tmp_path / "back")
    with pytest.raises(UserError, match="another image_size_eval"):
        decode_run(five, tmp_path / "back")


def test_comparisons(model_folder: Path, tmp_path: Path) -> None:
    words = ["compare", str(model_folder), "--methods", "cfg", "--labels", "0,1", "--num-samples", "2"]
    assert main([*words, "--image-size-eval", "5", "--output-dir", str(tmp_path / "out")]) == 0
    (folder,) = {path.parent for path in (tmp_path / "out").rglob("run.json")}
    assert settings_of(folder)["image_size_eval"] == 5


def test_sweeps(model_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    from softcfg.tuning import Sweep, SweepConfig

    pipe = Pipeline.from_pretrained(model_folder, image_size_eval=12)
    config = SweepConfig(
        pipe,
        {"guidance_scale": [2.0, 4.0]},
        objective="inception_score",
        reference=None,
        extractor=extractor(),
        num_samples=4,
        sampler="grid",
    )
    sweep = Sweep.open(tmp_path / "sweep", config)
    sweep.run(1)
    (row,) = sweep.rows()
    assert "--image-size-eval 12" in row.command


@pytest.mark.parametrize("size", [0, -1, 5000, 2.5, "5", True])
def test_sizes_that_are_none(model_folder: Path, plain: Pipeline, tmp_path: Path, size: Any) -> None:
    for call in (
        lambda: Pipeline.from_pretrained(model_folder, image_size_eval=size),
        lambda: plain.with_image_size(size),
        lambda: draw_run(RunRequest(plain, image_size_eval=size), tmp_path / "run"),
        lambda: evaluate(np.zeros((6, 8, 8, 3), dtype=np.uint8), None, extractor(), image_size_eval=size),
    ):
        with pytest.raises(UserError, match="image_size_eval must be a whole number from 1 to 4096"):
            call()
    assert not (tmp_path / "run").exists()


def test_sizes_on_the_command_line_that_are_none(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample(model_folder, tmp_path / "run") == 0
    for words in (
        ["sample", str(model_folder), "--output-dir", str(tmp_path / "new")],
        ["decode", str(tmp_path / "run"), "--output-dir", str(tmp_path / "new")],
        ["eval", str(tmp_path / "run"), "--extractor", "stand_in:factory"],
    ):
        assert main([*words, "--image-size-eval", "0"]) == 2
        assert "image_size_eval must be a whole number from 1 to 4096, got 0" in capsys.readouterr().err
    assert not (tmp_path / "new" / "run.json").exists()


def test_only_squares_are_resized(prompt_model_folder: Path, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(prompt_model_folder, image_size_eval=5)
    assert pipe(prompts=["red apple"], seed=1).pixels.shape == (1, 5, 5, 3)
    steps: list[int] = []
    with pytest.raises(UserError, match="resized to squares of 5 pixels, but these have 4 x 6 tokens"):
        pipe(prompts=["red apple"], width=12, height=8, on_step=steps.append)
    assert not steps
    words = ["sample", str(prompt_model_folder), "--prompt", "red", "--image-size-eval", "5", "--width", "12"]
    assert main([*words, "--output-dir", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out" / "run.json").exists()


def test_evaluation_resizes_8_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    samples, reference = rng.integers(0, 256, (2, 30, 12, 12, 3), dtype=np.uint8)
    smaller = bicubic(reference.transpose(0, 3, 1, 2), 8).round().clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    expected = evaluate(samples[:, :8, :8], smaller, extractor())
    found = evaluate(samples[:, :8, :8], reference, extractor(), cache=tmp_path / "cache", image_size_eval=8)
    assert found.metrics == pytest.approx(expected.metrics, rel=1e-3)
    assert found.settings["reference"]["size"] == [8, 8]
    assert found.settings["reference"]["resized_from"] == [12, 12]
    assert found.settings["reference"]["sha256"] == open_source(reference).fingerprint
    assert "resized_from" not in found.settings["samples"]
    assert "the images of array were resized from 12 to 8 pixels a side" in found.notes
    # Features of the images as they were are not taken for those of resized ones.
    whole = evaluate(reference, None, extractor(), cache=tmp_path / "cache")
    resized = evaluate(reference, None, extractor(), cache=tmp_path / "cache", image_size_eval=8)
    assert whole["inception_score"] != resized["inception_score"]
    with pytest.raises(UserError, match=r"makes squares; the images of array are 6 x 12"):
        evaluate(reference[:, :6], None, extractor(), image_size_eval=8)

    folder = write_pngs(tmp_path / "pictures", samples[:6])
    words = ["eval", str(folder), "--extractor", "stand_in:factory", "--no-cache", "--json"]
    assert main([*words, "--metrics", "inception_score", "--image-size-eval", "8"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["samples"]["resized_from"] == [12, 12]


def test_statistics_are_not_resized(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    evaluate(images, None, extractor(), save_stats=tmp_path / "stats.npz")
    with pytest.raises(UserError, match="samples are 5 x 5 and the reference images 8 x 8"):
        evaluate(images, tmp_path / "stats.npz", extractor(), image_size_eval=5)
    np.savez(tmp_path / "both.npz", images, **np.load(tmp_path / "stats.npz"))
    with pytest.raises(UserError, match="holds statistics of images of another size"):
        evaluate(images, tmp_path / "both.npz", extractor(), image_size_eval=5)
