"""`softcfg compare`: runs of every method, scale and seed; tables, pictures, continuation and refusals."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launching import Job
from softcfg import CFG, Pipeline, SoftCFG
from softcfg.cli.main import main
from softcfg.comparison import entries, run_folder, table
from softcfg.evaluation import evaluate
from softcfg.guidance import RULES, restore
from softcfg.runs.folder import RunFolder
from stand_in import extractor


def words(model: Path, out: Path, *more: str) -> list[str]:
    return ["compare", str(model), "--output-dir", str(out), "--num-samples", "8", "--batch-size", "4", *more]


def test_it_draws_measures_and_continues(
    model_folder: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    more = ["--reference", str(reference), "--extractor", "stand_in:factory", "--cache-dir", str(tmp_path / "features")]
    more += ["--seeds", "0,3", "--scales", "2,5", "--apg-eta", "0.25"]
    assert main(words(model_folder, out, "--methods", "none,softcfg+apg", *more)) == 0
    capsys.readouterr()
    first = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*/shards/*")}
    assert len(first) == 3 * 2 * 2
    assert main(words(model_folder, out, "--methods", "none,cfg,softcfg+apg", *more)) == 0
    assert {path: path.stat().st_mtime_ns for path in first} == first

    found = json.loads((out / "comparison.json").read_text())
    assert found["seeds"] == [0, 3]
    names = [(entry["method"], entry["scale"]) for entry in found["entries"]]
    assert names == [("none", None), *((name, scale) for name in ("cfg", "softcfg+apg") for scale in (2, 5))]
    guidance = [restore(entry["guidance"]) for entry in found["entries"]]
    assert guidance[0] == CFG(1.0, 0.5)
    assert guidance[2] == CFG(5.0, 0.5)
    assert guidance[4] == SoftCFG(5.0, 0.5, rule=RULES["apg"](eta=0.25))  # type: ignore[call-arg]

    pipe = Pipeline.from_pretrained(model_folder)
    run = RunFolder.open(out / "runs" / "softcfg+apg-5" / "seed-3")
    expected = pipe([0, 1, 2, 3] * 2, guidance[4], seed=3, batch_size=4).pixels
    assert np.array_equal(np.concatenate([shard.pixels for shard in run.shards()]), expected)
    fids = []
    for seed in (0, 3):
        report = evaluate(out / "runs" / "softcfg+apg-5" / f"seed-{seed}", reference, extractor())
        fids.append(report["fid"])
    fid = found["entries"][4]["metrics"]["fid"]
    assert fid["seeds"] == pytest.approx(fids)
    assert fid["mean"] == pytest.approx(statistics.fmean(fids))
    assert fid["error"] == pytest.approx(statistics.stdev(fids) / 2**0.5)

    table = (out / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert f"| softcfg+apg | 5 | {fid['mean']:.3f} ± {fid['error']:.3f} |" in table
    for picture in ("grid.png", "recall.png", "front.png"):
        with Image.open(out / picture) as image:
            assert image.width > 300


@pytest.mark.slow
def test_several_processes_share_it(model_folder: Path, reference: Path, tmp_path: Path) -> None:
    """One is killed in the middle, and with it the launch; the next launch goes on, to the tables of one process."""
    more = ["--methods", "none,cfg,softcfg+apg", "--scales", "2,5", "--seeds", "0,3", "--num-samples", "24"]
    more += ["--reference", str(reference), "--extractor", "stand_in:factory", "--device", "cpu"]
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert Job(1, words(model_folder, alone, *more, "--cache-dir", str(tmp_path / "one"))).join() == [0]
    command = words(model_folder, shared, *more, "--cache-dir", str(tmp_path / "two"))
    total = len(list(alone.glob("runs/*/*/shards/*")))
    assert total == 5 * 2 * 6
    kept: dict[Path, int] = {}
    for victim, until in ((1, 8), (0, 20)):
        job = Job(2, command)
        end = time.monotonic() + 120
        shards = "runs/*/*/shards/*.safetensors"  # whole ones
        while job.alive() and len(list(shared.glob(shards))) < until and time.monotonic() < end:
            time.sleep(0.01)
        assert job.kill([victim]) >= 1, "it ended before one of it could be killed"
        assert not (shared / "table.md").exists()
        assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
        kept = {path: path.stat().st_mtime_ns for path in shared.glob("runs/*/*/shards/*.safetensors")}
        assert until <= len(kept) < total
    assert Job(2, command).join() == [0, 0]
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    for name in ("table.md", "comparison.json", "grid.png"):
        assert (shared / name).read_bytes() == (alone / name).read_bytes()


def test_without_metrics(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(model_folder, tmp_path / "out", "--methods", "cfg,pag,released")) == 0
    assert "cfg, 3\npag, 3\nreleased, 3\n" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "comparison.json", "grid.png", "runs", "table.md",
    ]  # fmt: skip
    assert (tmp_path / "out" / "table.md").read_text().splitlines()[2] == "| cfg | 3 |"


def test_prompts(prompt_model_folder: Path, tmp_path: Path) -> None:
    more = ["--methods", "cfg,tcfg", "--prompt", "a red house", "--num-samples", "2", "--output-dir", str(tmp_path)]
    assert main(["compare", str(prompt_model_folder), *more]) == 0
    assert RunFolder.open(tmp_path / "runs" / "tcfg-3" / "seed-0").settings["prompts"] == ["a red house"]


def test_methods_by_name(model_folder: Path) -> None:
    pipe = Pipeline.from_pretrained(model_folder)
    (released, both) = entries(pipe, ["released", "apg+pag"], [4.0], {"strength": 0.5, "apg_eta": 0.5})
    assert released.guidance == SoftCFG.released(guidance_scale=4.0, guidance_scale_pow=0.5, strength=0.5)
    assert both.guidance == CFG(4.0, 0.5, rule=RULES["apg"](eta=0.5), perturbation="pag")  # type: ignore[call-arg, arg-type]
    assert run_folder(Path("out"), both, 7) == Path("out/runs/apg+pag-4/seed-7")
    near = entries(pipe, ["cfg"], [2.0, 2.0000001, 2.0000002, 1e6, 0.1 + 0.2, 0.3], {})
    folders = ["cfg-2", "cfg-2.0000001", "cfg-2.0000002", "cfg-1e+06", "cfg-0.30000000000000004", "cfg-0.3"]
    assert [entry.folder for entry in near] == folders
    assert len({entry.title for entry in near}) == len({table([entry]) for entry in near}) == len(near)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--methods", "cfg,apgg"], "there is no method 'apgg'; it is one of none, cfg, rescale"),
        (["--methods", "cfg+apg"], "there is no method 'cfg+apg'"),
        (["--methods", "pag+tpg"], "there is no method 'pag+tpg'"),
        (["--methods", "cfg,cfg"], "name each method once, got cfg, cfg"),
        (["--scales", "2,two"], "--scales must be numbers separated by commas"),
        (["--scales", "-1"], "guidance_scale must be"),
        (["--seeds", "1,1"], "name each seed once"),
        (["--interval", "100-200"], "the interval 100-200 holds none of the 16 steps, 0 to 15, of an image"),
        (["--num-samples", "0"], "--num-samples must be at least 1, got 0"),
        (["--images-per-prompt", "0"], "--images-per-prompt must be at least 1, got 0"),
        (["--rule", "apg"], "--rule: a comparison takes these from --methods"),
        (["--guidance-scale", "2"], "--guidance-scale: a comparison takes these from --scales"),
        (["--preset", "released"], "name the method 'released'"),
        (["--methods", "apg", "--apg-eta", "2"], "eta must be a number in [0, 1]"),
        (["--extractor", "nonesuch"], "nonesuch"),
        (["--extractor", "stand_in:factory", "--reference", "absent.npz"], "absent.npz"),
    ],
)
def test_refusals(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    assert main(words(model_folder, tmp_path / "out", *more)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_settings_in_the_same_folder_are_refused(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(model_folder, tmp_path / "out", "--methods", "apg")) == 0
    assert main(words(model_folder, tmp_path / "out", "--methods", "apg", "--apg-eta", "0.5")) == 2
    error = capsys.readouterr().err
    assert "another guidance.apg_eta (0.0 there, 0.5 here); give another folder (--output-dir)\n" in error


def test_links_in_the_folder_are_replaced_not_followed(model_folder: Path, tmp_path: Path) -> None:
    out, victim = tmp_path / "out", tmp_path / "victim"
    assert main(words(model_folder, out, "--methods", "cfg")) == 0
    victim.write_text("precious")
    for name in ("grid.png", "comparison.json", "table.md"):
        (out / name).unlink()
        (out / name).symlink_to(victim)
    assert main(words(model_folder, out, "--methods", "cfg")) == 0
    assert victim.read_text() == "precious"
    assert not (out / "table.md").is_symlink()


def test_files_of_others_are_not_replaced(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "table.md").write_text("mine")
    assert main(words(model_folder, tmp_path, "--methods", "cfg")) == 2
    assert "holds table.md, which was not made by this command; give another folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["table.md"]


def test_figures_of_other_metrics_are_removed(model_folder: Path, tmp_path: Path, reference: Path) -> None:
    out = tmp_path / "out"
    more = ["--methods", "cfg", "--extractor", "stand_in:factory", "--cache-dir", str(tmp_path / "features")]
    assert main(words(model_folder, out, *more, "--reference", str(reference))) == 0
    assert (out / "recall.png").exists()
    assert main(words(model_folder, out, *more)) == 0
    assert not (out / "recall.png").exists()
