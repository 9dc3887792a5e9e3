"""The training recipe of the bundled model: reading the data, and trainings that survive a kill."""

from __future__ import annotations

import gzip
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from recipes import codebook, muon, training
from recipes.fashion_mnist import (
    data,
    evaluate,
    train,
    train_classifier,
    train_generator,
    train_tokenizer,
)
from softcfg import CFG, Pipeline
from softcfg.errors import UserError
from softcfg.tokenizers.maskgit_vq import MaskGITVQ


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with 130 training images (gzipped) and 12 test images (plain)."""
    numbers = np.random.default_rng(0)
    for name, count in (("train", 130), ("t10k", 12)):
        images = numbers.integers(0, 256, (count, 28, 28))
        images[:, :6] = 0
        files = {f"{name}-images-idx3-ubyte": idx(images), f"{name}-labels-idx1-ubyte": idx(np.arange(count) % 10)}
        for file, content in files.items():
            if name == "train":
                (tmp_path / f"{file}.gz").write_bytes(gzip.compress(content))
            else:
                (tmp_path / file).write_bytes(content)
    return tmp_path


@pytest.fixture
def splits(folder: Path) -> tuple[data.Split, data.Split]:
    train_split = data.load(folder, "train")
    return data.Split(train_split.images[:24], train_split.labels[:24]), data.load(folder, "test")


class TestData:
    def test_images_are_padded_to_32_pixels(self, folder):
        split = data.load(folder, "train")
        raw = data.read_idx(folder / "train-images-idx3-ubyte.gz")
        assert len(split) == 130
        assert split.images.shape == (130, 32, 32)
        assert np.array_equal(split.images[:, 2:30, 2:30], raw)
        assert split.images.sum() == raw.sum()  # nothing but zeros around
        assert split.labels.tolist()[:11] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0]

    def test_pixels_are_gray_in_three_channels(self, folder):
        split = data.load(folder, "test")
        pixels = split.pixels(torch.tensor([3, 1]))
        assert pixels.shape == (2, 3, 32, 32)
        assert pixels.dtype == torch.float32
        for channel in pixels.unbind(1):
            assert torch.equal((channel * 255).round().byte(), split.images[[3, 1]])

    def test_missing_file_says_what_to_do(self, tmp_path):
        with pytest.raises(UserError, match=r"no train-images-idx3-ubyte.*dataset-fashion-mnist.*--data"):
            data.load(tmp_path, "train")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"not an idx file", "not an IDX file"),
            (idx(np.zeros((3, 28, 28)))[:-1], "its header says"),
            (idx(np.zeros((3, 14, 14))), "expected N images of 28x28"),
            (b"", "not an IDX file"),
            (b"\0\0\x08\x03\0\0", "ends within its header"),
        ],
    )
    def test_damaged_images_are_refused(self, folder, content, message):
        (folder / "t10k-images-idx3-ubyte").write_bytes(content)
        with pytest.raises(UserError, match=message):
            data.load(folder, "test")

    def test_damaged_gzip_is_refused(self, folder):
        path = folder / "train-images-idx3-ubyte.gz"
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(UserError, match="gzip"):
            data.load(folder, "train")


TINY_TOKENIZER = train_tokenizer.MaskGITVQConfig(
    channel_mult=(1, 1), hidden_channels=32, num_res_blocks=1, resolution=32, z_channels=4, codebook_size=8
)
TINY_GENERATOR = train_generator.AliTokConfig(
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    codebook_size=8,
    condition_num_classes=10,
    image_seq_len=256,
    grid_size=16,
    prefix_tokens=0,
)


def train_classifier_tiny(out, budget, data, test, **arguments):
    return train_classifier.train(out, budget, data, test, batch_size=8, **arguments)


def train_tokenizer_tiny(out, budget, data, test, **arguments):
    return train_tokenizer.train(
        out, budget, data, test, config=TINY_TOKENIZER, continuous_steps=1, batch_size=4, **arguments
    )


def train_generator_tiny(out, budget, data, test, **arguments):
    numbers = torch.Generator().manual_seed(0)
    tokens = [
        train_generator.Tokens(torch.randint(8, (len(s), 256), generator=numbers), s.labels) for s in (data, test)
    ]
    return train_generator.train_on_tokens(out, budget, *tokens, config=TINY_GENERATOR, batch_size=8, **arguments)


@pytest.mark.parametrize("part", [train_classifier_tiny, train_tokenizer_tiny, train_generator_tiny])
def test_killed_training_continues_to_the_same_weights(part, tmp_path, splits):
    """Five steps cross an epoch; the kill comes after the second."""
    budget = training.Budget(steps=5)
    whole = load_file(part(tmp_path / "whole", budget, *splits))
    part(tmp_path / "parts", budget, *splits, stop_at=2)
    (state,) = (tmp_path / "parts").glob("*/state.pt")
    assert torch.load(state, weights_only=True)["step"] == 2
    second = load_file(part(tmp_path / "parts", budget, *splits))
    assert whole.keys() == second.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, second[name]), name


def test_a_training_goes_on_with_its_own_seed_and_model_alone(tmp_path, splits):
    train_generator_tiny(tmp_path, training.Budget(steps=2), *splits)
    with pytest.raises(UserError, match="holds a training of seed 0: go on with it, or give another folder"):
        train_generator_tiny(tmp_path, training.Budget(steps=2, seed=7), *splits)
    state = tmp_path / "generator" / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"state\.pt is damaged or of another model"):
        train_generator_tiny(tmp_path, training.Budget(steps=2), *splits)


def test_tokens_are_of_the_tokenizer_and_the_images(tmp_path, splits):
    """Whatever the times of the files say."""
    found = []
    for seed, split in ((0, splits[0]), (1, splits[0]), (1, splits[1])):
        torch.manual_seed(seed)
        tokenizer = MaskGITVQ(TINY_TOKENIZER).eval()
        path = tmp_path / "tokenizer.safetensors"
        training.save_weights(path, tokenizer.state_dict())
        os.utime(path, (0, 0))
        found.append(train_generator.tokenise(split, tokenizer, path))
        assert torch.equal(found[-1], tokenizer.encode(split.pixels(torch.arange(len(split)))))
        assert torch.equal(found[-1], train_generator.tokenise(split, tokenizer, path))
    kept = list(tmp_path.glob("tokens-*"))
    assert len(kept) == 3
    for each in kept:
        content = bytearray(each.read_bytes())
        content[-1] ^= 1
        each.write_bytes(content)
    assert torch.equal(found[-1], train_generator.tokenise(split, tokenizer, path))


@pytest.mark.parametrize("words", [["--minutes", "0"], ["--steps", "-3"], ["--steps", "0"], ["--minutes", "inf"]])
def test_no_time_to_train_is_refused(words, folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", str(folder), *words])
    with pytest.raises(SystemExit) as end:
        train.main()
    assert end.value.code == 2
    assert "must be above 0" in capsys.readouterr().err


def test_a_generator_without_its_tokenizer_is_one_sentence(folder, tmp_path, monkeypatch, capsys):
    words = ["--out", str(tmp_path / "run"), "--steps", "1", "--only", "generator"]
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", str(folder), *words])
    with pytest.raises(SystemExit) as end:
        train.main()
    assert end.value.code == 2
    assert "tokenizer.safetensors" in capsys.readouterr().err


def test_finished_training_changes_nothing(tmp_path, splits):
    budget = training.Budget(steps=2)
    first = load_file(train_generator_tiny(tmp_path, budget, *splits))
    again = load_file(train_generator_tiny(tmp_path, budget, *splits))
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())


def test_log_has_losses_of_both_conditions(tmp_path, splits):
    train_generator_tiny(tmp_path, training.Budget(steps=2), *splits)
    rows = [json.loads(line) for line in (tmp_path / "generator" / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["done"]
    # An untrained generator is uniform over 8 codes: two small steps cannot move it far from log 8.
    assert rows[-1]["test_conditional"] == pytest.approx(np.log(8), abs=0.3)
    assert rows[-1]["test_unconditional"] == pytest.approx(np.log(8), abs=0.3)


def test_generator_learns(tmp_path, splits):
    """Images of one code each: after the first token the next is known, and the classes name the first."""
    tokens = [train_generator.Tokens((s.labels % 8)[:, None].repeat(1, 256), s.labels) for s in splits]
    weights = train_generator.train_on_tokens(
        tmp_path, training.Budget(steps=40), *tokens, config=TINY_GENERATOR, batch_size=8
    )
    model = train_generator.AliTok(TINY_GENERATOR)
    model.load_state_dict(load_file(weights))
    labels, test = splits[1].labels, tokens[1].tokens
    with torch.inference_mode():
        assert train_generator.nats_per_token(model, test, labels) < np.log(8) - 0.1
        first = model(model.class_condition(labels), test[:, :0])[:, 0].softmax(-1)
    right = first.gather(1, test[:, :1]).mean()
    assert right > first.gather(1, (test[:, :1] + 1) % 8).mean()


class TestTokenizer:
    def test_black_patches_have_the_zero_code(self, tmp_path, splits):
        weights = load_file(train_tokenizer_tiny(tmp_path, training.Budget(steps=4), *splits))
        assert not weights["quantize.embedding.weight"][0].any()
        assert weights["quantize.embedding.weight"][1:].any(1).all()

    def test_kmeans_finds_separate_clusters(self):
        numbers = torch.Generator().manual_seed(1)
        centres = torch.tensor([[4.0, 0.0], [0.0, 4.0], [-4.0, 0.0]])
        latents = centres.repeat(50, 1) + 0.1 * torch.randn(150, 2, generator=numbers)
        table = torch.nn.Embedding(4, 2).requires_grad_(False)
        codebook.MovingCodebook(table).initialise(latents, numbers)
        assert torch.cdist(centres, table.weight).amin(1).max() < 0.1
        assert not table.weight[0].any()

    def test_unused_codes_restart_at_latents(self):
        numbers = torch.Generator().manual_seed(2)
        table = torch.nn.Embedding(4, 2).requires_grad_(False)
        moving = codebook.MovingCodebook(table, decay=0.5)
        latents = torch.randn(64, 2, generator=numbers)
        moving.initialise(latents, numbers)
        table.weight[2] = 100.0
        moving.sums[1], moving.counts[1] = 100.0, 1e-3
        tokens = torch.cdist(latents, table.weight).argmin(1)
        moving.update(latents, tokens, numbers)
        assert torch.cdist(table.weight[2:3], latents).min() == 0

    def test_haar_keeps_the_energy_of_a_patch(self):
        pixels = torch.rand(2, 1, 32, 32).expand(-1, 3, -1, -1)
        coefficients = train_tokenizer.haar(pixels, 2)
        assert coefficients.shape == (2, 4, 16, 16)
        energy = pixels[:, 0].square().unflatten(1, (16, 2)).unflatten(3, (16, 2)).sum((2, 4))
        torch.testing.assert_close(coefficients.square().sum(1), energy)

    def test_haar_of_larger_patches_is_that_of_their_quadrants(self):
        quadrants = torch.rand(2, 1, 16, 16)
        pixels = quadrants.repeat_interleave(2, 2).repeat_interleave(2, 3).expand(-1, 3, -1, -1)
        small = train_tokenizer.haar(quadrants.expand(-1, 3, -1, -1), 2)
        torch.testing.assert_close(train_tokenizer.haar(pixels, 4), small)


def test_muon_update_is_nearly_orthogonal():
    for shape in ((24, 8), (8, 24), (16, 16)):
        update = muon.orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(3)), rounds=8)
        assert update.shape == shape
        values = torch.linalg.svdvals(update)
        assert values.min() > 0.6
        assert values.max() < 1.3


def test_epochs_are_shuffled_and_complete():
    epochs = [torch.cat([training.batch_index(0, 3 * e + i, 4, 12) for i in range(3)]) for e in range(2)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(12))
    assert not torch.equal(*epochs)
    with pytest.raises(UserError, match="larger than the data"):
        training.batch_index(0, 0, 13, 12)


def test_budget_follows_the_clock_or_the_steps():
    assert training.Budget(minutes=2).progress(5, 30.0) == pytest.approx(0.25)
    assert training.Budget(minutes=2).progress(5, 999.0) == 1.0
    assert training.Budget(minutes=2, steps=10).progress(5, 999.0) == 0.5


def test_rate_warms_up_and_decays_to_zero():
    plan = training.Plan(warmup_steps=10, decay_share=0.5)
    assert [plan.factor(step, 0.1) for step in (0, 4, 20)] == pytest.approx([0.1, 0.5, 1.0])
    assert [plan.factor(100, progress) for progress in (0.5, 0.75, 1.0)] == pytest.approx([1.0, 0.5, 0.0])


def test_average_follows_the_weights():
    module = torch.nn.BatchNorm1d(2)
    average = training.Average(module, 0.5)
    with torch.no_grad():
        module.weight.fill_(3.0)
    for step in range(200):
        average.update(step)
    assert average.weights()["weight"].tolist() == pytest.approx([3.0, 3.0])
    assert average.weights().keys() == module.state_dict().keys()


def test_frechet_distance_of_shifted_and_scaled_features():
    numbers = np.random.default_rng(4)
    first = numbers.normal(size=(4000, 3))
    assert evaluate.frechet_distance(first, first) == pytest.approx(0, abs=1e-6)
    # The squared distance of N(0, 1) and N(2, 3^2) in each of three dimensions is 2^2 + (3 - 1)^2.
    assert evaluate.frechet_distance(first, 3 * first + 2) == pytest.approx(3 * 8, rel=0.05)


@pytest.mark.parametrize(("preset", "tokens"), [("fashion", 256), ("fashion-small", 64)])
def test_recipe_makes_a_model_folder_that_the_pipeline_opens(preset, tokens, folder, tmp_path, monkeypatch):
    out = tmp_path / "run"
    command = ["train.py", "--data", str(folder), "--out", str(out), "--preset", preset, "--steps", "1"]
    monkeypatch.setattr(sys, "argv", command)
    train.main()
    pipeline = Pipeline.from_pretrained(out)
    assert pipeline.name == preset
    assert pipeline.classes == data.CLASSES
    drawn = pipeline([3], CFG(guidance_scale=1.0))
    assert drawn.tokens.shape == (1, tokens)
    assert drawn.pixels.shape == (1, 32, 32, 3)


def test_one_part_alone_makes_no_model_folder_yet(folder, tmp_path, monkeypatch):
    out = tmp_path / "run"
    command = ["train.py", "--data", str(folder), "--out", str(out), "--steps", "1", "--only", "tokenizer"]
    monkeypatch.setattr(sys, "argv", command)
    train.main()
    assert sorted(path.name for path in out.iterdir()) == ["tokenizer", "tokenizer.safetensors"]


def test_wrong_data_folder_ends_with_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        train.main()
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("train.py: no train-images-idx3-ubyte")
