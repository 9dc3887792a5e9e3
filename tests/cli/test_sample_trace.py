import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from made_runs import complete
from softcfg import Pipeline, SoftCFG
from softcfg.cli.main import main


def sample(model: Path, out: Path, *flags: str) -> int:
    return main(["sample", str(model), "--output-dir", str(out), *flags])


def test_sample_writes_images_grids_and_settings(model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert sample(model_folder, out, "--labels", "0,Star", "--num-samples", "6", "--seed", "3") == 0
    assert sorted(path.name for path in out.iterdir()) == [
        *(f"{n:06d}.png" for n in range(6)), "comparison.png", "grid.png", "run.json", "run.lock", "shards",
    ]  # fmt: skip
    expected = Pipeline.from_pretrained(model_folder)([0, 3] * 3, seed=3)
    for index, pixels in enumerate(expected.pixels):
        assert np.array_equal(np.asarray(Image.open(out / f"{index:06d}.png")), pixels)
    run = json.loads((out / "run.json").read_text())
    assert run["labels"] == [0, 3]
    assert run["guidance"]["guidance_scale"] == 3.0
    assert run["sampling"]["temperature"] == 0.9


def test_speculative_jacobi_decoding(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    flags = ["--labels", "0,Star", "--num-samples", "2", "--compare"]
    assert sample(model_folder, out, *flags, "--speculative-jacobi", "5") == 0
    assert json.loads((out / "run.json").read_text())["speculative_jacobi"] == 5
    pipe = Pipeline.from_pretrained(model_folder)
    expected = pipe([0, 3], speculative_jacobi=5)
    for index, pixels in enumerate(expected.pixels):
        assert np.array_equal(np.asarray(Image.open(out / f"{index:06d}.png")), pixels)
    plain = pipe([0, 3], pipe.default_guidance(guidance_scale=0), speculative_jacobi=5)
    assert cells(out / "comparison.png", plain.pixels[0]) >= 1
    capsys.readouterr()
    assert sample(model_folder, out, *flags, "--speculative_jacobi") == 2
    assert "another speculative_jacobi (5 there, 16 here)" in capsys.readouterr().err
    assert sample(model_folder, out, *flags) == 2
    assert sample(model_folder, tmp_path / "other", "--speculative-jacobi", "-1") == 2
    assert "--speculative-jacobi must be at least 1 (0: off), got -1" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def cells(path: Path, image: np.ndarray) -> int:
    """How often an image stands in a grid, enlarged by 8."""
    canvas = np.asarray(Image.open(path).convert("RGB"))
    enlarged = image.repeat(8, 0).repeat(8, 1)
    found = 0
    for y, x in np.argwhere((canvas == enlarged[0, 0]).all(-1)):
        window = canvas[y : y + 64, x : x + 64]
        found += window.shape == enlarged.shape and bool((window == enlarged).all())
    return found


def test_grids_show_the_images(model_folder: Path, tmp_path: Path) -> None:
    assert sample(model_folder, tmp_path, "--labels", "1,2", "--num-samples", "4") == 0
    pipe = Pipeline.from_pretrained(model_folder)
    for method, path in [
        (None, "grid.png"),
        (None, "comparison.png"),
        (pipe.default_guidance(SoftCFG, strength=0), "comparison.png"),
        (pipe.default_guidance(guidance_scale=0), "comparison.png"),
    ]:
        for image in pipe([1, 2, 1, 2], method).pixels:
            assert cells(tmp_path / path, image) >= 1


def test_flags_take_underscores_and_mean_what_they_say(model_folder: Path, tmp_path: Path) -> None:
    flags = ["--labels", "0-3", "--num_samples", "4", "--guidance_scale=5", "--guidance-scale-pow", "1.5",
             "--softcfg_strength", "0.5", "--no-step-norm", "--temperature", "1.1", "--top_k", "9", "--top-p", "0.9",
             "--confidence", "entropy", "--no-compare", "--batch_size=3"]  # fmt: skip
    assert sample(model_folder, tmp_path, *flags) == 0
    assert not (tmp_path / "comparison.png").exists()
    guidance = SoftCFG(guidance_scale=5.0, guidance_scale_pow=1.5, strength=0.5, step_norm=False, confidence="entropy")
    pipe = Pipeline.from_pretrained(model_folder)
    expected = pipe([0, 1, 2, 3], guidance, temperature=1.1, top_k=9, top_p=0.9, batch_size=3)
    for index, pixels in enumerate(expected.pixels):
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"{index:06d}.png")), pixels)


def test_the_schedule_is_the_models_own_by_default(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    description = yaml.safe_load((folder / "model.yaml").read_text())
    description["sampling"]["schedule"] = "constant"
    (folder / "model.yaml").write_text(yaml.safe_dump(description))
    for model, flags, schedule in [
        (folder, (), "constant"),
        (folder, ("--schedule", "linear"), "linear"),
        (model_folder, (), "cosine_power"),
    ]:
        assert sample(model, tmp_path, "--labels", "0", "--num-samples=1", "--no-compare", "--overwrite", *flags) == 0
        assert json.loads((tmp_path / "run.json").read_text())["guidance"]["schedule"] == schedule


def test_presets(model_folder: Path, tmp_path: Path) -> None:
    assert sample(model_folder, tmp_path, "--labels", "0", "--preset", "released", "--no-compare") == 0
    guidance = json.loads((tmp_path / "run.json").read_text())["guidance"]
    assert guidance["confidence"] == "sampled"
    assert guidance["floor"] == 0.05


def test_the_same_run_may_be_repeated_but_not_replaced(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample(model_folder, tmp_path, "--labels", "0", "--num-samples", "1", "--no-compare") == 0
    assert "\n1 image in " in capsys.readouterr().out
    first = (tmp_path / "000000.png").read_bytes()
    assert sample(model_folder, tmp_path, "--labels", "0", "--num-samples", "1", "--no-compare") == 0
    assert sample(model_folder, tmp_path, "--labels", "1", "--num-samples", "1", "--seed", "1") == 2
    assert "another seed (0 there, 1 here), labels ([0] there, [1] here)" in capsys.readouterr().err
    assert (tmp_path / "000000.png").read_bytes() == first
    assert sample(model_folder, tmp_path, "--labels", "1", "--num-samples", "1", "--overwrite") == 0
    assert (tmp_path / "000000.png").read_bytes() != first


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--labels", "4"], "label 4 is out of range: tiny has classes 0 to 3"),
        (
            ["--labels", "Hexagon"],
            "'Hexagon' is no class, and tiny does not read prompts; tiny has classes 0 to 3, called Circle, Square",
        ),
        (["--labels", "3-1"], "names no class"),
        (["--guidance-scale", "-1"], "guidance_scale must be a finite number >= 0, got -1.0"),
        (["--guidance-scale", "nan"], "guidance_scale must be a finite number"),
        (["--softcfg-strength", "-2"], "strength must be"),
        (
            ["--perturbation", "none", "--perturbation-scale", "1"],
            "perturbation_scale 1 takes a perturbation, and there",
        ),
        (["--softcfg-floor", "1.5"], "floor must be a number in [0, 1], got 1.5"),
        (["--confidence", "mean"], "margin, unsure, uniform, random, got 'mean'"),
        (["--temperature", "0"], "temperature must be"),
        (["--top-p", "2"], "top_p must be in (0, 1]"),
        (["--seed", "-1"], "seed must be a whole number in 0..2^64-1, got -1"),
        (["--num-samples", "0"], "--num-samples must be at least 1, got 0"),
        (["--device", "cuda:99"], "device 'cuda:99' is not available"),
        (["--device", "toaster"], "device 'toaster' is not available"),
        (["--generator-checkpoint", "/nowhere/x.bin"], "/nowhere/x.bin"),
    ],
)
def test_bad_input_is_one_sentence(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert sample(model_folder, tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert error.startswith("softcfg: error: ")
    assert "Traceback" not in error
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "alitok-xxl"], "did you mean alitok-xl"),
        (["sample", "/nowhere/model"], "there is no folder /nowhere/model"),
        (["sample", "fashion", "--guidance-scale", "much"], "invalid float value: 'much'"),
        (["sample", "fashion", "--guidanse-scale", "3"], "unrecognized arguments: --guidanse-scale"),
        (["sample"], "MODEL"),
        (["draw"], "invalid choice: 'draw'"),
        ([], "COMMAND"),
    ],
)
def test_bad_command_lines(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(arguments)
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_folders_that_cannot_be_written(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert sample(model_folder, tmp_path / "file") == 2
    assert "cannot write into folder" in capsys.readouterr().err
    if os.geteuid():  # root may write anywhere
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o500)
        assert sample(model_folder, locked) == 2
        assert not list(locked.iterdir())


def test_a_damaged_run_json_is_not_overwritten(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text("{")
    assert sample(model_folder, tmp_path) == 2
    assert "run.json is not readable" in capsys.readouterr().err
    assert (tmp_path / "run.json").read_text() == "{"


def test_trace_saves_and_replays(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "a" / "first.safetensors", tmp_path / "second.safetensors"
    model = str(model_folder)
    assert main(["trace", model, "--labels", "0,2", "--output", str(first), "--seed", "4"]) == 0
    assert "value_weights" in capsys.readouterr().out
    assert main(["trace", model, "--labels", "0,2", "--tokens", str(first), "--output", str(second)]) == 0
    a, b = load_file(first), load_file(second)
    assert set(a) == {
        "labels", "tokens", "cond_logits", "uncond_logits", "guided_logits", "guidance_scale", "confidence",
        "value_weights",
    }  # fmt: skip
    assert all(np.array_equal(a[name], b[name]) for name in a)
    assert np.array_equal(a["tokens"], Pipeline.from_pretrained(model_folder)([0, 2], seed=4).tokens)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["trace", "{model}", "--tokens", "trace.safetensors"], "--output: trace.safetensors would overwrite --tokens"),
        (
            ["trace", "{model}", "--tokens", "{here}/trace.safetensors", "--output", "./link"],
            "would overwrite --tokens",
        ),
        (["trace", "{model}", "--output", "{model}/generator.safetensors"], "would overwrite a file of the model"),
        (["trace", "{model}", "--labels", "@labels.txt", "--output", "labels.txt"], "would overwrite --labels"),
        (
            ["plot", "{model}", "--image", "gap.png", "--output-dir", "."],
            "--output-dir: gap.png would overwrite --image",
        ),
        (
            ["sample", "{model}", "--output-dir", ".", "--labels", "@000001.png"],
            "--labels: 000001.png is where the run",
        ),
        (
            ["sample", "{model}", "--output-dir", ".", "--image", "grid.png", "--overwrite"],
            "--image: grid.png is where",
        ),
        (["compare", "{model}", "--output-dir", ".", "--labels", "@grid.png"], "grid.png would overwrite --labels"),
        (
            ["sweep", "{model}", "--output-dir", ".", "--labels", "@results.csv", "--search", "top_k=1,2"],
            "--labels, an",
        ),
        (["decode", "run", "--output-dir", ".", "--tokenizer-checkpoint", "000001.png"], "000001.png is where the run"),
    ],
)
def test_nothing_overwrites_what_the_command_reads(
    model_folder: Path,
    words: list[str],
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    complete(tmp_path / "run")
    model = shutil.copytree(model_folder, tmp_path / "model")
    save_file({"tokens": torch.zeros(1, 16, dtype=torch.int64)}, "trace.safetensors")
    Path("link").symlink_to("trace.safetensors")
    for name in ("labels.txt", "gap.png", "000001.png", "grid.png", "results.csv"):
        Path(name).write_text("0\n")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    more = ["--labels", "0"] if words[0] in ("trace", "plot") and "--labels" not in words else []
    names = {"model": str(model), "here": str(tmp_path)}
    assert main([*(word.format(**names) for word in words), *more]) == 2
    assert text in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_trace_of_tokens_that_are_none(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "trace.safetensors"
    common = ["trace", str(model_folder), "--labels", "0", "--output", str(output), "--tokens"]
    (tmp_path / "broken.safetensors").write_bytes(b"not a tensor in sight")
    save_file({"x": load_file(model_folder / "generator.safetensors")["norm.weight"]}, tmp_path / "other.safetensors")
    for name, message in [
        ("broken.safetensors", "broken.safetensors"),
        ("other.safetensors", "has no entry 'tokens'"),
        ("missing.safetensors", "missing.safetensors"),
    ]:
        assert main([*common, str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err
    assert not output.exists()


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    commands = [["sample"], ["runs"], ["runs", "verify"], ["decode"], ["trace"], ["models"], ["fetch"]]
    for arguments in (["--help"], *([*command, "--help"] for command in commands)):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 0
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 110


def test_help_says_what_the_defaults_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sample", "--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert "1: in place of the unconditional branch (default: 0, or 1 with --weak-model)" in words


def test_quantized_weights_are_recorded(model_folder: Path, tmp_path: Path) -> None:
    flags = ["--labels", "0", "--num-samples", "1", "--no-compare"]
    assert sample(model_folder, tmp_path / "int8", *flags, "--quantize", "int8") == 0
    assert json.loads((tmp_path / "int8" / "run.json").read_text())["dtype"] == "float32/int8"
    expected = Pipeline.from_pretrained(model_folder, quantize="int8")([0])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "int8" / "000000.png")), expected.pixels[0])
    assert sample(model_folder, tmp_path / "bf16", *flags, "--dtype", "bfloat16") == 0
    assert json.loads((tmp_path / "bf16" / "run.json").read_text())["dtype"] == "bfloat16"
    # Another kind of weights would continue the run with other images.
    assert sample(model_folder, tmp_path / "int8", *flags) == 2
    assert sample(model_folder, tmp_path / "auto", *flags, "--device-map", "auto") == 2


def test_a_file_beside_the_folder_is_not_replaced(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out.npz").write_text("mine")
    words = ["sample", str(model_folder), "--num-samples", "1", "--npz", "--no-compare", "--output-dir"]
    assert main([*words, str(tmp_path / "out")]) == 2
    assert "holds out.npz, which was not made by this command; give another folder" in capsys.readouterr().err
    assert (tmp_path / "out.npz").read_text() == "mine"
    assert not (tmp_path / "out").exists()
    (tmp_path / "out.npz").unlink()
    assert main([*words, str(tmp_path / "out")]) == main([*words, str(tmp_path / "out")]) == 0
