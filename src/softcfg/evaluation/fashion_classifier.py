"""A small classifier of Fashion-MNIST images: class accuracy and features for images of the bundled model."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FashionClassifier(nn.Module):
    """Four 3x3 convolutions and a linear layer (241k parameters) over 32x32 images."""

    image_size = 32
    num_classes = 10
    num_features = 128

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            _block(3, 32, stride=2),  # 16x16
            _block(32, 64, stride=2),  # 8x8
            _block(64, 128),
            _block(128, self.num_features, stride=2),  # 4x4
        )
        self.head = nn.Linear(self.num_features, self.num_classes)

    def features(self, pixels: Tensor) -> Tensor:
        """Describe images.

        Args:
            pixels: float `[B, 3, 32, 32]` in [0, 1].

        Returns:
            float `[B, 128]`, the channel means of the last convolution.

        Raises:
            ValueError: the images have another shape.
        """
        if pixels.ndim != 4 or pixels.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(f"images must be [B, 3, 32, 32], got {list(pixels.shape)}")
        return self.blocks(pixels).mean(dim=(2, 3))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits `[B, 10]` for images `[B, 3, 32, 32]` in [0, 1]."""
        return self.head(self.features(pixels))

    @torch.inference_mode()
    def accuracy(self, pixels: Tensor, labels: Tensor, batch_size: int = 500) -> float:
        """Return the share of images whose predicted class is their label."""
        hits = sum(
            int((self(part).argmax(dim=1) == target.to(part.device)).sum())
            for part, target in zip(pixels.split(batch_size), labels.split(batch_size), strict=True)
        )
        return hits / len(labels)


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )
