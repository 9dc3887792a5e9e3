import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from goldens import golden
from image_files import write_pngs
from made_runs import of_images
from softcfg.cli.main import main
from softcfg.evaluation.fashion_classifier import FashionClassifier


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOFTCFG_CHECKPOINTS", str(tmp_path / "checkpoints"))
    monkeypatch.setenv("SOFTCFG_FEATURES", str(tmp_path / "features"))


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    arrays = {name: tensor.numpy() for name, tensor in golden("adm-metrics/golden-npz-pipeline").arrays.items()}
    moments = {name: arrays[f"ref_{name}"] for name in ("mu", "sigma", "mu_s", "sigma_s")}
    np.savez(tmp_path / "samples.npz", arrays["sample_arr_0"])
    np.savez(tmp_path / "reference.npz", arr_0=arrays["ref_arr_0"], **moments)
    np.savez(tmp_path / "nan.npz", np.full((5, 8, 8, 3), np.nan))
    (tmp_path / "broken.npz").write_bytes((tmp_path / "samples.npz").read_bytes()[:500])
    write_pngs(tmp_path / "pngs", arrays["sample_arr_0"])
    of_images(tmp_path / "run", arrays["sample_arr_0"], 100)
    return {path.stem: str(path) for path in tmp_path.iterdir()}


def test_a_table_and_json(files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = golden("adm-metrics/golden-npz-pipeline").about["evaluator"]
    output = tmp_path / "metrics.json"
    command = ["eval", files["samples"], "--reference", files["reference"], "--extractor", "stand_in:factory"]
    assert main([*command, "--output", str(output)]) == 0
    table = {line.rpartition(" ")[0].strip(): line.split()[-1] for line in capsys.readouterr().out.splitlines()[:5]}
    assert table["FID"] == f"{expected['fid']:.3f}"
    assert table["sFID"] == f"{expected['sfid']:.3f}"
    assert table["precision"] == "0.9850"
    assert table["recall"] == "0.7133"
    assert float(table["Inception Score"]) > 1
    content = json.loads(output.read_text())
    assert content["metrics"]["fid"] == pytest.approx(expected["fid"], abs=2e-6)
    assert main([*command, "--json", "--metrics", "recall,inception-score"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["metrics"] == {name: content["metrics"][name] for name in ("recall", "inception_score")}
    assert len(list((tmp_path / "features").iterdir())) == 2


@pytest.mark.parametrize("given", ["samples", "pngs", "run"])
def test_every_kind_of_samples(
    given: str, files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = str(tmp_path / "saved.npz")
    common = ["--extractor", "stand_in:factory", "--no-cache", "--json"]
    assert main(["eval", files[given], "--save-stats", saved, *common]) == 0
    assert list(json.loads(capsys.readouterr().out)["metrics"]) == ["inception_score"]
    assert main(["eval", files["reference"], "--reference", saved, "--metrics", "fid", *common]) == 0
    fid = json.loads(capsys.readouterr().out)["metrics"]["fid"]
    assert fid == pytest.approx(3.346221726535532, abs=2e-6)
    assert not (tmp_path / "features").exists()


def test_the_bundled_extractor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tmp_path / "classifier.safetensors"
    save_file(FashionClassifier().state_dict(), weights)
    pixels = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
    folder = str(write_pngs(tmp_path / "images", pixels))
    command = ["eval", folder, "--reference", folder, "--extractor", "fashion", "--extractor-weights", str(weights)]
    assert main([*command, "--dtype", "float64", "--cache-dir", str(tmp_path / "kept")]) == 0
    output = capsys.readouterr().out
    assert "no sFID: the extractor fashion gives no spatial features" in output
    assert "float64 on cpu" in output
    assert len(list((tmp_path / "kept").iterdir())) == 1


def test_inception_with_weights_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = golden("inception/golden-features")
    torch.save(case.weights(), tmp_path / "inception.pth")
    images = case.arrays["images_64x64"].permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "images.npz", images)
    command = ["eval", str(tmp_path / "images.npz"), "--inception_weights", str(tmp_path / "inception.pth"), "--json"]
    assert main(command) == 0
    logits = case.arrays["logits_unbiased_64x64"].double()
    p = logits.softmax(dim=1)
    expected = (p * (p / p.mean(dim=0)).log()).sum(dim=1).mean().exp()
    assert json.loads(capsys.readouterr().out)["metrics"]["inception_score"] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["{samples}", "--reference", "gone.npz"], "gone.npz does not exist"),
        (["{nan}"], "must be uint8, 0 to 255, got float64"),
        (["{broken}"], "broken.npz is no .npz file, or a truncated one"),
        (["{samples}", "--metrics", "fid"], "FID cannot be computed: it needs a reference"),
        (["{samples}", "--metrics", "kid"], "there is no metric named 'kid'"),
        (["{samples}", "--extractor", "incption"], "did you mean inception"),
        (["{samples}", "--extractor", "inception", "--inception-weights", "gone.pth"], "gone.pth does not exist"),
        (["{samples}", "--device", "cuda:77"], "device 'cuda:77' is not available"),
        (["{samples}", "--batch-size", "0"], "batch size must be at least 1"),
        (["{samples}", "--output", "no/such/folder/a.json"], "--output: the folder no/such/folder does not exist"),
        (["{samples}", "--no-cache", "--cache-dir", "x"], "exclude each other"),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: list[str], text: str, files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", *(word.format(**files) for word in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("softcfg: error: ")
    assert error.count("\n") == 1
    assert text in error


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["{samples}", "--save-stats", "{samples}"], "--save-stats: {samples} would overwrite SAMPLES, an input"),
        (["{samples}", "--output", "{link}"], "--output: {link} would overwrite SAMPLES, an input"),
        (["{samples}", "--reference", "{reference}", "--save-stats", "{reference}"], "would overwrite --reference, an"),
        (["{samples}", "--extractor-weights", "{broken}", "--output", "{broken}"], "overwrite the weights of the ext"),
        (["{run}", "--output", "{run}/run.json"], "would overwrite SAMPLES, an input; give another file"),
        (["{run}", "--output", "{run}/shards/shard-000000.safetensors"], "would overwrite SAMPLES, an input"),
        (["{pngs}", "--output", "{pngs}/{first}"], "would overwrite SAMPLES, an input; give another file"),
        (
            ["{samples}", "--output", "{run}/new", "--save-stats", "{run}/./new"],
            "--output and --save-stats are one file",
        ),
    ],
)
def test_nothing_overwrites_what_it_is_computed_from(
    arguments: list[str], text: str, files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link").symlink_to(files["samples"])
    names = {**files, "link": str(tmp_path / "link"), "first": min(os.listdir(files["pngs"]))}
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main(["eval", *(word.format(**names) for word in arguments)]) == 2
    assert text.format(**names) in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_results_may_lie_beside_the_images_and_be_written_again(files: dict[str, str]) -> None:
    output, stats = (f"{files['pngs']}/{name}" for name in ("metrics.json", "statistics.npz"))
    for _ in range(2):
        flags = ["--extractor", "stand_in:factory", "--metrics", "inception_score"]
        assert main(["eval", files["pngs"], *flags, "--output", output, "--save-stats", stats]) == 0


def test_help_is_fast_and_imports_no_torch() -> None:
    script = "import sys; from softcfg.cli.main import build_parser; build_parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.slow
def test_nothing_else_is_needed(files: dict[str, str]) -> None:
    """Neither SciPy nor torchvision nor TensorFlow, which a user may not have."""
    script = (
        "import sys\n"
        "for name in ('scipy', 'torchvision', 'timm', 'torch_fidelity', 'tensorflow'): sys.modules[name] = None\n"
        "from softcfg.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = ["eval", files["samples"], "--reference", files["reference"], "--extractor", "stand_in:factory"]
    paths = {"PYTHONPATH": ":".join(path for path in sys.path if path)}
    environment = {**os.environ, **paths}
    done = subprocess.run([sys.executable, "-c", script, *command], env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_warnings_are_a_line_each(files: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "pngs" / "notes.txt").touch()
    command = [sys.executable, "-m", "softcfg", "eval", files["pngs"], "--extractor", "nobody:factory"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    first, second = done.stderr.splitlines()
    assert first.startswith("softcfg: warning: ")
    assert "notes.txt" in first or ".txt" in first
    assert second.startswith("softcfg: error: extractor nobody:factory cannot be imported")
