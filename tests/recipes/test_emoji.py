"""The training recipe of the bundled text-to-image model: pictures, captions, trainings."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from recipes.emoji import captions, data, train_generator, train_tokenizer
from recipes.emoji.data import Picture
from recipes.training import Budget
from softcfg.errors import UserError

NAMES = """\
# group: Food & Drink

# subgroup: food-fruit
1F34E                 ; fully-qualified     # 🍎 E0.6 red apple
1F44B 1F3FB           ; fully-qualified     # 👋🏻 E1.0 waving hand: light skin tone
1F3CC 200D 2640 FE0F  ; fully-qualified     # 🏌‍♀️ E4.0 woman golfing
263A                  ; unqualified         # ☺ E0.6 smiling face
1F1EB 1F1F7           ; fully-qualified     # 🇫🇷 E2.0 flag: France
"""


def square(name: str, colour: tuple[int, int, int], word: str, *, recoloured: bool = False) -> Picture:
    pixels = np.full((32, 32, 3), 255, np.uint8)
    pixels[8:24, 8:24] = colour
    return Picture(name, ("box",), word, recoloured, pixels)


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    base = [
        square("red square", (220, 20, 30), "red"),
        square("flag france", (40, 40, 200), "blue"),
        square("leaf", (30, 160, 40), "green"),
        square("night", (10, 10, 10), "black"),
    ]
    return [
        *base,
        *(square(f"{word} leaf", (90, 20, 30 * i), word, recoloured=True) for i, word in enumerate(data.HUES)),
    ]


def test_skin_tones_and_gender_signs_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "emoji-test.txt"
    path.write_text(NAMES, encoding="utf-8")
    assert list(data._emoji(path)) == [("🍎", "red apple", "Food & Drink"), ("🇫🇷", "flag france", "Food & Drink")]


@pytest.mark.parametrize(
    ("colour", "word"),
    [
        ((221, 46, 68), "red"), ((244, 144, 12), "orange"), ((253, 216, 53), "yellow"), ((120, 177, 89), "green"),
        ((85, 172, 238), "blue"), ((170, 142, 214), "purple"), ((244, 171, 186), "pink"), ((122, 70, 40), "brown"),
        ((20, 20, 22), "black"), ((150, 152, 150), "gray"), ((250, 250, 252), "white"),
    ],
)  # fmt: skip
def test_colours_have_their_words(colour: tuple[int, int, int], word: str) -> None:
    assert data.COLOURS[data.colour_of(np.array([colour], np.uint8))[0]] == word


def test_recolouring_moves_the_main_colour_alone() -> None:
    apple = square("red apple", (221, 46, 68), "red")
    apple.pixels[8:11, 8:24] = (90, 160, 60)  # its leaf
    content = (apple.pixels < 250).any(2)
    made = {picture.name: picture for picture in data._recoloured(apple, content)}
    assert set(made) == {f"{colour} apple" for colour in data.HUES if colour != "red"}
    for name, picture in made.items():
        assert picture.recoloured
        assert data.main_colour(picture.pixels, content) == picture.colour == name.split()[0]
        same = picture.pixels == apple.pixels
        assert same[:11].all()
        assert not same[12:24, 8:24].all(2).any()


@pytest.mark.skipif(not all(p.is_file() for p in (data.FONT, data.NAMES, data.KEYWORDS)), reason="needs the font")
@pytest.mark.slow
def test_pictures_of_the_font() -> None:
    found = {picture.name: picture for picture in data.load()}
    assert len(found) > 4000
    assert found["green apple"].colour == "green"
    assert found["red apple"].colour in ("red", "orange")  # it shades from one to the other
    assert "fruit" in found["red apple"].keywords
    assert found["blue apple"].recoloured
    held_out = [picture for picture in found.values() if picture.held_out]
    assert 0.05 < len(held_out) / sum(picture.recoloured for picture in found.values()) < 0.15
    assert all((picture.pixels[0, 0] > 200).all() for picture in held_out)


def test_missing_font_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no\.ttf does not exist: install the Debian packages fonts-noto"):
        data.load(tmp_path / "no.ttf")


def test_captions_keep_the_colour_of_recoloured_pictures(pictures: list[Picture]) -> None:
    numbers = random.Random(0)
    for picture in pictures:
        lines = {captions.caption(picture, numbers) for _ in range(200)}
        assert len(lines) > 5
        assert picture.name in lines
        if picture.recoloured:
            assert all(picture.colour in line.split() for line in lines)
    flags = {captions.caption(pictures[1], numbers) for _ in range(200)}
    assert {"flag of france", "france flag"} <= flags


def test_text_tokenizer_minds_neither_case_nor_punctuation(pictures: list[Picture]) -> None:
    text = captions.text_tokenizer(pictures)
    ids = text.encode("red square").ids
    assert len(ids) == 2
    assert text.encode("Réd-Square!").ids == ids
    assert text.encode("square red").ids == ids[::-1]
    assert max(text.get_vocab().values()) < captions.TEXT_TOKENS


def test_summary_is_zero_for_white_and_orthogonal() -> None:
    assert train_tokenizer.summary(torch.ones(1, 3, 8, 8)).abs().max() == 0
    impulses = 1 - torch.eye(48).view(48, 3, 4, 4)
    basis = train_tokenizer.summary(impulses).flatten(1).double()  # [48, 12]
    assert torch.allclose(basis.T @ basis, torch.eye(12).double() / 16, atol=1e-6)
    black = train_tokenizer.summary(torch.zeros(1, 3, 4, 4)).flatten()
    assert black[0] == pytest.approx(3**0.5)
    assert black[1:].abs().max() < 1e-6


def tiny_codec(out: Path, pictures: list[Picture], steps: int, stop_at: int | None = None) -> dict[str, torch.Tensor]:
    config = replace(train_tokenizer.CONFIG, ch_mult=(1, 1, 1), n_embed=4)
    weights = train_tokenizer.train(out, Budget(steps=steps), pictures, config=config, batch_size=4, stop_at=stop_at)
    return load_file(weights) if weights.exists() else {}


def test_killed_codec_training_continues_to_the_same_weights(tmp_path: Path, pictures: list[Picture]) -> None:
    whole = tiny_codec(tmp_path / "whole", pictures, 5)
    tiny_codec(tmp_path / "killed", pictures, 5, stop_at=3)
    killed = tiny_codec(tmp_path / "killed", pictures, 5)
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    assert whole["quantize.embedding.weight"].abs().sum() > 0


def examples(pictures: list[Picture]) -> train_generator.Examples:
    config = replace(
        train_generator.CONFIG, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_codes=16,
    )  # fmt: skip
    codes = torch.randint(16, (len(pictures), 64), generator=torch.Generator().manual_seed(0))
    return train_generator.Examples(pictures, codes, captions.text_tokenizer(pictures), config)


def test_batches_leave_prompts_out_and_pair_pictures(pictures: list[Picture]) -> None:
    made = examples(pictures)
    prompts, codes = made.batch(0, 0, 4)
    assert codes.shape == (4, 64)
    again, same = made.batch(0, 0, 4)
    assert [list(prompt.ids) for prompt in prompts] == [list(prompt.ids) for prompt in again]
    assert torch.equal(codes, same)
    lengths = [len(prompt.ids) for step in range(50) for prompt in made.batch(0, step, 4)[0]]
    assert 0.03 < lengths.count(0) / len(lengths) < 0.2
    wide, pairs = made.batch(0, 7, 4)
    assert (wide[0].width, wide[0].height, pairs.shape) == (64, 32, (2, 128))
    left, right = pairs[0].view(8, 2, 8).unbind(1)
    known = {tuple(row) for row in made.codes.tolist()}
    assert {tuple(left.flatten().tolist()), tuple(right.flatten().tolist())} <= known
    tall, pairs = made.batch(0, 15, 4)
    assert (tall[0].width, tall[0].height) == (32, 64)
    assert tuple(pairs[0, :64].tolist()) in known


def test_generator_learns_and_continues(tmp_path: Path, pictures: list[Picture]) -> None:
    made = examples(pictures)

    def train(out: Path, **more: int) -> Path:
        return train_generator.train_on_codes(out, Budget(steps=40), made, batch_size=6, **more)

    whole = load_file(train(tmp_path / "whole"))
    train(tmp_path / "killed", stop_at=20)
    killed = load_file(train(tmp_path / "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    config = made.config
    assert whole["lm_head.weight"].shape == (config.vocab_size, 32)
    assert whole["lm_head.weight"].dtype == torch.bfloat16
    model = train_generator.Lumina(config)
    model.load_state_dict(whole)
    # The whole model, under its token rules, agrees with the one that was trained.
    prompts = made.prompts(["red square", "night"], [False, False])
    condition = model.condition(prompts, guided=False)
    codes = made.codes[[0, 3]]
    tokens = torch.nn.functional.pad(codes.view(2, 8, 8) + config.first_code_id, (0, 1), value=config.new_line_id)
    logits = model.constrain(model(condition, tokens.flatten(1)), torch.arange(73), condition)
    at_codes = logits[:, model.is_code(torch.arange(73), condition)]
    loss = torch.nn.functional.cross_entropy(at_codes.flatten(0, 1), codes.flatten() + config.first_code_id)
    assert loss < 2.7  # 16 codes at random: 2.77
