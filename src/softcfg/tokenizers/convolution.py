"""Parts that the convolutional tokenizers share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
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


def level_channels(config: Any) -> list[int]:
    """Channels of each level of a `LlamaGenVQ` or `MoVQ`, the full resolution first."""
    return [config.ch * factor for factor in config.ch_mult]


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


@dataclass(frozen=True)
class PartNames:
    """What released weights call the parts of an `Encoder` and a `Decoder`.

    Attributes:
        levels: those of the encoder, and those of the decoder.
        blocks: the residual blocks of a level.
        middle: the three blocks at the lowest resolution.
        lowest_first: whether the decoder's level 0 is the lowest resolution, rather than the full one.
    """

    levels: tuple[str, str]
    blocks: str
    middle: tuple[str, str, str]
    lowest_first: bool = False


class Encoder(nn.Module):
    """Pixels to latents; level 0 is the full resolution.

    Args:
        config: of a `LlamaGenVQ` or `MoVQ`.
        norm: makes the norm of a number of channels.
    """

    def __init__(self, config: Any, norm: Callable[[int], nn.Module], names: PartNames) -> None:
        super().__init__()
        channels = [config.ch, *level_channels(config)]
        last, blocks = len(config.ch_mult) - 1, config.num_res_blocks
        self.conv_in = conv(3, config.ch)
        self._levels = names.levels[0]
        levels = [
            Level(a, b, blocks, norm, names.blocks, attention=config.has_attention(i), downsample=i != last)
            for i, (a, b) in enumerate(pairwise(channels))
        ]
        self.add_module(self._levels, nn.ModuleList(levels))
        self.mid = middle(channels[-1], norm, names)
        self.norm_out = norm(channels[-1])
        self.conv_out = conv(channels[-1], config.z_channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> [B, z_channels, h, w]."""
        x = self.conv_in(x)
        for level in getattr(self, self._levels):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latents to pixels, from the lowest resolution to the full one; arguments as those of `Encoder`."""

    def __init__(self, config: Any, norm: Callable[[int], nn.Module], names: PartNames) -> None:
        super().__init__()
        channels, blocks = level_channels(config), config.num_res_blocks + 1
        self.conv_in = conv(config.z_channels, channels[-1])
        self.mid = middle(channels[-1], norm, names)
        self._levels, self._lowest_first = names.levels[1], names.lowest_first
        pairs = list(enumerate(pairwise([*channels, channels[-1]])))
        levels = [
            Level(b, a, blocks, norm, names.blocks, attention=config.has_attention(i), upsample=i > 0)
            for i, (a, b) in (reversed(pairs) if self._lowest_first else pairs)
        ]
        self.add_module(self._levels, nn.ModuleList(levels))
        self.norm_out = norm(channels[0])
        self.conv_out = conv(channels[0], 3)

    def forward(self, x: Tensor, *codes: Tensor) -> Tensor:
        """[B, z_channels, h, w], and codes that the norms take -> [B, 3, H, W], nominally in [-1, 1]."""
        x = self.mid(self.conv_in(x), *codes)
        levels = getattr(self, self._levels)
        for level in levels if self._lowest_first else reversed(levels):
            x = level(x, *codes)
        return self.conv_out(F.silu(self.norm_out(x, *codes)))


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention if there is any, and the step to the next."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        count: int,
        norm: Callable[[int], nn.Module],
        blocks: str,
        *,
        attention: bool,
        downsample: bool = False,
        upsample: bool = False,
    ) -> None:
        super().__init__()
        self._blocks = blocks
        self.add_module(
            blocks, nn.ModuleList(ResidualBlock(outputs if i else inputs, outputs, norm) for i in range(count))
        )
        self.attn = nn.ModuleList(AttentionBlock(outputs, norm) for _ in range(count if attention else 0))
        self.downsample = Downsample(outputs) if downsample else None
        self.upsample = Upsample(outputs) if upsample else None

    def forward(self, x: Tensor, *codes: Tensor) -> Tensor:
        """[B, inputs, h, w] -> [B, outputs, h, w], or half or twice the size after a step."""
        for i, block in enumerate(getattr(self, self._blocks)):
            x = block(x, *codes)
            if self.attn:
                x = self.attn[i](x, *codes)
        for step in (self.downsample, self.upsample):
            x = x if step is None else step(x)
        return x


class Chain(nn.ModuleDict):
    """Named blocks that run one after the other."""

    def forward(self, x: Tensor, *codes: Tensor) -> Tensor:
        """[B, channels, h, w] -> the same shape."""
        for block in self.values():
            x = block(x, *codes)
        return x


def middle(channels: int, norm: Callable[[int], nn.Module], names: PartNames) -> Chain:
    """Return the blocks at the lowest resolution, between levels and latents."""
    first, attention, last = names.middle
    return Chain(
        {
            first: ResidualBlock(channels, channels, norm),
            attention: AttentionBlock(channels, norm),
            last: ResidualBlock(channels, channels, norm),
        }
    )
