"""A small classifier of Fashion-MNIST images: class accuracy and features for images of the bundled model."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SmallNetwork(nn.Module):
    """Convolutions over images of one size; their means are the features.

    Attributes:
        image_size: H and W.
        num_features: channels of the last convolution.
    """

    image_size: int
    num_features: int
    blocks: nn.Sequential

    def features(self, pixels: Tensor) -> Tensor:
        """Describe images.

        Args:
            pixels: float `[B, 3, H, W]` in [0, 1].

        Returns:
            float `[B, num_features]`, the channel means of the last convolution.

        Raises:
            ValueError: the images have another shape.
        """
        return self.blocks(self.scaled(pixels)).mean(dim=(2, 3))

    def scaled(self, pixels: Tensor) -> Tensor:
        """Return the input of the first convolution: the pixels as they are, of the shape that `features` takes."""
        if pixels.ndim != 4 or pixels.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(f"images must be [B, 3, {self.image_size}, {self.image_size}], got {list(pixels.shape)}")
        return pixels


class FashionClassifier(SmallNetwork):
    """Four 3x3 convolutions and a linear layer (241k parameters) over 32x32 images."""

    image_size = 32
    num_classes = 10
    num_features = 128

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            conv_block(3, 32, stride=2),  # 16x16
            conv_block(32, 64, stride=2),  # 8x8
            conv_block(64, 128),
            conv_block(128, self.num_features, stride=2),  # 4x4
        )
        self.head = nn.Linear(self.num_features, self.num_classes)

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


def conv_block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """A 3x3 convolution without bias, batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )
