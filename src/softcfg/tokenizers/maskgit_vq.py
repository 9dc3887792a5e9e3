"""The MaskGIT-VQGAN tokenizer: a convolutional autoencoder without attention, 16 x 16 tokens at 256 px.

MaskGIT (https://arxiv.org/abs/2202.04200), in the PyTorch form of open-muse that RAR generates for
(https://github.com/bytedance/1d-tokenizer); parameter names are those of the released weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from softcfg.configuration import require_positive
from softcfg.tokenizers.base import Codebook, Tokenizer
from softcfg.tokenizers.convolution import check_levels, check_size

NORM_GROUPS = 32


@dataclass(frozen=True)
class MaskGITVQConfig:
    """Sizes of a `MaskGITVQ`; the defaults are the released ImageNet tokenizer at 256 px.

    Level i works on 1 / 2^i of the resolution with `hidden_channels * channel_mult[i]` channels.
    """

    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    hidden_channels: int = 128
    num_channels: int = 3
    num_res_blocks: int = 2
    resolution: int = 256
    z_channels: int = 256
    codebook_size: int = 1024

    def __post_init__(self) -> None:
        require_positive(
            self, "hidden_channels", "num_channels", "num_res_blocks", "resolution", "z_channels",
            "codebook_size",
        )  # fmt: skip
        check_levels(self, "channel_mult", "hidden_channels", NORM_GROUPS)
        check_size(self, "resolution", self.downsampling)

    @property
    def downsampling(self) -> int:
        """Width of a token in pixels."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def level_channels(self) -> list[int]:
        """Channels of each level, the full resolution first."""
        return [self.hidden_channels * factor for factor in self.channel_mult]


class MaskGITVQ(Tokenizer):
    """MaskGIT-VQGAN: tokens in raster order; decoding needs `decoder` and `quantize` only."""

    def __init__(self, config: MaskGITVQConfig) -> None:
        super().__init__()
        self.config = config
        self.set_size(config.resolution, config.downsampling)
        self.codebook_size = config.codebook_size
        self.num_channels = config.num_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Codebook(config.codebook_size, config.z_channels)

    def encode_latents(self, pixels: Tensor) -> Tensor:
        """Return the latents [B, z_channels, h, w] of pixels [B, 3, H, W] in [0, 1]."""
        # Channels-last order is faster on a CPU, but its group norm there is ten times less accurate.
        return self.encoder(pixels.contiguous())

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Return pixels [B, 3, H, W], nominally in [0, 1], of latents [B, z_channels, h, w]."""
        return self.decoder(latents.contiguous())


class Encoder(nn.Module):
    """Pixels to latents: residual blocks, halving the resolution after each level but the last."""

    def __init__(self, config: MaskGITVQConfig) -> None:
        super().__init__()
        channels = [config.hidden_channels, *config.level_channels]
        first, last, blocks = channels[0], channels[-1], config.num_res_blocks
        self.conv_in = nn.Conv2d(config.num_channels, first, 3, padding=1, bias=False)
        self.down = nn.ModuleList(Level(a, b, blocks) for a, b in pairwise(channels))
        self.mid = residual_blocks(last, last, blocks)
        self.norm_out = group_norm(last)
        self.conv_out = nn.Conv2d(last, config.z_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, colours, H, W] -> [B, z_channels, h, w]."""
        x = self.conv_in(x)
        for i, level in enumerate(self.down):
            x = level(F.avg_pool2d(x, 2) if i else x)
        for block in self.mid:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Latents to pixels; level 0, the full resolution, runs last."""

    def __init__(self, config: MaskGITVQConfig) -> None:
        super().__init__()
        channels = config.level_channels
        first, last, blocks = channels[-1], channels[0], config.num_res_blocks
        self.conv_in = nn.Conv2d(config.z_channels, first, 3, padding=1)
        self.mid = residual_blocks(first, first, blocks)
        self.up = nn.ModuleList(
            Level(a, b, blocks, upsample=i > 0) for i, (b, a) in enumerate(pairwise([*channels, first]))
        )
        self.norm_out = group_norm(last)
        self.conv_out = nn.Conv2d(last, config.num_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, z_channels, h, w] -> [B, colours, H, W]."""
        x = self.conv_in(x)
        for block in self.mid:
            x = block(x)
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Level(nn.Module):
    """The residual blocks of one resolution, and in the decoder the step up to the next."""

    def __init__(self, inputs: int, outputs: int, blocks: int, *, upsample: bool = False) -> None:
        super().__init__()
        self.block = residual_blocks(inputs, outputs, blocks)
        self.upsample_conv = nn.Conv2d(outputs, outputs, 3, padding=1) if upsample else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, h, w] -> [B, outputs, h, w], or twice the size with `upsample`."""
        for block in self.block:
            x = block(x)
        if self.upsample_conv is not None:
            x = self.upsample_conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x


class ResidualBlock(nn.Module):
    """Two normalised convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = group_norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm2 = group_norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.nin_shortcut = nn.Conv2d(outputs, outputs, 1, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, h, w] -> [B, outputs, h, w]."""
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        # Where the widths differ, the released model projects the block's own output and drops its input.
        return y + (x if self.nin_shortcut is None else self.nin_shortcut(y))


def residual_blocks(inputs: int, outputs: int, count: int) -> nn.ModuleList:
    """Return `count` residual blocks, the first of which changes the width."""
    return nn.ModuleList(ResidualBlock(inputs if i == 0 else outputs, outputs) for i in range(count))


def group_norm(channels: int) -> nn.GroupNorm:
    """Return the normalisation used everywhere in the model."""
    return nn.GroupNorm(NORM_GROUPS, channels, eps=1e-6)
