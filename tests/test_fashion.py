"""The bundled models: what is shipped, and that their samples are what they are asked to be."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from softcfg import CFG, Pipeline
from softcfg.cli.main import main
from softcfg.evaluation.fashion_classifier import FashionClassifier
from softcfg.zoo.registry import BUNDLED

FOLDER = BUNDLED / "fashion"
PARTS = {"model.yaml", "generator.safetensors", "tokenizer.safetensors"}


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_pretrained("fashion")


@pytest.fixture(scope="module")
def small() -> Pipeline:
    return Pipeline.from_pretrained("fashion-small")


def class_accuracy(pipe: Pipeline, count: int, guidance: CFG | None = None) -> float:
    """The share of `count` samples, classes in turn, that the shipped classifier puts into their own class."""
    classifier = FashionClassifier()
    classifier.load_state_dict(load_file(FOLDER / "classifier.safetensors"))
    labels = [index % 10 for index in range(count)]
    out = pipe(labels, guidance, batch_size=min(count, 100))
    pixels = torch.from_numpy(out.pixels).permute(0, 3, 1, 2).float() / 255
    return classifier.eval().accuracy(pixels, torch.tensor(labels))


def test_what_is_shipped_is_small() -> None:
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert set(sizes) == PARTS | {"classifier.safetensors"}
    assert sum(sizes.values()) <= 16 * 2**20
    sizes = {path.name: path.stat().st_size for path in (BUNDLED / "fashion-small").iterdir()}
    assert set(sizes) == PARTS
    assert sum(sizes.values()) <= 6 * 2**20


def test_the_model_is_made_of_the_usual_parts(pipe: Pipeline) -> None:
    assert pipe.generator.num_tokens == 256
    assert pipe.generator.num_classes == len(pipe.classes) == 10
    assert pipe.tokenizer.image_size == 32
    assert pipe.classes[7] == "Sneaker"


def test_the_small_model_has_fewer_tokens(pipe: Pipeline, small: Pipeline) -> None:
    assert small.generator.num_tokens == 64
    assert small.tokenizer.image_size == pipe.tokenizer.image_size
    assert small.classes == pipe.classes


def test_samples_are_in_their_class(pipe: Pipeline) -> None:
    assert class_accuracy(pipe, 20) >= 0.8


def test_speculative_jacobi_decoding_takes_few_passes(pipe: Pipeline) -> None:
    out = pipe([0, 7], speculative_jacobi=16)
    assert out.passes < pipe.generator.num_tokens / 2


def test_guidance_puts_samples_of_the_small_model_into_their_class(small: Pipeline) -> None:
    guided = class_accuracy(small, 200, CFG(guidance_scale=5.0))
    assert guided >= 0.84
    assert guided > class_accuracy(small, 200, CFG(guidance_scale=0))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_guidance_puts_samples_into_their_class(pipe: Pipeline) -> None:
    guided = class_accuracy(pipe, 1000)
    assert guided >= 0.9
    assert guided > class_accuracy(pipe, 300, CFG(guidance_scale=0))


def test_the_command_draws_with_it(tmp_path: Path) -> None:
    words = ["sample", "fashion-small", "--labels", "Sneaker,Bag", "--num-samples", "2"]
    assert main([*words, "--output-dir", str(tmp_path)]) == 0
    assert {"000000.png", "000001.png", "grid.png", "comparison.png"} <= {path.name for path in tmp_path.iterdir()}
