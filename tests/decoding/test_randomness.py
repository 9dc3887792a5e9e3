from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from softcfg import UserError
from softcfg.decoding import image_uniforms
from softcfg.decoding.randomness import image_indices

FROZEN = [0.011546754286331562, 0.24154919656271812, 0.11142585551493822]  # the first numbers of image 0 of seed 0


def test_an_images_numbers_depend_on_its_seed_and_index_alone() -> None:
    together = image_uniforms(7, range(10), 50)
    alone = image_uniforms(7, [4], 50)
    assert torch.equal(together[4], alone[0])
    assert torch.equal(image_uniforms(7, [4], 20)[0], alone[0, :20])
    assert not torch.equal(image_uniforms(8, [4], 50), alone)


def test_the_stream_is_frozen() -> None:
    # NumPy freezes the raw words of Philox-4x64 for a key; a change here would change every sample ever drawn.
    words = np.random.Philox(key=np.array([42, 3], dtype=np.uint64)).random_raw(2)
    expected = [(int(word) >> 11) / 2**53 for word in words]
    assert image_uniforms(42, [3], 2).tolist() == [expected]
    assert image_uniforms(0, [0], 3)[0].tolist() == pytest.approx(FROZEN, abs=0)


def test_numbers_are_uniform_and_independent_over_images() -> None:
    numbers = image_uniforms(1, range(200), 100).numpy()
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert stats.kstest(numbers.ravel(), "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1]) < 0.03


@pytest.mark.parametrize(("seed", "index"), [(-1, 0), (2**64, 0), (0, -1), (0, 2**64)])
def test_seeds_and_indices_out_of_range(seed: int, index: int) -> None:
    with pytest.raises(UserError, match=r"2\^64-1"):
        image_uniforms(seed, [index], 1)


@pytest.mark.parametrize(
    "given",
    [
        [4, 2**63 - 1], (4, 2**63 - 1), np.array([4, 2**63 - 1]), torch.tensor([4, 2**63 - 1]),
        [torch.tensor(4), np.uint64(2**63 - 1)], np.array([4, 2**63 - 1], dtype=np.uint64),
    ],
)  # fmt: skip
def test_indices_are_whole_numbers_in_anything_like_a_list(given: Any) -> None:
    found = image_indices(given, 2, "labels")
    assert found == [4, 2**63 - 1]
    assert all(type(index) is int for index in found)


def test_indices_are_those_from_0_on_where_none_are_given() -> None:
    assert image_indices(None, 3, "labels") == image_indices(range(3), 3, "labels") == [0, 1, 2]


@pytest.mark.parametrize("given", [{4, 9}, {4: 9}, "49", 5, torch.tensor(5), [[4], [9]], torch.zeros(2, 1).long()])
def test_indices_are_a_list(given: Any) -> None:
    with pytest.raises(UserError, match="indices must be a list, got"):
        image_indices(given, 2, "labels")


@pytest.mark.parametrize("given", [[4, None], [4, True], [4, 9.0], [4, -1], [4, 2**64], ["4", "9"], torch.ones(2)])
def test_indices_out_of_range(given: Any) -> None:
    with pytest.raises(UserError, match=r"image index must be a whole number in 0\.\.2\^64-1, got"):
        image_indices(given, 2, "labels")


def test_the_largest_seed_and_index() -> None:
    assert image_uniforms(2**64 - 1, [2**64 - 1], 4).shape == (1, 4)
