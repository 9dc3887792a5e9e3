"""The judge of emoji looks at an image in several views."""

import pytest
import torch

from softcfg.evaluation import load_extractor
from softcfg.evaluation.emoji_judge import VIEWS, EmojiJudge, View, look, seen_in


@pytest.fixture(scope="module")
def judge() -> EmojiJudge:
    torch.manual_seed(0)
    return EmojiJudge(7, 3, 4).eval()


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))


def test_a_turn_goes_to_the_right_and_what_comes_in_is_white(pixels: torch.Tensor) -> None:
    torch.testing.assert_close(seen_in(View(turn=90.0), pixels), torch.rot90(pixels, -1, (2, 3)), rtol=0, atol=1e-4)
    torch.testing.assert_close(seen_in(View(), pixels), pixels, rtol=0, atol=1e-5)
    smaller = seen_in(View(scale=0.5), pixels)
    assert (smaller[..., :23, :] == 1).all()
    assert (smaller[..., :23] == 1).all()
    assert (smaller[..., 25:71, 25:71] < 1).all()
    # Twice as large, its middle stays: pixels lie half way between those that were there.
    larger = seen_in(View(scale=2.0), torch.linspace(0, 1, 96).expand(1, 3, 96, 96))
    torch.testing.assert_close(larger[0, 0, 50], (torch.arange(96) + 47.5) / 2 / 95, rtol=0, atol=1e-4)


@torch.inference_mode()
def test_what_counts_is_the_mean_probability_of_the_views(judge: EmojiJudge, pixels: torch.Tensor) -> None:
    features, found = judge(pixels)
    torch.testing.assert_close(features, judge.features(pixels))
    assert VIEWS[0] == View()
    every = [judge.describe(seen_in(view, pixels))[1] for view in VIEWS]
    for head, logits in enumerate(found):
        mean = torch.stack([each[head].double().softmax(1) for each in every]).mean(0)
        torch.testing.assert_close(logits.double().exp(), mean, rtol=1e-4, atol=1e-6)


def test_looking_once_is_the_image_as_it_is(judge: EmojiJudge, pixels: torch.Tensor) -> None:
    features, seen = look(judge, pixels, batch_size=1, views=VIEWS[:1])
    with torch.inference_mode():
        expected, logits = judge.describe(pixels)
    torch.testing.assert_close(features, expected)
    assert seen.tolist() == torch.stack([head.argmax(1) for head in logits], 1).tolist()


@torch.inference_mode()
def test_the_extractor_looks_from_all_sides_and_keeps_its_answers_apart() -> None:
    extractor = load_extractor("emoji")
    pixels = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    found = extractor.describe(pixels)
    assert found.logits is not None
    assert found.answers is not None
    torch.testing.assert_close(found.logits.exp().sum(1), torch.ones(2))  # mean probabilities
    assert found.answers[:, 0].tolist() == found.logits.argmax(1).tolist()
    assert extractor.identity.endswith(f", {len(VIEWS)} views")  # not those of a judge that looked otherwise
