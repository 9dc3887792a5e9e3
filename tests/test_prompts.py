"""Prompts: their sentences and tokens, and the pipeline that draws from them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from softcfg import CFG, CheckpointError, Pipeline, SoftCFG, UserError
from softcfg.models.lumina import TEXT_TO_IMAGE, LuminaPrompts, PromptReader, sentence
from softcfg.models.text import TextTokenizer
from softcfg.prompts import Prompt, as_prompts
from softcfg.zoo import resolve
from tiny_models import RELEASED_SPECIAL, text_tokenizer


@pytest.fixture(scope="module")
def pipe(prompt_model_folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(prompt_model_folder)


# ---- sentences


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (Prompt("a cat {x}"), "Generate an image of 768x512 according to the following prompt:\na cat {x}"),
        (
            Prompt("a cat", task="hed"),
            "Generate a dual-panel image of 768x512 where the <lower half> displays a <hed edge map>, while the "
            "<upper half> retains the original image for direct visual comparison:\na cat",
        ),
        (
            Prompt("a cat", task="openpose"),
            "Generate a dual-panel image of 768x512 where the <lower half> displays a <pose estimation map>, while the "
            "<upper half> retains the original image for direct visual comparison:\na cat",
        ),
        (
            Prompt("a cat", task="canny", image="x.png"),
            "Generate a dual-panel image of 768x512 where the <upper half> displays a <canny edge map>, while the "
            "<lower half> retains the original image for direct visual comparison:\na cat",
        ),
        (
            Prompt("a cat", task="subject", image="x.png"),
            "Generate a dual-panel image of 768x512 where the <upper half> displays a <Bubbly and effervescent with a "
            "sparkling allure.>, while the <lower half> retains the original image for direct visual comparison:\n"
            "a cat",
        ),
    ],
)
def test_sentences(prompt: Prompt, expected: str) -> None:
    assert sentence(prompt, 768, 512) == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": 3}, "must be a string"),
        ({"text": "x", "task": "sepia"}, "one of depth, canny, hed, openpose, got 'sepia'"),
        ({"text": "x", "task": "hed", "image": "x.png"}, "with an image must be one of depth, canny, subject"),
        ({"text": "x", "image": "x.png"}, "needs a task"),
        ({"text": "x", "negative_text": 3}, "negative text of a prompt must be a string"),
        ({"text": "x", "negative_text": "blurred"}, "words takes no negative prompt"),
    ],
)
def test_prompts_that_are_refused(pipe: Pipeline, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pipe(prompts=[Prompt(**fields)])


def test_lists_of_prompts() -> None:
    assert as_prompts("a cat") == [Prompt("a cat")]
    made = as_prompts(["a cat", Prompt("a dog", width=64, task="depth")], 512, 256)
    assert made == [Prompt("a cat", 512, 256), Prompt("a dog", 64, 256, "depth")]
    for wrong in ([], 3, None, ["a cat", 4]):
        with pytest.raises(UserError, match="prompts must be"):
            as_prompts(wrong)


# ---- tokens


def test_special_tokens_are_found_by_name(tmp_path: Path, prompt_model_folder: Path) -> None:
    path = tmp_path / "tokenizer.json"
    text_tokenizer(RELEASED_SPECIAL).save(str(path))
    assert PromptReader(path).special_ids() == {
        "image_end_id": 7, "image_start_id": 8, "prompt_start_id": 9, "separator_id": 10, "new_line_id": 11,
        "size_id": 11,
    }  # fmt: skip
    assert PromptReader(prompt_model_folder / "tokenizer.json").special_ids() == {}
    text_tokenizer([name for name in RELEASED_SPECIAL if name != "<reserved08807>"]).save(str(path))
    with pytest.raises(CheckpointError, match="do not follow one another"):
        PromptReader(path).special_ids()


def test_prompts_become_tokens(pipe: Pipeline, prompt_model_folder: Path) -> None:
    (short, long) = pipe.conditioning.inputs(as_prompts(["red apple", "a house and a star"]))
    assert (short.ids, long.ids) == ([7, 2, 4, 8], [7, 1, 0, 6, 1, 5, 8])
    files = {"tokenizer": prompt_model_folder / "tokenizer.json"}
    released = LuminaPrompts(pipe.generator, pipe.tokenizer, files=files)
    assert released.settings == {"template": TEXT_TO_IMAGE}
    (read,) = released.inputs([Prompt("red apple", 8, 16)])
    words_of_the_sentence = 11  # "Generate" to ":"; the tiny vocabulary knows none of them
    assert read.ids == [7, *[0] * words_of_the_sentence, 2, 4, 8]


@pytest.mark.parametrize("name", ["<eoss>", "<|im_end|>", "<reserved08799>"])
def test_the_name_of_a_special_token_in_a_prompt_is_text(tmp_path: Path, name: str) -> None:
    path = tmp_path / "tokenizer.json"
    text_tokenizer(RELEASED_SPECIAL).save(str(path))
    for template in (TEXT_TO_IMAGE, "{prompt}"):
        reader = PromptReader(path, template)
        special = reader.tokenizer.special_id(name)
        assert special not in reader.text_ids(Prompt(f"red {name} apple"), 8, 8)
        assert special not in reader.text_ids(Prompt(f"red {name} apple", task="depth"), 8, 8)
    assert PromptReader(path, f"a {name} {{prompt}}").text_ids(Prompt(f"red {name}"), 8, 8).count(special) == 1
    assert PromptReader(path, "{prompt}").text_ids(Prompt("red apple"), 8, 8) == [2, 4]


def test_the_dropout_of_a_text_tokenizer_is_for_trainings(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    vocab = {"a": 0, "b": 1, "ab": 2, "abab": 3}
    model = {"type": "BPE", "dropout": 0.5, "vocab": vocab, "merges": [["a", "b"], ["ab", "ab"]]}
    path.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    assert all(TextTokenizer(path).ids(["abab"]) == [3] for _ in range(20))


def test_damaged_text_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        PromptReader(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": 3}))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is damaged"):
        PromptReader(tmp_path / "tokenizer.json")


# ---- images


def test_output(pipe: Pipeline) -> None:
    out = pipe(prompts=["a red apple", "star"], width=12, height=4, seed=2)
    assert out.labels is None
    assert out.prompts == [Prompt("a red apple", 12, 4), Prompt("star", 12, 4)]
    lines, columns = 2, 6
    assert out.tokens.shape == (2, lines * (columns + 1) + 1)
    assert out.pixels.shape == (2, 4, 12, 3)
    assert [image.size for image in out.images] == [(12, 4)] * 2
    picture = out.tokens[:, :-1].view(2, lines, columns + 1)
    assert (picture[:, :, -1] == 11).all()
    assert (out.tokens[:, -1] == 10).all()
    codes = picture[:, :, :-1].flatten(1) - 20
    assert ((codes >= 0) & (codes < 20)).all()
    decoded = pipe.tokenizer.to_uint8(pipe.tokenizer.decode(codes, grid=(lines, columns))).numpy()
    assert np.array_equal(decoded, out.pixels)


def test_defaults_come_from_the_model(pipe: Pipeline) -> None:
    out = pipe(["apple"])
    assert out.prompts == [Prompt("apple", 8, 8)]
    explicit = pipe(prompts="apple", guidance=SoftCFG(3.0, schedule="constant"), temperature=0.9, top_k=15)
    assert torch.equal(out.tokens, explicit.tokens)
    assert not torch.equal(out.tokens, pipe(["apple"], CFG(3.0, schedule="constant"), top_k=2).tokens)
    assert not torch.equal(out.tokens, pipe(["green star"]).tokens)


def test_seed_and_index_fix_an_image(pipe: Pipeline) -> None:
    prompts = ["a red apple", "star", "a green star and a red apple"]
    out = pipe(prompts, seed=3)
    steps: list[int] = []
    again = pipe([prompts[2], prompts[0]], seed=3, indices=[2, 0], batch_size=1, on_step=steps.append)
    assert torch.equal(again.tokens, out.tokens[[2, 0]])
    assert steps == list(range(1, 2 * 21 + 1))


def test_an_image_below_its_upper_half(pipe: Pipeline, prompt_model_folder: Path, tmp_path: Path) -> None:
    files = {"tokenizer": prompt_model_folder / "tokenizer.json"}
    released = LuminaPrompts(pipe.generator, pipe.tokenizer, files=files)
    tasks = Pipeline(pipe.generator, pipe.tokenizer, conditioning=released)
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (20, 40, 3), dtype=np.uint8))
    image.save(tmp_path / "x.png")
    prompt = Prompt("a red apple", 8, 16, task="depth", image=tmp_path / "x.png")
    out = tasks(prompts=[prompt, dataclasses.replace(prompt, image=image)])
    assert out.tokens.shape == (2, 4 * 5 + 1)
    assert out.pixels.shape == (2, 16, 8, 3)
    # The middle of the image, as wide as the upper half is in proportion, made as large as it.
    upper = image.crop((10, 0, 30, 20)).resize((8, 8), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(upper)).permute(2, 0, 1)[None].float() / 255
    codes = pipe.tokenizer.encode(pixels).expand(2, -1)
    drawn = out.tokens[:, :-1].view(2, 4, 5)[:, :, :-1].flatten(1) - 20
    whole = pipe.tokenizer.decode(torch.cat((codes, drawn), dim=1), grid=(8, 4))
    assert np.array_equal(pipe.tokenizer.to_uint8(whole).numpy(), out.pixels)
    with pytest.raises(UserError, match="cannot be read"):
        tasks(prompts=[dataclasses.replace(prompt, image=tmp_path / "gone.png")])
    with pytest.raises(UserError, match="as many lines"):
        tasks(prompts=[prompt, Prompt("a red apple", 8, 16)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": [3]}, "words draws from prompts: give texts, it has no classes"),
        ({"labels": [3], "prompts": ["x"]}, "words draws from prompts"),
        ({}, "prompts must be a list of at least one text"),
        ({"prompts": []}, "prompts must be"),
        ({"prompts": ["x"], "width": 7}, "width must be a multiple of 4, got 7"),
        ({"prompts": ["x", Prompt("y", width=4)]}, "one size"),
        ({"prompts": [Prompt("y", task="depth")]}, "it has no task depth"),
        ({"prompts": ["a " * 150]}, "positions"),
        ({"prompts": ["x"], "indices": [0, 1]}, "as many as prompts, 1, got 2"),
    ],
)
def test_bad_arguments(pipe: Pipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pipe(**arguments)


def test_prompts_are_not_for_models_of_classes(model_folder: Path, pipe: Pipeline) -> None:
    classes = Pipeline.from_pretrained(model_folder)
    with pytest.raises(UserError, match="tiny draws classes: give labels"):
        classes(prompts=["x"])
    for labels in (["x"], "x"):
        with pytest.raises(UserError, match="'x' is no class, and tiny does not read prompts"):
            classes(labels)
    with pytest.raises(UserError, match="without width and height"):
        classes([0], width=16)
    with pytest.raises(UserError, match="20 codes, 2 pixels wide"):
        Pipeline(pipe.generator, classes.tokenizer)
    with pytest.raises(UserError, match="no text tokenizer"):
        Pipeline(pipe.generator, pipe.tokenizer)(prompts=["x"])


def test_model_folders_say_how_prompts_are_read(prompt_model_folder: Path) -> None:
    text = resolve(prompt_model_folder).text
    assert text is not None
    file = text.files["tokenizer"]
    assert (file.name, file.folder, text.settings) == ("tokenizer.json", prompt_model_folder, {"template": "{prompt}"})
