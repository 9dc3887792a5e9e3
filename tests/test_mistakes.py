"""Values of the wrong kind or out of range: an error of one sentence, which names what is wrong, and never a crash."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import softcfg
from softcfg import CFG, Pipeline, SoftCFG
from softcfg.cli.main import main
from softcfg.comparison import compare
from softcfg.decoding import Sampling, decode, image_uniforms
from softcfg.evaluation import evaluate, load_extractor
from softcfg.runs import RunRequest, decode_run, draw_run
from softcfg.runs.export import export_npz, export_pngs
from softcfg.zoo import load_generator, load_tokenizer

ODD: list[Any] = ["32", 1.5, None, -1, 0, [], {}, object(), 2**70, "²", b"1", float("nan"), True, torch.zeros(2), CFG]
# Argument of a call -> what it may well be, of `ODD`.
CALL: dict[str, list[Any]] = {
    "guidance": [None, 0, 1.5], "seed": [0, None], "indices": [None], "sampling": [None], "temperature": [None, 1.5],
    "top_k": [None, 0], "top_p": [None], "batch_size": [None], "speculative_jacobi": [0], "width": [None],
    "height": [None], "labels": [0], "prompts": [None], "forced_tokens": [None],
}  # fmt: skip


def one_sentence(error: BaseException, name: str) -> None:
    assert isinstance(error, ValueError), repr(error)
    assert "\n" not in str(error)
    assert len(str(error)) < 600


@pytest.mark.parametrize("value", ODD, ids=lambda value: str(value)[:12])
@pytest.mark.parametrize("name", CALL)
def test_calls_of_a_pipeline(pipe: Pipeline, name: str, value: Any) -> None:
    arguments = {"labels": [0], "guidance": CFG(1.0), name: value}
    if any(value is good or (type(value) is type(good) and value == good) for good in CALL[name]) and name != "labels":
        return
    try:
        pipe(**arguments)
    except Exception as error:
        one_sentence(error, name)


@pytest.mark.parametrize("value", ODD, ids=lambda value: str(value)[:12])
@pytest.mark.parametrize("name", ["width", "height", "prompts", "labels", "seed"])
def test_calls_with_prompts(prompt_pipe: Pipeline, name: str, value: Any) -> None:
    arguments = {"prompts": ["red apple"], "guidance": CFG(1.0), name: value}
    if value is None:
        return
    try:
        prompt_pipe(**arguments)
    except Exception as error:
        one_sentence(error, name)


@pytest.mark.parametrize("value", ODD, ids=lambda value: str(value)[:12])
@pytest.mark.parametrize("name", ["labels", "tokens", "guidance", "seed", "steps_per_pass", "temperature", "generator"])
def test_traces(pipe: Pipeline, name: str, value: Any) -> None:
    arguments: dict[str, Any] = {"generator": pipe.generator, "labels": [0], "guidance": CFG(2.0), name: value}
    try:
        softcfg.trace(arguments.pop("generator"), **arguments)
    except Exception as error:
        one_sentence(error, name)


RUN = ("labels", "prompts", "num_samples", "guidance", "sampling", "batch_size", "seed", "speculative_jacobi")


@pytest.mark.parametrize("value", ODD, ids=lambda value: str(value)[:12])
@pytest.mark.parametrize("name", RUN)
def test_runs(pipe: Pipeline, tmp_path: Path, name: str, value: Any) -> None:
    request = RunRequest(pipe, **{"labels": [0], "guidance": CFG(1.0), name: value})
    try:
        draw_run(request, tmp_path / "run")
    except Exception as error:
        one_sentence(error, name)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name", ["device", "dtype", "kv_cache_dtype", "tokenizer_dtype", "quantize", "device_map", "generator_checkpoint"]
)
@pytest.mark.parametrize(
    "value", [*ODD, "meta", "cuda:99", "bfloat17", torch.int8, "int8", "nn"], ids=lambda value: str(value)[:12]
)
def test_loading(model_folder: Path, name: str, value: Any) -> None:
    try:
        Pipeline.from_pretrained(model_folder, **{name: value})
    except Exception as error:
        one_sentence(error, name)


@pytest.mark.parametrize("load", [load_generator, load_tokenizer])
@pytest.mark.parametrize("arguments", [{"device": "meta"}, {"device": "cuda:99"}, {"dtype": "many"}, {"dtype": 3}])
def test_parts(model_folder: Path, load: Any, arguments: dict[str, Any]) -> None:
    with pytest.raises(softcfg.UserError, match=r"(device|dtype) "):
        load(model_folder, **arguments)


def test_messages(pipe: Pipeline) -> None:
    for arguments, message in (
        ({"guidance": "strong"}, "guidance must be CFG"),
        ({"guidance": SoftCFG}, "guidance must be CFG.* got the class SoftCFG"),
        ({"seed": 1.5}, r"seed must be a whole number in 0\.\.2\^64-1, got 1.5"),
        ({"batch_size": "32"}, "batch_size must be a whole number, got '32'"),
        ({"indices": [0.5]}, r"image index must be a whole number in 0\.\.2\^64-1, got 0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe([0], **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="labels must name at least one class"):
        softcfg.trace(pipe.generator, labels=[], guidance=CFG(2.0))
    with pytest.raises(ValueError, match=r"pipe\.generator"):
        softcfg.trace(pipe, labels=[0], guidance=CFG(2.0))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="two steps 0 <= start <= stop"):
        CFG(interval=(0, 2**70))
    with pytest.raises(softcfg.UserError, match="device 'cuda:99' is not available"):
        load_extractor("fashion", device="cuda:99")


def test_things_of_another_kind(pipe: Pipeline, tmp_path: Path) -> None:
    uniforms = image_uniforms(0, [0], pipe.num_tokens())
    for said, call in {
        "request must be a RunRequest, got 'fashion-small'": lambda: draw_run("fashion-small", tmp_path / "a"),
        "request must be a RunRequest, got None": lambda: compare(None, [], tmp_path / "a"),
        "seeds must be a Sequence, got 3": lambda: compare(RunRequest(pipe, [0]), [], tmp_path / "a", seeds=3),
        "the name of an extractor must be a str, got 3": lambda: load_extractor(3),
        "device '' is not available here; use cpu, or cuda on a machine with a GPU": lambda: evaluate([], device=""),
        "a path must not be empty": lambda: softcfg.trace(pipe.generator, labels=[0], guidance=CFG(2.0)).save(""),
        "source must be a RunFolder, got 'run'": lambda: decode_run("run", tmp_path / "a"),
        "run must be a RunFolder, got 'run'": lambda: export_npz("run", tmp_path / "a.npz"),
        "run must be a RunFolder, got 3": lambda: export_pngs(3, tmp_path / "a"),
        "guidance must be a CFG, got 4.0": lambda: decode(pipe.generator, [3], 4.0, uniforms=uniforms),
        "uniforms must be a Tensor, got None": lambda: decode(pipe.generator, [3], CFG(4.0), uniforms=None),
    }.items():
        with pytest.raises(softcfg.UserError) as caught:
            call()
        assert str(caught.value) == said
    assert list(tmp_path.iterdir()) == []


def test_what_is_meant_is_done(pipe: Pipeline, model_folder: Path, prompt_pipe: Pipeline) -> None:
    assert torch.equal(pipe([0, 1], 4.0).tokens, pipe([0, 1], pipe.default_guidance(guidance_scale=4.0)).tokens)
    assert Pipeline.from_pretrained(model_folder, dtype="bfloat16").generator.dtype == torch.bfloat16
    assert pipe([0], sampling=Sampling(1.0), indices=range(1)).indices == [0]
    with pytest.raises(softcfg.UserError, match="width must be a whole number, got '8'"):
        prompt_pipe(prompts="star", width="8")  # type: ignore[arg-type]


COMMANDS = {
    "interval": (["--interval", f"0-{'9' * 5000}"], "is not START-STOP"),
    "device": (["--device", "meta"], "the device meta"),
    "cuda": (["--device", "cuda:99"], "device 'cuda:99' is not available"),
    "samples": (["--num-samples", "9" * 30], "num_samples"),
    "batch": (["--batch-size", "9" * 30], "batch_size"),
    "seed": (["--seed", "1.5"], "invalid int value"),
    "scale": (["--guidance-scale", "1e400"], "guidance_scale"),
    "jacobi": (["--speculative-jacobi", "9" * 30], ""),
    "size": (["--width", "32"], "--width"),
    "eta": (["--rule", "apg", "--apg-eta", "2"], "apg_eta must be a number in [0, 1], got 2.0"),
    "window": (["--perturbation", "window", "--window-size", "0"], "window_size must be an integer >= 1, got 0"),
    "labels": (["--labels", "@"], "--labels: give a file after the @"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_command_lines(model_folder: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags, message = COMMANDS[name]
    try:
        code = main(["sample", str(model_folder), "--labels", "0", *flags, "--output-dir", str(tmp_path / "out")])
    except SystemExit as end:
        code = int(end.code or 0)
    error = capsys.readouterr().err.strip()
    if message:
        assert code == 2
        assert message in error
        assert len(error.splitlines()) == 1


@pytest.mark.skipif(os.name == "nt", reason="words of a command line are text there")
def test_a_prompt_in_another_encoding(prompt_model_folder: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "softcfg", "sample", str(prompt_model_folder), "--output-dir", str(tmp_path / "out")]
    done = subprocess.run([*words, "--prompt", "pêche".encode("latin-1")], capture_output=True, text=True)
    assert done.returncode == 2
    assert "the text of a prompt is no UTF-8" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
