"""A family outside of the package (toy_family.py) draws through everything that draws."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

import softcfg
from launching import Job
from prompt_model import prompt_generator
from softcfg import Pipeline, UserError, plugins
from softcfg.cli.main import main
from softcfg.configuration import load_config
from softcfg.prompts import Prompt
from softcfg.runs.folder import RunFolder
from softcfg.tokenizers import MoVQ, MoVQConfig
from softcfg.ui.studio import Studio
from softcfg.zoo import GENERATORS, register_generator
from tiny_models import MOVQ

PLUGIN = Path(__file__).parents[1] / "toy_family.py"
WORDS = {"red": 1, "apple": 2, "a": 3, "star": 4, "?": 5}
NEGATIVE = "a star"


@pytest.fixture(scope="module", autouse=True)
def plugin() -> Iterator[None]:
    plugins.load(str(PLUGIN))
    yield
    del GENERATORS["toy"], sys.modules["toy_family"], plugins._loaded[str(PLUGIN)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "toy"
    folder.mkdir()
    movq = {**MOVQ, "n_embed": 3}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = MoVQ(load_config(MoVQConfig, movq))
    save_file(prompt_generator(12).state_dict(), folder / "generator.safetensors")
    save_file(tokenizer.state_dict(), folder / "tokenizer.safetensors")
    (folder / "words.json").write_text(json.dumps(WORDS))
    card = {
        "generator": {"family": "toy"},
        "tokenizer": {"family": "movq", "config": movq},
        "text": {"files": {"words": "words.json"}, "template": "a {prompt}"},
        "sampling": {"guidance_scale": 3.0, "schedule": "constant"},
    }
    (folder / "model.yaml").write_text(yaml.safe_dump(card))
    return folder


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(folder)


def test_inputs_are_the_family_s_own(pipe: Pipeline) -> None:
    assert pipe.generator.config.unknown_word == WORDS["?"]  # from the word file
    assert pipe.entry is not None
    assert (pipe.entry.name, pipe.conditioning.takes_prompts) == ("toy", True)
    requests = pipe.conditioning.requests(prompts=["red apple", Prompt("star", negative_text="red moon")])
    read = pipe.conditioning.inputs(requests)
    assert [list(prompt.words) for prompt in read] == [[3, 1, 2], [3, 4]]
    assert [list(prompt.negative) for prompt in read] == [[0], [1, 5]]
    assert pipe.num_tokens() == 12
    assert pipe.num_tokens(height=4) == 6
    with pytest.raises(UserError, match="toy takes no task"):
        pipe(prompts=[Prompt("star", task="depth")])
    with pytest.raises(UserError, match="4 pixels wide"):
        pipe(prompts=["star"], width=8)


def test_the_pipeline_and_a_trace_draw_the_same(pipe: Pipeline) -> None:
    out = pipe(prompts=["red apple", "star"], seed=3)
    assert out.pixels.shape == (2, 8, 4, 3)
    assert torch.equal(out.codes, out.tokens.view(2, 4, 3)[:, :, :2].flatten(1))
    other = pipe(prompts=[Prompt(text, negative_text=NEGATIVE) for text in ("red apple", "star")], seed=3)
    assert not torch.equal(out.tokens, other.tokens)
    inputs = pipe.conditioning.inputs(out.prompts or [])
    trace = softcfg.trace(pipe.generator, labels=inputs, guidance=pipe.default_guidance(), seed=3)
    assert torch.equal(trace.tokens, out.tokens)
    assert (trace.confidence.view(2, 4, 3)[:, :, 2] == 0).all()


def test_a_run_from_the_command_line(folder: Path, pipe: Pipeline, tmp_path: Path) -> None:
    flags = ["--prompt", "red apple", "--prompt", "star", "--images-per-prompt", "1", "--seed", "3", "--ratio", "2:3"]
    words = ["sample", str(folder), *flags, "--negative-prompt", NEGATIVE, "--output-dir", str(tmp_path / "out")]
    assert Job(1, [*words, "--plugin", str(PLUGIN)]).join() == [0]  # where nothing has imported it yet
    run = RunFolder.open(tmp_path / "out")
    assert (run.settings["negative_text"], run.settings["height"]) == (NEGATIVE, 6)
    assert run.settings["text"]["template"] == "a {prompt}"
    prompts = [Prompt(text, negative_text=NEGATIVE) for text in ("red apple", "star")]
    expected = pipe(prompts=prompts, seed=3, height=6)
    assert np.array_equal(run.require(0).pixels, expected.pixels)
    assert main(["decode", str(tmp_path / "out"), "--output-dir", str(tmp_path / "again")]) == 0
    assert np.array_equal(RunFolder.open(tmp_path / "again").require(0).pixels, expected.pixels)


def test_other_commands(folder: Path, pipe: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    door = ["--plugin", str(PLUGIN)]
    path = tmp_path / "trace.safetensors"
    assert main(["trace", str(folder), "--prompt", "star", "--seed", "2", "--output", str(path), *door]) == 0
    with safe_open(path, "np") as file:
        assert np.array_equal(file.get_tensor("tokens"), pipe(prompts=["star"], seed=2).tokens)
    assert main(["plot", str(folder), "--prompt", "star", "--output-dir", str(tmp_path / "plots"), *door]) == 0
    assert len(list((tmp_path / "plots").glob("*.png"))) == 5
    assert main(["bench", str(folder), "--random-weights", "--batch-sizes", "1", "--repeats", "1", *door]) == 0
    assert main(["models", str(folder), *door]) == 0
    assert "words.json" in capsys.readouterr().out


def test_the_web_page_draws_it(pipe: Pipeline) -> None:
    studio = Studio({"toy": pipe})
    panels = [panels for _, panels in studio.draw("visitor", studio.settings(subject="red apple", seed=1))][-1]
    picture = panels[-1].picture
    assert picture is not None
    assert (picture.grid.rows, picture.grid.columns, picture.grid.stride) == (4, 2, 3)
    assert np.array_equal(picture.pixels, pipe(prompts=["red apple"], seed=1).pixels[0])


def test_a_name_belongs_to_one_family() -> None:
    with pytest.raises(UserError, match="there is a generator family named 'alitok' already"):
        register_generator("alitok", dict)(type("Other", (), {}))
