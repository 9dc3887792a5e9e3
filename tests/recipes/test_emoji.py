"""The training recipe of the text-to-image model of nine styles: pictures, captions, trainings, judge."""

from __future__ import annotations

import io
import json
import random
import tarfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from recipes.emoji import (
    captions,
    colours,
    data,
    evaluate,
    sources,
    train,
    train_generator,
    train_judge,
    train_tokenizer,
)
from recipes.emoji.augment import WEAKLY, Moves, moved
from recipes.emoji.data import Collection, Gallery, Picture
from recipes.emoji.sources import STYLES, Drawings, Emoji, Package
from recipes.training import Budget, randomness
from softcfg.errors import UserError
from softcfg.evaluation import load_extractor
from softcfg.evaluation.emoji_judge import UNKNOWN, Vocabulary, agreement, load_judge

LEAF = 40  # where its picture ends
SQUARE = '<path fill="#dd2e44" d="M2 2h12v12H2z"/>'


def square(colour: tuple[int, int, int], bottom: int = 72) -> np.ndarray:
    pixels = np.full((data.SIZE, data.SIZE, 3), 255, np.uint8)
    pixels[24:bottom, 24:72] = colour
    return pixels


@pytest.fixture(scope="module")
def collection() -> Collection:
    """Three names in all styles, one of them recoloured."""
    shown = {"red square": ((220, 20, 30), "red"), "night": ((10, 10, 10), "black"), "leaf": ((30, 160, 40), "green")}
    pictures, pixels = [], []
    for subject, (name, (colour, word)) in enumerate(shown.items()):
        for style in STYLES:
            why = "style" if (name, style.word) == ("leaf", "ink") else ""
            pictures.append(Picture(name, ("box",), style.word, word, False, why, subject))
            pixels.append(square(colour, LEAF if name == "leaf" else 72))
    for word in colours.HUES:
        why = "colour" if word == "blue" else ""
        pictures.append(Picture("leaf", (), "flat", word, True, why, 2))
        pixels.append(colours.turn_hue(square((30, 160, 40), LEAF), np.ones((96, 96), bool), "green", word))
    return Collection(pictures, np.stack(pixels), list(shown))


# ---- packages


def package(path: Path, files: dict[str, object]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            encoded = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(encoded)
            archive.addfile(member, io.BytesIO(encoded))
    return path


def test_damaged_archive_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "x-y-1.0.tgz").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"x-y-1\.0\.tgz is damaged .* delete it and start again"):
        Package("@x/y", "1.0", "0" * 64).fetch(tmp_path)


def test_missing_npm_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="npm was not found"):
        Package("@x/y", "1.0", "0" * 64).fetch(tmp_path)


@pytest.mark.parametrize(
    ("known", "name"),
    [
        ({"codes": {"1f34e": "apfel"}, "icons": ("apfel",)}, "apfel"),
        ({"icons": ("red-apple",)}, "red-apple"),
        ({"icons": ("redapple",)}, "redapple"),
        ({"icons": ("red-apple-1", "red-apple-2")}, "red-apple-1"),
        ({"icons": ("pomme",), "aliases": {"red-apple": {"parent": "pomme"}}}, "pomme"),
        ({"icons": ("green-apple",)}, None),
    ],
)
def test_pictures_are_found_by_code_or_name(tmp_path: Path, known: dict, name: str | None) -> None:
    icons = {"icons": {icon: {"body": f"<!--{icon}-->"} for icon in known["icons"]}, "width": 24, "height": 16}
    files = {"icons.json": {**icons, "aliases": known.get("aliases", {})}}
    if "codes" in known:
        files["chars.json"] = known["codes"]
    apple = Emoji("1f34e", "red apple", (), "food-drink", "food-fruit", ("redapple",))
    [svg] = sources.find(apple, [Drawings(package(tmp_path / "set.tgz", files))])
    assert svg is None if name is None else f"<!--{name}-->" in svg and 'viewBox="0 0 24 16"' in svg


def test_names_and_keywords_of_unicode(tmp_path: Path) -> None:
    rows = [
        {
            "label": "flag: Japan",
            "hexcode": "1F1EF-1F1F5",
            "tags": ["JP", "flag"],
            "order": 2,
            "group": 1,
            "subgroup": 5,
        },
        {
            "label": "cat face",
            "hexcode": "1F431-FE0F",
            "tags": ["cat", "cat face"],
            "order": 1,
            "group": 0,
            "subgroup": 4,
        },
        {"label": "regional indicator", "hexcode": "1F1E6", "order": 3},
    ]
    messages = {
        "groups": [{"order": 0, "key": "animals-nature"}, {"order": 1, "key": "flags"}],
        "subgroups": [{"order": 4, "key": "animal-mammal"}, {"order": 5, "key": "country-flag"}],
    }
    files = {"en/data.json": rows, "en/messages.json": messages, "en/shortcodes/iamcal.json": {"1F431-FE0F": "kitty"}}
    cat, flag = sources.emoji(package(tmp_path / "names.tgz", files))
    assert (cat.code, cat.name, cat.keywords, cat.slugs) == ("1f431", "cat face", ("cat",), ("catface", "kitty"))
    assert (flag.name, flag.group, flag.subgroup) == ("flag of japan", "flags", "country-flag")
    assert {"japan", "flagforjapan"} <= set(flag.slugs)
    assert list(data.wanted([cat, flag, replace(flag, name="flag of nowhere")])) == [cat, flag]


@pytest.mark.parametrize(
    ("name", "group", "subgroup", "code", "kept"),
    [
        ("rocket", "travel-places", "transport-air", "1f680", True),
        ("three oclock", "travel-places", "time", "1f552", False),
        ("man cook", "people-body", "person-role", "1f468-200d-1f373", False),
        ("woman dancing", "people-body", "person-activity", "1f483", False),
        ("man", "people-body", "person", "1f468", True),
        ("left arrow", "symbols", "arrow", "2b05", False),
        ("red circle", "symbols", "geometric", "1f534", True),
        ("polar bear", "animals-nature", "animal-mammal", "1f43b-200d-2744", True),
    ],
)
def test_what_looks_alike_is_left_out(name: str, group: str, subgroup: str, code: str, kept: bool) -> None:
    assert bool(list(data.wanted([Emoji(code, name, (), group, subgroup, ())]))) == kept


def test_rendering(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    pixels, content = data.render(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 8">{SQUARE}</svg>', 32)
    assert (pixels.shape, content.shape) == ((32, 32, 3), (32, 32))
    assert (pixels[~content] > 120).all()
    assert tuple(pixels[16, 16]) == (221, 46, 68)
    assert (pixels[0] == 255).all()


# ---- colours


@pytest.mark.parametrize(
    ("colour", "word"),
    [
        ((221, 46, 68), "red"), ((244, 144, 12), "orange"), ((253, 216, 53), "yellow"), ((120, 177, 89), "green"),
        ((85, 172, 238), "blue"), ((170, 142, 214), "purple"), ((244, 171, 186), "pink"), ((122, 70, 40), "brown"),
        ((20, 20, 22), "black"), ((150, 152, 150), "gray"), ((250, 250, 252), "white"),
    ],
)  # fmt: skip
def test_colours_have_their_words(colour: tuple[int, int, int], word: str) -> None:
    assert colours.COLOURS[colours.colour_of(np.array([colour], np.uint8))[0]] == word


@pytest.mark.parametrize("wanted", [word for word in colours.HUES if word != "red"])
def test_recolouring_moves_the_main_colour_alone(wanted: str) -> None:
    apple = square((221, 46, 68))
    apple[24:28, 24:72] = (90, 160, 60)  # its leaf
    content = (apple < 250).any(2)
    turned = colours.turn_hue(apple, content, "red", wanted)
    assert colours.main_colour(turned, content) == wanted
    same = (turned == apple).all(2)
    assert same[:28].all()
    assert not same[28:72, 24:72].any()


# ---- what is held out


def unlike(number: np.ndarray) -> np.ndarray:
    """Pictures of 16 x 16 pixels, a different one for each number."""
    return np.random.default_rng(0).integers(256, size=(number.max() + 1, 16, 16, 3), dtype=np.uint8)[number]


def test_every_name_and_style_is_seen_and_no_held_out_pair_is() -> None:
    found = [Emoji(str(i), f"thing {i}", (), "objects", "tool", ()) for i in range(200)]
    number, style = (part.flatten() for part in np.meshgrid(np.arange(200), np.arange(9), indexing="ij"))
    drawn, again = np.zeros(1800, bool), np.ones(1800, bool)
    gallery = Gallery(
        found,
        np.concatenate([number, number]),
        np.concatenate([style, style]),
        np.full(3600, colours.COLOURS.index("blue")),
        np.concatenate([drawn, again]),
        unlike(np.concatenate([number, number])),
    )
    made = data.assemble(gallery)
    seen = [made.pictures[i] for i in made.where()]
    pairs = {(p.name, p.style) for p in seen}
    kept = {(p.name, p.style) for p in made.pictures if p.held_out == "style"}
    assert 0.07 < len(kept) / 1800 < 0.13
    assert not pairs & kept
    assert {p.name for p in seen} == set(made.names)
    assert {p.style for p in seen} == {style.word for style in STYLES}
    compositions = {(p.colour, p.name) for p in made.pictures if p.held_out == "colour"}
    assert 0.03 < len(compositions) / 200 < 0.2
    assert not compositions & {(p.colour, p.name) for p in seen if p.recoloured}
    assert data.assemble(Gallery(found, number, style, style, drawn, unlike(number)), names=10).names[-1] == "thing 180"


def test_names_that_few_have_drawn_are_left_out() -> None:
    found = [Emoji(str(i), f"thing {i}", (), group, "", ()) for i, group in enumerate(("objects", "objects", "flags"))]
    number, style = np.array([0] * 9 + [1] * 7 + [2] * 5), np.concatenate([np.arange(n) for n in (9, 7, 5)])
    made = data.assemble(Gallery(found, number, style, style, np.zeros(21, bool), unlike(number)))
    assert made.names == ["thing 0", "thing 2"]


def test_others_are_no_name_of_the_collection() -> None:
    names = ("red apple", "hammer", "green apple", "saw", "ewe", "drill", "wrench")  # an ewe is a sheep
    found = [Emoji(str(i), name, (), "objects", "tool", ()) for i, name in enumerate(names)]
    counts = (9, 9, 7, 2, 7, 1, 3)
    number, style = np.repeat(np.arange(7), counts), np.concatenate([np.arange(n) for n in counts])
    gallery = Gallery(found, number, style, style % 8, np.zeros(len(number), bool), unlike(number))
    made = data.assemble(gallery)
    assert made.names == ["red apple", "hammer"]
    others = data.others(gallery, made)
    assert others.names == ["saw", "wrench"]
    assert not any(picture.held_out for picture in others.pictures)
    both = data.joined(made, others)
    assert {both.names[picture.subject] for picture in both.pictures} == {*made.names, *others.names}
    assert all(both.names[picture.subject] == picture.name for picture in both.pictures)
    assert np.array_equal(both.pixels, np.concatenate([made.pixels, others.pixels]))


def test_names_that_are_alike_are_left_out() -> None:
    names = ("neutral face", "expressionless face", "red apple", "green apple", "anchor", "old key", "key")
    found = [Emoji(str(i), name, (), "objects", "tool", ()) for i, name in enumerate(names)]
    number, style = np.repeat(np.arange(7), 9), np.tile(np.arange(9), 7)
    pixels = unlike(number)
    pixels[number == 1] = pixels[number == 0]
    pixels[(number == 4) & (style < 2)] = pixels[(number == 2) & (style < 2)]  # in two styles alone
    made = data.assemble(Gallery(found, number, style, style, np.zeros(63, bool), pixels))
    assert made.names == ["neutral face", "red apple", "anchor", "key"]


# ---- captions


def test_captions_say_the_colour_of_recoloured_pictures_and_mostly_the_style(collection: Collection) -> None:
    numbers = random.Random(0)
    for picture in collection.pictures:
        lines = [captions.caption(picture, numbers) for _ in range(300)]
        assert picture.caption in lines
        assert 0.8 < sum(line.endswith(f", {picture.style} style") for line in lines) / 300 < 0.97
        if picture.recoloured:
            assert all(picture.colour in line.split(",")[0].split() for line in lines)


def test_text_tokenizer_minds_neither_case_nor_punctuation(collection: Collection) -> None:
    text = captions.text_tokenizer(collection.pictures)
    ids = text.encode("red square, flat style").ids
    assert len(ids) == 4
    assert text.encode("Réd-Square: FLAT style!").ids == ids
    assert max(text.get_vocab().values()) < captions.TEXT_TOKENS


# ---- trainings


def test_summary_is_zero_for_white_and_orthogonal() -> None:
    assert train_tokenizer.summary(torch.ones(1, 3, 16, 16)).abs().max() == 0
    impulses = 1 - torch.eye(192).view(192, 3, 8, 8)
    basis = train_tokenizer.summary(impulses).flatten(1).double()  # [192, 27]
    assert torch.allclose(basis.T @ basis, torch.eye(27).double() / 64, atol=1e-6)


def tiny_codec(out: Path, collection: Collection, steps: int, stop_at: int | None = None) -> dict[str, torch.Tensor]:
    config = replace(train_tokenizer.CONFIG, ch_mult=(1, 1, 1, 1), n_embed=4)
    weights = train_tokenizer.train(out, Budget(steps=steps), collection, config=config, batch_size=2, stop_at=stop_at)
    return load_file(weights) if weights.exists() else {}


def test_killed_codec_training_continues_to_the_same_weights(tmp_path: Path, collection: Collection) -> None:
    whole = tiny_codec(tmp_path / "whole", collection, 2)
    tiny_codec(tmp_path / "killed", collection, 2, stop_at=1)
    killed = tiny_codec(tmp_path / "killed", collection, 2)
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    codes = whole["quantize.embedding.weight"]
    assert codes[0].abs().max() == 0
    assert torch.equal(codes, load_file(tmp_path / "whole" / "codebook.safetensors")["codes"])


@pytest.fixture(scope="module")
def examples(collection: Collection) -> train_generator.Examples:
    config = replace(
        train_generator.CONFIG, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_codes=16,
    )  # fmt: skip
    model = train_tokenizer.MoVQ(replace(train_tokenizer.CONFIG, n_embed=16))
    numbers = randomness(0, 0)
    pixels = moved(train_tokenizer.pixels_of(collection, range(len(collection))), Moves(20, 0.3, 0.2), numbers)
    patches = train_tokenizer.summary(pixels).flatten(2).transpose(1, 2).flatten(0, 1).unique(dim=0)
    model.quantize.embedding.weight.data.copy_(patches[torch.randperm(len(patches), generator=numbers)[:16]])
    return train_generator.Examples(collection, captions.text_tokenizer(collection.pictures), model, config)


def test_batches_hold_no_held_out_picture_and_leave_prompts_out(examples: train_generator.Examples) -> None:
    assert [examples.pictures[i].held_out for i in examples.held_out["style"]] == ["style"]
    assert [examples.pictures[i].colour for i in examples.held_out["colour"]] == ["blue"]
    prompts_of_steps = train_generator.Steps(examples, 0, 8).iterate(0, 0)
    lengths, seen, still = [], set(), 0
    for _ in range(120):
        prompts, chosen, moves = next(prompts_of_steps)
        lengths += [len(prompt.ids) for prompt in prompts]
        seen |= set(chosen)
        still += moves.count(False)
    assert seen == {i for i, picture in enumerate(examples.pictures) if not picture.held_out}
    assert 0.05 < lengths.count(0) / len(lengths) < 0.15
    assert 0.2 < still / 960 < 0.4
    again, *same = next(train_generator.Steps(examples, 0, 8).iterate(119, 0))
    assert [list(prompt.ids) for prompt in prompts] == [list(prompt.ids) for prompt in again]
    assert same == [chosen, moves]


def test_pictures_move_but_those_that_are_to_stay(examples: train_generator.Examples) -> None:
    drawn = examples.codes([0, 1, 2, 20])
    found = examples.codes([0, 1, 2, 20], [True, False, True, False], randomness(0, 0))
    assert (found == drawn).all(1).tolist() == [False, True, False, True]


def test_generator_learns_and_continues(tmp_path: Path, examples: train_generator.Examples) -> None:
    def train(out: Path, **more: int) -> Path:
        return train_generator.train_on_codes(out, Budget(steps=60), examples, batch_size=6, **more)

    whole = load_file(train(tmp_path / "whole"))
    train(tmp_path / "killed", stop_at=30)
    killed = load_file(train(tmp_path / "killed"))
    head, continued = whole.pop("lm_head.weight"), killed.pop("lm_head.weight")
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    rows = slice(examples.config.first_code_id, examples.config.first_code_id + examples.config.num_codes)
    assert torch.equal(head[rows], continued[rows])
    torch.testing.assert_close(head, continued, rtol=0, atol=0.05)  # the other rows are solved for
    whole["lm_head.weight"] = head
    config = examples.config
    assert whole["lm_head.weight"].shape == (config.vocab_size, 32)
    assert whole["lm_head.weight"].dtype == torch.bfloat16
    model = train_generator.Lumina(config)
    model.load_state_dict(whole)
    # The whole model, under its token rules and without the padding, agrees with the one that was trained.
    prompts = examples.prompts(["red square, flat style", "night, ink style"], [False, False])
    condition = model.condition(prompts, guided=False)
    codes = examples.codes([2, 14])
    tokens = torch.nn.functional.pad(codes.view(2, 12, 12) + config.first_code_id, (0, 1), value=config.new_line_id)
    logits = model.constrain(model(condition, tokens.flatten(1)), torch.arange(157), condition)
    at_codes = logits[:, model.is_code(torch.arange(157), condition)]
    loss = torch.nn.functional.cross_entropy(at_codes.flatten(0, 1), codes.flatten() + config.first_code_id)
    assert loss < 2.768  # 16 codes at random: 2.773


@pytest.fixture(scope="module")
def sun() -> Collection:
    """A further name, which two artists drew."""
    shown = [Picture("sun", (), style.word, "yellow", False, "", 0) for style in STYLES[:2]]
    return Collection(shown, np.stack([square((250, 210, 40), 30)] * 2), ["sun"])


def test_moves_are_weak_for_some_and_as_exact_in_half_precision() -> None:
    pixels, far = torch.rand(8, 3, 32, 32), {"shift": 0.1, "shear": 0.18, "aspect": 0.15, "warp": 0.12, "turn": 20}
    weakly = {name: WEAKLY * bound for name, bound in far.items()}
    found = moved(pixels, Moves(**far, weak=1), randomness(0, 0))
    torch.testing.assert_close(found, moved(pixels, Moves(**weakly), randomness(0, 0)), rtol=0, atol=1e-4)
    some = moved(pixels, Moves(**far, weak=0.5), randomness(0, 0))
    strongly = moved(pixels, Moves(**far), randomness(0, 0))
    assert {(one == weak).all().item() for one, weak in zip(some, found, strict=True)} == {True, False}
    assert all((one == weak).all() or (one == far).all() for one, weak, far in zip(some, found, strongly, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(moved(pixels, Moves(**far), randomness(0, 0)), strongly, rtol=0, atol=1e-4)


def test_batches_are_groups_of_a_name_in_different_styles(collection: Collection, sun: Collection) -> None:
    learnt = data.joined(collection, sun)
    seen: set[int] = set()
    for step in range(100):
        chosen = train_judge.Groups(learnt, 3).batch(0, step, 14, 4)
        assert chosen == train_judge.Groups(learnt, 3).batch(0, step, 14, 4)
        names = []
        for k in range(0, 12, 4):
            group = [learnt.pictures[i] for i in chosen[k : k + 4]]
            names.append(group[0].name)
            assert {picture.name for picture in group} == {names[-1]}
            assert len({picture.style for picture in group}) == (2 if names[-1] == "sun" else 4)
        assert names[2] == "sun"
        assert len({*names}) == 3
        seen |= {*chosen}
    assert seen == {*learnt.where()}  # nothing that is held out
    batches = [train_judge.Groups(learnt, 3).batch(*given, 12, 4) for given in ((0, 0), (0, 1), (1, 0))]
    assert len({tuple(batch) for batch in batches}) == 3
    assert len(train_judge.Groups(collection, 3).batch(0, 0, 64, 4)) == 64  # more than there are names
    alone = train_judge.Groups(learnt, 3).batch(0, 0, 4, 1)
    assert len({learnt.pictures[i].name for i in alone}) == 4


def test_contrast_is_that_of_its_formula() -> None:
    numbers = randomness(0, 0)
    vectors = torch.randn(12, 5, generator=numbers)
    names, styles = (
        torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 3]),
        torch.tensor([0, 1, 2, 2, 0, 1, 0, 3, 4, 4, 5, 6]),
    )
    units = [row / np.linalg.norm(row) for row in vectors.double().numpy()]
    losses = []
    for i in range(12):
        near = {j: np.exp(units[i] @ units[j] / train_judge.TEMPERATURE) for j in range(12)}
        alike = [j for j in range(12) if names[j] == names[i] and styles[j] != styles[i]]
        apart = [j for j in range(12) if names[j] != names[i]]
        total = sum(near[j] for j in alike + apart)
        if alike:  # both pictures of name 2 are of one style
            losses.append(-np.mean([np.log(near[j] / total) for j in alike]))
    assert len(losses) == 10
    assert train_judge.contrast(vectors, names, styles).item() == pytest.approx(np.mean(losses), rel=1e-5)
    alone = vectors[:4].requires_grad_()
    train_judge.contrast(alone, names[:1].expand(4), styles[:1].expand(4)).backward()  # nothing to compare with
    assert alone.grad is not None
    assert alone.grad.abs().max() == 0


def test_mixing_styles_keeps_what_is_where() -> None:
    maps, share = torch.rand(4, 6, 5, 7).double() + 0.1, torch.tensor([1.0, 0.7, 0.0, 0.4])
    partner = torch.tensor([3, 2, 1, 0])
    found = train_judge.mixed(maps, share, partner).double()

    def statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.mean((2, 3), keepdim=True), x.std((2, 3), keepdim=True)

    (mean, deviation), (mean_found, deviation_found) = statistics(maps), statistics(found)
    torch.testing.assert_close(found[0], maps[0], rtol=0, atol=1e-5)
    torch.testing.assert_close((found - mean_found) / deviation_found, (maps - mean) / deviation, rtol=0, atol=1e-4)
    rest = share.view(4, 1, 1, 1)
    torch.testing.assert_close(mean_found, rest * mean + (1 - rest) * mean[partner], rtol=0, atol=1e-4)
    torch.testing.assert_close(deviation_found, rest * deviation + (1 - rest) * deviation[partner], rtol=0, atol=1e-4)


def test_mixing_styles_leaves_what_the_style_is_told_from(collection: Collection) -> None:
    judge = train_judge.judge_of(collection).eval()
    pixels = train_tokenizer.pixels_of(collection, [0, 9, 18])
    before = judge.describe(pixels)[1]
    with train_judge.mixing(judge, torch.tensor([1.0, 0.2, 0.2]), torch.tensor([1, 2, 0])):
        mixed = judge.describe(pixels)[1]
    assert torch.equal(mixed[1], before[1])
    for head in (0, 2):
        torch.testing.assert_close(mixed[head][0], before[head][0])
        assert all((mixed[head][i] - before[head][i]).abs().max() > 1e-4 for i in (1, 2))
    assert all(torch.equal(again, head) for again, head in zip(judge.describe(pixels)[1], before, strict=True))


@pytest.mark.slow
def test_killed_judge_training_continues_to_the_same_weights(
    tmp_path: Path, collection: Collection, sun: Collection
) -> None:
    def training(out: Path, **more: int) -> dict[str, torch.Tensor]:
        weights = train_judge.train(out, Budget(steps=2), collection, others=sun, batch_size=8, **more)
        return load_file(weights) if weights.exists() else {}

    whole = training(tmp_path / "whole")
    assert not training(tmp_path / "killed", stop_at=1)
    killed = training(tmp_path / "killed")
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    assert {name: tensor.dtype for name, tensor in whole.items()}["heads.0.weight"] == torch.float16

    extractor = load_extractor("emoji", tmp_path / "whole" / "judge.safetensors")
    described = extractor.describe(torch.from_numpy(collection.pixels[:2]).permute(0, 3, 1, 2))
    assert (described.pooled.shape, described.logits.shape) == ((2, 320), (2, 3))
    with pytest.raises(UserError, match="takes images of 96 x 96 pixels, these have 32 x 32"):
        extractor.describe(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


@pytest.mark.slow
@pytest.mark.parametrize("with_others", [False, True])
def test_judge_learns_and_reads_prompts(
    tmp_path: Path, collection: Collection, sun: Collection, with_others: bool
) -> None:
    others = sun if with_others else None
    train_judge.train(tmp_path, Budget(steps=40), collection, others=others, batch_size=12)
    judge, words, _ = load_judge(tmp_path / "judge.safetensors")
    chosen = collection.where()
    asked = words.read([collection.pictures[i].caption for i in chosen])
    labels = torch.tensor([train_judge.wanted(collection.pictures[i]) for i in chosen])
    assert torch.equal(asked[:, :2], labels[:, :2])
    found = agreement(judge, train_tokenizer.pixels_of(collection, chosen), asked)
    assert found["name"] > 0.9


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("red apple", (0, UNKNOWN, 0)),
        ("Blue Apple, flat style", (0, 1, 1)),
        ("cat face, ink style", (1, 0, UNKNOWN)),
        ("blue cat face", (1, UNKNOWN, 1)),
        ("blue heart", (2, UNKNOWN, 1)),
    ],
)
def test_prompts_say_name_style_and_colour(prompt: str, wanted: tuple[int, int, int]) -> None:
    words = Vocabulary(("red apple", "cat face", "blue heart"), ("ink", "flat"), ("red", "blue"))
    assert tuple(words.read([prompt])[0].tolist()) == wanted


def test_unknown_prompt_is_one_sentence() -> None:
    with pytest.raises(UserError, match="does not know what 'blue moon' shows"):
        Vocabulary(("red apple",), ("ink",), ("red", "blue")).read(["blue moon"])


def test_agreement_counts_what_prompts_say() -> None:
    class Fixed(torch.nn.Module):
        def forward(self, pixels: torch.Tensor, views: object) -> tuple[torch.Tensor, list[torch.Tensor]]:
            heads = (torch.eye(3)[[0, 1]], torch.eye(2)[[1, 1]], torch.eye(2)[[0, 0]])
            return torch.zeros(len(pixels), 1), [part[: len(pixels)] for part in heads]

    wanted = torch.tensor([[0, 1, UNKNOWN], [1, 0, UNKNOWN]])
    found = agreement(Fixed(), torch.zeros(2, 3, 96, 96), wanted)
    assert found == {"name": 1.0, "style": 0.5, "all": 0.5}
    with pytest.raises(UserError, match="one prompt per image, got 2 for 1 images"):
        agreement(Fixed(), torch.zeros(1, 3, 96, 96), wanted)


@pytest.mark.slow
def test_recipe_from_packages_to_measured_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands, with packages of a few squares in place of the artists'."""
    pytest.importorskip("resvg_py")
    shown = {"rocket": "#dd2e44", "octopus": "#55acee", "cat face": "#78b159"}
    rows = [
        {"label": name, "hexcode": f"1F68{i}", "order": i, "group": 0, "subgroup": 0, "tags": ["thing"]}
        for i, name in enumerate(shown)
    ]
    messages = {"groups": [{"order": 0, "key": "objects"}], "subgroups": [{"order": 0, "key": "tool"}]}
    package(tmp_path / "names.tgz", {"en/data.json": rows, "en/messages.json": messages})
    icons = {
        name.replace(" ", "-"): {"body": f'<path fill="{fill}" d="M2 2h12v{4 + 2 * i}H2z"/>'}
        for i, (name, fill) in enumerate(shown.items())
    }
    package(tmp_path / "set.tgz", {"icons.json": {"icons": icons, "width": 16, "height": 16}})
    monkeypatch.setattr(
        Package, "fetch", lambda self, folder: folder / ("names.tgz" if self == sources.NAMES else "set.tgz")
    )
    monkeypatch.setattr(train_tokenizer, "CODEBOOK_ROUNDS", 1)
    out = str(tmp_path / "model")

    def run(module: ModuleType, *options: str) -> str:
        monkeypatch.setattr("sys.argv", [module.__name__, *options, "--pictures", str(tmp_path)])
        module.main()
        return capsys.readouterr().out

    run(train, "--steps", "2", "--out", out)
    assert {path.name for path in Path(out).glob("*.*")} == {
        "model.yaml", "NOTICE.txt", "codebook.safetensors", "generator.safetensors", "tokenizer.safetensors",
        "tokenizer.json", "judge.safetensors", "judge.json",
    }  # fmt: skip
    assert max(path.stat().st_size for path in Path(out).glob("*.safetensors")) <= 16 * 2**20
    monkeypatch.setattr(evaluate, "SHOWN", ("rocket, flat style",))
    table = run(
        evaluate, out, "--images", "2", "--scales", "1", "2", "--kinds", "seen", "--grids", str(tmp_path / "grids")
    )
    assert [line.split()[1] for line in table.splitlines() if line.startswith("seen")] == [
        "the", "through", "none", "cfg", "softcfg",
    ]  # fmt: skip
    assert (tmp_path / "grids" / "shown-softcfg-2.png").is_file()


@pytest.mark.slow
def test_pictures_of_the_packages() -> None:
    made = data.load()
    pictures = {picture.caption: picture for picture in made.pictures}
    assert {"rocket", "octopus", "red apple", "cat face", "flag of japan"} <= set(made.names)
    assert "fruit" in pictures["red apple, flat style"].keywords
    assert pictures["red apple, flat style"].colour == "red"
    assert any(caption.startswith("blue apple, ") for caption in pictures)
    assert (made.pixels[:, 0, 0] > 200).all(1).mean() > 0.9
    prompts = json.loads((Path(__file__).parents[1] / "golden" / "emoji" / "prompts.json").read_text())
    for kind, key in (("seen", "seen"), ("style", "held_out"), ("colour", "held_out_colour")):
        assert prompts[key] == [made.pictures[i].caption for i in evaluate.chosen(made, kind, 100)]
    seen = [made.pictures[i] for i in made.where()]
    assert set(train.EXAMPLES) & {picture.caption for picture in seen} == set(train.EXAMPLES[:-2])
    assert "pink rocket" not in {picture.subject_words for picture in seen}
