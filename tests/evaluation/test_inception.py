"""The Inception network computes what torch-fidelity's computes, with the resizing of TensorFlow 1."""

from functools import lru_cache

import numpy as np
import pytest
import torch
from torch import Tensor

from goldens import golden
from softcfg.evaluation.inception import InceptionV3, resize_bilinear_tf1

CASE = "inception/golden-features"


@lru_cache(maxsize=1)
def weights() -> dict[str, Tensor]:
    return golden(CASE).weights()


def network(dtype: torch.dtype) -> InceptionV3:
    module = InceptionV3()
    module.load_state_dict(weights())
    return module.to(dtype).eval()


def test_names_and_shapes_are_the_published_ones() -> None:
    with torch.device("meta"):
        found = {name: list(tensor.shape) for name, tensor in InceptionV3().state_dict().items()}
    assert found == golden(CASE).about["tensors"]


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)])
def test_features(dtype: torch.dtype) -> None:
    arrays = golden(CASE).arrays
    module = network(dtype)
    for size in ("64x64", "136x200"):
        with torch.inference_mode():
            features = module(arrays[f"images_{size}"])
        expected = {
            "pooled": arrays[f"pool_{size}"],
            "spatial": arrays[f"spatial_{size}"].permute(0, 2, 3, 1).flatten(1),
            "logits": arrays[f"logits_unbiased_{size}"],
        }
        assert features.pooled.dtype == dtype
        for name, values in features.tensors().items():
            error = (values - expected[name]).abs().max() / expected[name].abs().max()
            assert error < 1e-5, (name, size)


def resized(image: np.ndarray, size: int) -> np.ndarray:
    """One pixel after the other, in float32."""
    height, width, _ = image.shape
    result = np.zeros((size, size, 3), dtype=np.float32)
    steps = np.float32(height / size), np.float32(width / size)
    for i in range(size):
        for j in range(size):
            y, x = np.float32(i) * steps[0], np.float32(j) * steps[1]
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            down, across = y - np.float32(top), x - np.float32(left)
            upper = image[top, left] + (image[top, right] - image[top, left]) * across
            lower = image[bottom, left] + (image[bottom, right] - image[bottom, left]) * across
            result[i, j] = upper + (lower - upper) * down
    return result


@pytest.mark.parametrize(("height", "width"), [(5, 9), (23, 23), (40, 31), (1, 2)])
def test_resizing_pixel_by_pixel(height: int, width: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.float32)
    ours = resize_bilinear_tf1(torch.from_numpy(image).permute(2, 0, 1)[None], 23)[0].permute(1, 2, 0)
    np.testing.assert_array_equal(ours.numpy(), resized(image, 23))


def test_resizing_to_the_same_size_changes_nothing() -> None:
    images = torch.rand(2, 3, 299, 299)
    assert torch.equal(resize_bilinear_tf1(images), images)
