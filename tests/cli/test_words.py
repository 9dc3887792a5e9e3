"""What the command line says: help, suggestions, and how far a run is."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from softcfg import CFG, SoftCFG
from softcfg.cli.main import BEFORE_PYTORCH, COMMANDS, build_parser, main
from softcfg.cli.trace import EXAMPLES as TRACE_EXAMPLES
from softcfg.evaluation import METRICS
from softcfg.evaluation.extractors import EXTRACTORS
from softcfg.guidance import CONFIDENCES, PERTURBATIONS, PRESETS, RULES, SCHEDULES


def help_of(*words: str) -> str:
    parser = build_parser()
    for word in words:
        parser = parser._subparsers._group_actions[0].choices[word]  # type: ignore[union-attr, index]
    return parser.format_help()


NAMES = [command.__name__.rpartition(".")[2].replace("_", "-") for command in COMMANDS]


@pytest.mark.parametrize("words", [(), *((name,) for name in NAMES), *(("runs", n) for n in ("status", "verify"))])
def test_help_fits_80_columns(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    lines = help_of(*words).splitlines()
    assert [line for line in lines if len(line) > 80] == []
    examples = lines.index("examples:") if "examples:" in lines else len(lines)
    assert not any(line.endswith("\\") for line in lines[:examples])  # as in a shell, but no command


def test_lists_of_help_are_broken_between_words() -> None:
    assert "Step\n               Normalisation" in help_of("plot")
    assert '"cat face, ink style"\n' in help_of("sample")
    assert set(METRICS) <= set(help_of("eval").replace(",", "").split())


def test_an_example_replays_what_another_one_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for example in [line for line in TRACE_EXAMPLES.splitlines() if "sneaker.safetensors" in line]:
        assert main(example.split()[1:]) == 0, capsys.readouterr().err


def test_help_lists_all_that_is_registered() -> None:
    text = " ".join(help_of("sample").split())
    for registry in (SCHEDULES, RULES, PERTURBATIONS, CONFIDENCES, PRESETS):
        assert [name for name in registry if name not in text] == []
    ours = list(EXTRACTORS)[:3]  # the others are registered by tests
    assert f"{', '.join(ours)} or your own" in " ".join(help_of("eval").split())


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("sample fashion --label x", "arguments: --label x; did you mean --labels? See 'softcfg sample --help'"),
        ("sample fashion --guidence_scale=3", "=3; did you mean --guidance-scale? See 'softcfg sample --help'"),
        ("runs status x --jsn", "unrecognized arguments: --jsn; did you mean --json? See 'softcfg runs status --help'"),
        ("models --zzzz", "unrecognized arguments: --zzzz; see 'softcfg models --help'"),
        ("sampel fashion", "invalid choice: 'sampel'; did you mean sample? See 'softcfg --help'"),
        ("sample fashion --dtype bfloat61", "invalid choice: 'bfloat61'; did you mean bfloat16?"),
        ("sample ./nofolder", "there is no folder ./nofolder; give the name of a model"),
        ("sample rar-xl", "rar_xl.bin, maskgit-vqgan-imagenet-f16-256.bin of rar-xl are missing: run `softcfg"),
    ],
)  # fmt: skip
def test_errors(
    words: str, error: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOFTCFG_CHECKPOINTS", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    with contextlib.suppress(SystemExit):
        assert main(words.split()) == 2
    assert error in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("runs export run --png", "--png"),
        ("runs status", "DIR"),
        ("eval", "SAMPLES"),
        ("eval x.npz --output", "--output"),
        ("eval x.npz --metrics", "--metrics"),
        ("eval x.npz --inception-weights", "--extractor-weights/--inception-weights"),
        ("sample", "MODEL"),
        ("sample fashion --device", "--device"),
        ("sample fashion --labels", "--labels"),
        ("sample fashion --config", "--config"),
        ("sample fashion --plugin", "--plugin"),
        ("sample emoji --ratio", "--ratio"),
        ("trace fashion --labels 0 --tokens", "--tokens"),
        ("ui --host", "--host"),
        *(
            (f"{command} --output-dir", "--output-dir")
            for command in ("sample fashion", "compare fashion", "decode run", "plot fashion", "sweep fashion")
        ),
    ],
)
def test_an_empty_value_is_not_taken_for_none(
    words: str, name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main([*words.split(), ""])
    assert f"error: {name} must not be empty; see 'softcfg {words.split()[0]}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_may_be_empty() -> None:
    args = build_parser().parse_args(["sample", "emoji", "--prompt", "", "--negative-prompt=", "--output-dir=~/out"])
    assert (args.prompt, args.negative_prompt) == ([""], "")
    assert args.output_dir == os.path.expanduser("~/out")


def test_a_file_that_is_given_is_not_missing(
    model_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "model.yaml").write_text((model_folder / "model.yaml").read_text())
    weights = str(model_folder / "generator.safetensors")
    assert main(["sample", str(tmp_path), "--generator-checkpoint", weights]) == 2
    assert f"tokenizer.safetensors of tiny is missing: put it into {tmp_path}" in capsys.readouterr().err


def test_strength_0_is_said_to_be_cfg(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    words = ["sample", str(model_folder), "--num-samples", "2", "--no-compare", "--output-dir", out]
    assert main([*words, "--softcfg-strength", "0"]) == 0
    said = capsys.readouterr().out
    assert "CFG: guidance_scale 3.0, guidance_scale_pow 0.5, schedule cosine_power\n" in said
    assert "SoftCFG" not in said
    assert main(["runs", "status", out]) == 0
    assert "SoftCFG" not in (said := capsys.readouterr().out)
    assert "tiny, CFG: guidance_scale 3.0" in said or ", CFG: guidance_scale 3.0" in said
    assert SoftCFG(3.0, strength=0).title == CFG(3.0).title == "CFG"
    assert main([*words, "--overwrite"]) == 0
    assert "SoftCFG: guidance_scale 3.0" in capsys.readouterr().out


def test_a_finished_run_says_so(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    words = ["sample", str(model_folder), "--num-samples", "2", "--no-compare", "--output-dir", out]
    assert main(words) == 0
    assert "is finished" not in capsys.readouterr().out
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "the run is finished: all of its 2 images are there" in said
    assert "images/s" not in said
    assert main(["runs", "status", out]) == 0
    assert "the run is finished" in capsys.readouterr().out
    assert main(["runs", "status", out, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["finished"], facts["images"], facts["at_work"]) == (True, {"done": 2, "total": 2}, None)
    assert facts["settings"]["num_samples"] == 2
    next(Path(out, "shards").glob("*.safetensors")).unlink()
    assert main(["runs", "status", out, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["finished"], facts["images"]["done"]) == (False, 0)


@pytest.mark.parametrize(
    ("batch", "said"),
    [("1", " passes in place of 32"), ("8", "saves little or no time in batches of 8, try --batch-size 1")],
)
def test_passes_are_printed(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], batch: str, said: str
) -> None:
    number = "2" if batch == "1" else "8"
    words = ["sample", str(model_folder), "--num-samples", number, "--batch-size", batch, "--speculative-jacobi", "6"]
    assert main([*words, "--no-compare", "--output-dir", str(tmp_path / "out")]) == 0
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit, match="0"):
        main(["--completion", shell])
    script = capsys.readouterr().out
    for word in ("sample", "guidance-scale", "t2i-bench"):
        assert word in script


def test_completion_needs_a_library(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["--completion", "bash"]) == 2
    assert "completion needs shtab: pip install '.[completion]' in the clone" in capsys.readouterr().err


def test_the_sentence_is_left_to_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert main(["sample", "./nofolder"]) == 2
    assert "no folder ./nofolder" in json.loads((tmp_path / "error.json").read_text())["message"]["message"]


@pytest.mark.slow
def test_the_sentence_is_last_under_torchrun(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1",
         "-m", "softcfg", "sample", "./nofolder"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1
    after = done.stderr.rpartition("Root Cause")[2]
    assert "there is no folder ./nofolder" in after, done.stderr
    assert "Traceback" not in after


@pytest.mark.parametrize("said", [None, "7"])
def test_variables_of_pytorch_are_set_before_it_is_imported_unless_they_are(said: str | None) -> None:
    """A thread that waits does not take the time of the one it waits for; large tensors lie in huge pages."""
    code = "import os, sys; from softcfg.cli.main import main; assert 'torch' not in sys.modules; main(['models'])"
    environment = {name: value for name, value in os.environ.items() if name not in BEFORE_PYTORCH}
    if said is not None:
        environment |= dict.fromkeys(BEFORE_PYTORCH, said)
    shown = "; print(*[os.environ[name] for name in ('THP_MEM_ALLOC_ENABLE', 'GOMP_SPINCOUNT')])"
    done = subprocess.run(
        [sys.executable, "-c", code + shown], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == ("1 10000" if said is None else "7 7")
