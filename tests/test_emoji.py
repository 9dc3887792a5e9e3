"""The bundled text-to-image model: what is shipped, and that it draws what it is asked for."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from softcfg import CFG, Pipeline
from softcfg.prompts import Prompt
from softcfg.zoo.registry import BUNDLED

FOLDER = BUNDLED / "emoji"
GOLDEN = Path(__file__).parent / "golden" / "emoji"


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_pretrained("emoji")


def test_what_is_shipped_is_small() -> None:
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    weights = {"generator.safetensors", "tokenizer.safetensors", "tokenizer.json"}
    assert set(sizes) == {"model.yaml", "NOTICE.txt", *weights}
    assert sum(sizes.values()) <= 16 * 2**20
    notice = (FOLDER / "NOTICE.txt").read_text()
    assert "SIL OPEN FONT LICENSE Version 1.1" in notice
    assert "Copyright 2013-2022 Google Inc." in notice


def test_the_model_is_made_of_the_large_ones_parts(pipe: Pipeline) -> None:
    assert type(pipe.generator).__name__ == "Lumina"
    assert type(pipe.tokenizer).__name__ == "MoVQ"
    out = pipe(prompts=["red apple", "a cat and a dog"])  # prompts of different length
    assert out.pixels.shape == (2, 32, 32, 3)
    assert out.codes.shape == (2, 64)
    assert out.tokens.shape == (2, 73)
    assert pipe(prompts=["dog and cat"], width=64, height=32).pixels.shape == (1, 32, 64, 3)


def test_text_tokens_get_no_probability(pipe: Pipeline) -> None:
    config = pipe.generator.config
    requests = pipe.conditioning.requests(prompts=["red apple"])
    condition = pipe.generator.condition(pipe.conditioning.inputs(requests), guided=True)
    with torch.no_grad():
        probabilities = pipe.generator(condition, torch.zeros(2, 0, dtype=torch.int64)).softmax(-1)
    codes = slice(config.first_code_id, config.first_code_id + config.num_codes)
    assert (probabilities[..., codes].sum(-1) > 0.999).all()


def test_its_special_token_in_a_prompt_is_text_and_ordinary_prompts_have_their_tokens(pipe: Pipeline) -> None:
    from tokenizers import Tokenizer

    reader = pipe.conditioning.reader  # type: ignore[attr-defined]
    released = Tokenizer.from_file(str(reader.path))
    for name in ("red apple", "man: medium skin tone", "Côte d’Ivoire", "a", "", "flag  [] <x>"):
        assert reader.text_ids(Prompt(name), 32, 32) == released.encode(name, add_special_tokens=False).ids
    assert reader.text_ids(Prompt("red <unknown> apple"), 32, 32) == reader.text_ids(
        Prompt("red unknown apple"), 32, 32
    )


def right(pipe: Pipeline, count: int, guidance: CFG | None = None) -> tuple[float, float]:
    """The share of `count` pictures nearest to the emoji asked for, and of those that have it among the nearest 5."""
    names = json.loads((GOLDEN / "names.json").read_text())["names"]
    pictures = load_file(GOLDEN / "pictures.safetensors")["pictures"]  # uint8 [N, 16, 16, 3]
    drawn = torch.from_numpy(pipe(prompts=names[:count], guidance=guidance, batch_size=50).pixels).permute(0, 3, 1, 2)
    small = torch.nn.functional.avg_pool2d(drawn.float(), 2).permute(0, 2, 3, 1).flatten(1)
    distance = torch.cdist(small, pictures.float().flatten(1))
    rank = (distance < distance.diagonal()[:, None]).sum(1)
    return float((rank == 0).float().mean()), float((rank < 5).float().mean())


def test_colours_are_those_of_the_prompt(pipe: Pipeline) -> None:
    colours = {"red": 0, "green": 1, "blue": 2}
    prompts = [f"{colour} {thing}" for thing in ("apple", "balloon", "car", "shirt") for colour in colours]
    pixels = pipe(prompts=prompts).pixels.astype(int)
    found = []
    for picture in pixels:
        coloured = picture[(picture.max(-1) - picture.min(-1)) > 60]
        found.append(np.bincount(coloured.argmax(-1), minlength=3).argmax() if len(coloured) else -1)
    wanted = [colours[prompt.split()[0]] for prompt in prompts]
    assert np.mean(np.array(found) == wanted) >= 0.75


@pytest.mark.slow
def test_pictures_are_those_of_their_names(pipe: Pipeline) -> None:
    first, five = right(pipe, 200)
    assert first >= 0.55
    assert five >= 0.62


def test_the_command_draws_with_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "softcfg", "sample", "emoji", "--prompt", "red apple", "--images-per-prompt", "2"]
    subprocess.run([*command, "--output-dir", str(tmp_path)], check=True, capture_output=True)
    assert Image.open(tmp_path / "000001.png").size == (32, 32)
