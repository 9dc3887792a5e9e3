import numpy as np
import pytest
import torch
from scipy import stats

from softcfg import UserError
from softcfg.decoding import image_uniforms

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


def test_the_largest_seed_and_index() -> None:
    assert image_uniforms(2**64 - 1, [2**64 - 1], 4).shape == (1, 4)
