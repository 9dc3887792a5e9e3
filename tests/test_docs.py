"""Every code block and every command of the documents is run, or read by the parser of the program it calls.

The published models are there under their names, with random weights and few tokens; the Inception network is a small
stand-in; runs draw a few images. Commands that need more than that (GPUs, a cluster, hours) are read by their parsers.
A block or command that nothing here knows fails the test.
"""

from __future__ import annotations

import argparse
import dataclasses
import doctest
import functools
import importlib
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

import stand_in
from code_blocks import Block, blocks, inline_code
from image_files import write_pngs
from softcfg import doctor, plugins
from softcfg.cli.main import COMMANDS, _rewritten, build_parser, main
from softcfg.evaluation.extractors import EXTRACTORS
from softcfg.guidance import CONFIDENCES, PERTURBATIONS, RULES, SCHEDULES
from softcfg.nn.backends.registry import BACKENDS
from softcfg.zoo.registry import (
    BUNDLED,
    GENERATORS,
    MODELS,
    TOKENIZERS,
    Component,
    ModelEntry,
    ModelFile,
    read_model_folder,
)
from tiny_models import module

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "recipes").rglob("*.md")),
]

# What commands are given besides, to be quick; runs without a GPU.
REDUCED = {
    "sample": ["--num-samples", "4", "--device", "cpu"],
    "bench": ["--batch-sizes", "1", "--repeats", "1", "--device", "cpu"],
    "doctor": ["--no-test", "--device", "cpu"],
    "trace": ["--device", "cpu"],
    "plot": ["--device", "cpu"],
    "eval": ["--device", "cpu"],
    "compare": ["--num-samples", "4", "--device", "cpu"],
    "decode": ["--device", "cpu"],
    "runs": [],
    "models": [],
    "fetch": [],
}
PARSED = {"sweep", "t2i-bench", "ui"}  # commands that are read, not run
SMALLER = {"num_samples=1000": "num_samples=8", "sweep.run(40)": "sweep.run(2)"}  # in Python blocks

# Indented blocks that are no commands begin with these words: formulas, and what a program prints.
QUOTED = ("w_i = 1 - p_max(x_i)", "softcfg: error:")

# What the shell and SLURM fill in, and where absolute paths of examples lead.
VARIABLES = {"SLURM_JOB_NODELIST": "node0", "SLURM_NNODES": "4", "SLURM_JOB_ID": "1", "HOST": "node0"}
SHARED = "/shared"

TINY_GENERATOR = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "codebook_size": 20,
    "condition_num_classes": 1000, "image_seq_len": 16, "grid_size": 4,
}  # fmt: skip
TINY_TOKENIZER = {
    "channel_mult": [1, 1, 1, 1], "hidden_channels": 32, "num_res_blocks": 1, "resolution": 32, "z_channels": 4,
    "codebook_size": 20,
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, ModelEntry], Path]:
    """The published models with few tokens and random weights, and the folder of their files."""
    folder = tmp_path_factory.mktemp("checkpoints")
    counts = {len(entry.classes) or 1000 for entry in MODELS.values()}
    small = {
        f"generator-{count}": Component(GENERATORS["alitok"], {**TINY_GENERATOR, "condition_num_classes": count}, None)  # type: ignore[arg-type]
        for count in counts
    }
    small["tokenizer"] = Component(TOKENIZERS["maskgit-vq"], TINY_TOKENIZER, None)  # type: ignore[arg-type]
    for name, part in small.items():
        torch.save(module(part).state_dict(), folder / name)
    entries = {}
    for entry in MODELS.values():
        if entry.text is not None:  # what is not bundled of these is not run
            continue
        parts = []
        names = (f"generator-{len(entry.classes) or 1000}", "tokenizer")
        for name, part in zip(names, entry.components, strict=True):
            file = ModelFile(f"{name}.pt", folder=folder) if entry.bundled else part.file
            parts.append(dataclasses.replace(small[name], file=file))
            link = folder / file.local_name
            if not link.exists():
                link.symlink_to(folder / name)
        entries[entry.name] = dataclasses.replace(entry, generator=parts[0], tokenizer=parts[1])
    return entries, folder


@pytest.fixture
def workplace(
    request: pytest.FixtureRequest,
    tiny: tuple[dict[str, ModelEntry], Path],
    model_folder: Path,
    prompt_model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[dict[str, Any]]:
    """A folder with the files that the documents name, as the current one; yields the names their code may use.

    The bundled models are small ones as well ("small"), but for that of emoji ("words"), or themselves ("bundled").
    """
    entries, checkpoints = tiny
    for name, entry in entries.items():
        if request.param != "bundled" or not MODELS[name].bundled:
            monkeypatch.setitem(MODELS, name, entry)
    if request.param == "small":
        words = dataclasses.replace(read_model_folder(prompt_model_folder), examples=MODELS["emoji"].examples)
        monkeypatch.setitem(MODELS, "emoji", words)
        monkeypatch.setattr(doctor, "bandwidth", functools.partial(doctor.bandwidth, size=2**20))
    monkeypatch.setitem(EXTRACTORS, "inception", stand_in.factory)
    for variable, path in (("SOFTCFG_CHECKPOINTS", checkpoints), ("SOFTCFG_FEATURES", tmp_path / "features")):
        monkeypatch.setenv(variable, str(path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    here = tmp_path / "clone"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.syspath_prepend(here)
    trained = here / "runs" / "fashion"
    trained.parent.mkdir()
    trained.symlink_to(BUNDLED / "fashion" if request.param == "bundled" else model_folder)
    (here / "runs" / "emoji").symlink_to(BUNDLED / "emoji")

    images = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    for file in ("samples", "ref", "VIRTUAL_imagenet256_labeled"):
        np.savez(f"{file}.npz", arr_0=images)
    for folder in ("test-images", "train-images"):
        write_pngs(Path(folder), images)
    Image.fromarray(images[0]).save("shoe.png")
    save_file(torch.load(checkpoints / "tokenizer"), "finetuned.safetensors")
    Path(tmp_path, "Downloads").symlink_to(checkpoints)
    Path("weights").symlink_to(checkpoints)
    Path("configs").mkdir()
    for name in ("alitok_b", "alitok_l", "alitok_xl"):
        configuration = {"model": {"vq_model": {"codebook_size": 20}, "generator": {**TINY_GENERATOR, "seed": 2}}}
        Path("configs", f"{name}.yaml").write_text(yaml.safe_dump(configuration))
    tables: tuple[Any, ...] = (
        GENERATORS, TOKENIZERS, RULES, PERTURBATIONS, SCHEDULES, CONFIDENCES, EXTRACTORS, BACKENDS, plugins._loaded,
        sys.modules,
    )  # fmt: skip
    before = [dict(table) for table in tables]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield {"pixels": images, "reference_pixels": images[::-1].copy()}
    torch.set_num_threads(threads)
    for table, names in zip(tables, before, strict=True):
        for name in [name for name in table if name not in names]:
            if table is not sys.modules or str(getattr(table[name], "__file__", "")).startswith(str(tmp_path)):
                del table[name]


DEAR = {ROOT / "docs" / f"{name}.md" for name in ("start", "guidance", "evaluation", "text-to-image", "plug")}
CASES = [
    pytest.param(path, "words", id=str(path.relative_to(ROOT)), marks=pytest.mark.slow)
    if path in DEAR
    else pytest.param(path, "small", id=str(path.relative_to(ROOT)))
    for path in PAGES
] + [
    pytest.param(path, "bundled", id=f"{path.relative_to(ROOT)}-bundled", marks=pytest.mark.slow)
    for path in PAGES
    if any(entry.bundled and name in path.read_text() for name, entry in MODELS.items())
]


@pytest.mark.parametrize(("path", "workplace"), CASES, indirect=["workplace"])
def test_code_blocks(path: Path, workplace: dict[str, Any]) -> None:
    if path.name == "evaluation.md":
        write_pngs(Path("out"), workplace["pixels"][:6])
    if path.name == "plug.md":
        pytest.importorskip("transformers")
    names = dict(workplace)
    shell = Shell()
    for block in blocks(path):
        if block.language == "python":
            run_python(block, names)
        elif block.language == "pycon":
            run_console(block, names)
        elif block.language in ("sh", "bash") or is_shell(block):
            shell.run(block)
        elif block.language == "yaml":
            yaml.safe_load(block.text)
        elif block.language != "text" and not (block.language == "" and block.text.startswith(QUOTED)):
            pytest.fail(f"{block.place}: nothing here runs a block of {block.language or block.text.splitlines()[0]!r}")


def is_shell(block: Block) -> bool:
    return block.language == "" and block.text.split()[0] in Shell.PROGRAMS


def run_python(block: Block, names: dict[str, Any]) -> None:
    """Run a block after those before it on its page; one that begins with `# NAME.py` becomes that file.

    It is what the page shows, but for the numbers in `SMALLER`.
    """
    if file := re.match(r"# (\w+)\.py\n", block.text):
        Path(f"{file[1]}.py").write_text(block.text)
        importlib.invalidate_caches()
        importlib.import_module(file[1])
        return
    text = block.text
    for some, fewer in SMALLER.items():
        text = text.replace(some, fewer)
    code = "\n" * (block.line - 1) + text
    exec(compile(code, str(block.path), "exec", dont_inherit=True), names)


def run_console(block: Block, names: dict[str, Any]) -> None:
    """Run an interactive session and compare what it prints."""
    session = doctest.DocTestParser().get_doctest(block.text, names, block.place, str(block.path), block.line - 1)
    printed: list[str] = []
    result = doctest.DocTestRunner().run(session, out=printed.append, clear_globs=False)
    assert result.attempted, f"{block.place}: no prompt"
    assert not result.failed, "".join(printed)
    names.update(session.globs)


class ParsedError(Exception):
    """The arguments of a program were read."""


class Shell:
    """Runs the commands of a page, or has them read by the parsers of their programs."""

    PROGRAMS = ("softcfg", "torchrun", "accelerate", "srun", "make", "pip", "python", "git", "cd", "apt")

    def __init__(self) -> None:
        self.folder = ROOT  # where the reader of a clone would be

    def run(self, block: Block) -> None:
        if block.language == "bash":  # a script
            subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
        for words in block.commands():
            words = [self.expanded(word) for word in words]
            while words and re.match(r"[A-Z_]+=", words[0]):
                words = [] if words[0].endswith(")") or "$(" in words[0] else words[1:]
            if not words:
                continue
            program, *rest = words
            if program not in self.PROGRAMS:
                pytest.fail(f"{block.place}: nothing here knows the command {program!r}")
            try:
                getattr(self, program)(rest)
            except (AssertionError, SystemExit, StopIteration) as error:
                pytest.fail(f"{block.place}: {shlex.join(words)}: {type(error).__name__}: {error}")

    def expanded(self, word: str) -> str:
        for name, value in VARIABLES.items():
            word = word.replace(f"${name}", value)
        if word.startswith(SHARED):
            word = str(Path(f"shared{word.removeprefix(SHARED)}").absolute())
        return os.path.expanduser(word)

    def softcfg(self, words: Sequence[str]) -> None:
        command = next(word for word in words if not word.startswith("-"))
        if "--help" in words:
            with pytest.raises(SystemExit, match="0"):
                build_parser().parse_args(words)
        elif command in PARSED or any(
            word == "path/to/ckpt" or (word in MODELS and too_large(MODELS[word])) for word in words
        ):
            build_parser().parse_args(_rewritten(words))
        else:
            assert command in REDUCED, "neither in REDUCED nor in PARSED"
            drawn_from_prompts = command == "sample" and any(word.startswith("--prompt") for word in words)
            reduced = ["--images-per-prompt", "1"] if drawn_from_prompts else REDUCED[command]
            if command == "compare" and "emoji" in words:
                reduced = ["--num-samples", "1"]
            assert main([*words, *reduced]) == 0

    def torchrun(self, words: Sequence[str]) -> None:
        from torch.distributed.run import get_args_parser

        args = get_args_parser().parse_args(words)
        self._launched(args.module, args.training_script, args.training_script_args)

    def accelerate(self, words: Sequence[str]) -> None:
        from accelerate.commands.launch import launch_command_parser

        assert words[0] == "launch"
        args = launch_command_parser().parse_args(words[1:])
        self._launched(args.module, args.training_script, args.training_script_args)

    def _launched(self, is_module: bool, script: str, words: Sequence[str]) -> None:
        assert is_module
        assert script == "softcfg", f"launches {script}"
        self.softcfg(words)

    def srun(self, words: Sequence[str]) -> None:
        assert words[0] == "torchrun"
        self.torchrun(words[1:])

    def make(self, words: Sequence[str]) -> None:
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        for word in words:
            assert word in targets or re.match(r"[A-Z_]+=", word), f"no target {word}"

    def pip(self, words: Sequence[str]) -> None:
        assert words[0] == "install"
        section = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]\n")[1].split("\n[")[0]
        extras = re.findall(r"^([\w-]+) = \[", section, re.MULTILINE)
        for word in words[1:]:
            package = re.fullmatch(r"(?:\.|softcfg|[\w./-]*softcfg-[\w.*-]+\.whl)(?:\[([\w,-]+)\])?", word)
            known = ("-e", "--upgrade", "torch")
            assert package or word in known, f"unknown argument {word}"
            for extra in (package[1] or "").split(",") if package else ():
                assert not extra or extra in extras, f"no extra {extra}"

    def python(self, words: Sequence[str]) -> None:
        if words[0] != "-m":
            script = self.folder / words[0]
            assert script.is_file(), f"no script {script}"
            self._parse(lambda: runpy.run_path(str(script), run_name="__main__"), words, script.parent)
        elif words[1] == "softcfg":
            self.softcfg(words[2:])
        elif words[1] == "pytest":
            for word in words[2:]:
                assert word.startswith("-") or word == "slow" or (ROOT / word.partition("::")[0]).exists(), word
        elif words[1].startswith(("benchmarks.", "recipes.")):
            self._parse(lambda: runpy.run_module(words[1], run_name="__main__"), words[1:], ROOT)
        else:
            assert words[1] in ("build", "benchmarks"), f"unknown module {words[1]}"

    def _parse(self, program: Callable[[], Any], words: Sequence[str], folder: Path) -> None:
        """Run a program up to where its parser has read the arguments."""
        with pytest.MonkeyPatch.context() as patch:
            parse = argparse.ArgumentParser.parse_args

            def stop(parser: argparse.ArgumentParser, *arguments: Any) -> None:
                parse(parser, *arguments)
                raise ParsedError

            patch.setattr(argparse.ArgumentParser, "parse_args", stop)
            patch.setattr(sys, "argv", list(words))
            patch.syspath_prepend(folder)
            with pytest.raises(ParsedError):
                program()

    def cd(self, words: Sequence[str]) -> None:
        (name,) = words
        self.folder = ROOT if name == "softcfg" else self.folder / name
        assert self.folder.is_dir(), f"no folder {self.folder}"

    def git(self, words: Sequence[str]) -> None:
        assert words[0] in ("clone", "checkout", "commit"), f"git {words[0]}"

    def apt(self, words: Sequence[str]) -> None:
        assert words[0] == "install"


def too_large(entry: ModelEntry) -> bool:
    """Whether no small model stands for this one."""
    return entry.text is not None and entry.folder is None


def commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The subcommands of a parser; none if it has none."""
    return {
        name: found
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
        for name, found in action.choices.items()
    }


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_the_prose(path: Path) -> None:
    """Commands in running text may leave arguments out, but their commands, flags and files are there."""
    for number, code in inline_code(path):
        words = code.split()
        while words and re.match(r"[A-Z_]+=", words[0]):
            del words[0]
        if words and words[0] == "softcfg":
            parser, rest = build_parser(), words[1:]
            while rest and rest[0] in commands_of(parser):
                parser = commands_of(parser)[rest.pop(0)]
            assert (
                not rest or parser.prog != "softcfg" or rest[0] in ("COMMAND", "--help", "--version", "--completion")
            ), (number, code)
            known = {flag for action in parser._actions for flag in action.option_strings}
            for word in rest:
                flag = word.partition("=")[0]
                assert not flag.startswith("-") or flag in known or rest[0] == "COMMAND", f"line {number}: {code}"
        elif words and words[0] in ("make", "pip") and len(words) > 1:
            getattr(Shell(), words[0])(shlex.split(code)[1:])
        elif words[:2] == ["python", "-m"] and words[2:3] != ["softcfg"]:
            Shell().python(words[1:])


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_examples_of_the_help(command: Any) -> None:
    assert command.EXAMPLES.startswith("examples:\n")
    for line in command.EXAMPLES.replace("\\\n", " ").splitlines()[1:]:
        words = shlex.split(line, comments=True)
        if words[0] == "torchrun":
            words = words[words.index("-m") + 1 :]
        assert words[0] == "softcfg"
        build_parser().parse_args(_rewritten(words[1:]))


def test_unknown_commands_fail(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "Text.\n\n```sh\nsoftcfg models\nsoftcgf models\n```\n\n    some formula\n\nThen\n\n    make test\n"
    )
    shell, formula, target = blocks(page)
    assert [list(block.commands()) for block in (shell, target)] == [
        [["softcfg", "models"], ["softcgf", "models"]],
        [["make", "test"]],
    ]
    with pytest.raises(pytest.fail.Exception, match=r"page.md:4: nothing here knows the command 'softcgf'"):
        Shell().run(shell)
    assert not is_shell(formula)
