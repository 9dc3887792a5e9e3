"""The small extractor with which the ADM evaluator was driven for the golden files."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from softcfg.evaluation import Extractor, Features


def describe(pixels: Tensor) -> Features:
    """uint8 `[B, 3, H, W]`: mean over 4 x 4 blocks; 7 of each block's pixels, the channel running fastest."""
    images = pixels.permute(0, 2, 3, 1).float()
    count, height, width, _ = images.shape
    cells = images.reshape(count, height // 4, 4, width // 4, 4, 3)
    pooled = cells.mean(dim=(2, 4)).flatten(1) / 32
    # Of cell (i, j), channel m: pixel [4i, 4j + m // 3], colour m % 3.
    spatial = cells[:, :, 0].flatten(3)[..., :7].flatten(1) / 64
    return Features(pooled, spatial, logits=pooled * 3)


def extractor(identity: str = "stand-in of the golden files") -> Extractor:
    return Extractor("stand-in", describe, identity)


def factory(weights: Path | None, device: torch.device, dtype: torch.dtype) -> Extractor:
    return extractor(str(weights))


class Counting:
    """An extractor that counts the batches it describes."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, pixels: Tensor) -> Features:
        self.batches.append(len(pixels))
        return describe(pixels)

    def __iter__(self) -> Iterator[int]:
        return iter(self.batches)
