"""Lines of people's text files end where editors end them, and nowhere else."""

import json
from pathlib import Path

import pytest

from softcfg.cli.main import main
from softcfg.files import iterate_lines
from softcfg.runs import RunRequest, draw_run
from softcfg.runs.folder import RunFolder
from softcfg.runs.suites import GenEval

# Characters at which `str.splitlines` splits and no editor does.
NO_ENDS = ["\u2028", "\u2029", "\x85", "\v", "\f", "\x1c", "\x1d", "\x1e"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines(end: str) -> None:
    assert list(iterate_lines(f"a{end}b{end}{end}")) == ["a", "b", ""]


@pytest.mark.parametrize("character", NO_ENDS)
def test_prompts_keep_their_characters(prompt_model_folder: Path, tmp_path: Path, character: str) -> None:
    texts = [f"red{character}apple", "star"]
    (tmp_path / "prompts.txt").write_bytes("\r\n".join(texts).encode("utf-8-sig"))
    out = tmp_path / "out"
    words = ["sample", str(prompt_model_folder), "--prompts", str(tmp_path / "prompts.txt"), "--no-compare"]
    assert main([*words, "--output-dir", str(out)]) == 0
    assert RunFolder.open(out).settings["prompts"] == texts


@pytest.mark.parametrize("character", NO_ENDS[:3])
def test_lines_of_geneval(tmp_path: Path, character: str) -> None:
    lines = [json.dumps({"prompt": f"a{character}b"}, ensure_ascii=False) for _ in range(2)]
    (tmp_path / "evaluation_metadata.jsonl").write_bytes("\n".join(lines).encode("utf-8-sig"))
    suite = GenEval(tmp_path)
    assert suite.prompts == [f"a{character}b"] * 2
    assert suite.lines == lines


HOMES = {
    "sample": "sample {model} --labels 0 --num-samples 1 --output-dir=~/new/run",
    "labels": "sample {model} --labels @~/labels --output-dir=~/new/run",
    "export": "runs export ~/run --npz=~/new/run.npz",
    "decode": "decode ~/run --output-dir=~/new/run",
    "model": "trace ~/model --labels 0 --output=~/new.safetensors",
    "eval": "eval ~/run --reference=~/run --extractor stand_in:factory --cache-dir=~/new/cache",
}


@pytest.mark.parametrize("name", HOMES)
def test_home(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home" / "model").symlink_to(model_folder)
    (tmp_path / "home" / "labels").write_text("Circle\n")
    draw_run(RunRequest("~/model", [0], num_samples=4), "~/run")
    assert main(HOMES[name].format(model=model_folder).split()) == 0
    assert list((tmp_path / "home").glob("new*"))
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
