"""Janus-Pro, Emu3-Gen and LlamaGen T2I from end to end: small weights in the published layouts, and every command."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import softcfg
from hub import Hub, client_environment, serving
from launching import Job
from published import place, write
from softcfg import CFG, Pipeline, SoftCFG
from softcfg.cli.main import main
from softcfg.models.llamagen_t2i import encoder as llamagen_encoder
from softcfg.prompts import Prompt
from softcfg.runs import RunRequest
from softcfg.runs.folder import RunFolder
from softcfg.zoo import MODELS, ModelEntry
from softcfg.zoo.loading import load_conditioning, load_generator, load_tokenizer

NAMES = [
    *(f"janus-pro-{size}{layout}" for size in ("1b", "7b") for layout in ("", "-original")),
    "emu3-gen",
    "emu3-gen-original",
    "llamagen-t2i-xl-256",
]
ONE_EACH = ["janus-pro-7b", "emu3-gen", "llamagen-t2i-xl-256"]
AS_OTHERS = {
    "janus-pro-1b",
    "janus-pro-7b-original",
    "emu3-gen-original",
}  # whose size and layout are those of two others
PROMPTS = ("a red fox", "a red fox in the snow of all colours")


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow if name in AS_OTHERS else ()) for name in NAMES],
)
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelEntry]:
    """A folder with the repositories of a model, and its entry."""
    folder = tmp_path_factory.mktemp(request.param)
    return folder, written(request.param, folder)


def written(name: str, folder: Path) -> ModelEntry:
    if name.startswith("llamagen"):
        pytest.importorskip("ftfy")
        pytest.importorskip("bs4")
    return write(name, folder)


@pytest.fixture
def fetched(published: tuple[Path, ModelEntry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelEntry:
    """The entry of a model whose files were fetched from their folders."""
    folder, entry = published
    monkeypatch.setenv("SOFTCFG_CHECKPOINTS", str(tmp_path / "checkpoints"))
    monkeypatch.setenv("SOFTCFG_CAPTIONS", str(tmp_path / "captions"))
    monkeypatch.setitem(MODELS, entry.name, entry)
    repositories = sorted({place(folder, file).parent for file in entry.files})
    codes = [main(["fetch", entry.name, "--from", str(repository)]) for repository in repositories]
    assert codes == [*[2] * (len(codes) - 1), 0]  # all but the last time, something is still missing
    return entry


one_each = pytest.mark.parametrize("published", ONE_EACH, indirect=True)


def one_now(first: str) -> pytest.MarkDecorator:
    """As `one_each`; all but the first are slow."""
    names = [pytest.param(name, marks=() if name == first else pytest.mark.slow) for name in ONE_EACH]
    return pytest.mark.parametrize("published", names, indirect=True)


def sample(name: str, out: Path, *flags: str) -> int:
    texts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    return main(["sample", name, *texts, "--output-dir", str(out), "--no-compare", *flags])


def pictures(out: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in sorted(out.glob("0*.png"))]


def test_two_prompts(fetched: ModelEntry, tmp_path: Path) -> None:
    """Several images a prompt are those of the Python interface, and the run holds how they were drawn."""
    out = tmp_path / "out"
    assert sample(fetched.name, out, "--images-per-prompt", "2", "--seed", "3") == 0
    pipe = Pipeline.from_pretrained(fetched.name)
    assert pipe.generator.dtype == torch.bfloat16
    assert next(pipe.tokenizer.parameters()).dtype == torch.float32
    expected = pipe(prompts=PROMPTS * 2, seed=3)
    assert all(map(np.array_equal, pictures(out), expected.pixels))
    assert len({image.tobytes() for image in expected.pixels}) == 4
    run = json.loads((out / "run.json").read_text())
    assert run["guidance"]["guidance_scale"] == fetched.sampling["guidance_scale"]
    assert run["guidance"]["schedule"] == "constant"
    assert (run["sampling"]["temperature"], run["sampling"]["top_k"]) == (1.0, fetched.sampling["top_k"])
    assert run["dtype"] == "bfloat16"
    assert len(run["text"]["sha256"]) == 64


def in_this_process(words: Sequence[str]) -> int:
    """The command line with a stand-in, as the program of a `Job`."""
    entry, environment = pickle.loads(Path(words[0]).read_bytes())
    MODELS[entry.name] = entry
    os.environ.update(environment)  # of the test; the server that forks has that of the first one
    return main(words[1:])


@one_each
@pytest.mark.slow
def test_a_killed_run_is_continued_by_two_processes(fetched: ModelEntry, tmp_path: Path) -> None:
    environment = {name: os.environ[name] for name in ("SOFTCFG_CHECKPOINTS", "SOFTCFG_CAPTIONS")}
    (tmp_path / "entry").write_bytes(pickle.dumps((fetched, environment)))
    texts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    out, whole = tmp_path / "out", tmp_path / "whole"

    def words(folder: Path, *flags: str) -> list[str]:
        return [
            str(tmp_path / "entry"), "sample", fetched.name, *texts, "--images-per-prompt", "20", "--batch-size", "2",
            "--no-compare", "--device", "cpu", "--output-dir", str(folder), *flags,
        ]  # fmt: skip

    job = Job(1, words(out), in_this_process)
    until = time.monotonic() + 120
    while not list(out.glob("shards/*.safetensors")) and time.monotonic() < until:
        time.sleep(0.01)
    assert job.kill([0]) == 1
    assert 0 < len(list(out.glob("shards/*.safetensors"))) < 20
    assert Job(2, words(out), in_this_process).join() == [0, 0]
    assert Job(1, words(whole), in_this_process).join() == [0]
    one, other = (RunFolder.open(folder) for folder in (out, whole))
    for number in range(20):
        assert np.array_equal(one.require(number).codes, other.require(number).codes)
    assert len(pictures(out)) == 40


@one_now("janus-pro-7b")
def test_trace_and_plot(fetched: ModelEntry, tmp_path: Path) -> None:
    words = ["--prompt", PROMPTS[0], "--output", str(tmp_path / "trace.safetensors"), "--seed", "1"]
    assert main(["trace", fetched.name, *words]) == 0
    trace = load_file(tmp_path / "trace.safetensors")
    assert (trace["guidance_scale"] == fetched.sampling["guidance_scale"]).all()
    drawn = Pipeline.from_pretrained(fetched.name)(prompts=PROMPTS[:1], seed=1)
    assert torch.equal(trace["tokens"], drawn.tokens)
    figures = tmp_path / "figures"
    assert main(["plot", fetched.name, "--prompt", PROMPTS[0], "--output-dir", str(figures)]) == 0
    assert list(figures.glob("*.png"))


@one_now("emu3-gen")
def test_benchmarks(fetched: ModelEntry, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "dpg").mkdir()
    (tmp_path / "dpg" / "fox.txt").write_text("a red fox\n")
    (tmp_path / "geneval").mkdir()
    line = json.dumps({"tag": "single_object", "prompt": PROMPTS[1]})
    (tmp_path / "geneval" / "evaluation_metadata.jsonl").write_text(f"{line}\n")
    side = 32 if fetched.name.startswith("emu3") else 96
    words = ["--suite", "dpg", "--prompts", str(tmp_path / "dpg"), "--output-dir", str(tmp_path / "dpg")]
    assert main(["t2i-bench", fetched.name, *words]) == 2
    assert "is the folder of the prompts; give another" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "fox.png").write_text("mine")
    assert main(["t2i-bench", fetched.name, *words[:-1], str(tmp_path / "mine")]) == 2
    assert "holds fox.png, which was not made by this command" in capsys.readouterr().err
    for suite, picture in (("dpg", "fox.png"), ("geneval", "00000/samples/0003.png")):
        out = tmp_path / f"{suite}-out"
        words = ["--suite", suite, "--prompts", str(tmp_path / suite), "--output-dir", str(out), "--seed", "7"]
        assert main(["t2i-bench", fetched.name, *words]) == 0
        image = np.asarray(Image.open(out / picture))
        assert image.shape == ((2 * side, 2 * side, 3) if suite == "dpg" else (side, side, 3))
        run = json.loads((tmp_path / f"{suite}-out.run" / "run.json").read_text())
        assert (run["seed"], run["labels"]) == (7, [0] * 4)
        assert run["guidance"]["guidance_scale"] == fetched.sampling["guidance_scale"]
        templates = {"janus": "template", "emu3": "positive_text"}
        for family, setting in templates.items():
            assert (setting in run["text"]) == fetched.name.startswith(family)
    drawn = Pipeline.from_pretrained(fetched.name)(prompts=[PROMPTS[1]] * 4, seed=7)
    assert np.array_equal(image, drawn.pixels[3])
    capsys.readouterr()
    assert main(["bench", fetched.name, "--batch-sizes", "1", "--repeats", "1"]) == 0
    assert "recommended: --batch-size 1" in capsys.readouterr().out


@one_each
@pytest.mark.slow
def test_rules_and_ways_to_draw(fetched: ModelEntry, tmp_path: Path) -> None:
    """Other rules, speculative Jacobi decoding, rounded weights and a rounded cache draw, each other images."""
    plain = tmp_path / "plain"
    assert sample(fetched.name, plain, "--images-per-prompt", "1") == 0
    for flags in (
        ["--rule", "apg"],
        ["--perturbation", "none", "--rule", "zero_star"],
        ["--softcfg-strength", "0"],
        ["--speculative-jacobi", "4"],
        ["--quantize", "int8"],
        ["--kv-cache-dtype", "int8"],
    ):
        out = tmp_path / "-".join(flags)
        assert sample(fetched.name, out, "--images-per-prompt", "1", *flags) == 0
        assert len(pictures(out)) == 2
        assert not all(map(np.array_equal, pictures(out), pictures(plain)))
    if fetched.name.startswith("llamagen"):
        pipe = Pipeline.from_pretrained(fetched.name, quantize="int8")
        assert "Int8" in type(pipe.conditioning.encoder.model.encoder.block[0].layer[0].SelfAttention.q.weight).__name__


@one_each
@pytest.mark.slow
def test_layers_on_several_devices(fetched: ModelEntry, tmp_path: Path) -> None:
    plain = Pipeline.from_pretrained(fetched.name, dtype=torch.float32)
    generator = plain.generator
    blocks = next(name for name, module in generator.named_modules() if module is generator.blocks)
    device_map: dict[str, str] = {
        name.rpartition(".")[0]: "cpu" for name, _ in generator.state_dict().items() if not name.startswith(blocks)
    }
    device_map |= {f"{blocks}.{i}": "disk" if i == 1 else "cpu" for i in range(len(generator.blocks))}
    spread = Pipeline.from_pretrained(
        fetched.name, dtype=torch.float32, device_map=device_map, offload_folder=str(tmp_path / "offload")
    )
    assert next(spread.generator.blocks[1].parameters()).is_meta
    one, other = (pipe(prompts=PROMPTS, seed=2).tokens for pipe in (plain, spread))
    assert torch.equal(one, other)


@pytest.mark.parametrize("published", ["emu3-gen"], indirect=True)
def test_negative_prompts_and_ratios(fetched: ModelEntry, tmp_path: Path) -> None:
    name = fetched.name
    runs = {}
    for number, flags in enumerate(([], ["--negative-prompt", "blurry"], ["--ratio", "4:1"])):
        assert sample(name, tmp_path / str(number), "--images-per-prompt", "1", *flags) == 0
        runs[number] = RunFolder.open(tmp_path / str(number))
    assert not np.array_equal(runs[0].require(0).codes, runs[1].require(0).codes)
    assert pictures(tmp_path / "2")[0].shape == (16, 64, 3)
    assert runs[1].settings["negative_text"] == "blurry"
    pipe = Pipeline.from_pretrained(name)
    expected = pipe(prompts=[Prompt(text, negative_text="blurry") for text in PROMPTS]).codes.numpy()
    assert np.array_equal(runs[1].require(0).codes, expected)
    run = softcfg.draw_run(RunRequest(pipe, prompts=PROMPTS, negative_prompt="blurry"), tmp_path / "python")
    assert np.array_equal(run.require(0).codes, expected)
    with pytest.raises(softcfg.UserError, match="takes no negative prompt"):
        RunRequest(words := Pipeline.from_pretrained("emoji"), prompts="cat", negative_prompt="dog").settings(words)


@one_now("emu3-gen")
@pytest.mark.parametrize("method", [SoftCFG, pytest.param(CFG, marks=pytest.mark.slow)])
def test_a_prompt_alone_and_beside_a_long_one(fetched: ModelEntry, method: type[CFG]) -> None:
    """In float64 it draws the same tokens; and halves of other dtypes fit together."""
    guidance = method(3.0, schedule="constant")
    tokenizer = load_tokenizer(fetched.name, dtype=torch.bfloat16)
    for dtype in (torch.float64, torch.float32):
        generator = load_generator(fetched.name, dtype=dtype)
        pipe = Pipeline(generator, tokenizer, conditioning=load_conditioning(fetched, generator, tokenizer))
        both = pipe(prompts=PROMPTS, guidance=guidance, seed=4)
        assert both.pixels.any()
        if dtype == torch.float64:
            alone = pipe(prompts=PROMPTS[:1], guidance=guidance, seed=4)
            assert torch.equal(alone.tokens[0], both.tokens[0])
            assert pipe.generator.dtype == torch.float64


@pytest.mark.parametrize("published", ["llamagen-t2i-xl-256"], indirect=True)
def test_captions_are_encoded_once(fetched: ModelEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join([*PROMPTS, "A RED FOX"]))
    encoded: list[str] = []
    encode = llamagen_encoder.CaptionEncoder.encode

    def counted(self: llamagen_encoder.CaptionEncoder, caption: str) -> torch.Tensor:
        encoded.append(caption)
        return encode(self, caption)

    monkeypatch.setattr(llamagen_encoder.CaptionEncoder, "encode", counted)

    def draw(out: str, *flags: str) -> np.ndarray:
        words = ["--prompts", str(file), "--images-per-prompt", "2", "--batch-size", "3", "--no-compare", *flags]
        assert main(["sample", fetched.name, *words, "--output-dir", str(tmp_path / out)]) == 0
        run = RunFolder.open(tmp_path / out)
        return np.concatenate([run.require(number).codes for number in range(2)])

    first = draw("one")
    assert encoded == [*PROMPTS]  # once each, and cleaned
    assert np.array_equal(draw("two"), first)
    assert len(encoded) == 2
    damaged = next((tmp_path / "captions").glob("*/*.safetensors"))
    damaged.write_bytes(b"damaged")
    assert np.array_equal(draw("three"), first)
    assert len(encoded) == 3
    draw("four", "--dtype", "float32")  # other features
    assert len(encoded) == 5
    monkeypatch.setenv("SOFTCFG_CAPTIONS", os.devnull)  # where nothing can be kept
    assert np.array_equal(draw("five"), first)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOFTCFG_CAPTIONS", "~nobody-of-this-name/captions")  # a folder, as for a shell
    assert np.array_equal(draw("six"), first)


@pytest.mark.slow
def test_through_the_hub(tmp_path: Path) -> None:
    """Fetch and sample in a fresh process, whose client asks a stand-in for the Hub; offline the cache serves."""
    hub = Hub()
    entries = {name: written(name, tmp_path / name) for name in NAMES}
    (tmp_path / "entries").write_bytes(pickle.dumps(entries))
    for name, entry in entries.items():
        for repository in {file.repository for file in entry.files}:
            for path in (tmp_path / name / repository).iterdir():
                hub.add(repository, path.name, path.read_bytes())
    script = """
import pickle, sys
from pathlib import Path
from softcfg.cli.main import main
from softcfg.zoo import MODELS
home = Path(sys.argv[1])
MODELS |= pickle.loads((home / "entries").read_bytes())
for name in sys.argv[2:]:
    flags = ["--prompt", "a red fox", "--images-per-prompt", "1", "--no-compare"]
    for words in (["fetch", name], ["sample", name, *flags, "--output-dir", str(home / "out" / name)]):
        if code := main(words):
            sys.exit(code)
"""
    with serving(hub):
        environment = client_environment(
            hub,
            tmp_path / "hf",
            SOFTCFG_CHECKPOINTS=str(tmp_path / "none"),
            SOFTCFG_CAPTIONS=str(tmp_path / "captions"),
        )
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path), *NAMES],
            capture_output=True, text=True, env=environment, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(pictures(tmp_path / "out" / "emu3-gen-original")) == 1
    assert not (tmp_path / "none").exists()
