"""The commands on text-to-image models: prompts in the place of labels."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors import safe_open

from softcfg import Pipeline
from softcfg.cli.main import main
from softcfg.prompts import Prompt
from softcfg.runs.folder import RunFolder

PROMPTS = ("red apple", "a blue cat")


def sample(model: Path, out: Path, *flags: str) -> int:
    return main(["sample", str(model), "--output-dir", str(out), *flags])


def test_prompts_take_the_place_of_labels(prompt_model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    assert sample(prompt_model_folder, out, *flags, "--images-per-prompt", "3", "--seed", "5") == 0
    assert sorted(path.name for path in out.iterdir()) == [
        *(f"{n:06d}.png" for n in range(6)), "comparison.png", "grid.png", "run.json", "run.lock", "shards",
    ]  # fmt: skip
    pipe = Pipeline.from_pretrained(prompt_model_folder)
    expected = pipe(prompts=[*PROMPTS] * 3, seed=5)
    for index, pixels in enumerate(expected.pixels):
        assert np.array_equal(np.asarray(Image.open(out / f"{index:06d}.png")), pixels)
    run = json.loads((out / "run.json").read_text())
    assert (run["prompts"], run["labels"], run["width"], run["height"]) == ([*PROMPTS], [0, 1], 8, 8)
    assert run["sampling"]["top_k"] == 15  # the model's own
    # Shards hold what the image tokenizer decodes, and the command makes pixels of it again.
    shard = RunFolder.open(out).read(0)
    assert np.array_equal(shard.codes, expected.codes.numpy())
    assert main(["decode", str(out), "--output-dir", str(tmp_path / "again")]) == 0
    assert np.array_equal(RunFolder.open(tmp_path / "again").read(0).pixels, expected.pixels)


def test_prompts_from_a_file_and_other_sizes(prompt_model_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("red apple\n\n  a blue cat  \n")
    flags = ["--prompts", str(file), "--prompt", "cat", "--width", "12", "--height", "4", "--no-compare"]
    assert sample(prompt_model_folder, tmp_path / "out", *flags) == 0
    expected = Pipeline.from_pretrained(prompt_model_folder)(prompts=["cat", *PROMPTS], width=12, height=4)
    assert expected.pixels.shape[1:3] == (4, 12)
    for index, pixels in enumerate(expected.pixels):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / f"{index:06d}.png")), pixels)
    assert not (tmp_path / "out" / f"{len(expected.pixels):06d}.png").exists()


def test_a_run_of_prompts_grows_but_does_not_change(
    prompt_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--prompt", "red apple", "--prompt", "cat", "--no-compare", "--batch-size", "2"]
    assert sample(prompt_model_folder, tmp_path, *flags, "--images-per-prompt", "1") == 0
    first = (tmp_path / "shards" / "shard-000000.safetensors").stat().st_mtime_ns
    assert sample(prompt_model_folder, tmp_path, *flags, "--images-per-prompt", "2") == 0
    assert (tmp_path / "shards" / "shard-000000.safetensors").stat().st_mtime_ns == first
    assert len(list(tmp_path.glob("0*.png"))) == 4
    capsys.readouterr()
    assert sample(prompt_model_folder, tmp_path, "--prompt", "dog", "--no-compare") == 2
    assert "holds a run with another" in (error := capsys.readouterr().err)
    assert "prompts" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "words draws texts: give one with --prompt, or a file of them with --prompts"),
        (["--labels", "0"], "--labels: words draws texts, not classes; give them with --prompt or --prompts"),
        (["--prompts", "/nowhere"], "--prompts: /nowhere cannot be read"),
        (["--prompts", os.devnull], "--prompts: /dev/null cannot be read: it is a device, not a regular file"),
        (["--prompt", "a", "--width", "7"], "width must be a multiple of 4, got 7"),
        (["--prompt", "a", "--height", "4000"], "height 4000 is too large"),
        (["--prompt", "a", "--prompt", " ".join(["red"] * 500)], "give a shorter prompt or a smaller image"),
        (["--prompt", "a", "--task", "depth"], "this model draws images only, it has no task depth"),
        (["--prompt", "a", "--task", "colour"], "the task of a prompt without an image must be one of depth"),
        (["--prompt", "a", "--image", "x.png"], "a prompt with an image needs a task"),
        (["--prompt", "a", "--images-per-prompt", "0"], "--images-per-prompt must be at least 1, got 0"),
        (["--prompt", "a", "--images-per-prompt", "2", "--num-samples", "3"], "--num-samples, not both"),
    ],
)
def test_wrong_prompts_are_one_sentence(
    prompt_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert sample(prompt_model_folder, tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert error.startswith("softcfg: error: ")
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize(
    "flag", [["--prompt", "a"], ["--prompts", "x"], ["--width", "8"], ["--images-per-prompt", "2"]]
)
def test_models_of_classes_take_no_prompts(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: list[str]
) -> None:
    assert sample(model_folder, tmp_path, *flag) == 2
    assert f"{flag[0]}: tiny draws classes, not texts; choose them with --labels" in capsys.readouterr().err
    for command in ("trace", "plot"):
        assert main([command, str(model_folder)]) == 2
        assert "tiny draws classes: give them with --labels" in capsys.readouterr().err


def test_trace_and_plot(prompt_model_folder: Path, tmp_path: Path) -> None:
    trace, flags = tmp_path / "trace.safetensors", ["--prompt", "red apple", "--prompt", "a blue cat"]
    assert main(["trace", str(prompt_model_folder), *flags, "--output", str(trace), "--seed", "2"]) == 0
    with safe_open(trace, "np") as file:
        assert json.loads(file.metadata()["softcfg"])["prompts"] == [*PROMPTS]
        tokens = file.get_tensor("tokens")
    assert np.array_equal(tokens, Pipeline.from_pretrained(prompt_model_folder)(prompts=[*PROMPTS], seed=2).tokens)
    assert main(["plot", str(prompt_model_folder), *flags, "--output-dir", str(tmp_path / "plots")]) == 0
    assert len(list((tmp_path / "plots").glob("*.png"))) == 5
    oblong = [*flags, "--width", "4", "--output-dir", str(tmp_path / "oblong")]
    assert main(["plot", str(prompt_model_folder), *oblong]) == 0
    assert len(list((tmp_path / "oblong").glob("*.png"))) == 5


@pytest.mark.parametrize("more", [[], ["--random-weights"]])
def test_bench(prompt_model_folder: Path, capsys: pytest.CaptureFixture[str], more: list[str]) -> None:
    assert main(["bench", str(prompt_model_folder), "--batch-sizes", "1", "2", "--repeats", "1", *more]) == 0
    assert "\nrecommended: --batch-size " in capsys.readouterr().out


def test_an_interval_is_of_the_steps_of_the_size_asked_for(
    prompt_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [Pipeline.from_pretrained(prompt_model_folder).num_tokens(*size) for size in ((8, 8), (16, 16))]
    flags = ["--prompt", "red apple", "--num-samples", "1", "--interval", f"{steps[0]}-{steps[1]}", "--no-compare"]
    assert sample(prompt_model_folder, tmp_path / "small", *flags) == 2
    assert f"holds none of the {steps[0]} steps" in capsys.readouterr().err
    assert not (tmp_path / "small").exists()
    assert sample(prompt_model_folder, tmp_path / "large", *flags, "--width", "16", "--height", "16") == 0
    more = ["--output-dir", str(tmp_path / "all"), *flags[:-1], "--width", "16", "--height", "16", "--methods", "cfg"]
    assert main(["compare", str(prompt_model_folder), *more]) == 0


def bench(model: Path, suite: str, prompts: Path, out: Path, *flags: str) -> int:
    command = ["t2i-bench", str(model), "--suite", suite, "--prompts", str(prompts), "--output-dir", str(out)]
    return main([*command, "--batch-size", "8", *flags])


@pytest.fixture
def dpg(tmp_path: Path) -> Path:
    folder = tmp_path / "prompts"
    folder.mkdir()
    for name, text in {"2": "a blue cat\n", "10": "red apple", "x_y": "dog"}.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


def test_dpg_bench(prompt_model_folder: Path, dpg: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "dpg"
    assert bench(prompt_model_folder, "dpg", dpg, out, "--seed", "1") == 0
    assert f"dpg_bench/dist_eval.sh {out} 8" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["10.png", "2.png", "x_y.png"]
    pipe = Pipeline.from_pretrained(prompt_model_folder)
    drawn = pipe(prompts=["red apple"] * 4 + ["a blue cat"] * 4 + ["dog"] * 4, seed=1, batch_size=8).pixels
    for number, name in enumerate(["10", "2", "x_y"]):
        picture = np.asarray(Image.open(out / f"{name}.png"))
        crops = [picture[y : y + 8, x : x + 8] for y in (0, 8) for x in (0, 8)]
        assert np.array_equal(crops, drawn[4 * number : 4 * number + 4])


def test_bench_goes_on_where_it_was_left(
    prompt_model_folder: Path, dpg: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "dpg"
    assert bench(prompt_model_folder, "dpg", dpg, out) == 0
    content = {path.name: path.read_bytes() for path in out.iterdir()}
    (tmp_path / "dpg.run" / "shards" / "shard-000001.safetensors").unlink()
    (out / "10.png").unlink()
    (out / ".x_y.png.host.1.tmp").write_bytes(b"half")
    kept = (tmp_path / "dpg.run" / "shards" / "shard-000000.safetensors").stat().st_mtime_ns
    assert bench(prompt_model_folder, "dpg", dpg, out) == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == content
    assert (tmp_path / "dpg.run" / "shards" / "shard-000000.safetensors").stat().st_mtime_ns == kept
    capsys.readouterr()
    (out / "10.png").write_bytes(content["2.png"])  # of something else
    (dpg / "2.txt").rename(dpg / "3.txt")
    assert bench(prompt_model_folder, "dpg", dpg, out) == 0
    assert (out / "10.png").read_bytes() == content["10.png"]
    assert f"{out} also holds 2.png, which this run did not draw: remove it" in capsys.readouterr().err


def test_geneval(prompt_model_folder: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"tag": "colors", "prompt": prompt}) for prompt in PROMPTS]
    (tmp_path / "evaluation_metadata.jsonl").write_text("\n".join(lines))
    out = tmp_path / "geneval"
    assert bench(prompt_model_folder, "geneval", tmp_path, out, "--width", "12") == 0
    assert sorted(path.name for path in out.iterdir()) == ["00000", "00001"]
    drawn = Pipeline.from_pretrained(prompt_model_folder)(prompts=[p for p in PROMPTS for _ in range(4)], width=12)
    for number, line in enumerate(lines):
        folder = out / f"{number:05d}"
        assert json.load((folder / "metadata.jsonl").open()) == json.loads(line)
        for i in range(4):
            pixels = np.asarray(Image.open(folder / "samples" / f"{i:04d}.png"))
            assert np.array_equal(pixels, drawn.pixels[4 * number + i])


def test_wrong_benches_are_one_sentence(
    model_folder: Path, prompt_model_folder: Path, dpg: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for model, prompts, flags, message in [
        (model_folder, dpg, [], "tiny draws classes, not texts; t2i-bench is for text-to-image models"),
        (prompt_model_folder, dpg, ["--batch-size", "6"], "--batch-size must be a multiple of 4, the images of a"),
        (prompt_model_folder, dpg, ["--width", "12"], "takes square images, got 12 x 8"),
        (prompt_model_folder, tmp_path, [], "holds no prompts"),
    ]:
        assert bench(model, "dpg", prompts, out, *flags) == 2
        assert message in capsys.readouterr().err
    assert not out.exists()
    assert not out.with_name("out.run").exists()
    assert bench(prompt_model_folder, "dpg", dpg, Path("/")) == 2
    assert "--output-dir / has no name for a folder of the run beside it" in capsys.readouterr().err


def test_pictures_in_two_halves(prompt_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(prompt_model_folder, folder)
    description = yaml.safe_load((folder / "model.yaml").read_text())
    del description["text"]["template"]
    description["generator"]["config"]["max_position_embeddings"] = 128
    (folder / "model.yaml").write_text(yaml.safe_dump(description))
    Image.new("RGB", (8, 4), "red").save(tmp_path / "given.png")
    flags = ["--prompt", "red apple", "--images-per-prompt", "2", "--no-compare"]
    assert sample(folder, tmp_path / "pair", *flags, "--task", "canny") == 0
    pipe = Pipeline.from_pretrained(folder)
    expected = pipe(prompts=[Prompt("red apple", task="canny")] * 2)
    assert np.array_equal(RunFolder.open(tmp_path / "pair").read(0).pixels, expected.pixels)
    flags += ["--task", "depth", "--image", str(tmp_path / "given.png")]
    assert sample(folder, tmp_path / "given", *flags) == 0
    expected = pipe(prompts=[Prompt("red apple", task="depth", image=tmp_path / "given.png")] * 2)
    run = RunFolder.open(tmp_path / "given")
    assert np.array_equal(run.read(0).pixels, expected.pixels)
    assert run.settings["task"] == "depth"
    Image.new("RGB", (8, 4), "blue").save(tmp_path / "given.png")
    assert sample(folder, tmp_path / "given", *flags) == 2  # another image under the same name
    Image.new("RGBA", (8, 4), (255, 0, 0, 9)).save(tmp_path / "given.png")
    assert sample(folder, tmp_path / "clear", *flags) == 2
    assert "given.png is partly transparent" in capsys.readouterr().err
    assert not (tmp_path / "clear" / "run.json").exists()


def test_a_file_without_prompts(prompt_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_text(" \n\n")
    assert sample(prompt_model_folder, tmp_path / "out", "--prompts", str(tmp_path / "empty.txt")) == 2
    assert "empty.txt holds no text" in capsys.readouterr().err
