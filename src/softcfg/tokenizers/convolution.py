"""Parts that the convolutional tokenizers share."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def conv(inputs: int, outputs: int) -> nn.Conv2d:
    """Return a convolution that keeps the size."""
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class Downsample(nn.Module):
    """Half the size."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, h, w] -> [B, channels, h / 2, w / 2]."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # on the right and at the bottom only


class Upsample(nn.Module):
    """Twice the size."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, h, w] -> [B, channels, 2 h, 2 w]."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def pixel_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of all pixels to all, with one head: three of [B, channels, h, w] -> the same shape."""
    q, k, v = (tensor.flatten(2).transpose(1, 2)[:, None] for tensor in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).unflatten(2, query.shape[2:])
