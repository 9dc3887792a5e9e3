"""Parts that the convolutional tokenizers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def check_levels(config: Any, factors: str, channels: str, groups: str | int) -> None:
    """Raise `ValueError` unless the widths of a convolutional network can be built.

    Args:
        factors: the field that lists the width of each level as a multiple of `channels`.
        groups: of the norms, or the field that says how many.
    """
    if not getattr(config, factors) or min(getattr(config, factors)) < 1:
        raise ValueError(f"{factors} must list numbers greater than 0, got {list(getattr(config, factors))}")
    count, name = (groups, "") if isinstance(groups, int) else (getattr(config, groups), f"{groups} ")
    if getattr(config, channels) % count:
        raise ValueError(f"{channels} {getattr(config, channels)} must be a multiple of {name}{count}")


def check_size(config: Any, size: str, patch_size: int) -> None:
    """Raise `ValueError` unless images of the field `size` are a whole number of codes wide."""
    if getattr(config, size) % patch_size:
        raise ValueError(
            f"{size} {getattr(config, size)} must be a multiple of {patch_size}: every level after the first halves it"
        )


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


class ResidualBlock(nn.Module):
    """Two normalised convolutions and a shortcut; `codes` goes to the norms, where they take it."""

    def __init__(self, inputs: int, outputs: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm1 = norm(inputs)
        self.conv1 = conv(inputs, outputs)
        self.norm2 = norm(outputs)
        self.conv2 = conv(outputs, outputs)
        self.nin_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor, *codes: Tensor) -> Tensor:
        """[B, inputs, h, w] -> [B, outputs, h, w]."""
        y = self.conv1(F.silu(self.norm1(x, *codes)))
        y = self.conv2(F.silu(self.norm2(y, *codes)))
        return y + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class AttentionBlock(nn.Module):
    """Normalised self-attention of all pixels to all, with one head, and a shortcut."""

    def __init__(self, channels: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor, *codes: Tensor) -> Tensor:
        """[B, channels, h, w] -> the same shape."""
        y = self.norm(x, *codes)
        return x + self.proj_out(pixel_attention(self.q(y), self.k(y), self.v(y)))
